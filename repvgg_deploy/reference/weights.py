"""Lazy tensors → the float32 tensors of a state dict, checked: no overlap, no integers, no NaN, no infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..errors import CheckpointError
from .lazy_tensor import LazyTensor, MalformedError
from .structure import Shapes

_CHUNK = 1 << 20
_COUNTER = ".num_batches_tracked"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def load_weights(tensors: Mapping[str, LazyTensor], expected: Shapes, *, transpose_classifier: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Loads what `expected` names, in its order.

    Args:
        tensors: By official name; complete but for BatchNorm's step counters.
        expected: Shape by name.
        transpose_classifier: `linear.weight` is stored as (features, classes), as PaddlePaddle does.

    Returns:
        float32 tensors (counters int64) that are views of the mapped file where the file holds float32, and notes on what was converted.

    Raises:
        CheckpointError: A weight is no real number, or NaN or infinite, or tensors share memory.
    """
    chosen = {name: tensors[name] for name in expected if name in tensors}
    _check_overlap(chosen)
    state: dict[str, torch.Tensor] = {}
    converted: dict[torch.dtype, int] = {}
    for name in expected:
        if name.endswith(_COUNTER):
            state[name] = _load_counter(name, chosen.get(name))
            continue
        lazy = chosen[name]
        if lazy.dtype not in _FLOATS:
            raise CheckpointError(f"{name} has the dtype {_dtype_name(lazy.dtype)}, expected float32 (or float16, bfloat16, float64)",
                                  remedy="give the checkpoint before quantization, with floating-point weights")  # fmt: skip
        if lazy.dtype != torch.float32:
            converted[lazy.dtype] = converted.get(lazy.dtype, 0) + 1
        tensor = _load(name, lazy).to(torch.float32)
        state[name] = _plain_strides(tensor.t() if transpose_classifier and name == "linear.weight" else tensor)
        _check_numbers(name, state[name])
    return state, [f"{count} tensors were converted from {_dtype_name(dtype)} to float32" for dtype, count in converted.items()]


def _plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """Row-major. A 1×1 kernel saved as channels_last is contiguous either way; its strides alone would choose another algorithm."""
    return tensor.contiguous().flatten().view(tensor.shape)


def _load(name: str, lazy: LazyTensor) -> torch.Tensor:
    try:
        return lazy.load()
    except MalformedError as error:
        raise CheckpointError(f"{name} cannot be read: {error}", remedy="download the checkpoint again and compare its sha256") from error


def _load_counter(name: str, lazy: LazyTensor | None) -> torch.Tensor:
    """BatchNorm's step counter, int64 (). Old files and PaddlePaddle have none; inference never looks at it."""
    if lazy is None or lazy.shape != () or lazy.dtype != torch.int64:
        return torch.zeros((), dtype=torch.int64)
    return _load(name, lazy).clone()


def _check_overlap(tensors: Mapping[str, LazyTensor]) -> None:
    """A few bytes must not pose as many weights: it would take memory and time that the file's size does not announce."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    held = sum({id(tensor.backing): tensor.backing_bytes for tensor in tensors.values()}.values())
    if needed > held:
        raise CheckpointError(f"its tensors share memory: they need {needed:,} bytes, the file holds {held:,} for them",
                              remedy="save it again with tensors of their own: {name: tensor.clone() for name, tensor in state.items()}")  # fmt: skip


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    # One pass without a temporary: the smallest and largest value are NaN if any value is.
    low, high = (float(value) for value in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        flat = tensor.flatten()
        wrong = sum(int((~torch.isfinite(flat[start : start + _CHUNK])).sum().item()) for start in range(0, flat.numel(), _CHUNK))
        raise CheckpointError(f"{name} has {wrong} values of {tensor.numel()} that are NaN or infinite",
                              remedy="the training diverged, or float16 overflowed: give an earlier checkpoint")  # fmt: skip
    if name.endswith(".running_var") and low < 0:
        raise CheckpointError(f"{name} has a negative variance ({low:g})", remedy="give an undamaged checkpoint: a variance is never negative")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

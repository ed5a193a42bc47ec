"""Is this batch what the model expects? The check costs microseconds; the explanation is only written when it is not.

Is what a library made of a file the model that its metadata describes?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, ModelError
from ..specs.values import ModelSpec

RUN_REMEDY = (
    "if memory ran out, give EngineOptions(max_batch=…) a smaller number; else check that the model accepts this "
    "image size"
)
"""Where a library fails on a batch that was checked."""
Interface: TypeAlias = "tuple[str, str, tuple[int | str | None, ...]]"
"""Name, dtype and shape of an input or output; what is not a number in the shape is a dimension of any size."""


def check_interface(path: Path, spec: ModelSpec, inputs: Sequence[Interface], outputs: Sequence[Interface]) -> None:
    """The graph's input and outputs must be those of the metadata, or batches would be checked against the wrong thing.

    Raises:
        ModelError: They differ.
    """
    expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in (spec.input, *spec.outputs)]
    found = [*inputs, *outputs]
    if len(inputs) != 1 or len(found) != len(expected) or not all(map(_agree, expected, found)):
        raise ModelError(
            f"{path}: its metadata and its graph disagree on its input and outputs: expected {expected}, found {found}",
            remedy="export it again with repvgg-export",
        )


def _agree(expected: Interface, found: Interface) -> bool:
    """Same name, dtype and rank, and no dimension that is one number here and another there."""
    sizes = [
        not isinstance(want, int) or not isinstance(have, int) or want == have
        for want, have in zip(expected[2], found[2], strict=False)
    ]
    return expected[:2] == found[:2] and len(expected[2]) == len(found[2]) and all(sizes)


def one_line(error: Exception) -> str:
    """An error's text for a message of ours."""
    return " ".join(str(error).split())


_FLOAT16_ENDS = 65520.0  # what is smaller rounds to 65504 or less
_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
_SWAPPED = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 2, 3, 1)}  # transposition from the other layout


class BatchCheck:
    """The check of one model's batches.

    Args:
        spec: The model's specification.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._dtype = np.dtype(spec.input.dtype)
        self._sizes = tuple(size if isinstance(size, int) else None for size in spec.input.shape[1:])
        self._has_floats = self._dtype.kind == "f"
        self._narrows = self._dtype == np.float16

    def check(self, batch: object) -> NDArray[Any]:
        """The batch as a plain array, not copied; of a float16 model, float32 is rounded to float16.

        Raises:
            InputError: It is not what the model expects; the message says what was expected and found, the remedy every
                step to get there.
        """
        array = _plain_array(batch)
        shape = array.shape
        if self._narrows and array.dtype == np.float32:
            array = _narrow(array)
        # The dtype of a big-endian array differs from the native one of the same name.
        if array.dtype != self._dtype or len(shape) != len(self._sizes) + 1:
            raise self._explain(array)
        for have, want in zip(shape[1:], self._sizes, strict=True):
            if have != want and want is not None:
                raise self._explain(array)
        if array.size == 0:
            raise self._explain(array)
        if self._has_floats and not (math.isfinite(array.max()) and math.isfinite(array.min())):
            raise _explain_values(array)
        return array

    def _explain(self, array: NDArray[Any]) -> InputError:
        expected = (
            f"{self._dtype} ({', '.join(['N', *(str(size) for size in self._spec.input.shape[1:])])}), "
            f"{self._spec.input.layout}"
        )
        problems, steps = self._compare(array)
        found = f"{_name_dtype(array.dtype)} ({', '.join(map(str, array.shape))})"
        return InputError(
            f"batch: {' and '.join(problems)}: expected {expected}, found {found}", remedy="; then ".join(steps)
        )

    def _compare(self, array: NDArray[Any]) -> tuple[list[str], list[str]]:
        problems, steps = [], []
        shape, rank = array.shape, len(self._sizes) + 1
        if 0 in shape:
            return ["it is empty"], ["give at least one image, none of them without pixels"]
        if len(shape) == rank - 1:
            problems.append("the batch dimension is missing")
            steps.append("add it: batch[np.newaxis]")
            shape = (1, *shape)
        elif len(shape) != rank:
            return [f"its rank is {len(shape)}, not {rank}"], [f"give {rank} dimensions, the first one counting images"]
        layout = self._spec.input.layout
        swapped = self._transposed(shape)
        if swapped is not None and layout in _SWAPPED:
            problems.append(f"the layout is not {layout}")
            steps.append(f"transpose it: batch.transpose{_SWAPPED[layout]}")
            shape = swapped
        self._compare_sizes(shape, problems, steps)
        if array.dtype != self._dtype:
            problems.append("the dtype differs")
            steps.append(self._fix_dtype(array.dtype))
            if array.dtype == np.uint8 and swapped is not None:
                steps = [step for step in steps if not step.startswith("transpose")]  # normalize() does that too
        return problems, steps

    def _transposed(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape in the model's layout, if it fits only there."""
        layout = self._spec.input.layout
        if layout not in _SWAPPED:
            return None
        axis = _CHANNEL_AXIS[layout]
        channels = self._sizes[axis - 1]
        swapped = tuple(shape[index] for index in _SWAPPED[layout])
        return swapped if channels is not None and shape[axis] != channels == swapped[axis] else None

    def _compare_sizes(self, shape: tuple[int, ...], problems: list[str], steps: list[str]) -> None:
        channel_axis = _CHANNEL_AXIS.get(self._spec.input.layout)
        wrong = [axis for axis, want in enumerate(self._sizes, start=1) if want is not None and shape[axis] != want]
        if channel_axis in wrong:
            problems.append(f"it has {shape[channel_axis]} channels")
            steps.append(
                f"give {self._sizes[channel_axis - 1]} channels, red, green, blue: repeat a grey one, drop an "
                f"alpha channel"
            )
        if [axis for axis in wrong if axis != channel_axis]:
            size = "×".join(
                str(want or "any") for axis, want in enumerate(self._sizes, start=1) if axis != channel_axis
            )
            problems.append("the size differs")
            steps.append(
                f"resize or crop the images to {size} (infer_images does), or export the model with another "
                f"--image-size"
            )

    def _fix_dtype(self, dtype: np.dtype[Any]) -> str:
        if dtype == np.uint8 and self._has_floats and self._spec.preprocessing is not None:
            return (
                "normalise it: repvgg_deploy.images.decode.normalize(images, engine.spec.preprocessing), or export "
                "the model with --input uint8"
            )
        if self._dtype == np.uint8:
            return (
                "give the bytes of the images as they are, RGB 0-255 of dtype uint8: this model normalises them itself"
            )
        if dtype.kind in "fiu":
            return f"convert it: batch.astype(np.{self._dtype.name})"
        return f"give an array of real numbers of dtype {self._dtype.name}"


def _plain_array(batch: object) -> NDArray[Any]:
    if type(batch) is np.ndarray:
        return batch
    if isinstance(batch, np.ma.MaskedArray):
        raise InputError(
            "batch: is a masked array, and a model cannot leave pixels out", remedy="give batch.filled(value)"
        )
    if isinstance(batch, np.ndarray):
        return batch.view(np.ndarray)  # a memmap, say
    kind = f"{type(batch).__module__}.{type(batch).__qualname__}".removeprefix("builtins.")
    if kind.startswith("torch."):
        remedy = "call infer(batch.detach().cpu().numpy())"
    elif kind.startswith("PIL.") or isinstance(batch, (str, bytes)) or hasattr(batch, "__fspath__"):
        remedy = "for image files call infer_images([path, …])"
    elif isinstance(batch, (list, tuple)):
        remedy = "make it one array first: np.stack(images)"
    else:
        remedy = "convert it first: np.asarray(batch)"
    raise InputError(f"batch: expected a NumPy array, found {kind}", remedy=remedy)


def _narrow(array: NDArray[Any]) -> NDArray[np.float16]:
    largest = max(abs(float(array.max())), abs(float(array.min()))) if array.size else 0.0
    if math.isfinite(largest) and largest >= _FLOAT16_ENDS:
        raise InputError(
            f"batch: expected numbers that float16 holds, at most 65504, found {largest:.6g}",
            remedy="normalise the images as engine.spec.preprocessing says, or use the float32 model",
        )
    return array.astype(np.float16)


def _explain_values(array: NDArray[Any]) -> InputError:
    finite = np.isfinite(array)
    count = array.size - int(np.count_nonzero(finite))
    first = tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), array.shape))
    return InputError(
        f"batch: expected finite numbers, found {count} of {array.size} NaN or infinite, the first at {first}: "
        f"{array[first]}",
        remedy=f"look at how image {first[0]} of the batch was made",
    )


def _name_dtype(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else f"{'big' if dtype.str[0] == '>' else 'little'}-endian {dtype.name}"

"""A block beside its deploy form, both on random input; and the deploy forms that a foreign block may have."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import CheckpointError
from ..specs.values import Check
from .foreign import Reading, fold_reading
from .tolerance import FLOAT32_FACTOR, compare, relative_error

# In float64 two forms differ by rounding alone, 1e-13 in sums of thousands of products; what is wrong in a fold, be it
# a BatchNorm's epsilon behind FastViT's layer scale of 1e-5, is above 1e-9.
_WIDE = 1e-10
# The folded kernel's centre taps are larger than any branch's: see parity's floor for blocks.
_FLOOR_EPSILONS = 64
_ACTIVATIONS = (nn.Identity, nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ReLU6, nn.Mish)  # that a forward calls itself
_MAX_ORDERED = 3  # modules behind the sum whose order is tried
# What forwards of other projects decide by, and what it is in deploy form.
_FLAGS = {"inference_mode": True, "fully_fused": True, "partially_fused": False, "build_residual_branches": False}
# What forwards of other projects call in deploy form, too, or go through.
_STUBS = {"bn": nn.Identity, "fusion_conv": nn.Sequential, "fusion_bn": nn.Sequential}
_Builder = Callable[[nn.Module, nn.Conv2d], nn.Module]


class Trial:
    """One block in `eval()` on one random image: in float64, and in its own dtype; on its own device.

    Args:
        block: Not changed.
        channels: That its input may have; the first number with which it runs.
        reach: Pixels that its largest kernel reads beyond the centre.

    Raises:
        CheckpointError: It does not run on one image.
    """

    def __init__(self, block: nn.Module, channels: Iterable[int], reach: int) -> None:
        self.block = copy.deepcopy(block).eval() if any(module.training for module in block.modules()) else block
        self.wide = copy.deepcopy(self.block).double()
        like = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
        self.dtype = like.dtype
        generator, self.reason = torch.Generator().manual_seed(0), ""  # why the last one did not run
        for count in dict.fromkeys(channels):
            # not square, odd and even, all borders, and every phase of a stride
            x = torch.randn(1, count, 2 * reach + 5, 2 * reach + 4, generator=generator)
            self.x = x.to(like.device, like.dtype)
            try:
                self.truth = _call(self.wide, self.x.double())
                break
            except Exception as error:  # noqa: BLE001 - another project's forward may raise anything
                self.reason = f"{type(error).__name__}: {error}"
        else:
            raise CheckpointError(
                f"{type(block).__name__} does not run on one random image: {self.reason}",
                remedy="export_module folds by algebra, whatever a block takes; or convert it yourself before",
            )
        self.own_error: float | None = None  # where its own dtype runs on its own device
        try:
            self.own_error = relative_error(_to_numpy(_call(self.block, self.x)), _to_numpy(self.truth))
        except RuntimeError:  # half precision on some processors
            self.dtype = torch.float64

    def check(self, folded: nn.Module, dtype: torch.dtype) -> Check:
        """How far a deploy form, computed in `dtype`, is from the block in float64; without end where it cannot run."""
        own = self.own_error or 0.0
        epsilon = torch.finfo(self.dtype).eps
        if dtype == torch.float64:
            allowed = max(_WIDE, FLOAT32_FACTOR * own * torch.finfo(torch.float64).eps / epsilon)
        else:
            allowed = max(FLOAT32_FACTOR * own, _FLOOR_EPSILONS * epsilon)
        try:
            found = _call(folded, self.x.to(dtype))
        except Exception as error:  # noqa: BLE001 - as above
            self.reason = f"{type(error).__name__}: {error}"
            return Check("", float("inf"), allowed, 0.0)
        return compare("", _to_numpy(found), _to_numpy(self.truth), allowed)

    @property
    def is_dead(self) -> bool:
        """Whether the block gives zeros only, so that nothing can be compared."""
        return not bool(self.truth.any())

    def find_deploy_form(self, readings: Iterable[Reading]) -> tuple[nn.Module | None, Check]:
        """The block in the first deploy form that equals it, if there is one; and the nearest comparison."""
        best = Check("", float("inf"), _WIDE, 0.0)
        for reading in readings:
            conv = fold_reading(reading, torch.float64)
            for build in _builders(self.block, reading):
                check = self.check(build(self.wide, conv), torch.float64)
                best = min(best, check, key=lambda each: each.error)
                if check.passed:
                    found = build(self.block, fold_reading(reading, reading.like.weight.dtype)).eval()
                    return found, check if self.dtype == torch.float64 else self.check(found, self.dtype)
        return None, best


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """What a block gives for an image; RepVGGplus hands a loss through as well, which begins with 0."""
    wanted = list(inspect.signature(module.forward).parameters.values())[1:]
    extra = [0.0 for each in wanted if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    with torch.no_grad():
        out = module(x, *extra)
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result


def _to_numpy(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.double().cpu().numpy()
    return array


def _builders(block: nn.Module, reading: Reading) -> Iterator[_Builder]:
    """The deploy forms to try: the block's own path, then a plain sequence of the convolution and what follows it."""
    for name in reading.folded:
        yield partial(_with_own_path, reading=reading, name=name)
    if reading.like.in_channels != reading.channels:
        return  # something stands before the sum
    taken = (*reading.parts, *reading.folded)
    rest = [name for name, child in block.named_children() if name not in taken and not isinstance(child, nn.Identity)]
    orders = permutations(rest) if len(rest) <= _MAX_ORDERED else [tuple(rest)]
    for order in orders if rest else ():
        yield partial(_make_plain, reading=reading, tail=order)
    for activation in _ACTIVATIONS:
        yield partial(_make_plain, reading=reading, tail=activation)


def _with_own_path(block: nn.Module, conv: nn.Conv2d, *, reading: Reading, name: str) -> nn.Module:
    """A copy of the block without its branches, the convolution under the name where its own forward looks for it.

    Forwards decide on the presence of that name, on flags, or on a branch that is None: all are set.
    """
    memo: dict[int, object] = {id(child): None for part, child in block.named_children() if part in reading.parts}
    result = copy.deepcopy(block, memo)
    for part in (*sorted(reading.parts), "id_tensor", name):
        for store in (result._modules, result._parameters, result._buffers, vars(result)):
            store.pop(part, None)  # timm keeps a plain None under the name
        if part in _STUBS and part in block._modules:
            result.add_module(part, _STUBS[part]())
    result.add_module(name, conv)
    result.deploy = True  # type: ignore[assignment]
    for flag, value in _FLAGS.items():
        if flag in vars(result):
            setattr(result, flag, value)
    return result


def _make_plain(
    block: nn.Module, conv: nn.Conv2d, *, reading: Reading, tail: Sequence[str] | type[nn.Module]
) -> nn.Module:
    """The convolution and what follows it in a row, with the plain attributes of the block.

    YOLO's models hang `i`, `f` and `type` on each of their layers, and run by them.
    """
    name = reading.folded[0] if reading.folded else "reparam_conv"
    names = () if isinstance(tail, type) else tail
    behind = {part: block.get_submodule(part) for part in names}
    if isinstance(tail, type) and tail is not nn.Identity:
        behind["act"] = tail()
    result = nn.Sequential(OrderedDict({name: conv} | copy.deepcopy(behind)))
    for key, value in vars(block).items():
        if not key.startswith("_") and key not in ("training", "forward", *result._modules):
            setattr(result, key, value)
    return result

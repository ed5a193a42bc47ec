"""Training form → deploy form, for a RepVGG and for any module that holds RepVGG-like blocks, ours or other projects'.

Folding is computed in float64 and rounded once. The argument is never changed, and the result shares no block with it.
Every folded block is run beside the original on random input, before anybody gets it: `beside.Trial`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..errors import CheckpointError, InputError, ParityError
from ..specs.values import Check
from .beside import Trial
from .block import TrainingBlock, fold_block
from .foreign import Candidate, find_parallel, read_block
from .network import RepVGG

M = TypeVar("M", bound=nn.Module)
Convert = Callable[[nn.Module], nn.Module | None]
logger = logging.getLogger(__name__)
_BY_ALGEBRA = "export_module folds such a block by algebra, whatever its parts are called"
_SHOWN = 5
_PLAIN = (nn.Identity, nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Dropout)


@torch.no_grad()
def reparameterize(model: M, *, convert: Mapping[type[nn.Module], Convert] | None = None) -> M:
    """A copy of `model` in which every RepVGG-like block is one convolution, in `eval()`.

    Blocks of this project become `DeployBlock`. Blocks of other projects are known by the names of their parts, or
    nominated because their parts look like branches (`foreign`); they keep their class where its own forward has a path
    for the folded convolution, and become an `nn.Sequential` of the convolution and what follows it where not. What was
    nominated and is more than a sum of its branches stays as it is; a warning lists it. Auxiliary heads of a `RepVGG`
    are dropped: they serve training only. Everything else is copied.

    Args:
        model: A `RepVGG` in training form, one block, or any module that contains such blocks. Not changed.
        convert: The user's own conversion for blocks of a class: gets a copy of the block in `eval()`, returns its
            deploy form, or None where it changed the copy. It goes before everything that is known here.

    Returns:
        A module of the same class (unless it is itself a block, see above).

    Raises:
        CheckpointError: There is no block in training form in it, or a block has parts that cannot be folded.
        ParityError: A block in deploy form does not give what it gave before, on random input.
        InputError: There is no block of a class that `convert` names.
    """
    memo: dict[int, object] = {}
    left: dict[str, str] = {}
    convert = convert or {}
    unused, inside = set(convert), "\0"  # `inside`: the block that was folded last; its parts are gone with it
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in memo or name.startswith(inside):
            continue
        where = name or type(module).__name__
        kind = next((kind for kind in type(module).__mro__ if kind in convert), None)
        unused.discard(kind)
        folded = _fold(module, where) if kind is None else _convert(module, convert[kind], where)
        if isinstance(folded, str):
            left[where] = folded
        elif folded is not None:
            memo[id(module)], inside = folded, f"{name}." if name else ""
        elif isinstance(module, RepVGG):
            memo.update({id(child): None for part, child in module.named_children() if part.endswith("_aux")})
    if unused:
        raise InputError(
            f"convert= names {', '.join(sorted(kind.__name__ for kind in unused))}, of which the model holds no module",
            remedy="give the classes of the model's own modules",
        )
    _report_left(model, left, found=bool(memo))
    result = copy.deepcopy(model, memo).eval()
    for module in result.modules():
        if isinstance(module, RepVGG):
            module.gradient_checkpointing = False
            for name in [name for name, child in module._modules.items() if child is None]:
                delattr(module, name)
    return result


def _report_left(model: nn.Module, left: dict[str, str], *, found: bool) -> None:
    """Says which modules with branches stay as they are: in a warning, or in the error where nothing was folded.

    Args:
        model: What holds them.
        left: Those that were nominated: name → class and branches.
        found: Whether anything was folded. Where nothing was, modules of weaker signs are named, too.
    """
    if not found:
        weaker = ((name or type(module).__name__, module) for name, module in model.named_modules())
        named = {where: _describe(module, parts) for where, module in weaker if (parts := find_parallel(module))}
        left = named | left
    text = "; ".join(f"{where} ({what})" for where, what in list(left.items())[:_SHOWN])
    text += f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    if found and left:
        logger.warning("modules that look like branches, but are more than their sum, stay as they are: %s", text)
    if not found:
        branching = f"; modules that may have branches: {text}" if left else ""
        raise CheckpointError(
            f"{type(model).__name__} holds no RepVGG block in training form{branching}",
            remedy="give the model as it was trained; a model in deploy form needs no conversion; export_module folds "
            "any branches, by algebra; convert= takes your own conversion of a class",
        )


def _fold(module: nn.Module, where: str) -> nn.Module | str | None:
    """A block in deploy form; where it looks like one and stays as it is, its class and branches; else None."""
    if isinstance(module, TrainingBlock):
        return _fold_ours(module, where)
    candidate = read_block(module, where)
    if candidate is None:
        return None
    folded = _fold_candidate(module, candidate, where)
    return _describe(module, candidate.parts) if folded is None else folded


def _describe(module: nn.Module, parts: Sequence[str]) -> str:
    return f"{type(module).__name__}: {', '.join(parts)}"


def _fold_ours(block: TrainingBlock, where: str) -> nn.Module:
    try:
        folded = fold_block(block)
    except CheckpointError as error:
        raise CheckpointError(f"{where}.{error.message}", remedy=error.remedy) from error
    trial = Trial(block, [block.spec.in_channels], folded.spec.dilation)
    _require(trial.check(folded.eval(), trial.dtype), where, trial.reason)
    return folded


def _fold_candidate(block: nn.Module, candidate: Candidate, where: str) -> nn.Module | None:
    """A block of another project in deploy form; None for one that is more than a sum and of no known names."""
    readings = list(candidate.readings)
    if not readings:
        return None
    like = readings[0].like
    reach = max(d * (k - 1) // 2 for d, k in zip(like.dilation, like.kernel_size, strict=True))
    try:
        trial = Trial(block, [readings[0].channels], reach)
    except CheckpointError as error:
        if candidate.certain:
            raise CheckpointError(f"{where}: {error.message}", remedy=error.remedy) from error
        return None
    folded, check = trial.find_deploy_form(() if trial.is_dead else readings)
    if candidate.certain or (folded is not None and not check.passed):
        taken = {*readings[0].parts, *readings[0].folded}
        others = [name for name, child in block.named_children() if name not in taken and not isinstance(child, _PLAIN)]
        others += [name for name, _ in block.named_parameters(recurse=False) if name not in taken]
        unknown = f"; parts that are not folded: {', '.join(others)}" if others else ""
        if trial.is_dead:
            raise ParityError(
                f"{where}: gives nothing but zeros for random input, so that nothing can be compared{unknown}",
                remedy="give a trained model",
            )
        _require(check, where, f"{trial.reason or 'its forward does more than sum its branches'}{unknown}")
    return None if folded is None else _fold_inside(folded)


def _convert(block: nn.Module, convert: Convert, where: str) -> nn.Module:
    """A block as the user's own conversion has it."""
    given = copy.deepcopy(block).eval()
    folded = convert(given)
    folded = given if folded is None else folded
    if not isinstance(folded, nn.Module):
        raise InputError(
            f"{where}: convert= of {type(block).__name__} returned {type(folded).__name__}",
            remedy="return the block in deploy form, or None where its copy was changed",
        )
    convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    reach = max([0, *(d * (k - 1) // 2 for c in convs for d, k in zip(c.dilation, c.kernel_size, strict=True))])
    norms = [module.num_features for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    try:
        trial = Trial(block, [*(conv.in_channels for conv in convs), *norms], reach)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", remedy=error.remedy) from error
    _require(trial.check(folded.eval(), trial.dtype), where, trial.reason or f"see convert= of {type(block).__name__}")
    return _fold_inside(folded)


def _fold_inside(folded: nn.Module) -> nn.Module:
    """What a folded block still holds, folded, too: modules behind its sum may be blocks."""
    for name, module in folded.named_modules():
        known = name and read_block(module, name)
        if isinstance(module, TrainingBlock) or (known and known.certain):
            return reparameterize(folded)
    return folded


def _require(check: Check, where: str, reason: str) -> None:
    if not check.passed:
        raise ParityError(
            f"{where}: its folded form differs from it by {check.error:.1e} of its largest output, at most "
            f"{check.tolerance:.0e} is rounding: {reason}",
            remedy=_BY_ALGEBRA,
        )

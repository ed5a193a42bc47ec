"""Training form → deploy form, for a RepVGG and for any module that contains RepVGG blocks: ours, or others' by their names.

Folding is computed in float64 and rounded once. The argument is never changed, and the result shares no block with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError
from .arithmetic import Branch, KernelBias, fold_in_float64
from .block import DeployBlock, TrainingBlock
from .network import RepVGG

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class BlockNames:
    """What one code base calls the parts of a RepVGG block."""

    dense: str
    pointwise: str
    identity: str
    folded: str
    bn: str


FOREIGN_BLOCKS = (
    BlockNames(
        "rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", "bn"
    ),  # the original, RepVGGplus, QARepVGG, YOLOv6
    BlockNames("conv_kxk", "conv_1x1", "identity", "reparam_conv", "bn"),  # timm
    BlockNames("branch_3x3", "branch_1x1", "branch_norm", "branch_reparam", "norm"),  # mmpretrain
)
"""Names of parts in other projects; facts read from their sources."""


def reparameterize(model: M) -> M:
    """A copy of `model` in which every RepVGG block is one 3×3 convolution, in `eval()`.

    Blocks of this project become `DeployBlock`; blocks of other projects, known by the names of their parts
    (`FOREIGN_BLOCKS`), keep their class and get the folded convolution under their own name, as their own conversion
    would have it. Auxiliary heads of a `RepVGG` are dropped: they serve training only. Everything else is copied.

    Args:
        model: A `RepVGG` in training form, one block, or any module that contains such blocks. Not changed.

    Returns:
        A module of the same class.

    Raises:
        CheckpointError: There is no block in training form in it, or a block has parts that cannot be folded.
    """
    if isinstance(model, TrainingBlock):
        return cast(M, fold_block(model).eval())
    memo: dict[int, object] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainingBlock):
            memo[id(module)] = fold_block(module)
        elif (names := foreign_names(module)) is not None:
            memo[id(module)] = _fold_foreign(module, names, name)
        elif isinstance(module, RepVGG):
            memo.update(_drop_auxiliary(module))
    if not memo:
        raise CheckpointError(
            f"{type(model).__name__} holds no RepVGG block in training form",
            remedy="give the model as it was trained; a model in deploy form needs no conversion",
        )
    result = copy.deepcopy(model, memo).eval()
    _mark_deploy(result)
    return result


def _drop_auxiliary(model: RepVGG) -> dict[int, object]:
    return {id(child): None for name, child in model.named_children() if name.endswith("_aux")}


def _mark_deploy(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, RepVGG):
            module.form = "deploy"
            module.gradient_checkpointing = False
            for name in [name for name, child in module._modules.items() if child is None]:
                delattr(module, name)


def fold_block(block: TrainingBlock) -> DeployBlock:
    """One block of ours in deploy form; SE parameters are copied.

    Returns:
        A `DeployBlock` in the dtype and on the device of the argument.
    """
    dtype = block.rbr_dense.conv.weight.dtype
    folded = fold_in_float64(block.branches(), block.post_bn, block.spec.groups, result=dtype)
    with torch.device("meta"):
        result = DeployBlock(block.spec)
    _assign(result.rbr_reparam, folded)
    result.se, result.post_se = copy.deepcopy(block.se), copy.deepcopy(block.post_se)
    return result.train(block.training)


def _assign(conv: nn.Conv2d, folded: KernelBias) -> None:
    assert folded.bias is not None
    conv.weight = nn.Parameter(folded.kernel, requires_grad=False)
    conv.bias = nn.Parameter(folded.bias, requires_grad=False)


def foreign_names(module: nn.Module) -> BlockNames | None:
    """Which project's naming a training-form block follows, or None if it is no such block (or one of ours)."""
    if isinstance(module, (TrainingBlock, DeployBlock)):
        return None
    children = dict(module.named_children())
    for names in FOREIGN_BLOCKS:
        if names.dense in children and names.pointwise in children and _conv_of(children[names.dense]) is not None:
            return names
    return None


def _conv_of(branch: nn.Module) -> nn.Conv2d | None:
    conv = branch if isinstance(branch, nn.Conv2d) else getattr(branch, "conv", None)
    return conv if isinstance(conv, nn.Conv2d) else None


def _branch_of(branch: nn.Module, names: BlockNames, where: str) -> Branch:
    if isinstance(branch, nn.Identity):
        return Branch(None)
    if isinstance(branch, _BatchNorm):
        return Branch(None, bn=_usable_bn(branch, where))
    conv, bn = _conv_of(branch), getattr(branch, names.bn, None)
    if isinstance(branch, nn.Conv2d):
        bn = None
    if conv is None or not (bn is None or isinstance(bn, _BatchNorm)):
        raise CheckpointError(
            f"{where}: expected a convolution with or without BatchNorm, found {type(branch).__name__}",
            remedy="only blocks that sum 3×3, 1×1 and identity branches can be reparameterized",
        )
    return Branch(conv.weight, conv.bias, None if bn is None else _usable_bn(bn, where))


def _usable_bn(bn: _BatchNorm, where: str) -> nn.BatchNorm2d:
    """A BatchNorm with running statistics; SyncBatchNorm is one, too."""
    if bn.running_mean is None or bn.running_var is None:
        raise CheckpointError(
            f"{where}: its BatchNorm has no running statistics, so it has no eval() form",
            remedy="train with track_running_stats=True",
        )
    return cast(nn.BatchNorm2d, bn)


def _require_foldable(dense: nn.Conv2d, pointwise: nn.Conv2d | None, where: str) -> None:
    """Only a zero-padded 3×3 convolution, with a 1×1 one of the same stride and groups, is one 3×3 convolution.

    Raises:
        CheckpointError: It is another.
    """
    one = dense if pointwise is None else pointwise
    facts = {
        "kernel": (dense.kernel_size, (3, 3)),
        "padding": (dense.padding, dense.dilation),
        "padding mode": (dense.padding_mode, "zeros"),
        "1×1 kernel": (one.kernel_size if pointwise is not None else (1, 1), (1, 1)),
        "1×1 stride": (one.stride, dense.stride),
        "1×1 groups": (one.groups, dense.groups),
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise CheckpointError(
                f"{where}: {what}: expected {expected}, found {found}",
                remedy="such a block cannot be folded; deploy its training form",
            )


def _fold_foreign(block: nn.Module, names: BlockNames, where: str) -> nn.Module:
    branches = [
        _branch_of(block.get_submodule(name), names, f"{where}.{name}") for name in (names.dense, names.pointwise)
    ]
    identity = dict(block.named_children()).get(names.identity)
    if identity is not None:
        branches.append(_branch_of(identity, names, f"{where}.{names.identity}"))
    dense = _conv_of(block.get_submodule(names.dense))
    assert dense is not None
    _require_foldable(dense, _conv_of(block.get_submodule(names.pointwise)), where)
    post_bn = _post_bn(block, names, where)
    folded = fold_in_float64(branches, post_bn, dense.groups, result=dense.weight.dtype)
    conv = nn.Conv2d(
        dense.in_channels,
        dense.out_channels,
        3,
        dense.stride,
        dense.padding,
        dense.dilation,
        dense.groups,
        device="meta",
    )  # type: ignore[arg-type]
    _assign(conv, folded)
    return _with_folded(block, names, conv)


def _post_bn(block: nn.Module, names: BlockNames, where: str) -> nn.BatchNorm2d | None:
    """The BatchNorm after the sum, which only QARepVGG's blocks have (official naming); with SE before it, it cannot be folded."""
    bn = dict(block.named_children()).get("bn") if names.dense == "rbr_dense" else None
    if not isinstance(bn, _BatchNorm):
        return None
    if not isinstance(getattr(block, "se", nn.Identity()), nn.Identity):
        raise CheckpointError(
            f"{where}: QARepVGG with SE applies its last BatchNorm after the SE block, which no convolution can absorb",
            remedy="train without SE, or deploy the training form",
        )
    return _usable_bn(bn, where)


def _with_folded(block: nn.Module, names: BlockNames, conv: nn.Conv2d) -> nn.Module:
    """A copy of the block without its branches. Its own forward decides on `hasattr(rbr_reparam)`, `deploy` or a None branch: all three are set."""
    removed = {names.dense, names.pointwise, names.identity, *(("bn",) if names.dense == "rbr_dense" else ())}
    memo: dict[int, object] = {id(child): None for name, child in block.named_children() if name in removed}
    result = copy.deepcopy(block, memo)
    for name in [name for name in removed if name in result._modules]:
        del result._modules[name]
    if "bn" in removed and isinstance(getattr(block, "bn", None), nn.Module):
        result.add_module("bn", nn.Identity())  # some forwards call bn in deploy form, too
    result.__dict__.pop(names.folded, None)  # timm keeps a plain None under this name
    result.add_module(names.folded, conv)
    result.deploy = True  # type: ignore[assignment]
    return result

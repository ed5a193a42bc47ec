"""Training form → deploy form, for a RepVGG and for any module that holds RepVGG blocks, ours or another project's.

Folding is computed in float64 and rounded once. The argument is never changed, and the result shares no block with it.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError, ParityError
from .arithmetic import Branch, KernelBias, fold_in_float64
from .block import DeployBlock, TrainingBlock
from .network import RepVGG

M = TypeVar("M", bound=nn.Module)


class BlockNames(NamedTuple):
    """What one code base calls the parts of a RepVGG block; facts read from its source."""

    dense: str
    pointwise: str
    identity: str
    folded: str
    bn: str


_OFFICIAL_NAMES = BlockNames("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", "bn")
_FOREIGN_BLOCKS = (
    _OFFICIAL_NAMES,  # the original, RepVGGplus, QARepVGG, YOLOv6
    BlockNames("conv_kxk", "conv_1x1", "identity", "reparam_conv", "bn"),  # timm
    BlockNames("branch_3x3", "branch_1x1", "branch_norm", "branch_reparam", "norm"),  # mmpretrain
)


def reparameterize(model: M) -> M:
    """A copy of `model` in which every RepVGG block is one 3×3 convolution, in `eval()`.

    Blocks of this project become `DeployBlock`; blocks of other projects, known by the names of their parts
    (`_FOREIGN_BLOCKS`), keep their class and get the folded convolution under their own name, as their own conversion
    would have it. Auxiliary heads of a `RepVGG` are dropped: they serve training only. Everything else is copied.

    Args:
        model: A `RepVGG` in training form, one block, or any module that contains such blocks. Not changed.

    Returns:
        A module of the same class.

    Raises:
        CheckpointError: There is no block in training form in it, or a block has parts that cannot be folded.
        ParityError: A block of another project does not give what it gave before, on random input.
    """
    if isinstance(model, TrainingBlock):
        return cast(M, fold_block(model).eval())
    memo: dict[int, object] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainingBlock):
            memo[id(module)] = fold_block(module)
        elif (names := foreign_names(module)) is not None:
            memo[id(module)] = _fold_foreign(module, names, name or type(module).__name__)
        elif isinstance(module, RepVGG):
            memo.update({id(child): None for name, child in module.named_children() if name.endswith("_aux")})
    if not memo:
        raise CheckpointError(
            f"{type(model).__name__} holds no RepVGG block in training form",
            remedy="give the model as it was trained; a model in deploy form needs no conversion; export_module folds "
            "blocks of other names, by algebra",
        )
    result = copy.deepcopy(model, memo).eval()
    for module in result.modules():
        if isinstance(module, RepVGG):
            module.form = "deploy"
            module.gradient_checkpointing = False
            for name in [name for name, child in module._modules.items() if child is None]:
                delattr(module, name)
    return result


def fold_block(block: TrainingBlock) -> DeployBlock:
    """One block of ours in deploy form, in its dtype and on its device; SE parameters are copied."""
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
    for names in _FOREIGN_BLOCKS:
        if names.dense in children and names.pointwise in children and _conv_of(children[names.dense]) is not None:
            return names
    return None


def _conv_of(branch: nn.Module) -> nn.Conv2d | None:
    conv = branch if isinstance(branch, nn.Conv2d) else getattr(branch, "conv", None)
    return conv if isinstance(conv, nn.Conv2d) else None


def _fold_foreign(block: nn.Module, names: BlockNames, where: str) -> nn.Module:
    """A copy of a block of another project in which one convolution stands for its branches."""
    children = dict(block.named_children())
    dense, pointwise = _conv_of(children[names.dense]), _conv_of(children[names.pointwise])
    present = [name for name in (names.dense, names.pointwise, names.identity) if name in children]
    branches = [_branch_of(children[name], names, f"{where}.{name}") for name in present]
    assert dense is not None  # `foreign_names` has seen it
    _require_foldable(dense, dense if pointwise is None else pointwise, where)
    folded = fold_in_float64(branches, _post_bn(block, names, where), dense.groups, result=dense.weight.dtype)
    like = (dense.stride, dense.padding, dense.dilation, dense.groups)
    conv = nn.Conv2d(dense.in_channels, dense.out_channels, 3, *like, device="meta")  # type: ignore[arg-type]
    _assign(conv, folded)
    result = _with_folded(block, names, conv)
    _require_equal(block, result, names, where)
    return result


def _require_equal(block: nn.Module, folded: nn.Module, names: BlockNames, where: str) -> None:
    """Runs a folded block beside the original, both in float64: names do not tell what is done with the parts."""
    parts = (names.dense, names.pointwise, names.identity, names.folded, *(("bn",) if names is _OFFICIAL_NAMES else ()))
    plain = (nn.Identity, nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish)
    others = [name for name, child in block.named_children() if name not in parts and not isinstance(child, plain)]
    others += [name for name, _ in block.named_parameters(recurse=False)]
    unknown = f"; parts that are not folded: {', '.join(others)}" if others else ""
    remedy = "export_module folds such a block by algebra, whatever its parts are called"
    dense = _conv_of(dict(block.named_children())[names.dense])
    assert dense is not None
    size = [12 + 2 * dilation for dilation in dense.dilation]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, dense.in_channels, *size, generator=generator, dtype=torch.float64).to(dense.weight.device)
    try:
        with torch.no_grad():
            truth, found = (copy.deepcopy(module).eval().double()(x) for module in (block, folded))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        message = f"{where}: cannot be run beside its folded form: {type(error).__name__}: {error}{unknown}"
        raise CheckpointError(message, remedy=remedy) from error
    # The folded weights were rounded once to the block's dtype; sums of a few thousand such errors of random sign.
    allowed = max(1e-5, 32 * torch.finfo(dense.weight.dtype).eps)
    largest = float(truth.abs().max())
    same = found.shape == truth.shape and largest > 0
    difference = float((found - truth).abs().max()) / largest if same else float("inf")
    if not difference <= allowed:
        raise ParityError(
            f"{where}: its folded form differs from it by {difference:.1e} of its largest output, at most "
            f"{allowed:.0e} is rounding: its forward does more than sum its branches{unknown}",
            remedy=remedy,
        )


def _branch_of(branch: nn.Module, names: BlockNames, where: str) -> Branch:
    if isinstance(branch, nn.Identity):
        return Branch(None)
    if isinstance(branch, _BatchNorm):
        return Branch(None, bn=_usable_bn(branch, where))
    conv = _conv_of(branch)
    bn = None if isinstance(branch, nn.Conv2d) else getattr(branch, names.bn, None)
    if conv is None or not (bn is None or isinstance(bn, _BatchNorm)):
        raise CheckpointError(
            f"{where}: expected a convolution with or without BatchNorm, found {type(branch).__name__}",
            remedy="only blocks that sum 3×3, 1×1 and identity branches can be reparameterized",
        )
    return Branch(conv.weight, conv.bias, None if bn is None else _usable_bn(bn, where))


def _usable_bn(bn: _BatchNorm, where: str) -> nn.BatchNorm2d:
    """A BatchNorm with running statistics; SyncBatchNorm is one, too."""
    if bn.running_mean is None or bn.running_var is None:
        message = f"{where}: its BatchNorm has no running statistics, so it has no eval() form"
        raise CheckpointError(message, remedy="train with track_running_stats=True")
    return cast(nn.BatchNorm2d, bn)


def _require_foldable(dense: nn.Conv2d, one: nn.Conv2d, where: str) -> None:
    """Only a zero-padded 3×3 convolution, with a 1×1 one of the same stride and groups, is one 3×3 convolution."""
    facts = {
        "kernel": (dense.kernel_size, (3, 3)),
        "padding": (dense.padding, dense.dilation),
        "padding mode": (dense.padding_mode, "zeros"),
        "1×1 kernel": ((1, 1) if one is dense else one.kernel_size, (1, 1)),
        "1×1 stride": (one.stride, dense.stride),
        "1×1 groups": (one.groups, dense.groups),
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise CheckpointError(
                f"{where}: {what}: expected {expected}, found {found}",
                remedy="such a block cannot be folded; deploy its training form",
            )


def _post_bn(block: nn.Module, names: BlockNames, where: str) -> nn.BatchNorm2d | None:
    """The BatchNorm after the sum, which QARepVGG's blocks have; with SE before it, it cannot be folded."""
    bn = dict(block.named_children()).get("bn") if names is _OFFICIAL_NAMES else None
    if not isinstance(bn, _BatchNorm):
        return None
    if not isinstance(getattr(block, "se", nn.Identity()), nn.Identity):
        raise CheckpointError(
            f"{where}: QARepVGG with SE applies its last BatchNorm after the SE block, which no convolution can absorb",
            remedy="train without SE, or deploy the training form",
        )
    return _usable_bn(bn, where)


def _with_folded(block: nn.Module, names: BlockNames, conv: nn.Conv2d) -> nn.Module:
    """A copy of the block without its branches.

    Its own forward decides on `hasattr(rbr_reparam)`, on `deploy` or on a None branch: all three are set.
    """
    removed = {names.dense, names.pointwise, names.identity, *(("bn",) if names is _OFFICIAL_NAMES else ())}
    memo: dict[int, object] = {id(child): None for name, child in block.named_children() if name in removed}
    result = copy.deepcopy(block, memo)
    for name in removed & result._modules.keys():
        del result._modules[name]
    if "bn" in removed and isinstance(getattr(block, "bn", None), nn.Module):
        result.add_module("bn", nn.Identity())  # some forwards call bn in deploy form, too
    result.__dict__.pop(names.folded, None)  # timm keeps a plain None under this name
    result.add_module(names.folded, conv)
    result.deploy = True  # type: ignore[assignment]
    return result

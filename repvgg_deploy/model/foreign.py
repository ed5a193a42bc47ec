"""Blocks of other projects: which of their parts are summed, read from the names and the kinds of the parts.

A reading is a guess. `fold` runs what it gives beside the block before anybody gets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError
from .arithmetic import Branch, fold_in_float64, identity_kernel
from .block import DeployBlock, TrainingBlock

_LINEAR = (nn.Conv2d, nn.AvgPool2d, nn.ZeroPad2d)
_ONE_SUM = "only blocks that sum convolutions, BatchNorms, identities and average poolings can be reparameterized"


class BlockNames(NamedTuple):
    """What one code base calls the parts of a block; facts read from its source.

    Attributes:
        marks: Parts that tell such a block; the second is what a factor `alpha` belongs to.
        branches: All parts that are summed.
        folded: The names under which its own forward, or a sister's, looks for the folded convolution.
        post: The BatchNorm after the sum.
    """

    marks: tuple[str, ...]
    branches: tuple[str, ...]
    folded: tuple[str, ...]
    post: str = ""


_MOBILEONE = BlockNames(("rbr_conv",), ("rbr_conv", "rbr_scale", "rbr_skip"), ("reparam_conv",))  # Apple's, FastViT
_TIMM = BlockNames(("conv_kxk",), ("conv_kxk", "conv_1x1", "conv_scale", "identity"), ("reparam_conv",))  # timm's
_BLOCKS = (
    # the original, RepVGGplus, QARepVGG, YOLOv6, yolov7, mmyolo (there with alpha: PP-YOLOE+)
    BlockNames(
        ("rbr_dense", "rbr_1x1"), ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_avg"), ("rbr_reparam",), post="bn"
    ),
    _MOBILEONE,
    _TIMM,  # RepVGG and MobileOne
    # mmpretrain; super-gradients (YOLO-NAS)
    BlockNames(
        ("branch_3x3", "branch_1x1"),
        ("branch_3x3", "branch_1x1", "branch_norm", "no_conv_branch", "identity"),
        ("branch_reparam", "rbr_reparam"),
        post="post_bn",
    ),
    # mmpretrain's MobileOne
    BlockNames(("branch_conv_list",), ("branch_conv_list", "branch_scale", "branch_norm"), ("branch_reparam",)),
    # large kernels of RepLKNet and FastViT, Apple's and timm's
    BlockNames(("lkb_origin", "small_conv"), ("lkb_origin", "small_conv"), ("lkb_reparam",)),
    BlockNames(("large_conv", "small_conv"), ("large_conv", "small_conv"), ("reparam_conv",)),
)


class Reading(NamedTuple):
    """One way to understand a block.

    Attributes:
        branches: What is summed, the largest kernel first.
        post_bn: After the sum.
        like: The convolution with the largest kernel: size, stride, padding, dilation and groups of the folded one.
        parts: Children, parameters and buffers of the block that the folded convolution stands for.
        folded: The names under which the block's own forward may look for it.
        channels: Of the block's input.
    """

    branches: tuple[Branch, ...]
    post_bn: nn.BatchNorm2d | None
    like: nn.Conv2d
    parts: frozenset[str]
    folded: tuple[str, ...]
    channels: int


class Candidate(NamedTuple):
    """What may be a block of another project.

    Attributes:
        readings: The ways to read it, the likeliest first.
        certain: Its names leave no doubt: where no reading is right, something is wrong.
        parts: The names of its branches.
    """

    readings: Iterable[Reading]
    certain: bool
    parts: tuple[str, ...]


def read_block(block: nn.Module, where: str) -> Candidate | None:
    """What a module is: by the names of its parts, or because they look like branches. None for any other module.

    Raises:
        CheckpointError: A part of a block of known names is of no known kind, or its branches are no one convolution.
    """
    if isinstance(block, (TrainingBlock, DeployBlock, nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    known = {name for names in _BLOCKS for name in names.branches}
    named = {name: child for name, child in block.named_children() if name in known}
    # yolov7: the parts of its branches have no names, and so prove nothing
    doubtful = any(type(child) is nn.Sequential and "0" in child._modules for child in named.values())
    try:
        for read in (_read_named, _read_mixer, _read_ghost, _read_scaled):
            readings = read(block, where)
            if readings:
                return Candidate(readings, not doubtful, tuple(sorted(readings[0].parts)))
    except CheckpointError:
        if not doubtful:
            raise
        return Candidate((), False, tuple(named))
    unknown = [name for name, _ in block.named_children() if name.startswith("rbr_")]
    unknown = [name for name in unknown if name not in ("rbr_reparam", "rbr_skip")]
    if unknown:
        raise CheckpointError(
            f"{where}: {type(block).__name__} has the parts {', '.join(unknown)}, which are not those of a known block",
            remedy=f"{_ONE_SUM}; give convert={{{type(block).__name__}: …}}",
        )
    parts = _parallel_parts(block)
    return Candidate(_nominate(block, parts), False, tuple(parts)) if parts else None


@torch.no_grad()
def fold_reading(reading: Reading, dtype: torch.dtype) -> nn.Conv2d:
    """The one convolution that a reading comes to, computed in float64 and rounded once to `dtype`."""
    like = reading.like
    folded = fold_in_float64(reading.branches, reading.post_bn, like.groups, result=dtype)
    shape = (like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding, like.dilation)
    conv = nn.Conv2d(*shape, like.groups, device="meta")  # type: ignore[arg-type]
    assert folded.bias is not None
    conv.weight = nn.Parameter(folded.kernel, requires_grad=False)
    conv.bias = nn.Parameter(folded.bias, requires_grad=False)
    return conv


def find_parallel(block: nn.Module) -> list[str]:
    """Parts that may be branches, by signs too weak to nominate a block: for a message.

    Linear parts of one stride from the same to the same number of channels, poolings among them.
    """
    if isinstance(block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return []
    groups = _group_linear(block)
    pools = [(name, _stride(part)) for name, part in _flatten(block) if isinstance(part, nn.AvgPool2d)]
    for (ins, outs, _, stride), group in groups.items():
        names = group + [name for name, own in pools if ins == outs and own == stride]
        if len(names) > 1:
            return names
    return []


def _group_linear(block: nn.Module) -> dict[tuple[int, int, int, tuple[int, int]], list[str]]:
    """Linear parts with a convolution, by what branches share: input and output channels, groups, stride."""
    found: dict[tuple[int, int, int, tuple[int, int]], list[str]] = {}
    for name, part in _flatten(block):
        convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
        leaves = [module for module in part.modules() if not list(module.children())]
        if convs and all(isinstance(leaf, _LINEAR) or _is_idle(leaf) or _is_bn(leaf) for leaf in leaves):
            key = (convs[0].in_channels, convs[-1].out_channels, convs[0].groups, _stride(part))
            found.setdefault(key, []).append(name)
    return found


def _stride(part: nn.Module) -> tuple[int, int]:
    """Input pixels for one output pixel, vertically and horizontally."""
    height, width = 1, 1
    for module in part.modules():
        if isinstance(module, (nn.Conv2d, nn.AvgPool2d)):
            stride = module.stride
            down, right = stride if isinstance(stride, tuple) else (stride, stride)
            height, width = height * down, width * right
    return height, width


def _parallel_parts(block: nn.Module) -> list[str]:
    """The names of two or more parts that look like branches: linear, from the same to the same number of channels."""
    parts = dict(_flatten(block))
    for group in _group_linear(block).values():
        simple = [name for name in group if _conv_bn(parts[name])]  # others may be an SE, behind the sum
        names = simple if len(simple) > 1 else group
        convs = [module for name in names for module in parts[name].modules() if isinstance(module, nn.Conv2d)]
        # Bare convolutions follow one another as often as not; those of branches are depthwise or of odd shapes. And
        # where all kernels are of one size, they are one projection for each of several inputs.
        bare = all(isinstance(parts[name], nn.Conv2d) for name in names)
        odd = any(conv.groups > 1 or len(set(conv.kernel_size)) > 1 for conv in convs)
        if len(names) > 1 and len({conv.kernel_size for conv in convs}) > 1 and (odd or not bare):
            return names
    return []


def _nominate(block: nn.Module, names: Sequence[str]) -> Iterator[Reading]:
    """The ways to read a block whose branches have names that mean nothing: as their sum.

    With or without the input itself, and with each BatchNorm beside them as that of the identity, as the one after the
    sum, or as neither. RT-DETR, D-FINE, ultralytics, yolov9 (`conv1`, `conv2`), YOLOv10 and RepViT (`conv`, `conv1`).
    """
    taken = {name.partition(".")[0] for name in names}
    lists = {name for name in taken if isinstance(block._modules[name], nn.ModuleList)}
    own = ("conv",) if "conv" in taken or "conv" not in block._modules else ()
    summed = [part for name, part in _flatten(block) if name in names or name.partition(".")[0] in lists]
    try:
        like = _largest(summed, "")
        branches = [_read_part(part, "", like) for part in summed]
    except CheckpointError:
        return
    alpha = block._parameters.get("alpha")
    if alpha is not None and alpha.numel() == 1:
        top = like.weight[0, 0].numel()
        branches = [branch if _taps(branch) == top else branch._replace(scale=alpha) for branch in branches]
        taken.add("alpha")
    norms = {name: cast(nn.BatchNorm2d, child) for name, child in block.named_children() if _is_bn(child)}
    norms = norms if len(norms) < 3 else {}
    square = like.in_channels == like.out_channels and like.stride == (1, 1)
    for bare, *roles in product([False, True], *[["skip", "post", "none"]] * len(norms)):
        skips = [Branch(None, bn=norm) for norm, role in zip(norms.values(), roles, strict=True) if role == "skip"]
        skips += [Branch(None)] if bare else []
        post = [norm for norm, role in zip(norms.values(), roles, strict=True) if role == "post"]
        used = {name for name, role in zip(norms, roles, strict=True) if role != "none"}
        if len(post) < 2 and (square or not skips):
            both = _sort([*branches, *skips])
            parts = frozenset(taken | used)
            yield Reading(both, next(iter(post), None), like, parts, own, like.in_channels)


def _read_named(block: nn.Module, where: str) -> list[Reading]:
    children = dict(block.named_children())
    for names in _BLOCKS:
        if not all(mark in children for mark in names.marks):
            continue
        summed = [(name, part) for name, part in _flatten(block) if name.partition(".")[0] in names.branches]
        if not any(isinstance(module, nn.Conv2d) for _, part in summed for module in part.modules()):
            continue
        like = _largest([part for _, part in summed], where)
        branches = {name: _read_part(part, f"{where}.{name}", like) for name, part in summed}
        pointwise, parts = names.marks[-1], {name.partition(".")[0] for name in branches}
        alpha = getattr(block, "alpha", None)
        if isinstance(alpha, (Tensor, float, int)) and pointwise in branches:
            scale = alpha if isinstance(alpha, Tensor) else torch.tensor(float(alpha), device=like.weight.device)
            branches[pointwise] = branches[pointwise]._replace(scale=scale)
            parts |= {"alpha"}
        bn = children.get(names.post)
        post = _usable_bn(bn, f"{where}.{names.post}") if bn is not None and _is_bn(bn) else None
        if post is not None and names.post == "bn" and not isinstance(getattr(block, "se", nn.Identity()), nn.Identity):
            raise CheckpointError(
                f"{where}: QARepVGG with SE applies its last BatchNorm after the SE block, which no convolution can "
                "absorb",
                remedy="train without SE, or deploy the training form",
            )
        taken = frozenset(parts | ({names.post} if post is not None else set()))
        first = Reading(_sort(branches.values()), post, like, taken, names.folded, like.in_channels)
        one = branches.get(pointwise)
        if post is None or one is None or one.kernel is None or one.bn is not None:
            return [first]
        # QARepVGG's GRE: the BatchNorm stands after 1×1 and identity only
        plain = [name for name, branch in branches.items() if branch == Branch(None)]
        kernel = one.kernel.detach().double()
        kernel = kernel + identity_kernel(like.out_channels, like.groups, kernel).kernel if plain else kernel
        rest = [branch for name, branch in branches.items() if name not in (*plain, pointwise)]
        second = _sort([*rest, one._replace(kernel=kernel, bn=post)])
        return [first, first._replace(branches=second, post_bn=None)]
    return []


def _read_mixer(block: nn.Module, where: str) -> list[Reading]:
    """FastViT's RepMixer: x + layer_scale · (mixer(x) − norm(x)), both of them blocks of MobileOne."""
    mixer, norm = (block._modules.get(name) for name in ("mixer", "norm"))
    names = next((n for n in (_MOBILEONE, _TIMM) if n.marks[0] in getattr(mixer, "_modules", {})), None)
    if mixer is None or norm is None or names is None:
        return []
    summed = [[(n, p) for n, p in _flatten(side) if n.partition(".")[0] in names.branches] for side in (mixer, norm)]
    like = _largest([part for side in summed for _, part in side], where)
    scale = getattr(block, "layer_scale", None)
    if isinstance(scale, nn.Module):
        scale = next(scale.parameters(), None)
    factor = scale if isinstance(scale, Tensor) else torch.ones((), device=like.weight.device)
    branches = [Branch(None)]
    for side, sign, name in zip(summed, (factor, -factor), ("mixer", "norm"), strict=True):
        branches += [_read_part(part, f"{where}.{name}.{n}", like)._replace(scale=sign) for n, part in side]
    parts = frozenset({"mixer", "norm", "layer_scale"})
    return [Reading(_sort(branches), None, like, parts, ("reparam_conv",), like.in_channels)]


def _read_ghost(block: nn.Module, where: str) -> list[Reading]:
    """RepGhost: behind `primary_conv`, a depthwise convolution and BatchNorms of its input."""
    names = ("primary_conv", "cheap_operation", "fusion_conv", "fusion_bn")
    primary, cheap, convs, norms = (block._modules.get(name) for name in names)
    first = next((m for m in primary.modules() if isinstance(m, nn.Conv2d)), None) if primary is not None else None
    if first is None or cheap is None or convs is None or norms is None or not list(norms.children()):
        return []
    like = _largest([cheap], where)
    branches = [_read_part(cheap, f"{where}.cheap_operation", like)]
    for conv, norm in zip(convs.children(), norms.children(), strict=True):
        branch = _read_part(conv, f"{where}.fusion_conv", like)
        branches.append(branch._replace(bn=_read_part(norm, f"{where}.fusion_bn", like).bn))
    return [Reading(_sort(branches), None, like, frozenset(names[1:]), ("cheap_operation",), first.in_channels)]


def _read_scaled(block: nn.Module, where: str) -> list[Reading]:
    """YOLOv6's LinearAddBlock: branches with a factor a channel each, then one BatchNorm."""
    pairs = {"conv": "scale_conv", "conv_1x1": "scale_1x1", "": "scale_identity"}
    children = dict(block.named_children())
    bn = children.get("bn")
    if not {"conv", "scale_conv", "scale_1x1"} <= children.keys() or bn is None:
        return []
    like = _largest([children["conv"]], where)
    branches = []
    for name, scale in pairs.items():
        if scale in children:
            part = children[name] if name else nn.Identity()
            factor = cast(Tensor, children[scale].weight)
            branches.append(_read_part(part, f"{where}.{name}", like)._replace(scale=factor))
    parts = frozenset({*pairs, *pairs.values(), "bn"})
    return [Reading(_sort(branches), _usable_bn(bn, f"{where}.bn"), like, parts, (), like.in_channels)]


def _flatten(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children, those of a list one by one (`name.0`)."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", item) for index, item in enumerate(child))
        else:
            yield name, child


def _conv_bn(part: nn.Module) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """Convolution and BatchNorm of a part that has nothing else, whatever it calls them."""
    if isinstance(part, nn.Conv2d):
        return part, None
    inner = [child for child in part.children() if not _is_idle(child)]
    convs, norms = ([c for c in inner if isinstance(c, nn.Conv2d)], [c for c in inner if _is_bn(c)])
    if len(convs) != 1 or inner not in (convs, [*convs, *norms[:1]]):
        return None
    return convs[0], norms[0] if norms else None


def _is_idle(part: nn.Module) -> bool:
    return isinstance(part, (nn.Identity, nn.Dropout, nn.Dropout2d)) or (isinstance(part, nn.Sequential) and not part)


def _is_bn(part: nn.Module) -> bool:
    """A BatchNorm, or one that is frozen (RT-DETR, torchvision) and so of another class; with nothing behind it."""
    frozen = all(isinstance(getattr(part, name, None), Tensor) for name in ("weight", "running_mean", "running_var"))
    return (isinstance(part, _BatchNorm) or frozen) and all(_is_idle(child) for child in part.children())


def _read_part(part: nn.Module, where: str, like: nn.Conv2d) -> Branch:
    if _is_bn(part):
        return Branch(None, bn=_usable_bn(part, where))
    if isinstance(part, nn.AvgPool2d):
        size = part.kernel_size if isinstance(part.kernel_size, tuple) else (part.kernel_size, part.kernel_size)
        unit = identity_kernel(like.out_channels, like.groups, like.weight.detach()).kernel
        return Branch(unit.double().expand(-1, -1, *size) / (size[0] * size[1]))
    pair = _conv_bn(part)
    if pair is not None:
        conv, bn = pair
        return Branch(conv.weight, conv.bias, None if bn is None else _usable_bn(bn, where))
    if isinstance(part, nn.Identity) or _returns_its_input(part):
        return Branch(None)
    raise CheckpointError(
        f"{where}: expected a convolution with or without BatchNorm, found {type(part).__name__}",
        remedy=f"{_ONE_SUM}; give convert= the block's class",
    )


def _returns_its_input(part: nn.Module) -> bool:
    """A bare identity of a class of its own, as super-gradients' Residual."""
    if any(True for _ in (*part.children(), *part.parameters(), *part.buffers())):
        return False
    x = torch.full((1, 1, 1, 1), -1.0)
    try:
        return part(x) is x and float(x) == -1
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def _usable_bn(bn: nn.Module, where: str) -> nn.BatchNorm2d:
    """A BatchNorm with running statistics; SyncBatchNorm is one, too."""
    if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
        message = f"{where}: its BatchNorm has no running statistics, so it has no eval() form"
        raise CheckpointError(message, remedy="train with track_running_stats=True")
    return cast(nn.BatchNorm2d, bn)


def _largest(parts: Sequence[nn.Module], where: str) -> nn.Conv2d:
    """The convolution whose kernel the others fit into; all zero-padded so that they give maps of one size.

    Raises:
        CheckpointError: There is none.
    """
    convs = [pair[0] for pair in map(_conv_bn, parts) if pair is not None]
    if not convs:
        kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
        raise CheckpointError(f"{where}: no convolution among its branches, but {kinds}", remedy=_ONE_SUM)
    largest = max(convs, key=lambda conv: conv.weight[0, 0].numel())
    for conv in convs:
        reach = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        sizes = zip(conv.kernel_size, largest.kernel_size, conv.dilation, largest.dilation, strict=True)
        fits = all(k % 2 and (k == 1 or (k <= large and d == other)) for k, large, d, other in sizes)
        facts = {
            "kernel and dilation": ((conv.kernel_size, conv.dilation) if not fits else True, True),
            "padding": ({"same": reach, "valid": (0, 0)}.get(str(conv.padding), conv.padding), reach),
            "padding mode": (conv.padding_mode, "zeros"),
            "stride": (conv.stride, largest.stride),
            "groups": (conv.groups, largest.groups),
            "channels": ((conv.in_channels, conv.out_channels), (largest.in_channels, largest.out_channels)),
        }
        for what, (found, expected) in facts.items():
            if found != expected:
                like = f"one that fits into {largest.kernel_size}, {largest.dilation}" if expected is True else expected
                raise CheckpointError(
                    f"{where}: {what} of a branch: expected {like}, found {found}",
                    remedy="such a block cannot be folded; deploy its training form",
                )
    return largest


def _taps(branch: Branch) -> int:
    return 0 if branch.kernel is None else branch.kernel[0, 0].numel()


def _sort(branches: Iterable[Branch]) -> tuple[Branch, ...]:
    return tuple(sorted(branches, key=_taps, reverse=True))

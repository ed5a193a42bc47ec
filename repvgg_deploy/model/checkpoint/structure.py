"""Official names and shapes → the architecture they are of; and whether every tensor of it is there, and no other.

What does not add up is refused, naming the tensor. Groups follow from a kernel's second dimension, because the input
channels are the output channels of the layer before.
Source: the shapes of https://github.com/DingXiaoH/RepVGG.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import CheckpointError, InputError
from ...specs.values import BlockKind, Form, SePosition, VariantSpec
from ...specs.variants import name_variant
from .lazy import listing, printable

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
AUXILIARY = re.compile(r"(stage[123]\w*_aux)\.")
_INCOMPLETE = "give the complete checkpoint, or save it again: torch.save(model.state_dict(), 'model.pth')"
_COUNTER = ".num_batches_tracked"
_BLOCK = re.compile(r"(stage0|stage[1-4]\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Structure:
    """What the tensors are of.

    Attributes:
        spec: Its strides are 2 for each stage without an identity branch, which tensors do not tell.
        headless: There is no classifier; `spec` has one class in its place.
        notes: What is absent, in sentences.
    """

    spec: VariantSpec
    form: Form
    headless: bool = False
    notes: tuple[str, ...] = ()


def infer_structure(shapes: Shapes, *, split: int = 0) -> Structure:
    """Finds the architecture from official names and shapes.

    Args:
        shapes: By official name.
        split: Blocks of RepVGGplus's `stage3_first`, 0 where the third stage is whole.

    Raises:
        CheckpointError: Tensors are missing, disagree, or the form is mixed; the message names the first.
    """
    blocks = _group_by_block(shapes)
    form = _find_form(blocks)
    depths = _find_depths(blocks)
    names = ["stage0", *(f"stage{stage}.{index}" for stage in range(1, 5) for index in range(depths[stage - 1]))]
    kernels = _find_kernels(shapes, names, form)
    kind = _find_kind(shapes, form)
    se, reduction = _find_se(shapes, names, kernels)
    if se != "none" and (kind.startswith("qarepvgg") or _leftover_bn(blocks)):
        raise CheckpointError(
            "is a QARepVGG with SE blocks: its last BatchNorm follows the SE block, so that no convolution can "
            "absorb it",
            remedy="train with blocks of kind 'repvgg', or QARepVGG without SE",
        )
    firsts = [name for name in names if name == "stage0" or name.endswith(".0")]
    # An identity branch proves a stride of 1; without one it is 2, as in every published variant.
    kept = [name for name in firsts if kernels[name].in_channels == kernels[name].width]
    dense = {name for name in kept if f"{name}.rbr_identity.weight" in shapes}
    headless = "linear.weight" not in shapes and "linear.bias" not in shapes
    classes = 1 if headless else _require(shapes, "linear.weight", 2)[0]
    auxiliary = _find_auxiliary(shapes, depths, split=split)
    try:
        spec = VariantSpec(
            name="custom",
            depths=depths,
            widths=_five(kernels[name].width for name in firsts),
            groups=tuple(kernels[name].groups for name in names),
            se=se,
            se_reduction=reduction,
            strides=_five(1 if name in dense else 2 for name in firsts),
            block=kind,
            num_classes=classes,
            auxiliary_heads=auxiliary and form == "training",
        )
    except InputError as error:
        raise CheckpointError(f"the tensors do not form a RepVGG: {error.message}", remedy=_INCOMPLETE) from error
    published = name_variant(spec)
    notes = []
    if split and form == "training" and not auxiliary:
        notes.append("the auxiliary heads of RepVGGplus are absent; only training uses them")
    if headless:
        notes.append("there is no classifier: a backbone, which --features exports")
    return Structure(dataclasses.replace(spec, name=published or "custom"), form, headless, tuple(notes))


class _Kernel(NamedTuple):
    in_channels: int
    width: int
    groups: int


def _group_by_block(shapes: Shapes) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for name in shapes:
        match = _BLOCK.match(name)
        if match:
            blocks.setdefault(match[1], []).append(name[match.end() :])
    return blocks


def _find_form(blocks: Mapping[str, list[str]]) -> Form:
    branches = ("rbr_dense.", "rbr_1x1", "rbr_identity.")
    deploy = [name for name, parts in blocks.items() if any(part.startswith("rbr_reparam.") for part in parts)]
    training = [name for name, parts in blocks.items() if any(part.startswith(branches) for part in parts)]
    if deploy and training:
        raise CheckpointError(
            f"is half converted: {listing(deploy)} in deploy form (rbr_reparam), {listing(training)} in training "
            f"form (rbr_dense)",
            remedy="convert the training-form checkpoint again, all of it: repvgg-export --ckpt train.pth "
            "--save-deploy deploy.pth --out model.onnx",
        )
    has_se = any(part.startswith(("se.", "post_se.")) for parts in blocks.values() for part in parts)
    leftover = [] if has_se else _leftover_bn(blocks)
    if leftover:
        raise CheckpointError(
            f"is half converted: {listing(leftover)} in deploy form (rbr_reparam), but with the last BatchNorm "
            f"of a QARepVGG beside it",
            remedy="give the training-form checkpoint",
        )
    return "deploy" if deploy else "training"


def _leftover_bn(blocks: Mapping[str, list[str]]) -> list[str]:
    """Blocks in deploy form that still have the last BatchNorm of QARepVGG."""
    return [name for name, parts in blocks.items() if {"rbr_reparam.weight", "bn.weight"} <= set(parts)]


def _find_depths(blocks: Mapping[str, list[str]]) -> tuple[int, int, int, int]:
    depths = []
    for stage in range(1, 5):
        indexes = sorted(int(name.split(".")[1]) for name in blocks if name.startswith(f"stage{stage}."))
        gap = next((expected for expected, found in enumerate(indexes) if expected != found), None)
        if not indexes or gap is not None:
            raise CheckpointError(f"is incomplete: no tensor of block stage{stage}.{gap or 0}", remedy=_INCOMPLETE)
        depths.append(len(indexes))
    first, second, third, fourth = depths
    return first, second, third, fourth


def _find_kernels(shapes: Shapes, names: list[str], form: Form) -> dict[str, _Kernel]:
    part = "rbr_dense.conv.weight" if form == "training" else "rbr_reparam.weight"
    missing = [f"{name}.{part}" for name in names if f"{name}.{part}" not in shapes]
    if missing:
        message = f"is incomplete: {len(missing)} of {len(names)} 3×3 kernels are missing, first {missing[0]}"
        raise CheckpointError(message, remedy=_INCOMPLETE)
    kernels: dict[str, _Kernel] = {}
    channels = 3
    for name in names:
        key = f"{name}.{part}"
        shape = _require(shapes, key, 4)
        width, per_group = shape[:2]
        if name == "stage0" and shape[2:] == (3, 3) and per_group != channels:
            # One channel would divide three, too: a grayscale stem must not pass for three groups, which no RepVGG has.
            reads = (
                "1 input channel (grayscale, not RGB)" if per_group == 1 else f"{per_group} input channels (not RGB)"
            )
            raise CheckpointError(
                f"{key} has the shape {list(shape)}: it reads {reads}, expected 3",
                remedy="load it with its own code, then export_module(model, example_inputs, 'model.onnx'); images "
                "are then prepared by you",
            )
        if shape[2:] != (3, 3) or width < 1 or per_group < 1 or channels % per_group:
            raise CheckpointError(
                f"{key} has the shape {list(shape)}, expected [C, I, 3, 3] with I a divisor of the {channels} "
                f"channels before it",
                remedy="give the checkpoint of a RepVGG whose layers are 3×3 convolutions of one path",
            )
        kernels[name] = _Kernel(channels, width, channels // per_group)
        channels = width
    return kernels


def _require(shapes: Shapes, name: str, dimensions: int) -> Shape:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"is incomplete: {name} is missing", remedy=_INCOMPLETE)
    if len(shape) != dimensions or min(shape) < 1:
        message = f"{name} has the shape {list(shape)}, expected {dimensions} dimensions"
        raise CheckpointError(message, remedy=_INCOMPLETE)
    return shape


def _find_kind(shapes: Shapes, form: Form) -> BlockKind:
    if form == "deploy":
        return "repvgg"
    if any(name.endswith(".rbr_1x1.weight") for name in shapes):
        return "qarepvgg_v2"
    if not any(".rbr_1x1." in name for name in shapes):
        return "plain"
    return "qarepvgg_v1" if any(re.fullmatch(r"stage[\d.]+\.bn\.weight", name) for name in shapes) else "repvgg"


def _find_se(shapes: Shapes, names: list[str], kernels: Mapping[str, _Kernel]) -> tuple[SePosition, int]:
    position: SePosition
    for part, position in (("se", "before_relu"), ("post_se", "after_relu")):
        if not any(f".{part}." in name for name in shapes):
            continue
        hidden = {name: _require(shapes, f"{name}.{part}.down.weight", 4)[0] for name in names}
        widest = max(names, key=lambda name: kernels[name].width)
        # width // reduction = hidden holds for a range of reductions; 16 and 4 are the published ones.
        low = max(kernels[name].width // (hidden[name] + 1) + 1 for name in names)
        high = min(kernels[name].width // hidden[name] for name in names)
        if low <= high:
            return position, next((reduction for reduction in (16, 4) if low <= reduction <= high), high)
        raise CheckpointError(
            f"the SE block of {widest} has {hidden[widest]} hidden channels of {kernels[widest].width}, others "
            f"another reduction",
            remedy="give a RepVGG whose SE blocks share one reduction",
        )
    return "none", 16


def _find_auxiliary(shapes: Shapes, depths: tuple[int, ...], *, split: int) -> bool:
    """Whether RepVGGplus's auxiliary classifiers are there."""
    present = {match[1] for name in shapes if (match := AUXILIARY.match(name))}
    expected = {"stage1_aux", "stage2_aux", "stage3_first_aux"}
    if present and present != expected:
        missing = listing(sorted(expected - present))
        raise CheckpointError(f"is incomplete: the auxiliary heads {missing} are missing", remedy=_INCOMPLETE)
    if present and split not in (0, depths[2] // 2):
        raise CheckpointError(
            f"its third stage is split after {split} of {depths[2]} blocks, expected the middle, where its "
            f"auxiliary head stands",
            remedy="remove the tensors of the auxiliary heads (stage…_aux): inference does not need them",
        )
    return bool(present)


def _five(values: Iterable[int]) -> tuple[int, int, int, int, int]:
    first, second, third, fourth, fifth = values
    return first, second, third, fourth, fifth


def expected_shapes(spec: VariantSpec, form: Form) -> dict[str, Shape]:
    """Name → shape of every tensor in the state dict of `RepVGG(spec, form)`, in order; computed without torch.

    Raises:
        CheckpointError: No such model can be built.
    """
    if form == "training" and spec.se != "none" and spec.block.startswith("qarepvgg"):
        raise CheckpointError(
            f"{spec.name}: QARepVGG with SE applies its last BatchNorm after the SE block, which no convolution can "
            f"absorb",
            remedy="train with a block of kind 'repvgg', or without SE",
        )
    shapes: dict[str, Shape] = {}
    for layer in spec.layers():
        ins, outs, name = layer.in_channels // layer.groups, layer.out_channels, layer.name
        if form == "deploy":
            shapes |= {f"{name}.rbr_reparam.weight": (outs, ins, 3, 3), f"{name}.rbr_reparam.bias": (outs,)}
        else:
            shapes |= {f"{name}.rbr_dense.conv.weight": (outs, ins, 3, 3), **_batch_norm(f"{name}.rbr_dense.bn", outs)}
            if spec.block == "qarepvgg_v2":
                shapes[f"{name}.rbr_1x1.weight"] = (outs, ins, 1, 1)
            elif spec.block != "plain":
                shapes |= {f"{name}.rbr_1x1.conv.weight": (outs, ins, 1, 1), **_batch_norm(f"{name}.rbr_1x1.bn", outs)}
                shapes |= _batch_norm(f"{name}.rbr_identity", outs) if layer.has_identity else {}
            shapes |= _batch_norm(f"{name}.bn", outs) if spec.block.startswith("qarepvgg") else {}
        if spec.se != "none":
            se, hidden = f"{name}.{'se' if spec.se == 'before_relu' else 'post_se'}", outs // spec.se_reduction
            shapes |= {f"{se}.down.weight": (hidden, outs, 1, 1), f"{se}.down.bias": (hidden,)}
            shapes |= {f"{se}.up.weight": (outs, hidden, 1, 1), f"{se}.up.bias": (outs,)}
    shapes |= {"linear.weight": (spec.num_classes, spec.widths[4]), "linear.bias": (spec.num_classes,)}
    if spec.auxiliary_heads and form == "training":
        for head, width in zip(("stage1_aux", "stage2_aux", "stage3_first_aux"), spec.widths[1:4], strict=True):
            shapes |= {f"{head}.0.conv.weight": (width, width, 3, 3), **_batch_norm(f"{head}.0.bn", width)}
            shapes |= {f"{head}.3.weight": (spec.num_classes, width), f"{head}.3.bias": (spec.num_classes,)}
    return shapes


def _batch_norm(name: str, channels: int) -> dict[str, Shape]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (channels,) for part in vectors}, f"{name}{_COUNTER}": ()}


def check_complete(shapes: Shapes, expected: Shapes, extra: tuple[str, ...] = (), *, headless: bool = False) -> None:
    """Compares name by name and shape by shape. BatchNorm's step counter may be missing: inference never looks at it.

    Raises:
        CheckpointError: Something is missing (but the classifier where there is none), extra, or of another shape.
    """
    needed = {name: shape for name, shape in expected.items() if not name.endswith(_COUNTER)}
    if headless:
        needed = {name: shape for name, shape in needed.items() if not name.startswith("linear.")}
    missing = [name for name in needed if name not in shapes]
    if missing:
        message = f"is incomplete: {len(missing)} of {len(expected)} tensors are missing, first {missing[0]}"
        raise CheckpointError(message, remedy=_INCOMPLETE)
    surplus = [*extra, *(name for name in shapes if name not in expected)]
    if surplus:
        raise CheckpointError(
            f"has {len(surplus)} tensors that a RepVGG of this form does not have: {listing(surplus)}",
            remedy="a bigger network: load it with its own code, then export_module(model, example_inputs, "
            "'model.onnx'); otherwise remove these tensors and save it again",
        )
    for name, shape in needed.items():
        if shapes[name] != shape:
            message = f"{name} has the shape {list(shapes[name])}, expected {list(shape)}"
            raise CheckpointError(message, remedy=_INCOMPLETE)


def match_architecture(shapes: Shapes, found: Structure, arch: VariantSpec) -> VariantSpec:
    """The architecture that was asked for, with what only the tensors tell: class count, block kind, auxiliary heads.

    Args:
        shapes: By official name.
        found: What the tensors are of.
        arch: What they should be of; its strides count, because tensors do not tell them.

    Raises:
        CheckpointError: They are of another; the message names the first tensor that differs and the variant that fits.
    """
    spec, form = found.spec, found.form
    block = spec.block if form == "training" else arch.block
    wanted = dataclasses.replace(arch, num_classes=spec.num_classes, block=block, auxiliary_heads=spec.auxiliary_heads)
    if block.startswith("qarepvgg") and wanted.se != "none":
        raise CheckpointError(
            f"is asked for as {arch.name}, a QARepVGG with SE blocks: its last BatchNorm follows the SE block "
            f"and cannot be folded",
            remedy="train with blocks of kind 'repvgg', or QARepVGG without SE",
        )
    difference = _first_difference(shapes, expected_shapes(wanted, form))
    if difference is None or (found.headless and difference.startswith("linear.")):
        return wanted
    published = spec.name != "custom"
    remedy = f"give --arch {spec.name}, or leave --arch out"
    raise CheckpointError(
        f"is not of the architecture {arch.name}: {difference}; the tensors fit "
        f"{spec.name if published else describe_custom(spec)}",
        remedy=remedy if published else "leave --arch out, or give a TOML file that defines this variant",
    )


def describe_custom(spec: VariantSpec) -> str:
    """A variant without a published name, in words."""
    groups = "" if max(spec.groups) == 1 else f", groups up to {max(spec.groups)}"
    se = "" if spec.se == "none" else f", SE {spec.se.replace('_', ' ')} 1/{spec.se_reduction}"
    return f"a custom variant (depths {list(spec.depths)}, widths {list(spec.widths)}{groups}{se})"


def _first_difference(shapes: Shapes, expected: Shapes) -> str | None:
    for name, shape in expected.items():
        if name.endswith(_COUNTER):
            continue
        if name not in shapes:
            return f"{name} is expected with the shape {list(shape)}, found none"
        if shapes[name] != shape:
            return f"{name} is expected with the shape {list(shape)}, found {list(shapes[name])}"
    surplus = next((name for name in shapes if name not in expected), None)
    if surplus is None:
        return None
    return f"{printable(surplus)} is not expected, found with the shape {list(shapes[surplus])}"

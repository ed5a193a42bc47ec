"""Names of architectures → VariantSpec, and what follows from a spec by arithmetic. No torch.

Source: Ding et al., RepVGG: Making VGG-style ConvNets Great Again, CVPR 2021 (https://arxiv.org/abs/2101.03697), table
2 and 3; D2se and RepVGGplus from https://github.com/DingXiaoH/RepVGG.

The layers of a variant's deploy form, one row each: what they are and what they cost. Standard library only.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .values import BlockKind, Form, LayerSpec, ModelSpec, SePosition, VariantSpec

_DEPTHS = {"A": (2, 4, 14, 1), "B": (4, 6, 16, 1), "D": (8, 14, 24, 1)}
_MULTIPLIERS = {
    "A0": (0.75, 0.75, 0.75, 2.5),
    "A1": (1.0, 1.0, 1.0, 2.5),
    "A2": (1.5, 1.5, 1.5, 2.75),
    "B0": (1.0, 1.0, 1.0, 2.5),
    "B1": (2.0, 2.0, 2.0, 4.0),
    "B2": (2.5, 2.5, 2.5, 5.0),
    "B3": (3.0, 3.0, 3.0, 5.0),
    "D2": (2.5, 2.5, 2.5, 5.0),
}
_BASE_WIDTHS = (64, 128, 256, 512)
_GROUPED_END = 27  # groups stand on layers 2, 4, …, 26


def stage_widths(multipliers: tuple[float, float, float, float]) -> tuple[int, int, int, int, int]:
    """Channels of the stem and of stages 1 to 4 for the paper's width multipliers (a, a, a, b)."""
    first, second, third, fourth = (int(base * m) for base, m in zip(_BASE_WIDTHS, multipliers, strict=True))
    return (min(64, int(64 * multipliers[0])), first, second, third, fourth)


def alternating_groups(depths: tuple[int, int, int, int], groups: int) -> tuple[int, ...]:
    """`groups` on layers 2, 4, …, 26 and 1 elsewhere (layer 0 is the stem), as in the paper's g2 and g4 variants."""
    return tuple(
        groups if index >= 2 and index % 2 == 0 and index < _GROUPED_END else 1 for index in range(1 + sum(depths))
    )


def _published(name: str, base: str, groups: int = 1, se: SePosition = "none") -> VariantSpec:
    depths = _DEPTHS[base[0]]
    plus = se == "after_relu"
    return VariantSpec(
        name=name,
        depths=depths,
        widths=stage_widths(_MULTIPLIERS[base]),
        groups=alternating_groups(depths, groups),
        se=se,
        se_reduction=4 if plus else 16,
        auxiliary_heads=plus,
    )


PUBLISHED: dict[str, VariantSpec] = {
    spec.name: spec
    for spec in (
        *(_published(name, name) for name in ("A0", "A1", "A2", "B0", "B1")),
        _published("B1g2", "B1", 2),
        _published("B1g4", "B1", 4),
        _published("B2", "B2"),
        _published("B2g2", "B2", 2),
        _published("B2g4", "B2", 4),
        _published("B3", "B3"),
        _published("B3g2", "B3", 2),
        _published("B3g4", "B3", 4),
        _published("D2se", "D2", se="before_relu"),
        _published("RepVGGplus-L2pse", "D2", se="after_relu"),
    )
}
"""The 15 published variants with 1,000 classes."""


def get_variant(name: str, *, num_classes: int | None = None) -> VariantSpec:
    """Finds a variant by its published name (`B2`, `RepVGG-B2`, any case) or by the path of a TOML file.

    Args:
        name: Published name, with or without `RepVGG-`, or a path that ends in `.toml`.
        num_classes: Rows of the classifier; None keeps the definition's own.

    Raises:
        InputError: No such variant, or the file does not define one.
    """
    if name.lower().endswith(".toml"):
        spec = load_variant(Path(name))
    else:
        folded = {_fold(known): known for known in PUBLISHED}
        if _fold(name) not in folded:
            raise InputError(
                f"unknown variant {name!r}",
                remedy=f"choose one of {', '.join(PUBLISHED)}, or the path of a TOML file that defines yours",
            )
        spec = PUBLISHED[folded[_fold(name)]]
    return spec if num_classes is None else dataclasses.replace(spec, num_classes=num_classes)


def _fold(name: str) -> str:
    lowered = name.lower().replace("_", "-")
    return lowered.removeprefix("repvgg-").removeprefix("repvggplus-")


def load_variant(path: Path) -> VariantSpec:
    """Reads a variant from a TOML file.

    Keys: `name`, `depths`, then `widths` (stem and four stages) or `width_multipliers` (the paper's four); optional
    `groups` (one number for layers 2, 4, …, 26, or a list with one entry a layer), `se`, `se_reduction`, `strides`,
    `block`, `num_classes`, `bn_eps`.

    Raises:
        InputError: The file cannot be read or a key is unknown, missing or mistyped.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    remedy = "compare it with models/sample/variant.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a variant: {error}", remedy=remedy) from error
    return _from_table(table, str(path), remedy)


def _from_table(table: dict[str, Any], where: str, remedy: str) -> VariantSpec:
    from ..specs import codec

    values = dict(table)
    if "width_multipliers" in values and "widths" in values:
        raise InputError(f"{where}: has both widths and width_multipliers, expected one of them", remedy=remedy)
    try:
        if "width_multipliers" in values:
            values["widths"] = stage_widths(tuple(float(m) for m in values.pop("width_multipliers")))  # type: ignore[arg-type]
        if isinstance(values.get("groups", 1), int):
            values["groups"] = alternating_groups(tuple(values["depths"]), values.get("groups", 1))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: depths and width_multipliers must be lists of four numbers ({error!r})", remedy=remedy
        ) from error
    try:
        return codec.decode(VariantSpec, values)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", remedy=remedy) from error


def name_variant(spec: VariantSpec) -> str | None:
    """The published name whose architecture `spec` has (class count, BatchNorm epsilon and block kind aside), or None."""
    for name, known in PUBLISHED.items():
        if architecture_of(spec) == architecture_of(known):
            return name
    return None


def architecture_of(spec: VariantSpec) -> tuple[object, ...]:
    """What two specs must share so that one's deploy form runs the other's weights, class count aside."""
    reduction = spec.se_reduction if spec.se != "none" else None
    return (spec.depths, spec.widths, spec.groups, spec.se, reduction, spec.strides)


def count_parameters(spec: VariantSpec, form: Form) -> int:
    """Learned parameters (no BatchNorm statistics, no auxiliary heads) in training or deploy form."""
    count = sum(_layer_parameters(layer, spec.block, form) for layer in spec.layers())
    if spec.se != "none":
        count += sum(_se_parameters(layer.out_channels, spec.se_reduction) for layer in spec.layers())
    return count + (spec.widths[4] + 1) * spec.num_classes


def _layer_parameters(layer: LayerSpec, block: BlockKind, form: Form) -> int:
    pairs = layer.in_channels // layer.groups * layer.out_channels
    if form == "deploy":
        return 9 * pairs + layer.out_channels
    bn = 2 * layer.out_channels
    if block == "plain":
        return 9 * pairs + bn
    if block == "qarepvgg_v2":
        return 10 * pairs + 2 * bn
    extra = bn if block == "qarepvgg_v1" else 0
    return 10 * pairs + 2 * bn + (bn if layer.has_identity else 0) + extra


def _se_parameters(channels: int, reduction: int) -> int:
    hidden = channels // reduction
    return 2 * channels * hidden + hidden + channels


def count_macs(spec: VariantSpec, height: int, width: int) -> int:
    """Multiply-accumulates of one image in deploy form: 3×3 convolutions, SE and classifier.

    Args:
        spec: The variant.
        height: Image height in pixels.
        width: Image width in pixels.
    """
    total = 0
    for layer in spec.layers():
        height, width = (-(-size // layer.stride) for size in (height, width))
        total += 9 * layer.in_channels // layer.groups * layer.out_channels * height * width
        if spec.se != "none":
            total += 2 * layer.out_channels * (layer.out_channels // spec.se_reduction)
    return total + spec.widths[4] * spec.num_classes


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One line of the layer table.

    Attributes:
        name: In the official key names; `.se` for a squeeze-and-excitation block.
        channels: Input and output.
        stride: Of the convolution.
        groups: Of the convolution.
        output_size: (height, width); None where the image size is not known.
        parameters: Weights and biases.
        macs: Multiply-accumulates of one image; None where the image size is not known.
        precision: That it computes in: `int8`, `fp16` or `fp32`; None where no graph was looked at.
    """

    name: str
    channels: tuple[int, int]
    stride: int
    groups: int
    output_size: tuple[int, int] | None
    parameters: int
    macs: int | None
    precision: str | None = None


def image_size(spec: ModelSpec) -> tuple[int, int] | None:
    """(height, width) that the model is made for, or None where any is accepted and none is usual."""
    axes = {"NCHW": (2, 3), "NHWC": (1, 2)}.get(spec.input.layout)
    if axes is not None:
        height, width = (spec.input.shape[axis] for axis in axes)
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return spec.preprocessing.crop if spec.preprocessing is not None else None


def layer_rows(variant: VariantSpec, size: tuple[int, int] | None) -> tuple[LayerRow, ...]:
    """The layers of the deploy form, squeeze-and-excitation blocks and the classifier included.

    Args:
        variant: The architecture.
        size: (height, width) of the image, or None.
    """
    rows = []
    for layer in variant.layers():
        size = None if size is None else (-(-size[0] // layer.stride), -(-size[1] // layer.stride))
        weights = 9 * layer.in_channels // layer.groups * layer.out_channels
        macs = None if size is None else weights * size[0] * size[1]
        channels = (layer.in_channels, layer.out_channels)
        rows.append(
            LayerRow(layer.name, channels, layer.stride, layer.groups, size, weights + layer.out_channels, macs)
        )
        if variant.se != "none":
            hidden = layer.out_channels // variant.se_reduction
            weights = 2 * layer.out_channels * hidden
            both = (layer.out_channels, layer.out_channels)
            rows.append(
                LayerRow(f"{layer.name}.se", both, 1, 1, (1, 1), weights + hidden + layer.out_channels, weights)
            )
    weights = variant.widths[4] * variant.num_classes
    rows.append(
        LayerRow(
            "linear", (variant.widths[4], variant.num_classes), 1, 1, (1, 1), weights + variant.num_classes, weights
        )
    )
    return tuple(rows)

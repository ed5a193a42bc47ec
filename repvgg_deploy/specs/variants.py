"""Names of architectures → VariantSpec, and what follows from one by arithmetic: layers, parameters, operations.

Source: Ding et al., RepVGG: Making VGG-style ConvNets Great Again, CVPR 2021 (https://arxiv.org/abs/2101.03697), table
2 and 3; D2se and RepVGGplus from https://github.com/DingXiaoH/RepVGG.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from . import codec
from .values import Form, SePosition, VariantSpec

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
_MOST_BLOCKS = 10_000  # that a file may ask for in a few bytes; the deepest that is published has 46
_GROUPED_END = 27  # groups stand on layers 2, 4, …, 26


def _stage_widths(multipliers: tuple[float, float, float, float]) -> tuple[int, int, int, int, int]:
    """Channels of the stem and of stages 1 to 4 for the paper's width multipliers (a, a, a, b)."""
    first, second, third, fourth = (int(base * m) for base, m in zip(_BASE_WIDTHS, multipliers, strict=True))
    return (min(64, int(64 * multipliers[0])), first, second, third, fourth)


def alternating_groups(depths: tuple[int, int, int, int], groups: int) -> tuple[int, ...]:
    """`groups` on layers 2, 4, …, 26 and 1 elsewhere (layer 0 is the stem), as in the paper's g2 and g4 variants."""
    grouped = range(2, _GROUPED_END, 2)
    return tuple(groups if index in grouped else 1 for index in range(1 + sum(depths)))


def _published(name: str, base: str, groups: int = 1, se: SePosition = "none") -> VariantSpec:
    depths, widths, plus = _DEPTHS[base[0]], _stage_widths(_MULTIPLIERS[base]), se == "after_relu"
    reduction = 4 if plus else 16
    return VariantSpec(name, depths, widths, alternating_groups(depths, groups), se, reduction, auxiliary_heads=plus)


PUBLISHED: dict[str, VariantSpec] = {
    spec.name: spec
    for spec in (
        *(_published(name, name) for name in ("A0", "A1", "A2", "B0")),
        *(_published(base + end, base, n) for base in ("B1", "B2", "B3") for end, n in (("", 1), ("g2", 2), ("g4", 4))),
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
        folded = {_fold(known): spec for known, spec in PUBLISHED.items()}
        if _fold(name) not in folded:
            raise InputError(
                f"unknown variant {name!r}",
                remedy=f"choose one of {', '.join(PUBLISHED)}, or the path of a TOML file that defines yours",
            )
        spec = folded[_fold(name)]
    return spec if num_classes is None else dataclasses.replace(spec, num_classes=num_classes)


def _fold(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("repvgg-").removeprefix("repvggplus-")


def load_variant(path: Path) -> VariantSpec:
    """Reads a variant from a TOML file.

    Keys: `name`, `depths`, then `widths` (stem and four stages) or `width_multipliers` (the paper's four); optional
    `groups` (one number for layers 2, 4, …, 26, or a list with one entry a layer), `se`, `se_reduction`, `strides`,
    `block`, `num_classes`, `bn_eps`.

    Raises:
        InputError: The file cannot be read or a key is unknown, missing or mistyped.
    """
    remedy = "compare it with models/sample/variant.toml"
    values = codec.read_toml(path, "a variant", remedy=remedy)
    if "width_multipliers" in values and "widths" in values:
        raise InputError(f"{path}: has both widths and width_multipliers, expected one of them", remedy=remedy)
    try:
        if "width_multipliers" in values:
            multipliers = tuple(float(m) for m in values.pop("width_multipliers"))
            values["widths"] = _stage_widths(multipliers)  # type: ignore[arg-type]
        if isinstance(values.get("groups", 1), int):
            depths = tuple(values["depths"])
            if sum(depths) > _MOST_BLOCKS:
                raise InputError(
                    f"{path}: depths of {sum(depths):,} blocks, expected at most {_MOST_BLOCKS:,}", remedy=remedy
                )
            values["groups"] = alternating_groups(depths, values.get("groups", 1))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: depths and width_multipliers must be lists of four numbers ({error!r})", remedy=remedy
        ) from error
    try:
        return codec.decode(VariantSpec, values)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", remedy=remedy) from error


def name_variant(spec: VariantSpec) -> str | None:
    """The published name with the architecture of `spec` (not its class count, epsilon and block kind), or None."""
    wanted = architecture_of(spec)
    return next((name for name, known in PUBLISHED.items() if architecture_of(known) == wanted), None)


def architecture_of(spec: VariantSpec) -> tuple[object, ...]:
    """What two specs must share so that one's deploy form runs the other's weights, class count aside."""
    reduction = spec.se_reduction if spec.se != "none" else None
    return (spec.depths, spec.widths, spec.groups, spec.se, reduction, spec.strides)


def count_parameters(spec: VariantSpec, form: Form) -> int:
    """Learned parameters (no BatchNorm statistics, no auxiliary heads) in training or deploy form."""
    count = sum(row.parameters for row in layer_rows(spec, None))
    if form == "deploy":
        return count
    for layer in spec.layers():
        batch_norm = 2 * layer.out_channels
        count += batch_norm - layer.out_channels  # of the 3×3 convolution, which has no bias then
        if spec.block != "plain":
            count += layer.in_channels // layer.groups * layer.out_channels  # the 1×1 convolution
            count += batch_norm  # of the 1×1 convolution, or in qarepvgg_v2 behind the sum
        if spec.block in ("repvgg", "qarepvgg_v1") and layer.has_identity:
            count += batch_norm
        if spec.block == "qarepvgg_v1":
            count += batch_norm  # behind the sum
    return count


def count_macs(spec: VariantSpec, height: int, width: int) -> int:
    """Multiply-accumulates in deploy form of one image of this height and width in pixels."""
    return sum(row.macs or 0 for row in layer_rows(spec, (height, width)))


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One line of the layer table: a 3×3 layer, a squeeze-and-excitation block or the classifier.

    Attributes:
        name: In the official key names; `.se` for a squeeze-and-excitation block.
        channels: Input and output.
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


def layer_rows(variant: VariantSpec, size: tuple[int, int] | None) -> tuple[LayerRow, ...]:
    """The layers of the deploy form in order.

    Args:
        variant: The architecture.
        size: (height, width) of the image in pixels, or None where it is not known.
    """
    rows = []
    for layer in variant.layers():
        ins, outs = layer.in_channels, layer.out_channels
        size = None if size is None else (-(-size[0] // layer.stride), -(-size[1] // layer.stride))
        weights = 9 * ins // layer.groups * outs
        macs = None if size is None else weights * size[0] * size[1]
        rows.append(LayerRow(layer.name, (ins, outs), layer.stride, layer.groups, size, weights + outs, macs))
        if variant.se != "none":
            hidden = outs // variant.se_reduction
            weights = 2 * outs * hidden
            rows.append(LayerRow(f"{layer.name}.se", (outs, outs), 1, 1, (1, 1), weights + hidden + outs, weights))
    ins, outs = variant.widths[4], variant.num_classes
    rows.append(LayerRow("linear", (ins, outs), 1, 1, (1, 1), ins * outs + outs, ins * outs))
    return tuple(rows)

"""The layers of a variant's deploy form, one row each: what they are and what they cost. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from .specs import ModelSpec, VariantSpec


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
        rows.append(LayerRow(layer.name, channels, layer.stride, layer.groups, size, weights + layer.out_channels, macs))
        if variant.se != "none":
            hidden = layer.out_channels // variant.se_reduction
            weights = 2 * layer.out_channels * hidden
            both = (layer.out_channels, layer.out_channels)
            rows.append(LayerRow(f"{layer.name}.se", both, 1, 1, (1, 1), weights + hidden + layer.out_channels, weights))
    weights = variant.widths[4] * variant.num_classes
    rows.append(LayerRow("linear", (variant.widths[4], variant.num_classes), 1, 1, (1, 1), weights + variant.num_classes, weights))
    return tuple(rows)

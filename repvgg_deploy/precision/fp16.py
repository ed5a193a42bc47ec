"""FP32 ONNX → FP16 ONNX, strongly typed: weights and everything between the image and the logits are FP16.

FP16 ends at 65504, and loses digits below 6e-5. Where the range of a channel, with a margin, or its weights come near either end, the channel is
rescaled by a power of two along the chain: exact, and never a clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from .chain import FloatArray, Interface, Layer, read_chain, read_weights, replace_weights
from .check import check_halves
from .equalize import rescale
from .halves import LARGEST, SMALLEST_NORMAL, Io, half_spec, write_halves
from .ranges import RangeSource, find_ranges
from .typed_model import StrPath, TypedModel, extend, load_parent

_COMFORTABLE = 16.0  # where the values of a channel that must be moved are moved to
_HIGHEST = 4096.0  # where they may lie if its weights would otherwise be subnormal
_TINY = SMALLEST_NORMAL * 64  # a row whose largest weight is smaller loses digits that matter
_LOWEST = SMALLEST_NORMAL * 256  # where such a row is moved to


@dataclass(frozen=True, slots=True)
class Fp16Options:
    """How a graph becomes FP16.

    Attributes:
        margin: Other images may give values this many times as large as the ranges say.
        io: Type of the floating-point input and outputs; uint8 images and class numbers stay what they are.
    """

    margin: float = 8.0
    io: Io = "fp32"

    def __post_init__(self) -> None:
        if not 1 <= self.margin <= 1024:
            raise CalibrationError(f"the margin must lie between 1 and 1024, found {self.margin}", remedy="give 8, or leave it out")
        if self.io not in ("fp32", "fp16"):
            raise CalibrationError(f"inputs and outputs can be fp32 or fp16, found {self.io!r}", remedy="give fp32, or leave it out")


@dataclass(frozen=True, slots=True)
class Fp16Report:
    """What was found and done.

    Attributes:
        source: What the ranges are known from; see `ranges.OutputRanges`.
        images: How many images were run.
        largest: By layer: the largest absolute value that its output may have in FP32, before any rescaling and without the margin.
        rescaled: By layer: how many of its output channels were rescaled; layers without any are left out.
        factors: By layer, of the same layers: smallest and largest power of two that a channel was divided by.
    """

    source: RangeSource
    images: int
    largest: dict[str, float]
    rescaled: dict[str, int]
    factors: dict[str, tuple[float, float]]


def to_fp16(
    source: StrPath | onnx.ModelProto, batches: Sequence[NDArray[Any]] | None = None, options: Fp16Options | None = None
) -> tuple[TypedModel, Fp16Report]:
    """Makes the FP16 graph of an FP32 ONNX that repvgg-export wrote; `typed_model.write_typed` writes it.

    Args:
        source: File, or the model in memory.
        batches: Images as the model takes them, in a list: what the ranges are measured on. None: the ranges are taken from the BatchNorm statistics
            that an export of a training form keeps, and from drawn images.
        options: Margin, type of inputs and outputs.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, or a tensor that cannot be rescaled does not fit FP16.
        ModelError: The file is damaged or not one of ours.
    """
    options = options or Fp16Options()
    parent = load_parent(source)
    chain = read_chain(parent.model)
    ranges = find_ranges(parent, batches)
    model, factors = fit_ranges(parent.model, ranges.values, options)
    typed = write_halves(model, io=options.io)
    check_halves(typed)
    rescaled = {name: int((factor != 1).sum()) for name, factor in factors.items()}
    said: dict[str, str | int | float | bool | None] = {
        "margin": options.margin,
        "io": options.io,
        "ranges": ranges.source,
        "images": ranges.images,
        "rescaled_channels": sum(rescaled.values()),
    }
    report = Fp16Report(
        ranges.source,
        ranges.images,
        {layer.name: float(ranges.values[layer.output].max()) for layer in chain.layers},
        rescaled,
        {name: (float(factor.min()), float(factor.max())) for name, factor in factors.items()},
    )
    return extend(parent, typed, stage="fp16", options=said, spec=half_spec(parent.metadata.spec, options.io)), report


def fit_ranges(
    model: onnx.ModelProto, ranges: Mapping[str, NDArray[np.float64]], options: Fp16Options
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float64]]]:
    """Rescales channels by powers of two, first layer to last, wherever FP16 could not hold them or the weights that make them.

    Args:
        model: FP32; not changed.
        ranges: By name of a layer's output: largest absolute value of each channel, (C,).
        options: Margin.

    Returns:
        The same function, and by layer what its output channels were divided by, (C,); layers without any change are left out.

    Raises:
        CalibrationError: What cannot be rescaled does not fit.
    """
    chain, weights = read_chain(model), read_weights(model)
    factors: dict[str, NDArray[np.float64]] = {}
    for layer, interface in zip(chain.layers, chain.interfaces, strict=True):
        values = ranges[layer.output] * options.margin
        wanted = _factors(values, weights[layer.weight], weights[layer.bias])
        if interface.blocked_by is None and np.any(wanted != 1):
            rescale(weights, chain, interface, wanted)
            factors[layer.name] = wanted
            values = values / wanted
        _check_fit(layer, interface, values, weights)
    return replace_weights(model, weights), factors


def _factors(values: NDArray[np.float64], weight: FloatArray, bias: FloatArray) -> NDArray[np.float64]:
    """Powers of two by which the channels of a layer's output are to be divided; 1 where FP16 holds them as they are."""
    # Of a row's weights only the largest matters: what is a thousand times smaller than it changes nothing that FP16 shows.
    rows = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    top = np.maximum(np.maximum(values, rows), np.abs(bias))
    move = (top > LARGEST) | ((rows > 0) & (rows < _TINY))
    top, rows = np.where(move, top, 1.0), np.where(move & (rows > 0), rows, np.inf)
    wanted = np.maximum(np.minimum(top / _COMFORTABLE, rows / _LOWEST), top / _HIGHEST)
    return np.where(move, np.exp2(np.round(np.log2(wanted))), 1.0)


def _check_fit(layer: Layer, interface: Interface, values: NDArray[np.float64], weights: Mapping[str, FloatArray]) -> None:
    stored = max(float(np.abs(weights[name]).max()) for name in (layer.weight, layer.bias))
    # A sigmoid makes 1 of infinity, as it makes of 65504.
    largest = stored if interface.blocked_by == "Sigmoid" else max(stored, float(values.max()))
    if largest > LARGEST:
        why = "its channels cannot be rescaled: " + (interface.blocked_by or "their weights would leave it at the other end")
        raise CalibrationError(
            f"{layer.name}: FP16 ends at 65504, and values up to {largest:.3g} are expected; {why}",
            remedy="keep this model in FP32; if its images cannot drive it so far, give a smaller margin, or images to measure on",
        )

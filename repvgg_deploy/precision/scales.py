"""Scales of activations: how much of a tensor's range 127 integers cover, chosen from its statistics, and saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..specs import codec
from .calibrate import LEVELS, Statistics, TensorStatistics
from .chain import input_norms, read_chain, read_weights

Method = Literal["max", "percentile", "entropy", "min_error"]
SCALES_SCHEMA: Literal[1] = 1

_CANDIDATES = 64
_SMALLEST_RATIO = 0.1  # candidates for clipping reach from a tenth of the largest value to all of it
MIN_SCALE = float(np.finfo(np.float32).tiny) * 256
"""Smallest scale: float32 arithmetic on it and its neighbours stays normal."""


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """How a scale is chosen of a tensor's statistics.

    Attributes:
        method: `max`: nothing is clipped. `percentile`: as much is clipped as `percentile` says. `entropy`: least Kullback–Leibler divergence
            (as TensorRT's own calibrator). `min_error`: least squared error of what the next layer computes of it.
        percentile: Of all values of the tensor.
    """

    method: Method = "min_error"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise CalibrationError(f"the percentile must lie between 50 and 100, found {self.percentile}", remedy="give 99.99, or leave it out")


@dataclass(frozen=True, slots=True)
class ScaleFile:
    """A calibration as saved JSON: `codec.dumps` and `codec.loads`. With it, the same graph is quantized again without measuring it again.

    Attributes:
        schema: SCALES_SCHEMA.
        graph_sha256: Of the FP32 graph, as exported.
        data_sha256: Of the images.
        images: How many.
        method: How the scales were chosen.
        scales: By name of a layer's input, of the rescaled network: real value of one integer step.
        factors: By name of a layer: what its output channels are divided by; base64 of little-endian float64 (C,). Empty without equalization.
        exponents: By name of a layer: with what exponent they were found.
        target: What they were made for: those of `trt10` also suit `trt8`, which asks for less.
    """

    schema: Literal[1]
    graph_sha256: str
    data_sha256: str
    images: int
    method: Method
    scales: dict[str, float]
    factors: dict[str, str] = field(default_factory=dict)
    exponents: dict[str, float] = field(default_factory=dict)
    target: Literal["trt8", "trt10"] = "trt10"

    def check(self, graph_sha256: str, data_sha256: str | None = None) -> None:
        """Fails when the scales are of another graph, or of other images.

        Raises:
            CalibrationError: They are.
        """
        for what, expected, found in (("graph", graph_sha256, self.graph_sha256), ("images", data_sha256, self.data_sha256)):
            if expected is not None and expected != found:
                raise CalibrationError(
                    f"the saved scales are of another {what}: expected sha256 {expected[:16]}…, found {found[:16]}…", remedy="calibrate again"
                )


def graph_sha256(model: onnx.ModelProto) -> str:
    """SHA-256 of a graph with its weights, without its metadata."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def load_scales(text: str) -> ScaleFile:
    """Reads saved scales.

    Raises:
        InputError: The text is not such a file.
    """
    return codec.loads(ScaleFile, text)


def choose_scales(model: onnx.ModelProto, statistics: Statistics, options: ScaleOptions | None = None) -> dict[str, float]:
    """The scale of each layer's input: the real value of one integer step, float32.

    Args:
        model: The graph that `statistics` speak of; its weights say how much an error in a channel matters.
        statistics: See `collect`.
        options: Method.
    """
    options = options or ScaleOptions()
    chain, weights = read_chain(model), read_weights(model)
    scales = {}
    for layer in chain.layers:
        if layer.input not in scales:
            found = statistics.tensors[layer.input]
            importance = input_norms(weights[layer.weight], layer.groups, order="square")
            scales[layer.input] = float(np.float32(max(choose_limit(found, importance, options) / LEVELS, MIN_SCALE)))
    return scales


def choose_limit(found: TensorStatistics, importance: NDArray[np.float64], options: ScaleOptions) -> float:
    """The largest value that is not clipped.

    Args:
        found: The tensor's statistics.
        importance: What a squared error in each channel costs, (C,).
        options: Method.
    """
    top = float(found.largest.max(initial=0.0))
    if top <= 0:
        return 1.0  # a dead tensor: any scale holds it
    if options.method == "max":
        return top
    if options.method == "min_error":
        return _least_error(found, importance)
    counts, top = found.merged()
    if options.method == "entropy":
        return _least_divergence(counts) * top
    below = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(below, options.percentile / 100) + 1) / len(counts) * top)


def _least_error(found: TensorStatistics, importance: NDArray[np.float64]) -> float:
    values, weight = found.values(), found.histogram * importance[:, None]
    top = float(found.largest.max())
    limits = top * np.geomspace(_SMALLEST_RATIO, 1.0, _CANDIDATES)
    errors = []
    for limit in limits:
        step = limit / LEVELS
        rounded = np.minimum(np.rint(values / step), LEVELS) * step
        errors.append(float((weight * np.square(values - rounded)).sum()))
    return float(limits[int(np.argmin(errors))])


def _least_divergence(counts: NDArray[np.float64]) -> float:
    """Share of the range at which clipping and rounding to 128 levels changes the distribution least (Kullback–Leibler).

    Source: S. Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    counts = counts.copy()
    counts[0] = counts[1]  # the zeros of ReLU are exact at every scale and would hide all else
    best, share = np.inf, 1.0
    for stop in range(LEVELS + 1, len(counts) + 1, 16):
        reference = counts[:stop].copy()
        reference[-1] += counts[stop:].sum()
        level = np.arange(stop) * (LEVELS + 1) // stop
        occupied = counts[:stop] > 0
        sums = np.bincount(level, weights=counts[:stop], minlength=LEVELS + 1)
        number = np.bincount(level, weights=occupied.astype(np.float64), minlength=LEVELS + 1)
        spread = np.where(occupied, (sums / np.maximum(number, 1))[level], 0.0)
        if spread.sum() <= 0:
            continue
        p, q = reference / reference.sum(), np.maximum(spread / spread.sum(), 1e-12)
        divergence = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
        if divergence < best:
            best, share = divergence, stop / len(counts)
    return share

"""Scales of activations: how much of a tensor's range 127 integers cover, chosen from its statistics, and saved.

`fit_scales` comes before, where the rest is FP16: it rescales the FP32 network by powers of two, so that the scales
that quantization will choose lie well inside FP16.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx

from ..errors import CalibrationError, InputError
from ..graph.edit import copy_model
from ..specs import codec
from .equalize import read_range, rescale
from .grids import INT8, Format, Grid
from .halves import LARGEST
from .network import Float64, FloatArray, Interface, Layer, Network, input_norms, read_weights
from .ranges import LEVELS, Statistics, TensorStatistics

Method = Literal["max", "percentile", "entropy", "min_error"]
_SMALLEST_RATIO = 0.1  # candidates for clipping reach from a tenth of the largest value to all of it
_LARGEST_BYTES = 64 << 20
_LARGEST_SCALE = float(np.finfo(np.float32).max)
MIN_SCALE = float(np.finfo(np.float32).tiny) * 256
"""Smallest scale: float32 arithmetic on it and its neighbours stays normal."""


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """How a scale is chosen of a tensor's statistics.

    Attributes:
        method: `max`: nothing is clipped. `percentile`: as much is clipped as `percentile` says. `entropy`: least
            Kullback–Leibler divergence (as TensorRT's own calibrator). `min_error`: least squared error of what the
            next layer computes of it.
        percentile: Of all values of the tensor.
    """

    method: Method = "min_error"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise CalibrationError(
                f"the percentile must lie between 50 and 100, found {self.percentile}",
                remedy="give 99.99, or leave it out",
            )


@dataclass(frozen=True, slots=True)
class ScaleFile:
    """A calibration as saved JSON. With it, the same graph is quantized again without measuring it again.

    Attributes:
        graph_sha256: Of the FP32 graph, as exported.
        data_sha256: Of the images.
        images: How many.
        method: How the scales were chosen.
        scales: By name of a layer's input, of the rescaled network: real value of one integer step.
        factors: By name of a layer: what its output channels are divided by; base64 of little-endian float64 (C,).
            Empty without equalization.
        exponents: By name of a layer: with what exponent they were found.
        left_out: Which images, counted from 0, took no part: their activations dwarf those of the others.
        target: What they were made for: those of `trt10` also suit `trt8`, which asks for less.
        format: The number format whose steps the scales are.
    """

    schema: Literal[1]
    graph_sha256: str
    data_sha256: str
    images: int
    method: Method
    scales: dict[str, float]
    factors: dict[str, str] = field(default_factory=dict)
    exponents: dict[str, float] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()
    target: Literal["trt8", "trt10"] = "trt10"
    format: Format = "int8"

    def __post_init__(self) -> None:
        remedy = "calibrate again with --save-scales"
        wrong = next((name for name, scale in self.scales.items() if not 0 < scale <= _LARGEST_SCALE), None)
        if wrong is not None:
            raise InputError(
                f"the scale of {wrong!r} is {self.scales[wrong]}, expected a positive number", remedy=remedy
            )
        for name, text in self.factors.items():
            try:
                values = np.frombuffer(base64.b64decode(text, validate=True), "<f8")
            except ValueError as error:
                message = f"the factors of {name!r} are not base64 of float64: {error}"
                raise InputError(message, remedy=remedy) from error
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise InputError(f"the factors of {name!r} are not positive numbers", remedy=remedy)

    def channel_factors(self) -> dict[str, Float64]:
        """`factors` as numbers, float64 (C,)."""
        return {name: np.frombuffer(base64.b64decode(text), "<f8").astype(float) for name, text in self.factors.items()}

    def check(self, graph_sha256: str, data_sha256: str | None = None) -> None:
        """Fails when the scales are of another graph, or of other images.

        Raises:
            CalibrationError: They are.
        """
        for what, expected, found in (
            ("graph", graph_sha256, self.graph_sha256),
            ("images", data_sha256, self.data_sha256),
        ):
            if expected is not None and expected != found:
                raise CalibrationError(
                    f"the saved scales are of another {what}: expected sha256 {expected[:16]}…, found {found[:16]}…",
                    remedy="calibrate again",
                )


def encode_factors(factors: Mapping[str, Float64]) -> dict[str, str]:
    """Factors as `ScaleFile.factors` holds them."""
    return {name: base64.b64encode(value.astype("<f8").tobytes()).decode("ascii") for name, value in factors.items()}


def graph_sha256(model: onnx.ModelProto) -> str:
    """SHA-256 of a graph with its weights, without its metadata."""
    if model.metadata_props:
        model = copy_model(model)
        del model.metadata_props[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def read_scales(path: Path) -> ScaleFile:
    """Reads saved scales.

    Raises:
        InputError: The file is missing, cannot be read, or is not one that `--save-scales` wrote.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file", remedy="check the path, or make it with --save-scales")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", remedy="check its permissions") from error
    try:
        if len(data) > _LARGEST_BYTES:
            raise InputError(f"larger than {_LARGEST_BYTES >> 20} MiB", remedy="calibrate again with --save-scales")
        return codec.loads(ScaleFile, data.decode("utf-8"))
    except (UnicodeDecodeError, InputError) as error:
        why = error.message if isinstance(error, InputError) else "not UTF-8"
        raise InputError(
            f"{path}: not a calibration that --save-scales wrote: {why}", remedy="calibrate again with --save-scales"
        ) from error


def choose_scales(
    network: Network, statistics: Statistics, options: ScaleOptions | None = None, grid: Grid = INT8
) -> dict[str, float]:
    """The scale of each layer's input: the real value of one integer step, or of 1 in floating point; float32."""
    options = options or ScaleOptions()
    weights = read_weights(network)
    scales: dict[str, float] = {}
    for layer in network.layers:
        if layer.input not in scales:
            importance = input_norms(weights[layer.weight], layer.groups, order="square")
            limit = choose_limit(statistics.tensors[layer.input], importance, options, grid)
            scales[layer.input] = float(np.float32(max(limit / grid.largest, MIN_SCALE)))
    for name, ids in network.sums:
        limit = choose_limit(statistics.tensors[name], np.ones(len(ids)), options, grid)
        scales[name] = float(np.float32(max(limit / grid.largest, MIN_SCALE)))
    return scales


def choose_limit(found: TensorStatistics, importance: Float64, options: ScaleOptions, grid: Grid = INT8) -> float:
    """The largest value that is not clipped; `importance` is what a squared error in each channel costs, (C,)."""
    top = float(found.largest.max(initial=0.0))
    if top <= 0:
        return 1.0  # a dead tensor: any scale holds it
    if options.method == "max":
        return top
    if options.method == "min_error":
        return _least_error(found, importance, grid)
    counts, top = found.merged()
    if options.method == "entropy":
        return _least_divergence(counts) * top
    below = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(below, options.percentile / 100) + 1) / len(counts) * top)


def _least_error(found: TensorStatistics, importance: Float64, grid: Grid) -> float:
    values, weight = found.values(), found.histogram * importance[:, None]
    top = float(found.largest.max())
    limits = grid.limits(top, _SMALLEST_RATIO)
    errors = []
    for limit in limits:
        step = limit / grid.largest
        rounded = grid.nearest(values / step) * step
        errors.append(float((weight * np.square(values - rounded)).sum()))
    return float(limits[int(np.argmin(errors))])


def _least_divergence(counts: Float64) -> float:
    """Share of the range at which clipping and rounding to 128 levels changes the distribution least.

    Source: S. Migacz, 8-bit inference with TensorRT, GTC 2017 (Kullback–Leibler).
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


_ROWS = (2.0**-5, 2.0**12)
"""Largest weight of each row: with half of it clipped, its scale is twice the smallest normal FP16 number, or more."""
_TOPS = (2.0**-3, 2.0**8)
"""Largest value of each tensor that is quantized: with nine tenths clipped, its scale is normal."""
_BOUNDS = (2.0**-24, 2.0**15)
"""What a layer can give at most, whatever its quantized input."""
_WEAKEST = 1024.0  # a row that much weaker than its layer's median does not move the whole tensor
_MARGIN = 8.0  # a layer that is kept in FP16 reads what nothing clips: other images may give as many times more
_OCTAVES = 40


def fit_scales(
    network: Network, ranges: Mapping[str, Float64], *, kept: Collection[str] = (), grid: Grid = INT8
) -> tuple[Network, Float64]:
    """Rescales interfaces by powers of two, first layer to last, until the scales to come are comfortable in FP16.

    A factor common to a whole tensor changes no INT8 value. Only a row so much weaker than the others of its layer that
    its scale would be subnormal is rescaled by itself, as far as its channel does not become the largest of its tensor.
    Takes ranges of each layer's input, (C,), by tensor, and the names of layers that will not be quantized. Gives what
    computes the same to the last bit, and what each variable was divided by, (count,).

    Raises:
        CalibrationError: What cannot be rescaled does not fit.
    """
    weights = read_weights(network)
    fit = _Fit(network, weights, {layer.input: read_range(layer, ranges) for layer in network.layers}, kept, grid)
    factors = network.ones()
    for interface in network.interfaces:
        if interface.blocked_by is None:
            found = fit.choose(interface)
            if np.any(found != 1):
                fit.apply(found)
                factors *= found
    for layer in network.layers:
        fit.check(layer)
    return network.with_weights(weights), factors


@dataclass(slots=True, eq=False)
class _Fit:
    """Chooses and applies factors; `weights` and `ranges` are what they are after those applied so far."""

    network: Network
    weights: dict[str, FloatArray]
    ranges: dict[str, Float64]
    kept: Collection[str]
    grid: Grid

    def choose(self, interface: Interface) -> Float64:
        """Powers of two, (count,), by which its channels are to be divided; 1 for all others."""
        free = interface.variables
        rows, bounds, shares = (self.network.ones() * 0 for _ in range(3))
        for layer in self.network.layers:
            if np.isin(layer.result, free).any():
                np.maximum.at(rows, layer.result, self._rows(layer))
                np.maximum.at(bounds, layer.result, self._bounds(layer))
        rows, bounds = rows[free], bounds[free]
        readers = [self.network.layer(name) for name in interface.readers]
        tops = [max(float(self.ranges[reader.input].max(initial=0.0)), 1e-300) for reader in readers]
        for reader, top in zip(readers, tops, strict=True):
            np.maximum.at(shares, reader.source, self.ranges[reader.input] / top)
        strong = rows[rows * _WEAKEST >= np.median(rows[rows > 0])] if rows.any() else rows
        windows = [_window(strong, _ROWS), _window(np.array(tops), _TOPS), _window(bounds, _BOUNDS)]
        ends = [reader for reader in readers if not np.isin(reader.result, self.network.free()).any()]
        windows += [_window(self._rows(reader), _ROWS, grows=True) for reader in ends]
        # The smallest power of two with which the windows fit best, counted in whole octaves.
        steps = sorted(range(-_OCTAVES, _OCTAVES + 1), key=abs)
        common = 2.0 ** min(steps, key=lambda step: np.ceil(sum(window.misfit(step) for window in windows)))
        room = np.maximum(bounds / common / _BOUNDS[1], shares[free])
        found = self.network.ones()
        found[free] = common * _lift(rows / common, room)
        return found

    def apply(self, factors: Float64) -> None:
        rescale(self.weights, self.network, factors)
        for tensor, divisor in self.network.divided(factors).items():
            self.ranges[tensor] = self.ranges[tensor] / divisor

    def check(self, layer: Layer) -> None:
        """Fails when what the layer stores or gives exceeds FP16."""
        largest = float(np.abs(self.weights[layer.bias]).max())
        if layer.name in self.kept:
            largest = max(largest, float(np.abs(self.weights[layer.weight]).max()))
        blocked_by = self.network.blocked_by(layer)
        if blocked_by != "Sigmoid":  # which makes 1 of infinity, as it makes of 65504
            readers = (other for other in self.network.layers if np.isin(other.source, layer.result).any())
            seen = [float(self.ranges[reader.input].max()) for reader in readers]
            largest = max([largest, *seen] if seen else [largest, float(self._bounds(layer).max())])
        if largest > LARGEST:
            raise CalibrationError(
                f"{layer.name}: FP16 ends at 65504, and values up to {largest:.3g} are expected; they cannot be "
                f"rescaled: {blocked_by}",
                remedy="quantize for TensorRT 8 (--target trt8), where the rest is FP32",
            )

    def _rows(self, layer: Layer) -> Float64:
        weight = self.weights[layer.weight]
        return np.asarray(np.abs(weight.reshape(len(weight), -1)).max(axis=1), np.float64)

    def _bounds(self, layer: Layer) -> Float64:
        """What each output channel can be at most, on every image: a quantized input ends at its scale."""
        weight = np.abs(self.weights[layer.weight]).reshape(layer.out_channels, -1).sum(axis=1, dtype=np.float64)
        margin = _MARGIN if layer.name in self.kept else self.grid.spare * -self.grid.lowest / self.grid.largest
        top = float(self.ranges[layer.input].max(initial=0.0)) * margin
        return np.asarray(weight * top + np.abs(self.weights[layer.bias]), np.float64)


def _lift(rows: Float64, room: Float64) -> Float64:
    """Powers of two, 1 or less and at least `room`, to divide rows by whose scale would be subnormal."""
    weak = (rows > 0) & (rows < _ROWS[0] / 2)
    wanted = np.maximum(np.where(weak, rows / _ROWS[0], 1.0), np.maximum(room, 2.0**-_OCTAVES))
    return np.where(weak, np.exp2(np.minimum(np.ceil(np.log2(wanted)), 0.0)), 1.0)


class _Window(NamedTuple):
    """Where values should lie that shrink by a factor, or grow by it; logarithms to base two."""

    smallest: float
    largest: float
    low: float
    high: float
    grows: bool = False

    def misfit(self, step: int) -> float:
        """Octaves that they lie outside, both ends together, once the factor is 2^step."""
        move = step if self.grows else -step
        return max(0.0, self.low - self.smallest - move) + max(0.0, self.largest + move - self.high)


def _window(values: Float64, limits: tuple[float, float], *, grows: bool = False) -> _Window:
    logs = np.log2(values[values > 0])
    low, high = (float(np.log2(limit)) for limit in limits)
    smallest, largest = (float(logs.min()), float(logs.max())) if logs.size else (low, low)
    return _Window(smallest, largest, low, high, grows)

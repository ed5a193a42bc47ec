"""The exponent of every interface, by measurement: each candidate is really quantized, and the least error wins.

A factor on an interface changes the integers of the layers that read it and of no others, so that interfaces can be
decided one by one. The layer is tried on positions of calibration images, on a part of its input channels (a large
layer's error is that of its parts), and judged on other positions than its weights were rounded with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .equalize import choose_factors, main_reader
from .grids import INT8, Grid
from .network import Float64, FloatArray, Layer, Network, input_norms, read_weights, scale_inputs
from .ranges import Statistics, columns, pick_positions
from .round import RoundOptions, round_rows
from .run_onnx import LayerWalk, Tell, count_images, spread_images, tell_nobody
from .scales import ScaleOptions, choose_limit


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is tried.

    Attributes:
        exponents: Candidates, each 0 (ranges of weights) to 1 (of activations).
        images: Calibration images that take part.
        positions: Output positions, of all images together; a quarter of them judges.
        channels: Input channels that take part, of each group.
        range_percentile: Of each channel's values, taken as its range.
        seed: Chooses positions and channels.
        grid: The values that are rounded to; `quantize_graph` sets that of its format.
    """

    exponents: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.85, 1.0)
    images: int = 128
    positions: int = 3072
    channels: int = 64
    range_percentile: float = 99.99
    seed: int = 0
    grid: Grid = INT8

    def __post_init__(self) -> None:
        enough = bool(self.exponents) and all(0 <= exponent <= 1 for exponent in self.exponents)
        if not enough or min(self.images, self.channels) < 1 or self.positions < 4:
            raise CalibrationError(
                f"search: expected exponents of 0 to 1, images, channels and at least 4 positions, found {self}",
                remedy="leave it out",
            )


def choose_exponents(
    network: Network,
    batches: Sequence[NDArray[Any]],
    statistics: Statistics,
    options: SearchOptions,
    *,
    progress: Tell = tell_nobody,
) -> dict[str, float]:
    """An exponent for every interface that can be rescaled and that more than SE reads, by name of the layer before it.

    `statistics` are those of all calibration images (`ranges.collect`); `progress` is told of interfaces.

    Raises:
        CalibrationError: A batch is not what the graph takes.
    """
    weights, ranges = read_weights(network), statistics.ranges(options.range_percentile)
    order = {layer.name: index for index, layer in enumerate(network.layers)}
    in_order = sorted(
        (
            (interface, main_reader(interface, network))
            for interface in network.interfaces
            if interface.blocked_by is None and not set(interface.readers) <= set(network.gates)
        ),
        key=lambda item: order[item[1].name],
    )
    images = spread_images(network.model, batches, options.images)
    walk = LayerWalk(network.model, images, tensors=[layer.input for _, layer in in_order])
    each = max(1, -(-options.positions // count_images(images)))
    found: dict[str, float] = {}
    for index, (interface, layer) in enumerate(in_order):
        generator = np.random.default_rng(options.seed + index)
        sample = np.concatenate(
            [columns(v, layer, pick_positions(v, layer, each, generator)) for v in walk.advance(layer.input)], axis=1
        )
        trial = _Trial(layer, weights[layer.weight], sample, generator, grid=options.grid)
        free = np.isin(layer.source, interface.variables)
        norms = input_norms(weights[layer.weight], layer.groups, order="max")
        errors = {}
        for exponent in options.exponents:
            factors = choose_factors(np.asarray(ranges[layer.input], np.float64), norms, exponent, free=free)
            rescaled = scale_inputs(weights[layer.weight].astype(np.float64), layer.groups, factors)
            importance = input_norms(rescaled, layer.groups, order="square")
            limit = choose_limit(
                statistics.tensors[layer.input].rescaled(factors), importance, ScaleOptions(), options.grid
            )
            errors[exponent] = trial.error(factors, limit / options.grid.largest, options.channels)
        found[interface.source] = min(errors, key=lambda exponent: errors[exponent])
        progress(index + 1, len(in_order))
    return found


class _Trial:
    """A layer's inputs at some positions, float32 (groups, positions, inner), in random order, and its weights."""

    def __init__(
        self, layer: Layer, weight: FloatArray, sample: FloatArray, generator: np.random.Generator, *, grid: Grid
    ) -> None:
        self._grid = grid
        self._kernel = int(np.prod(layer.weight_shape[2:]))
        self._sample = sample[:, generator.permutation(sample.shape[1])]
        self._rows = weight.reshape(layer.groups, -1, sample.shape[2])
        self._order = generator.permutation(layer.weight_shape[1])

    def error(self, factors: Float64, step: float, channels: int) -> float:
        """Squared error of the output with the input rounded to multiples of `step`, and the weights rounded for it."""
        picked = np.sort(self._order[:channels])
        inner = (picked[:, None] * self._kernel + np.arange(self._kernel)).ravel()
        parts = zip(self._sample, self._rows, factors.reshape(len(self._rows), -1), strict=True)
        return sum(
            _error(sample[:, inner], rows[:, inner], np.repeat(factor[picked], self._kernel), step, grid=self._grid)
            for sample, rows, factor in parts
        )


def _error(sample: FloatArray, rows: FloatArray, factors: Float64, step: float, *, grid: Grid) -> float:
    """Of one group: the squared error at a quarter of the positions, the weights rounded by the others."""
    exact = (sample / factors).astype(np.float32)
    rows = (rows * factors).astype(np.float32)
    rounded = grid.through(exact, step)
    count = max(1, len(exact) * 3 // 4)
    missing = (exact - rounded) @ rows.T
    seen, lost = rounded[:count], missing[:count]
    mean, error = seen.mean(axis=0, dtype=np.float64), lost.mean(axis=0, dtype=np.float64)
    # Centred before the product: of positions that are all alike nothing may be left.
    centred = (seen - mean).astype(np.float32)
    covariance = (centred.T @ centred).astype(np.float64) / count
    cross = (lost.T @ centred).astype(np.float64) / count
    integers, scales = round_rows(
        rows.astype(np.float64), covariance, cross, RoundOptions(clips=(0.8,), sweeps=0), grid=grid
    )
    change = rows - integers * scales[:, None]
    left = missing[count:] - error + (rounded[count:] - mean) @ change.T
    return float(np.square(left, dtype=np.float64).sum())

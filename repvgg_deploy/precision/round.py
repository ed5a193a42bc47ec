"""Weights → 8 bits, rounded so that what the layer computes changes least, rather than each weight.

With the second moments H of a layer's (quantized) inputs, the squared error of its output is Σ (q − w) H (q − w)ᵀ over
its rows. Inputs are centred: their mean is the bias's business, which takes up exactly what is left of it (bias
correction). Three steps:

1. The weights w are moved to those that best reproduce, from the quantized input, what the FP32 network computes at
   this place (ridge regression): errors of the layers before are corrected, not only this layer's. Where positions
   are few for so many inputs, as behind the last strides of small images, the calibration images would be learnt by
   heart: there this step is left out.
2. Columns are rounded one after the other, largest moment first, and each one's error is fed forward to those that are
   not rounded yet.
   Source: Frantar et al. 2022, GPTQ, https://arxiv.org/abs/2210.17323. Several clipped weight scales are tried and the
   best kept, row by row.
3. Single weights are moved on the grid wherever that still lowers the error (coordinate descent).

What the grid is, integers or E4M3's numbers, `grids` says.

Without a single image (`round_by_prior`) the second moments are what is true of every image: neighbouring pixels are
alike. What a layer reads is taken as independent from channel to channel, with the deviations that BatchNorm layers
state, and as correlated between the taps of one channel, ρ to the power of their distance. H is then the same small
matrix for every channel: an error in one tap is fed forward to the other taps of its channel, so that a kernel's sum,
which smooth inputs see, survives. On a trained A0 that is worth 7 dB over rounding to nearest (`benchmarks/int8.py`,
the row without images in closed form).
Source: Field 1987 for the correlation of natural images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .grids import INT8, Grid
from .network import Float64, FloatArray
from .ranges import Moments

_BLOCK = 64
_ENOUGH = 8  # positions for each input: with fewer, step 1 is left out
_CORRELATION = 0.6  # of neighbouring pixels of one channel


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """How weights are rounded.

    Attributes:
        method: `second_order`: as described above. `nearest`: each weight by itself.
        bias_correction: Whether the bias takes up the mean error.
        damping: Added to the diagonal of H, in units of its mean.
        ridge: The same for step 1; larger stays closer to the original weights.
        clips: Weight scales to try, in units of the one that clips nothing.
        sweeps: Passes of step 3.
        samples: Positions (of all images together) that H is summed over.
        seed: Chooses positions.
    """

    method: Literal["second_order", "nearest"] = "second_order"
    bias_correction: bool = True
    damping: float = 0.003
    ridge: float = 0.3
    clips: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    sweeps: int = 2
    samples: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            self.damping <= 0
            or self.ridge <= 0
            or self.sweeps < 0
            or self.samples < 1
            or not all(0 < clip <= 1 for clip in self.clips)
            or not self.clips
        ):
            raise CalibrationError(
                f"rounding: expected positive damping, ridge and samples, and clips between 0 and 1, found {self}",
                remedy="leave the options out",
            )


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """One layer's weights in 8 bits.

    Attributes:
        integers: int8, the weight's shape, −127 … 127; of a floating-point format float32, values of its grid.
        scales: float32 (out,): weight = integer × scale.
        bias: float32 (out,), corrected.
    """

    integers: NDArray[Any]
    scales: FloatArray
    bias: FloatArray

    def weight(self) -> FloatArray:
        """The weights that the integers stand for, float32."""
        return np.asarray(self.integers * self.scales.reshape(-1, *[1] * (self.integers.ndim - 1)), np.float32)


def nearest_scales(rows: NDArray[np.floating], grid: Grid = INT8) -> Float64:
    """The scale of each row that clips nothing; 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    return np.where(largest > 0, np.maximum(largest / grid.largest, float(np.finfo(np.float32).tiny)), 1.0)


def round_nearest(weight: FloatArray, bias: FloatArray, grid: Grid = INT8) -> RoundedLayer:
    """Each weight to the nearest value of its output channel's scale; the bias stays."""
    rows = weight.reshape(len(weight), -1)
    scales = nearest_scales(rows, grid).astype(np.float32)
    integers = grid.pack(grid.nearest(rows / scales[:, None]))
    return RoundedLayer(integers.reshape(weight.shape), scales, bias)


def round_layer(
    weight: FloatArray, bias: FloatArray, moments: Moments, options: RoundOptions, *, grid: Grid = INT8
) -> RoundedLayer:
    """Rounds a layer's weights, (out, in / groups, …), and corrects its bias, (out,), by the moments of its inputs."""
    groups = moments.layer.groups
    rows = weight.reshape(groups, len(weight) // groups, -1)
    integers, scales, shift = [], [], []
    for group in range(groups):
        covariance, cross, mean, error = moments.centred(group)
        if options.method == "second_order":
            enough = moments.count >= _ENOUGH * len(covariance)
            found, scale = round_rows(rows[group], covariance, cross if enough else None, options, grid=grid)
        else:
            scale = nearest_scales(rows[group], grid).astype(np.float32).astype(np.float64)
            found = grid.nearest(rows[group] / scale[:, None])
        integers.append(found)
        scales.append(scale)
        shift.append(error + rows[group] @ mean - (found @ mean) * scale)
    corrected = bias + np.concatenate(shift) if options.bias_correction else bias
    packed = np.concatenate([grid.pack(found) for found in integers]).reshape(weight.shape)
    return RoundedLayer(packed, np.concatenate(scales).astype(np.float32), corrected.astype(np.float32))


def round_rows(
    rows: NDArray[np.floating],
    covariance: NDArray[np.floating],
    cross: NDArray[np.floating] | None,
    options: RoundOptions,
    *,
    grid: Grid = INT8,
) -> tuple[FloatArray, Float64]:
    """Rounds the rows (out, K) of one group in the three steps above.

    Takes the covariance of the inputs, (K, K), and that of the missing output with them, (out, K), or None to leave out
    the first step; see `Moments.centred`. Gives integers (out, K) and scales (out,).
    """
    level = float(np.trace(covariance)) / len(covariance)
    level = level if level > 0 else 1.0  # inputs that never change: every rounding is as good
    order = np.argsort(-np.diag(covariance), kind="stable")
    damped = covariance.astype(np.float32)[np.ix_(order, order)]
    diagonal = np.diag(damped).copy()
    # Column by column is how all three steps go: a column of the weights is a row of the arrays from here on.
    target = rows.T[order].astype(np.float32)
    if cross is not None:
        np.fill_diagonal(damped, diagonal + np.float32(options.ridge * level))
        target += np.linalg.solve(damped, cross[:, order].T.astype(np.float32))
    np.fill_diagonal(damped, diagonal + np.float32(options.damping * level))
    factor = _upper_factor(damped)
    base = nearest_scales(target.T, grid)
    best = np.full(len(rows), np.inf)
    integers, scales = np.zeros_like(target), base.astype(np.float32)
    for width in grid.widths(options.clips):
        scale = (base * width).astype(np.float32)
        found, error = _feed_forward(target, scale, factor, grid)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        np.copyto(integers, found, where=better)
    del factor
    for _ in range(options.sweeps):
        _descend(integers, scales, target, damped, grid=grid)
    restored = np.empty_like(integers)
    restored[order] = integers
    return restored.T, scales.astype(np.float64)


def _upper_factor(matrix: NDArray[Any]) -> NDArray[Any]:
    """U with U Uᵀ = `matrix`, upper triangular.

    The error of a difference d in the columns up to k is the square of the first k entries of d U.
    """
    reverse = matrix[::-1, ::-1]
    try:
        lower = np.linalg.cholesky(reverse)
    except np.linalg.LinAlgError:  # moments whose directions differ by more than float32 resolves
        lower = np.linalg.cholesky(reverse.astype(np.float64)).astype(matrix.dtype)
    return np.asarray(lower[::-1, ::-1])


def _feed_forward(
    target: NDArray[Any], scale: NDArray[Any], factor: NDArray[Any], grid: Grid
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Rounds column by column; each makes up for the error of those before, as those still free will for its own.

    That is GPTQ without an inverse: with H = U Uᵀ, column k of (q − w) U holds only what columns up to k give. In
    blocks, so that the columns beyond are updated by one matrix product a block. Takes targets (K, out), scales (out,)
    and U of one float type; gives integers (K, out) and each output's squared error (out,).
    """
    work, result = np.zeros_like(target), np.empty_like(target)  # what is there so far of (q − w) U, and the integers
    error = np.zeros(len(scale))
    for start in range(0, len(work), _BLOCK):
        stop = min(start + _BLOCK, len(work))
        change, left = np.empty_like(target[start:stop]), np.empty_like(target[start:stop])
        for index in range(start, stop):
            row, pivot = index - start, factor[index, index]
            result[index] = grid.nearest((target[index] - work[index] / pivot) / scale)
            change[row] = result[index] * scale - target[index]
            left[row] = work[index] + pivot * change[row]
            work[index + 1 : stop] += np.outer(factor[index, index + 1 : stop], change[row])
        work[stop:] += factor[start:stop, stop:].T @ change
        error += np.square(left).sum(axis=0, dtype=np.float64)
    return result, error


def _descend(
    integers: NDArray[Any], scales: NDArray[Any], target: NDArray[Any], damped: NDArray[Any], *, grid: Grid
) -> None:
    """One pass over the columns: each of `integers`, (K, out), moves to where the error, all others held, is least."""
    gradient = damped @ (integers * scales - target)
    for start in range(0, len(damped), _BLOCK):
        stop = min(start + _BLOCK, len(damped))
        local, moves = gradient[start:stop].copy(), np.zeros_like(target[start:stop])
        for index in range(start, stop):
            wanted = integers[index] - local[index - start] / (damped[index, index] * scales)
            found = grid.nearest(wanted)
            moves[index - start] = (found - integers[index]) * scales
            integers[index] = found
            local += np.outer(damped[start:stop, index], moves[index - start])
        gradient += damped[:, start:stop] @ moves


def round_by_prior(
    weight: FloatArray, bias: FloatArray, *, deviation: Float64, groups: int, grid: Grid = INT8
) -> RoundedLayer:
    """Rounds one layer without images; the bias stays. `deviation` is that of each input channel, (in,)."""
    options = RoundOptions()
    out, inner = weight.shape[:2]
    taps = int(np.prod(weight.shape[2:]))
    places = np.array(list(np.ndindex(*weight.shape[2:])), np.float64).reshape(taps, weight.ndim - 2)
    distance = np.sqrt(np.square(places[:, None] - places[None]).sum(axis=2))
    covariance = np.asarray(_CORRELATION**distance + options.damping * np.eye(len(places)), np.float64)
    factor = _upper_factor(covariance)
    base = nearest_scales(weight.reshape(out, -1).astype(np.float64), grid)
    by_row = np.repeat(np.square(deviation).reshape(groups, -1), out // groups, axis=0)  # (out, in / groups)
    # A kernel is a row, and its taps are the columns.
    target = np.ascontiguousarray(weight.reshape(out * inner, -1).T, np.float64)
    best, integers, scales = np.full(out, np.inf), np.zeros((out, *target.shape[:1], inner)), base.copy()
    for width in grid.widths(options.clips):
        scale = (base * width).astype(np.float32).astype(np.float64)
        steps = np.repeat(scale, inner)
        found, _ = _feed_forward(target, steps, factor, grid)
        for _ in range(options.sweeps):
            _descend(found, steps, target, covariance, grid=grid)
        difference = found * steps - target
        error = (by_row * ((covariance @ difference) * difference).sum(axis=0).reshape(out, inner)).sum(axis=1)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        integers[better] = found.reshape(-1, out, inner).transpose(1, 0, 2)[better]
    packed = grid.pack(integers.transpose(0, 2, 1).reshape(weight.shape))
    return RoundedLayer(packed, scales.astype(np.float32), bias)

"""Weights → INT8, rounded so that what the layer computes changes least, rather than each weight.

With the second moments H of a layer's (quantized) inputs, the squared error of its output is Σ (q − w) H (q − w)ᵀ over its rows. Inputs are
centred: their mean is the bias's business, which takes up exactly what is left of it (bias correction). Three steps:

1. The weights w are moved to those that best reproduce, from the quantized input, what the FP32 network computes at this place (ridge regression):
   errors of the layers before are corrected, not only this layer's.
2. Columns are rounded one after the other, largest moment first, and each one's error is fed forward to those that are not rounded yet.
   Source: Frantar et al. 2022, GPTQ, https://arxiv.org/abs/2210.17323. Several clipped weight scales are tried and the best kept, row by row.
3. Single weights are changed by one step wherever that still lowers the error (coordinate descent).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .calibrate import LEVELS
from .chain import FloatArray, Layer

_BLOCK = 64
_ROWS = 512


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """How weights are rounded.

    Attributes:
        method: `second_order`: as described above; `nearest`: each weight by itself.
        bias_correction: Whether the bias takes up the mean error.
        damping: Added to the diagonal of H, in units of its mean.
        ridge: The same for step 1; larger stays closer to the original weights.
        clips: Weight scales to try, in units of the one that clips nothing.
        sweeps: Passes of step 3.
        samples: Positions (of all images together) that H is summed over.
        seed: Of the choice of positions.
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
                f"rounding: expected positive damping, ridge and samples, and clips between 0 and 1, found {self}", remedy="leave the options out"
            )


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """One layer's weights in INT8.

    Attributes:
        integers: int8, the weight's shape, −127 … 127.
        scales: float32 (out,): weight = integer × scale.
        bias: float32 (out,), corrected.
    """

    integers: NDArray[np.int8]
    scales: FloatArray
    bias: FloatArray

    def weight(self) -> FloatArray:
        """The weights that the integers stand for, float32."""
        return np.asarray(self.integers * self.scales.reshape(-1, *[1] * (self.integers.ndim - 1)), np.float32)


class Moments:
    """Sums over a layer's inputs: of the quantized network (x) and of what the FP32 network differs there.

    Args:
        layer: Whose inputs.
        weight: Its FP32 weights.
        positions: Output positions to take of each image; all where there are fewer.
        seed: Of their choice.
        full: Whether second moments are needed, or means only.
    """

    def __init__(self, layer: Layer, weight: FloatArray, *, positions: int, seed: int, full: bool = True) -> None:
        self.layer = layer
        inner = int(np.prod(layer.weight_shape[1:]))
        self.count = 0
        self.second: NDArray[np.float64] = np.zeros((layer.groups, inner, inner))
        self.total: NDArray[np.float64] = np.zeros((layer.groups, inner))
        self.cross: NDArray[np.float64] = np.zeros((layer.groups, layer.out_channels // layer.groups, inner))
        self.error: NDArray[np.float64] = np.zeros((layer.groups, layer.out_channels // layer.groups))
        self._full = full
        self._closed: set[int] = set()
        self._origin: FloatArray | None = None  # near the mean: sums of squares around it lose no digits, and inputs that never change give 0
        self._rows = weight.reshape(layer.groups, -1, inner)
        self._positions = positions
        self._generator = np.random.default_rng(seed)

    def add(self, quantized: FloatArray, reference: FloatArray) -> None:
        """Adds one batch of inputs, (N, C, H, W) or (N, C): of the quantized and of the FP32 network."""
        assert not self._closed, "the moments were read already"
        picks = pick_positions(quantized, self.layer, self._positions, self._generator)
        x, truth = (columns(value, self.layer, picks) for value in (quantized, reference))
        self.count += x.shape[1]
        if self._origin is None:
            self._origin = x.mean(axis=1, keepdims=True)
        for group in range(self.layer.groups):
            missing, near = (truth[group] - x[group]) @ self._rows[group].T, x[group] - self._origin[group]
            self.total[group] += near.sum(axis=0, dtype=np.float64)
            self.error[group] += missing.sum(axis=0, dtype=np.float64)
            if self._full:
                self.second[group] += near.T @ near
                self.cross[group] += missing.T @ near

    def centred(self, group: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of one group: covariance of x (K, K), covariance of the missing output with x (out, K), mean of x (K,), mean missing output (out,).

        The covariance takes the place of the sums, which are as large (265 MB of a large layer): nothing can be added any more.
        """
        mean, error = self.total[group] / self.count, self.error[group] / self.count
        covariance = self.second[group]
        fresh = self._full and group not in self._closed
        for start in range(0, len(mean) if fresh else 0, _ROWS):
            rows = slice(start, start + _ROWS)
            covariance[rows] /= self.count
            covariance[rows] -= np.outer(mean[rows], mean)
        self._closed.add(group)
        origin = 0.0 if self._origin is None else self._origin[group, 0]
        return covariance, self.cross[group] / self.count - np.outer(error, mean), mean + origin, error


def pick_positions(value: FloatArray, layer: Layer, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Some output positions of each image, flat indices (N, P): `count` of them, or all where there are fewer.

    Args:
        value: The layer's input, (N, C, H, W) or (N, C).
        layer: Kernel, stride and padding.
        count: How many.
        generator: Of the choice.
    """
    if value.ndim == 2:
        return np.zeros((len(value), 1), np.int64)
    height, width = output_size(value.shape, layer)
    if height * width <= count:
        return np.tile(np.arange(height * width), (len(value), 1))
    return np.stack([generator.choice(height * width, count, replace=False) for _ in range(len(value))])


def output_size(shape: tuple[int, ...], layer: Layer) -> tuple[int, int]:
    """(height, width) of a convolution's output for an input (N, C, H, W)."""
    top, left, bottom, right = layer.pads
    (height, width), (down, across) = layer.weight_shape[2:], layer.strides
    return (shape[2] + top + bottom - height) // down + 1, (shape[3] + left + right - width) // across + 1


def columns(value: FloatArray, layer: Layer, picks: NDArray[np.int64]) -> FloatArray:
    """The inputs that each picked output position sees (im2col), by group.

    Args:
        value: (N, C, H, W) or (N, C).
        layer: Kernel, stride, padding and groups.
        picks: Flat output positions, (N, P).

    Returns:
        float32 (groups, N × P, C / groups × kernel height × kernel width).
    """
    if value.ndim == 2:
        return value[None]
    top, left, bottom, right = layer.pads
    padded = np.pad(value, ((0, 0), (0, 0), (top, bottom), (left, right)))
    kernel: Any = layer.weight_shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[:, :, :: layer.strides[0], :: layer.strides[1]]
    row, column = np.divmod(picks, windows.shape[3])
    found = windows[np.arange(len(value))[:, None], :, row, column]  # (N, P, C, kernel height, kernel width)
    grouped = found.reshape(picks.size, layer.groups, -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2), np.float32)


def nearest_scales(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """The scale of each row that clips nothing; 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    return np.where(largest > 0, np.maximum(largest / LEVELS, float(np.finfo(np.float32).tiny)), 1.0)


def round_nearest(weight: FloatArray, bias: FloatArray) -> RoundedLayer:
    """Each weight to the nearest integer of its output channel's scale; the bias stays."""
    rows = weight.reshape(len(weight), -1)
    scales = nearest_scales(rows).astype(np.float32)
    integers = np.clip(np.rint(rows / scales[:, None]), -LEVELS, LEVELS).astype(np.int8)
    return RoundedLayer(integers.reshape(weight.shape), scales, bias)


def round_layer(weight: FloatArray, bias: FloatArray, moments: Moments, options: RoundOptions) -> RoundedLayer:
    """Rounds a layer's weights by the moments of its inputs.

    Args:
        weight: (out, in / groups, …).
        bias: (out,).
        moments: With all batches added.
        options: Method.
    """
    groups = moments.layer.groups
    rows = weight.reshape(groups, len(weight) // groups, -1)
    integers, scales, shift = [], [], []
    for group in range(groups):
        covariance, cross, mean, error = moments.centred(group)
        if options.method == "second_order":
            found, scale = round_rows(rows[group], covariance, cross, options)
        else:
            scale = nearest_scales(rows[group]).astype(np.float32).astype(np.float64)
            found = np.clip(np.rint(rows[group] / scale[:, None]), -LEVELS, LEVELS)
        integers.append(found)
        scales.append(scale)
        shift.append(error + rows[group] @ mean - (found @ mean) * scale)
    corrected = bias + np.concatenate(shift) if options.bias_correction else bias
    packed = np.concatenate([found.astype(np.int8) for found in integers]).reshape(weight.shape)
    return RoundedLayer(packed, np.concatenate(scales).astype(np.float32), corrected.astype(np.float32))


def round_rows(
    rows: NDArray[np.floating], covariance: NDArray[np.floating], cross: NDArray[np.floating], options: RoundOptions
) -> tuple[FloatArray, NDArray[np.float64]]:
    """Rounds the rows of one group; see the three steps above.

    Args:
        rows: (out, K).
        covariance: Of the inputs, (K, K).
        cross: Covariance of the missing output with the inputs, (out, K); see `Moments.centred`.
        options: Damping, ridge, clips and sweeps.

    Returns:
        Integers (out, K) and scales (out,).
    """
    level = float(np.trace(covariance)) / len(covariance)
    level = level if level > 0 else 1.0  # inputs that never change: every rounding is as good
    order = np.argsort(-np.diag(covariance), kind="stable")
    damped = covariance.astype(np.float32)[np.ix_(order, order)]
    diagonal = np.diag(damped).copy()
    np.fill_diagonal(damped, diagonal + np.float32(options.ridge * level))
    # Column by column is how all three steps go: a column of the weights is a row of the arrays from here on.
    target = rows.T[order].astype(np.float32)
    target += np.linalg.solve(damped, cross[:, order].T.astype(np.float32))
    np.fill_diagonal(damped, diagonal + np.float32(options.damping * level))
    factor = _upper_factor(damped)
    base = nearest_scales(target.T)
    best = np.full(len(rows), np.inf)
    integers, scales = np.zeros_like(target), base.astype(np.float32)
    for clip in options.clips:
        scale = (base * clip).astype(np.float32)
        found, error = _feed_forward(target, scale, factor)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        np.copyto(integers, found, where=better)
    del factor
    for _ in range(options.sweeps):
        _descend(integers, scales, target, damped)
    restored = np.empty_like(integers)
    restored[order] = integers
    return restored.T, scales.astype(np.float64)


def _upper_factor(matrix: FloatArray) -> FloatArray:
    """U with U Uᵀ = `matrix`, upper triangular: the error of the columns up to k is the square of the first k entries of d U, for a difference d."""
    reverse = matrix[::-1, ::-1]
    try:
        lower = np.linalg.cholesky(reverse)
    except np.linalg.LinAlgError:  # moments whose directions differ by more than float32 resolves
        lower = np.linalg.cholesky(reverse.astype(np.float64)).astype(np.float32)
    return np.asarray(lower[::-1, ::-1])


def _feed_forward(target: FloatArray, scale: FloatArray, factor: FloatArray) -> tuple[FloatArray, NDArray[np.float64]]:
    """Rounds column by column, each to where the error of those rounded before is best made up for by it and by those still free.

    That is GPTQ without an inverse: with H = U Uᵀ, U upper triangular, column k of (q − w) U holds only what columns up to k give. In blocks, so that
    the columns beyond are updated by one matrix product a block.

    Args:
        target: float32 (K, out).
        scale: float32 (out,).
        factor: See `_upper_factor`.

    Returns:
        Integers (K, out) and each output's squared error (out,).
    """
    work, result = np.zeros_like(target), np.empty_like(target)  # what is there so far of (q − w) U, and the integers
    error = np.zeros(len(scale))
    for start in range(0, len(work), _BLOCK):
        stop = min(start + _BLOCK, len(work))
        change, left = np.empty((stop - start, len(scale)), np.float32), np.empty((stop - start, len(scale)), np.float32)
        for index in range(start, stop):
            row, pivot = index - start, factor[index, index]
            result[index] = np.clip(np.rint((target[index] - work[index] / pivot) / scale), -LEVELS, LEVELS)
            change[row] = result[index] * scale - target[index]
            left[row] = work[index] + pivot * change[row]
            work[index + 1 : stop] += np.outer(factor[index, index + 1 : stop], change[row])
        work[stop:] += factor[start:stop, stop:].T @ change
        error += np.square(left).sum(axis=0, dtype=np.float64)
    return result, error


def _descend(integers: FloatArray, scales: FloatArray, target: FloatArray, damped: FloatArray) -> None:
    """One pass over the columns: each integer moves to where the error, all others held, is least. Changes `integers`, (K, out)."""
    gradient = damped @ (integers * scales - target)
    for start in range(0, len(damped), _BLOCK):
        stop = min(start + _BLOCK, len(damped))
        local, moves = gradient[start:stop].copy(), np.zeros((stop - start, len(scales)), np.float32)
        for index in range(start, stop):
            wanted = integers[index] - local[index - start] / (damped[index, index] * scales)
            found = np.clip(np.rint(wanted), -LEVELS, LEVELS)
            moves[index - start] = (found - integers[index]) * scales
            integers[index] = found
            local += np.outer(damped[start:stop, index], moves[index - start])
        gradient += damped[:, start:stop] @ moves

"""Weights → INT8 without a single image, from what is true of every image: neighbouring pixels are alike.

What a layer reads is taken as independent from channel to channel, with the deviations that BatchNorm layers state, and as correlated between the
taps of one channel, ρ to the power of their distance. Its covariance is then the same small matrix for every channel, and the second-order rounding
of `round` becomes exact and quick: an error in one tap is fed forward to the other taps of its channel, so that a kernel's sum, which smooth inputs
see, survives. On a trained A0 that is worth 7 dB over rounding to nearest (`benchmarks/int8.py`, the row without images in closed form).

Source: Frantar et al. 2022, GPTQ, https://arxiv.org/abs/2210.17323, for feeding errors forward; Field 1987 for the correlation of natural images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .calibrate import LEVELS
from .chain import FloatArray
from .round import RoundedLayer, nearest_scales

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PriorOptions:
    """How weights are rounded without images.

    Attributes:
        correlation: Of neighbouring pixels of one channel, 0 (rounding to nearest, with the best clip) to less than 1.
        damping: Added to the diagonal of the covariance, whose entries are 1.
        clips: Weight scales to try, in units of the one that clips nothing.
        sweeps: Passes in which single weights are changed by a step wherever that lowers the error.
    """

    correlation: float = 0.6
    damping: float = 0.003
    clips: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1 or self.damping <= 0 or self.sweeps < 0 or not self.clips or not all(0 < clip <= 1 for clip in self.clips):
            raise CalibrationError(
                f"rounding without images: expected a correlation of 0 to 1 and positive options, found {self}", remedy="leave it out"
            )


def round_by_prior(weight: FloatArray, bias: FloatArray, *, deviation: Float64, groups: int, options: PriorOptions | None = None) -> RoundedLayer:
    """Rounds one layer.

    Args:
        weight: float32 (out, in / groups, height, width) or (out, in).
        bias: float32 (out,); it stays.
        deviation: Standard deviation of each input channel, (in,).
        groups: Of the layer.
        options: Correlation, damping, clips.
    """
    options = options or PriorOptions()
    target = weight.reshape(*weight.shape[:2], -1).astype(np.float64)
    covariance = tap_covariance(weight.shape[2:], options)
    by_row = np.repeat(np.square(deviation).reshape(groups, -1), len(weight) // groups, axis=0)  # (out, in / groups)
    factor = np.linalg.cholesky(np.linalg.inv(covariance)).T
    base = nearest_scales(target.reshape(len(target), -1))
    best, integers, scales = np.full(len(target), np.inf), np.zeros_like(target), base.copy()
    for clip in options.clips:
        scale = (base * clip).astype(np.float32).astype(np.float64)
        found = _feed_forward(target, scale, factor)
        for _ in range(options.sweeps):
            _descend(found, scale, target, covariance)
        difference = found * scale[:, None, None] - target
        error = (by_row * ((difference @ covariance) * difference).sum(axis=2)).sum(axis=1)
        better = error < best
        best[better], integers[better], scales[better] = error[better], found[better], scale[better]
    return RoundedLayer(integers.reshape(weight.shape).astype(np.int8), scales.astype(np.float32), bias)


def tap_covariance(kernel: tuple[int, ...], options: PriorOptions) -> Float64:
    """Covariance of the taps of one channel of deviation 1, (taps, taps): ρ to the power of their distance, damped."""
    places = np.array(list(np.ndindex(*kernel)), np.float64).reshape(int(np.prod(kernel)), len(kernel))
    distance = np.sqrt(np.square(places[:, None] - places[None]).sum(axis=2))
    return np.asarray(options.correlation**distance + options.damping * np.eye(len(places)), np.float64)


def _feed_forward(target: Float64, scale: Float64, factor: Float64) -> Float64:
    """Rounds tap by tap, all channels at once; each error is spread over the taps that are not rounded yet."""
    work, result, step = target.copy(), np.empty_like(target), scale[:, None]
    for tap in range(len(factor)):
        result[:, :, tap] = np.clip(np.rint(work[:, :, tap] / step), -LEVELS, LEVELS)
        error = (work[:, :, tap] - result[:, :, tap] * step) / factor[tap, tap]
        work[:, :, tap + 1 :] -= error[:, :, None] * factor[tap, tap + 1 :]
    return result


def _descend(integers: Float64, scale: Float64, target: Float64, covariance: Float64) -> None:
    """One pass: each integer moves to where the error, all others held, is least. Changes `integers`."""
    step = scale[:, None]
    gradient = (integers * step[:, :, None] - target) @ covariance
    for tap in range(len(covariance)):
        wanted = integers[:, :, tap] - gradient[:, :, tap] / (covariance[tap, tap] * step)
        found = np.clip(np.rint(wanted), -LEVELS, LEVELS)
        gradient += ((found - integers[:, :, tap]) * step)[:, :, None] * covariance[tap]
        integers[:, :, tap] = found

"""What rounding must know of a layer's inputs: first and second moments, summed over some output positions of every image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chain import FloatArray, Layer

_ROWS = 512


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
        # float32: around the origin below, and beside the damping, seven digits are plenty; of a large layer, float64 would be 265 MB.
        self.second: FloatArray = np.zeros((layer.groups, inner, inner), np.float32)
        self.total: NDArray[np.float64] = np.zeros((layer.groups, inner))
        self.cross: FloatArray = np.zeros((layer.groups, layer.out_channels // layer.groups, inner), np.float32)
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

    def centred(self, group: int) -> tuple[FloatArray, FloatArray, NDArray[np.float64], NDArray[np.float64]]:
        """Of one group: covariance of x (K, K), covariance of the missing output with x (out, K), mean of x (K,), mean missing output (out,).

        The covariance takes the place of the sums, which are as large (133 MB of a large layer): nothing can be added any more.
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
        cross = self.cross[group] / np.float32(self.count)
        cross -= np.outer(error, mean).astype(np.float32)
        return covariance, cross, mean + origin, error


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

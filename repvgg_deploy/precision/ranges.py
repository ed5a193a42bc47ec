"""What calibration images show of each layer's input, streamed: memory holds one batch and what is summed up.

`Statistics` are ranges and histograms per channel: one collection on the exported FP32 graph also serves every rescaled
version of it, because a factor on a channel stretches its bins. `Moments` are what rounding must know of a layer's
inputs: first and second moments, over some output positions of every image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .network import Float64, FloatArray, Layer, Network
from .run_onnx import Tell, Tensors, open_tensors, tell_nobody

LEVELS = 127
"""Largest integer of symmetric INT8; −128 is not used, so that negation is exact."""
BINS = 1024
"""Of a channel's histogram."""
_MERGED_BINS = 2048
_MAX_PIXELS = 1024
_EXTREME = (30.0, 0.05)
"""An image is left out whose activations somewhere are so many times the median image's (root mean squares); where a
larger share of the images is such, that is what the data is like."""
_EXTREME_OUTPUT = (3.0, 0.01)
"""The same of what the last layers give: of usual images at most twice the median's. Such an image is clipped, so that
few may be left out: where 3 % of the images made the outputs of heads on A0 explode, the median image won 8 dB without
them, and they went from 8 dB to 1. Between layers even 17 times do no harm where the next layer does not pass them on:
A0's own logits lose 2.5 dB without these images."""
_ROWS = 512


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What a layer's input was over all calibration images.

    Attributes:
        largest: Largest absolute value of each channel, float64 (C,).
        histogram: How often |x| of each channel fell into each of equal bins from 0 to `largest`, int64 (C, bins); of
            large maps, a regular part of the pixels is counted.
    """

    largest: Float64
    histogram: NDArray[np.int64]

    def rescaled(self, factors: Float64) -> TensorStatistics:
        """The statistics when each channel is divided by its factor."""
        return TensorStatistics(self.largest / factors, self.histogram)

    def stretched(self, factor: float) -> TensorStatistics:
        """The same values in a range that is wider by a factor of at least 1."""
        bins = self.histogram.shape[1]
        merged = np.zeros_like(self.histogram)
        np.add.at(merged.T, (np.arange(bins) / factor).astype(np.int64), self.histogram.T)
        return TensorStatistics(self.largest * factor, merged)

    def values(self) -> Float64:
        """|x| that each bin stands for, (C, bins); that of the first is 0, where ReLU puts most."""
        centres = (np.arange(self.histogram.shape[1]) + 0.5) / self.histogram.shape[1]
        centres[0] = 0.0
        return np.asarray(self.largest[:, None] * centres, np.float64)

    def channel_percentile(self, percent: float) -> Float64:
        """The upper edge of the bin of each channel below which `percent` of its values lie; (C,)."""
        totals = np.cumsum(self.histogram, axis=1)
        index = (totals < percent / 100 * totals[:, -1:]).sum(axis=1)
        edges = np.minimum(index + 1, self.histogram.shape[1]) / self.histogram.shape[1]
        return np.asarray(self.largest * edges, np.float64)

    def merged(self) -> tuple[Float64, float]:
        """Histogram of the whole tensor, (2048,), over 0 … the float."""
        top = float(self.largest.max(initial=0.0))
        if top <= 0:
            return np.zeros(_MERGED_BINS), 0.0
        index = np.minimum((self.values() / top * _MERGED_BINS).astype(np.int64), _MERGED_BINS - 1)
        counts = np.bincount(index.ravel(), weights=self.histogram.ravel().astype(np.float64), minlength=_MERGED_BINS)
        return counts.astype(np.float64), top


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration images showed.

    Attributes:
        tensors: By name of a layer's input.
        images: How many images there were.
        data_sha256: Of their values, shapes and dtypes, in order.
        left_out: Which images are not in `tensors`; see `find_extreme`.
    """

    tensors: dict[str, TensorStatistics]
    images: int
    data_sha256: str
    left_out: tuple[int, ...] = ()

    def ranges(self, percent: float = 100.0) -> dict[str, Float64]:
        """Ranges of each channel, by tensor: the largest values, or a percentile of each channel's own."""
        return {
            name: t.largest if percent >= 100 else t.channel_percentile(percent) for name, t in self.tensors.items()
        }

    def rescaled(self, factors: Mapping[str, Float64]) -> Statistics:
        """The statistics of a graph that `equalize` rescaled by `factors`."""
        tensors = {name: t.rescaled(factors[name]) if name in factors else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)


def collect(network: Network, batches: Iterable[NDArray[Any]], *, progress: Tell = tell_nobody) -> Statistics:
    """Streams the batches (a list: they are read again) through the graph: for the ranges, then for the histograms.

    `progress` is told of images, each counted twice.

    Raises:
        CalibrationError: There are no images, they are all alike or hold NaN, or `batches` can be iterated only once.
    """
    if isinstance(batches, Iterator):
        raise CalibrationError(
            "batches can be iterated only once", remedy="give a list, or an object whose __iter__ starts again"
        )
    tensors, axes = network.quantized_tensors(), network.axes()
    digest, images = hash_images(batches)
    last = network.last_outputs()
    measure, run, done = open_tensors(network.model, [*tensors, *last]), open_tensors(network.model, tensors), 0
    peaks: dict[str, list[FloatArray]] = {name: [] for name in tensors}  # of each image, (N, C)
    sizes: dict[str, list[FloatArray]] = {name: [] for name in (*tensors, *last)}  # root mean square of each, (N,)
    for batch in batches:
        for name, value in measure(batch).items():
            peak, size = _by_image(np.moveaxis(value, axes[name], 1), len(batch))
            sizes[name].append(size)
            if name in peaks:
                peaks[name].append(peak)
        done += len(batch)
        progress(done, 2 * images)
    by_image = {name: np.concatenate(value) for name, value in peaks.items()}
    require_finite(
        {name: value.max(axis=0).astype(np.float64) for name, value in by_image.items()},
        "calibration gives",
        "look for NaN in the calibration images and in the checkpoint",
    )
    gated = {layer.input for layer in network.layers if layer.name in network.gates}
    by_size = {name: np.concatenate(value) for name, value in sizes.items() if name not in gated}
    left_out = find_extreme(by_size.values(), [by_size[name] for name in last if name in by_size])
    largest = {name: np.delete(v, left_out, axis=0).max(axis=0).astype(np.float64) for name, v in by_image.items()}
    histograms = {name: np.zeros((value.size, BINS), np.int64) for name, value in largest.items()}
    for batch in leave_out(batches, left_out):
        for name, value in run(batch).items():
            histograms[name] += _histogram(np.moveaxis(value, axes[name], 1), largest[name])
        done += len(batch)
        progress(done, 2 * images)
    found = {name: TensorStatistics(largest[name], histograms[name]) for name in tensors}
    return Statistics(found, images, digest, left_out)


def _by_image(value: FloatArray, images: int) -> tuple[FloatArray, FloatArray]:
    """Largest absolute value of each image's channels, (N, C), and its root mean square, (N,), of (N, C, …).

    Of (N × k, C, …), as windows of an image are, too; where the first axis is not of images, all have what the whole
    has.
    """
    parts = images if len(value) % images == 0 else 1
    rows = value.reshape(parts, -1, value.shape[1], int(np.prod(value.shape[2:])))
    peak = np.maximum(rows.max(axis=(1, 3)), -rows.min(axis=(1, 3)))
    size = np.sqrt(np.einsum("nkcp,nkcp->n", rows, rows) / rows[0].size)
    return np.repeat(peak, images // parts, axis=0), np.repeat(size, images // parts)


def find_extreme(activations: Iterable[FloatArray], outputs: Iterable[FloatArray]) -> tuple[int, ...]:
    """Images beside which the others vanish: in a deep network with gates, some make activations hundreds as large.

    127 steps that reach up to theirs leave none for the other images, and squared errors speak of theirs alone. Takes
    the root mean square of each image, (N,), of each tensor; gives none where they are too many to be exceptions.
    """
    found: set[int] = set()
    for (most, share), sizes in ((_EXTREME, activations), (_EXTREME_OUTPUT, outputs)):
        extreme: set[int] = set()
        count = 0
        for size in sizes:
            count, median = len(size), np.median(size)
            extreme.update(np.flatnonzero(size > most * median).tolist() if median > 0 else ())
        found |= extreme if len(extreme) <= share * count else set()
    return tuple(sorted(found))


def leave_out(batches: Iterable[NDArray[Any]], images: Collection[int]) -> list[NDArray[Any]]:
    """The batches with others of the same batch in the place of some images, so that batches keep their size.

    Where nothing else is in a batch, it is gone.
    """
    found, start = [], 0
    for batch in batches:
        rest = [index for index in range(len(batch)) if start + index not in images]
        if rest:
            found.append(batch if len(rest) == len(batch) else batch[np.resize(rest, len(batch))])
        start += len(batch)
    return found


def widen_ranges(ranges: dict[str, Float64], values: Tensors, channels: Mapping[str, int]) -> None:
    """Takes a batch's values into the largest absolute value of each channel, float64 (C,), by tensor.

    `channels` says which axis of a tensor they are.
    """
    for name, value in values.items():
        axes = tuple(axis for axis in range(value.ndim) if axis != channels[name] % value.ndim)
        largest = np.maximum(value.max(axis=axes), -value.min(axis=axes)).astype(np.float64)
        ranges[name] = np.maximum(ranges[name], largest) if name in ranges else largest


def require_finite(ranges: Mapping[str, Float64], who: str, remedy: str) -> None:
    """Fails when a range is NaN or infinite; `who` gave it.

    Raises:
        CalibrationError: It names the tensor.
    """
    bad = next((name for name, value in ranges.items() if not np.isfinite(value).all()), None)
    if bad is not None:
        raise CalibrationError(f"{who} NaN or infinite values at {bad}", remedy=remedy)


def hash_images(batches: Iterable[NDArray[Any]]) -> tuple[str, int]:
    """SHA-256 of the images (values, shapes and dtypes, in order) and how many there are.

    Raises:
        CalibrationError: There are none, or they are all alike.
    """
    digest, images, first, alike = hashlib.sha256(), 0, None, True
    for batch in batches:
        for image in batch:
            digest.update(f"{image.dtype} {image.shape};".encode())
            data = np.ascontiguousarray(image).tobytes()
            digest.update(data)
            alike = alike and (first is None or data == first)
            first = data if first is None else first
            images += 1
    if images == 0:
        raise CalibrationError(
            "there are no calibration images", remedy="give some hundred images of the training split"
        )
    if images > 1 and alike:
        raise CalibrationError(
            f"all {images} calibration images are alike", remedy="give images that show what the model will see"
        )
    return digest.hexdigest(), images


def _histogram(value: NDArray[Any], largest: Float64) -> NDArray[np.int64]:
    """How often |x| falls into each bin, (C, bins), for (N, C, …); of a large map every so many pixels are counted."""
    if value.ndim == 4:  # neighbours are alike
        stride = max(1, int(np.sqrt(value.shape[2] * value.shape[3] / _MAX_PIXELS)))
        value = value[:, :, ::stride, ::stride]
    channels = value.shape[1]
    value = value.reshape(len(value), channels, -1).transpose(1, 0, 2).reshape(channels, -1)
    factor = np.where(largest > 0, BINS / np.where(largest > 0, largest, 1.0), 0.0).astype(np.float32)
    index = np.minimum((np.abs(value) * factor[:, None]).astype(np.int32), BINS - 1)
    index += np.arange(channels, dtype=np.int32)[:, None] * BINS
    return np.asarray(np.bincount(index.ravel(), minlength=channels * BINS).reshape(channels, BINS), np.int64)


class Moments:
    """Sums over a layer's inputs: of the quantized network (x) and of what the FP32 network differs there.

    `positions` output positions of each image are taken; `full` says whether second moments are needed, or means only.
    """

    def __init__(self, layer: Layer, weight: FloatArray, *, positions: int, seed: int, full: bool = True) -> None:
        self.layer = layer
        inner = int(np.prod(layer.weight_shape[1:]))
        self.count = 0
        # float32: around the origin below, and beside the damping, seven digits are plenty; of a large layer, float64
        # would be 265 MB.
        self.second: FloatArray = np.zeros((layer.groups, inner, inner), np.float32)
        self.total: Float64 = np.zeros((layer.groups, inner))
        self.cross: FloatArray = np.zeros((layer.groups, layer.out_channels // layer.groups, inner), np.float32)
        self.error: Float64 = np.zeros((layer.groups, layer.out_channels // layer.groups))
        self._full = full
        self._closed: set[int] = set()
        # Near the mean: sums of squares around it lose no digits, and inputs that never change give 0.
        self._origin: FloatArray | None = None
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

    def centred(self, group: int) -> tuple[FloatArray, FloatArray, Float64, Float64]:
        """Of one group: covariances of x (K, K), of the missing output with x (out, K); means of both, (K,), (out,).

        The covariance takes the place of the sums, which are as large (133 MB in a large layer): nothing can be added.
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
    """Output positions of each image, flat indices (N, P): `count` of them at random, or all where there are fewer."""
    total = int(np.prod(value.shape[1:-1] if layer.axis == -1 else output_size(value.shape, layer)))
    if total <= count:
        return np.tile(np.arange(total), (len(value), 1))
    return np.stack([generator.choice(total, count, replace=False) for _ in range(len(value))])


def output_size(shape: tuple[int, ...], layer: Layer) -> tuple[int, int]:
    """(height, width) of a convolution's output for an input (N, C, H, W)."""

    def along(axis: int) -> int:
        size = (shape[2 + axis] - 1) * layer.upsampling[axis] + 1 + layer.pads[axis] + layer.pads[axis + 2]
        extent = (layer.weight_shape[2 + axis] - 1) * layer.dilations[axis] + 1
        return (size - extent) // layer.strides[axis] + 1

    return along(0), along(1)


def columns(value: FloatArray, layer: Layer, picks: NDArray[np.int64]) -> FloatArray:
    """The inputs that each picked output position, (N, P), sees (im2col), by group.

    Returns:
        float32 (groups, N × P, C / groups × kernel height × kernel width).
    """
    if layer.axis == -1:
        tokens = value.reshape(len(value), -1, value.shape[-1])
        return np.ascontiguousarray(tokens[np.arange(len(value))[:, None], picks].reshape(1, picks.size, -1))
    top, left, bottom, right = layer.pads
    down, across = layer.upsampling
    height, width = (size * by - by + 1 for size, by in zip(value.shape[2:], (down, across), strict=True))
    padded = np.zeros((*value.shape[:2], height + top + bottom, width + left + right), value.dtype)
    padded[:, :, top : top + height : down, left : left + width : across] = value
    kernel: Any = tuple((k - 1) * d + 1 for k, d in zip(layer.weight_shape[2:], layer.dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[
        :, :, :: layer.strides[0], :: layer.strides[1], :: layer.dilations[0], :: layer.dilations[1]
    ]
    row, column = np.divmod(picks, windows.shape[3])
    found = windows[np.arange(len(value))[:, None], :, row, column]  # (N, P, C, kernel height, kernel width)
    grouped = found.reshape(picks.size, layer.groups, -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2), np.float32)

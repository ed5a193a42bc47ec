"""Ranges of activations: streamed per-channel histograms.

Memory holds one batch and a histogram per channel, however many images there are. The histograms are per channel, so that one collection on the
exported FP32 graph also serves every rescaled version of it: a factor on a channel stretches its bins.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from .chain import read_chain
from .execute import run_tensors

LEVELS = 127
"""Largest integer of symmetric INT8; −128 is not used, so that negation is exact."""

BINS = 1024
"""Of a channel's histogram."""
_MERGED_BINS = 2048
_MAX_PIXELS = 1024


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What a layer's input was over all calibration images.

    Attributes:
        largest: Largest absolute value of each channel, float64 (C,).
        histogram: How often |x| of each channel fell into each of equal bins from 0 to `largest`, int64 (C, bins); of large maps, a regular part
            of the pixels is counted.
    """

    largest: NDArray[np.float64]
    histogram: NDArray[np.int64]

    def rescaled(self, factors: NDArray[np.float64]) -> TensorStatistics:
        """The statistics when each channel is divided by its factor."""
        return TensorStatistics(self.largest / factors, self.histogram)

    def values(self) -> NDArray[np.float64]:
        """|x| that each bin stands for, (C, bins); that of the first is 0, where ReLU puts most."""
        centres = (np.arange(self.histogram.shape[1]) + 0.5) / self.histogram.shape[1]
        centres[0] = 0.0
        return np.asarray(self.largest[:, None] * centres, np.float64)

    def channel_percentile(self, percent: float) -> NDArray[np.float64]:
        """Per channel, the upper edge of the bin below which `percent` of its values lie; (C,)."""
        totals = np.cumsum(self.histogram, axis=1)
        index = (totals < percent / 100 * totals[:, -1:]).sum(axis=1)
        edges = np.minimum(index + 1, self.histogram.shape[1]) / self.histogram.shape[1]
        return np.asarray(self.largest * edges, np.float64)

    def merged(self) -> tuple[NDArray[np.float64], float]:
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
    """

    tensors: dict[str, TensorStatistics]
    images: int
    data_sha256: str

    def ranges(self, percent: float = 100.0) -> dict[str, NDArray[np.float64]]:
        """Per-channel ranges by tensor, for `equalize`: the largest values, or a percentile of each channel's own."""
        return {name: t.largest if percent >= 100 else t.channel_percentile(percent) for name, t in self.tensors.items()}

    def rescaled(self, factors: Mapping[str, NDArray[np.float64]]) -> Statistics:
        """The statistics of a graph that `equalize` rescaled by `factors`."""
        tensors = {name: t.rescaled(factors[name]) if name in factors else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)


def collect(model: onnx.ModelProto, batches: Iterable[NDArray[Any]], *, progress: Callable[[int, int], None] | None = None) -> Statistics:
    """Streams the batches through the graph twice: for the ranges, then for the histograms.

    Args:
        model: FP32, as exported.
        batches: Such as the model takes; must give the same again when iterated again (a list, not a generator).
        progress: Called with images done and images in all, each counted twice.

    Raises:
        CalibrationError: There are no images, they are all alike or hold NaN, or `batches` can be iterated only once.
        ModelError: The graph is not one of ours.
    """
    if isinstance(batches, Iterator):
        raise CalibrationError("batches can be iterated only once", remedy="give a list, or an object whose __iter__ starts again")
    tensors = read_chain(model).quantized_tensors()
    digest, images = hash_images(batches)
    done = 0
    largest: dict[str, NDArray[np.float64]] = {}
    for values in run_tensors(model, tensors, batches):
        for name, value in values.items():
            axes = (0, *range(2, value.ndim))
            found = np.maximum(value.max(axis=axes), -value.min(axis=axes)).astype(np.float64)
            largest[name] = np.maximum(largest[name], found) if name in largest else found
        done = _tell(progress, done + len(next(iter(values.values()))), 2 * images)
    bad = [name for name, value in largest.items() if not np.isfinite(value).all()]
    if bad:
        raise CalibrationError(
            f"calibration gives NaN or infinite values at {bad[0]}", remedy="look for NaN in the calibration images and in the checkpoint"
        )
    histograms = {name: np.zeros((value.size, BINS), np.int64) for name, value in largest.items()}
    for values in run_tensors(model, tensors, batches):
        for name, value in values.items():
            histograms[name] += _histogram(_by_channel(_thin(value)), largest[name])
        done = _tell(progress, done + len(next(iter(values.values()))), 2 * images)
    return Statistics({name: TensorStatistics(largest[name], histograms[name]) for name in tensors}, images, digest)


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> int:
    if progress is not None:
        progress(done, total)
    return done


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
        raise CalibrationError("there are no calibration images", remedy="give some hundred images of the training split")
    if images > 1 and alike:
        raise CalibrationError(f"all {images} calibration images are alike", remedy="give images that show what the model will see")
    return digest.hexdigest(), images


def _thin(value: NDArray[Any]) -> NDArray[Any]:
    """Every so many pixels of a large map: a histogram needs no more, and neighbours are alike."""
    if value.ndim < 4:
        return value
    stride = max(1, int(np.sqrt(value.shape[2] * value.shape[3] / _MAX_PIXELS)))
    return value[:, :, ::stride, ::stride]


def _by_channel(value: NDArray[Any]) -> NDArray[Any]:
    """(N, C, …) as (C, N × …)."""
    return np.asarray(value.reshape(len(value), value.shape[1], -1).transpose(1, 0, 2).reshape(value.shape[1], -1))


def _histogram(value: NDArray[Any], largest: NDArray[np.float64]) -> NDArray[np.int64]:
    channels = len(value)
    factor = np.where(largest > 0, BINS / np.where(largest > 0, largest, 1.0), 0.0).astype(np.float32)
    index = np.minimum((np.abs(value) * factor[:, None]).astype(np.int32), BINS - 1)
    index += np.arange(channels, dtype=np.int32)[:, None] * BINS
    return np.asarray(np.bincount(index.ravel(), minlength=channels * BINS).reshape(channels, BINS), np.int64)

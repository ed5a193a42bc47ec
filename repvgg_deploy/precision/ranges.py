"""How large each layer's output may become: measured on images, or, without any, stated by the BatchNorm layers and tried on drawn images."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError, ModelError
from ..specs.values import ChannelStatistics, ModelSpec
from .chain import read_chain
from .execute import count_images, run_tensors
from .typed_model import TypedModel

RangeSource: TypeAlias = Literal["images", "statistics", "synthetic"]

INPUT_SUFFIX = ".input"
"""Ends the name under which the metadata states what a block reads."""

DEVIATIONS = 256.0
"""Standard deviations that a channel may reach. A trained A0 reaches 130 on 64 photographs: tails are long, and a block's branches, whose variances
the statistics add as if they were independent, rise together. Too much does no harm: FP16 has digits to spare below, and rescaling is exact."""
UNSEEN = 32.0
"""How much further real images may reach than drawn ones, where nothing else is known. The same A0: 12 times."""


@dataclass(frozen=True, slots=True)
class OutputRanges:
    """Largest absolute value of each output channel of every layer, before its ReLU.

    Attributes:
        values: By name of the layer's output tensor, float64 (C,).
        source: `images`: measured on the caller's. `statistics`: of the BatchNorm layers, |mean| + 256σ, where they speak (every 3×3 convolution),
            and 32 times what drawn images gave elsewhere (SE, classifier). `synthetic`: 32 times what drawn images gave, everywhere.
        images: How many images were run.
    """

    values: dict[str, NDArray[np.float64]]
    source: RangeSource
    images: int


def find_ranges(parent: TypedModel, batches: Sequence[NDArray[Any]] | None) -> OutputRanges:
    """Measures the ranges, or bounds them where there are no images.

    Args:
        parent: FP32.
        batches: Images as the model takes them; None where there are none.

    Raises:
        CalibrationError: The images do not do, or there are none and it is not known how an image becomes the input.
        ModelError: The graph is not one of ours, or its statistics are of another.
    """
    if batches is not None:
        return OutputRanges(measure_ranges(parent.model, batches), "images", count_images(batches))
    drawn = draw_batches(parent.metadata.spec)
    found = {name: value * UNSEEN for name, value in measure_ranges(parent.model, drawn).items()}
    stated = stated_ranges(parent.metadata.statistics)
    for name, value in stated.items():
        if name not in found or found[name].shape != value.shape:
            raise ModelError(f"the metadata states BatchNorm statistics of {name}, which the graph does not have", remedy="export the model again")
        # A channel that drawn images drive beyond that must fit, too.
        found[name] = np.maximum(found[name] / UNSEEN, value)
    return OutputRanges(found, "statistics" if stated else "synthetic", count_images(drawn))


def measure_ranges(model: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Largest absolute value of each output channel of every layer, by tensor; float64 (C,).

    Raises:
        CalibrationError: There are no images, or they hold or give NaN or infinite values.
        ModelError: The graph is not one of ours.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for values in run_tensors(model, [layer.output for layer in read_chain(model).layers], batches):
        for name, value in values.items():
            axes = (0, *range(2, value.ndim))
            largest = np.maximum(value.max(axis=axes), -value.min(axis=axes)).astype(np.float64)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    if not found:
        raise CalibrationError("there are no images to measure ranges on", remedy="give some images of the training split")
    bad = [name for name, value in found.items() if not np.isfinite(value).all()]
    if bad:
        raise CalibrationError(f"the images give NaN or infinite values at {bad[0]}", remedy="look for NaN in the images and in the checkpoint")
    return found


def stated_ranges(statistics: Mapping[str, ChannelStatistics]) -> dict[str, NDArray[np.float64]]:
    """|mean| + 256σ of each channel of every layer's output as the BatchNorm layers state them, by tensor; float64 (C,)."""
    outputs = {name: value for name, value in statistics.items() if not name.endswith(INPUT_SUFFIX)}
    return {name: np.abs(decode_channels(value.mean)) + DEVIATIONS * decode_channels(value.std) for name, value in outputs.items()}


def decode_channels(text: str) -> NDArray[np.float64]:
    """One number a channel, of `ChannelStatistics`; float64 (C,)."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def draw_batches(spec: ModelSpec) -> list[NDArray[Any]]:
    """Eight drawn images as the model takes them: four smooth ones, noise, a chequerboard, black and white; the same every time.

    Raises:
        CalibrationError: It is not known how an image becomes the input.
    """
    if spec.preprocessing is None:
        raise CalibrationError(
            "there are no images, and none can be drawn: how an image becomes this model's input is not known",
            remedy="give some batches as the model takes them",
        )
    sizes = spec.input.shape[1:3] if spec.input.layout == "NHWC" or spec.input.dtype == "uint8" else spec.input.shape[2:4]
    height, width = (size if isinstance(size, int) else usual for size, usual in zip(sizes, spec.preprocessing.crop, strict=True))
    images = _draw_images(height, width)
    if spec.batch is not None:
        images = np.resize(images, (-(-len(images) // spec.batch) * spec.batch, *images.shape[1:]))
    if spec.input.dtype != "uint8":
        mean, std = (np.array(values, np.float32) for values in (spec.preprocessing.mean, spec.preprocessing.std))
        images = ((images - mean) / std).transpose(0, 3, 1, 2)
    size = spec.batch or len(images)
    return [np.ascontiguousarray(images[start : start + size]) for start in range(0, len(images), size)]


def _draw_images(height: int, width: int) -> NDArray[Any]:
    """uint8 (8, H, W, 3).

    Natural images have a power spectrum that falls with frequency (Field 1987); a sum of random gratings with amplitude 1/frequency has, too.
    """
    random = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    images = np.zeros((8, height, width, 3))
    for index, frequency in np.ndindex(4, 5):
        direction, phase = random.uniform(0, 2 * np.pi, (2, 3))
        along = np.cos(direction) * x[..., None] + np.sin(direction) * y[..., None]
        images[index] += np.sin(2 * np.pi * 2**frequency * along + phase) / 2**frequency
    images[:4] += random.normal(0, 0.1, images[:4].shape)
    images[4] = random.uniform(-1, 1, images[4].shape)
    images[5] = np.where((np.indices((height, width)) // 8).sum(0) % 2, 1.0, -1.0)[..., None]
    images[6], images[7] = -1.0, 1.0
    return np.clip(np.rint(127.5 + 127.5 * images), 0, 255).astype(np.uint8)

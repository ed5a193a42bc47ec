"""Drawn batches that make a difference between two models visible: image-like, hard at the borders, large constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..specs.values import Preprocessing
from .decode import normalize

_LARGE = 100.0  # some forty times the largest normalised pixel: activations far from where training left them


@dataclass(frozen=True, slots=True)
class Batch:
    """One verification batch.

    Attributes:
        name: What it shows, for a report.
        images: uint8 (N, H, W, 3), RGB, 0–255; None where the batch is no image.
        array: float32 (N, 3, H, W), normalised.
    """

    name: str
    images: NDArray[np.uint8] | None
    array: NDArray[np.float32]

    def input_for(self, dtype: str) -> NDArray[np.uint8] | NDArray[np.float32]:
        """What a model with a `uint8` or `float32` input is given."""
        if dtype != "uint8":
            return self.array
        assert self.images is not None, "a batch that is no image cannot be given to a uint8 model"
        return self.images


def make_batches(preprocessing: Preprocessing, sizes: Sequence[tuple[int, int]], *, seed: int = 0) -> tuple[Batch, ...]:
    """The batches of a verification.

    At each size two image-like images; at the first two sizes also borders and a large constant, one each, so that a
    dynamic batch is run with two sizes.

    Args:
        preprocessing: Its mean and standard deviation normalise the images.
        sizes: (height, width) of each.
        seed: Starts the random generator.
    """
    random = np.random.default_rng(seed)
    batches = []
    for index, size in enumerate(dict.fromkeys(sizes)):
        name, images = f"{size[0]}×{size[1]}", draw_images(size, 2, random)
        batches.append(Batch(f"image-like {name}", images, normalize(images, preprocessing)))
        if index < 2:
            borders = _border_image(size)
            batches.append(Batch(f"borders {name}", borders, normalize(borders, preprocessing)))
            colour = np.array([_LARGE, -_LARGE, _LARGE], np.float32).reshape(1, 3, 1, 1)
            batches.append(Batch(f"large constant {name}", None, np.broadcast_to(colour, (1, 3, *size)).copy()))
    return tuple(batches)


def draw_images(size: tuple[int, int], count: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Image-like batches: smooth colour fields, a few hard-edged rectangles and sensor noise.

    Natural images have a power spectrum that falls with frequency (Field 1987); a sum of random gratings with amplitude
    1/frequency has, too.

    Returns:
        uint8 (count, H, W, 3), RGB, 0–255; every image different.
    """
    height, width = size
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    images = np.empty((count, height, width, 3), np.uint8)
    for image in images:
        field = np.zeros((height, width, 3))
        for frequency in (1, 2, 3, 5, 8, 13):
            direction = random.uniform(0, 2 * np.pi, 3)
            along = np.cos(direction) * x[..., None] + np.sin(direction) * y[..., None]
            phase = 2 * np.pi * frequency * along + random.uniform(0, 2 * np.pi, 3)
            field += np.sin(phase) / frequency
        for _ in range(3):
            top, left = random.integers(0, height), random.integers(0, width)
            field[top : top + height // 3 + 1, left : left + width // 3 + 1] += random.uniform(-1.5, 1.5, 3)
        pixels = 127 + 60 * field + random.normal(0, 6, field.shape)
        image[:] = np.clip(np.rint(pixels), 0, 255)
    return images


def _border_image(size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (1, H, W, 3): black with white edges at the top and left and corners: errors at the padding show."""
    image = np.zeros((1, *size, 3), np.uint8)
    image[:, 0] = image[:, :, 0] = 255
    image[:, [0, 0, -1, -1], [0, -1, 0, -1]] = 255
    return image

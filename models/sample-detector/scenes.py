"""Draws scenes: handwritten digits of many sizes on busy ground, with a box and a class for each.

A scene is decided by its seed and its number alone, so that 2,000 evaluation scenes need no file. Integers only: equal
on every processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SAMPLE = Path(__file__).resolve().parents[1] / "sample"
LABELS = tuple("0123456789")
SEEDS = {"train": 0, "calib": 1, "eval": 2}
SIDES = (96, 176)  # height and width of a scene, each drawn by itself
DIGIT_HEIGHTS = (14, 60)
MOST_DIGITS = 8
INK = 64  # what counts as ink of a digit's box, of 255


@dataclass(frozen=True, slots=True)
class Digits:
    """Ink uint8 (N, 32, 32), 0 is paper; classes int64 (N,)."""

    ink: NDArray[np.uint8]
    classes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scene:
    """Image uint8 (H, W, 3) RGB; boxes float32 (n, 4), left, top, right, bottom in pixels; classes int64 (n,)."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


def load_digits(split: str) -> Digits:
    """The digits of the classifier's sample: `calib` or `eval`."""
    with np.load(SAMPLE / f"{split}.npz", allow_pickle=False) as file:
        return Digits(file["images"][..., 0], file["labels"])


def draw_scene(digits: Digits, split: str, number: int) -> Scene:
    """One of the scenes of a split, whose digits are given."""
    rng = np.random.default_rng((SEEDS[split], number))
    height, width = (int(side) for side in rng.integers(*SIDES, 2, endpoint=True))
    canvas, is_dark = _draw_ground(rng, height, width)
    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    for _ in range(int(rng.integers(1, MOST_DIGITS, endpoint=True))):
        low, high = np.log(DIGIT_HEIGHTS)
        tall = round(float(np.exp(rng.uniform(low, high))))
        wide = round(tall * float(rng.uniform(0.75, 1.1)))
        chosen = int(rng.integers(len(digits.ink)))
        ink = np.asarray(Image.fromarray(digits.ink[chosen]).resize((wide, tall), Image.Resampling.BILINEAR), np.int32)
        ink = ink * 256 // max(int(ink.max()), 1)
        rows, columns = (np.flatnonzero((ink >= INK).any(axis)) for axis in (1, 0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        tall, wide = ink.shape
        for _ in range(12):
            if tall >= height or wide >= width:
                break
            left, top = int(rng.integers(width - wide)), int(rng.integers(height - tall))
            box = (left, top, left + wide, top + tall)
            if all(_share_covered(box, other) < 0.1 for other in boxes):
                colour = rng.integers(150, 256, 3) if is_dark else rng.integers(0, 106, 3)
                part = canvas[top : box[3], left : box[2]]
                part += ink[..., None] * (colour.astype(np.int32) - part) >> 8
                boxes.append(box)
                classes.append(int(digits.classes[chosen]))
                break
    canvas += rng.integers(-9, 10, canvas.shape, np.int8)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int64))


def _draw_ground(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.int32], bool]:
    """A gradient under bars and patches, int32 (H, W, 3), and whether it is dark."""
    is_dark = bool(rng.integers(2))
    low, high = (0, 90) if is_dark else (166, 256)
    corners = rng.integers(low, high, (3, 3), np.int32)
    y = (np.arange(height, dtype=np.int32) * 256 // height)[:, None, None]
    x = (np.arange(width, dtype=np.int32) * 256 // width)[None, :, None]
    canvas = (corners[0] + ((corners[1] - corners[0]) * y >> 9)) + ((corners[2] - corners[0]) * x >> 9)
    for _ in range(int(rng.integers(3, 12))):
        thin = int(rng.integers(1, 5))
        tall, wide = ((thin, int(rng.integers(8, width))), (int(rng.integers(8, height)), thin),
                      tuple(int(side) for side in rng.integers(4, 40, 2)))[int(rng.integers(3))]  # fmt: skip
        top, left = int(rng.integers(height)), int(rng.integers(width))
        part = canvas[top : top + tall, left : left + wide]
        part += (rng.integers(0, 256, 3, np.int32) - part) * int(rng.integers(40, 160)) >> 8
    return canvas, is_dark


def _share_covered(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> float:
    """What two boxes have in common, of the smaller."""
    wide, tall = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return max(wide, 0) * max(tall, 0) / min(areas)

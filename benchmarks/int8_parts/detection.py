"""Scenes of the sample detector, and its mAP beside FP32's, with the interval that a paired bootstrap gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples import detect
from repvgg_deploy.images import fit_image

from scenes import Scene, draw_scene, load_digits  # isort: skip  # `detect` says where they are

RESAMPLES = 200
_CALIBRATION = 256  # scenes of a draw; the next one has the next


def draw_scenes(split: str, first: int, count: int) -> list[Scene]:
    """Scenes by number."""
    digits = load_digits(split)
    return [draw_scene(digits, split, number) for number in range(first, first + count)]


def fit_scenes(scenes: list[Scene]) -> NDArray[np.uint8]:
    """As the network's preprocessing fits images: uint8 (N, H, W, 3)."""
    return np.stack([fit_image(scene.image, detect.PREPROCESSING) for scene in scenes])


def prepare_scenes(folder: Path, *, calibration: int, evaluation: int, seeds: list[int]) -> None:
    """Writes the images of all seeds and of the evaluation."""
    np.save(folder / "evaluation.npy", fit_scenes(draw_scenes("eval", 0, evaluation)))
    for seed in seeds:
        np.save(folder / f"calibration-{seed}.npy", fit_scenes(draw_scenes("calib", seed * _CALIBRATION, calibration)))


class Matches(NamedTuple):
    """Detections of one class, best first.

    Attributes:
        image: int64 (n,).
        right: bool (IoU thresholds, n).
        truths: Objects on each image, int64 (images,).
    """

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    truths: NDArray[np.int64]


def measure(folder: Path, outputs: dict[str, NDArray[np.float32]], *, is_reference: bool) -> dict[str, float]:
    """mAP 0.50:0.95 in points; how far it is below FP32's, and between what 95 % of the resampled sets of scenes lie.

    FP32's own are kept in `maps.npy`: of all scenes, then of each resampled set.
    """
    count = len(next(iter(outputs.values())))
    scenes = draw_scenes("eval", 0, count)
    found = []
    for start in range(0, count, 64):
        part = {name: array[start : start + 64] for name, array in outputs.items()}
        sizes = [scene.image.shape[:2] for scene in scenes[start : start + 64]]
        found += detect.to_images(detect.decode(part, 0.01), sizes)
    matches = match_classes(detect.judge_boxes(found, scenes), count)
    generator = np.random.default_rng(0)
    draws = [generator.multinomial(count, np.full(count, 1 / count)) for _ in range(RESAMPLES)]
    maps = np.array([mean_precision(matches, weights) for weights in (np.ones(count, np.int64), *draws)])
    if is_reference:
        np.save(folder / "maps.npy", maps)
    drops = 100 * (np.load(folder / "maps.npy") - maps)
    low, high = np.percentile(drops[1:], (2.5, 97.5))
    return {"map": 100 * float(maps[0]), "map_drop": float(drops[0]), "drop_low": float(low), "drop_high": float(high)}


def match_classes(judge: Any, count: int) -> list[Matches]:
    """What COCO's matching found, by class."""
    found = []
    for start in range(0, len(judge.evalImgs), count):
        each = [(index, one) for index, one in enumerate(judge.evalImgs[start : start + count]) if one is not None]
        truths = np.zeros(count, np.int64)
        truths[[index for index, _ in each]] = [len(one["gtIds"]) for _, one in each]
        scores = np.concatenate([np.asarray(one["dtScores"]) for _, one in each])
        right = np.concatenate([np.asarray(one["dtMatches"]) > 0 for _, one in each], axis=1)
        image = np.concatenate([np.full(len(one["dtScores"]), index) for index, one in each])
        order = np.argsort(-scores, kind="mergesort")
        found.append(Matches(image[order], right[:, order], truths))
    return found


def mean_precision(matches: list[Matches], weights: NDArray[np.int64]) -> float:
    """COCO's mAP where each image counts so many times: interpolated at 101 recalls, over classes and thresholds."""
    recalls, found = np.linspace(0, 1, 101), []
    for one in matches:
        truths = int((one.truths * weights).sum())
        if not truths:
            continue
        weight = weights[one.image]
        right, wrong = ((weight * mask).cumsum(axis=1) for mask in (one.right, ~one.right))
        precision = right / np.maximum(right + wrong, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row, recall in zip(precision, right / truths, strict=True):
            places = np.searchsorted(recall, recalls, side="left")
            found.append(np.where(places < len(row), row[np.minimum(places, len(row) - 1)], 0.0).mean())
    return float(np.mean(found))

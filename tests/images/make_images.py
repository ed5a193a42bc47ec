"""Images and specifications for the tests of image sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repvgg_deploy.specs.values import ModelSpec, Preprocessing, TensorSpec

LABELS = ("cat", "dog", "garbage truck")
PREPROCESSING = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 8, (8, 8))


def make_spec(
    *,
    uint8: bool = False,
    batch: int | str = "batch",
    labels: tuple[str, ...] | None = LABELS,
    kind: Any = "logits",
    classes: int = 3,
) -> ModelSpec:
    source = (
        TensorSpec("x", "uint8", (batch, 8, 8, 3), "NHWC")
        if uint8
        else TensorSpec("x", "float32", (batch, 3, 8, 8), "NCHW")
    )
    preprocessing = dataclasses.replace(PREPROCESSING, in_graph=uint8)
    return ModelSpec(source, (TensorSpec(kind, "float32", (batch, classes), "NC"),), kind, preprocessing, labels)


def draw(count: int = 12, *, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_images(folder: Path, names: list[str], *, seed: int = 0) -> list[Path]:
    paths = []
    for name, image in zip(names, draw(len(names), seed=seed), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        paths.append(path)
    return paths

"""Models and images of the INT8 benchmark, exported and decoded once into a working folder for all methods.

The folder holds `fp32.onnx`, `evaluation.npy` and, of a classifier, `labels.npy`, and for each seed
`calibration-SEED.npy`; images are uint8 (N, H, W, 3).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.export.export import ExportOptions, export_checkpoint
from repvgg_deploy.export.options import GraphOptions
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.images.decode import normalize

from .places import SAMPLE, SUBJECTS, Subject

BATCH = 32


def prepare(name: str, folder: Path, *, calibration: int, evaluation: int, seeds: list[int]) -> dict[str, Any]:
    """Exports the model and decodes the images.

    Args:
        name: Of `SUBJECTS`.
        folder: Where everything is written.
        calibration: How many training images, drawn anew for each seed.
        evaluation: How many evaluation images, the first ones.
        seeds: Of the draws.
    """
    subject = SUBJECTS[name]
    facts = {"size": subject.size, "evaluation": evaluation, "calibration": calibration}
    if subject.kind == "detector":
        from . import detection, networks

        detection.prepare_scenes(folder, calibration=calibration, evaluation=evaluation, seeds=seeds)
        networks.export(subject, folder)
        return facts
    facts |= _write_images(subject, folder, calibration=calibration, evaluation=evaluation, seeds=seeds)
    if subject.kind == "pyramid":
        from . import networks

        networks.export(subject, folder)
        return facts
    graph = GraphOptions(image_size=(subject.size, subject.size))
    strides = (2, 2, 2, 2, 2) if name == "A0g4" else None  # no published variant, and tensors do not tell
    options = ExportOptions(graph=graph, force=True, strides=strides)
    export_checkpoint(subject.checkpoint, folder / "fp32.onnx", options=options)
    return facts


def _write_images(
    subject: Subject, folder: Path, *, calibration: int, evaluation: int, seeds: list[int]
) -> dict[str, int]:
    """The images of all seeds and of the evaluation, with labels; how many there are."""
    pools = _shared_images(subject) if subject.images.name == "imagenette128.npz" else _sample_images()
    images, labels = pools["evaluation"]
    np.save(folder / "evaluation.npy", _decode(images[:evaluation], subject.size))
    np.save(folder / "labels.npy", labels[:evaluation])
    training, _ = pools["training"]
    for seed in seeds:
        picks = np.random.default_rng(seed).permutation(len(training))[:calibration]
        np.save(folder / f"calibration-{seed}.npy", _decode([training[index] for index in picks], subject.size))
    return {"evaluation": len(labels[:evaluation]), "calibration": min(calibration, len(training))}


def _shared_images(subject: Subject) -> dict[str, tuple[list[Any], NDArray[np.int64]]]:
    """JPEG bytes and labels by split."""
    with np.load(subject.images) as data:
        blob, offset, label, split = (data[key] for key in ("blob", "offset", "label", "split"))
    found = {}
    for name, number in (("training", 0), ("evaluation", 1)):
        where = np.flatnonzero(split == number)
        found[name] = ([blob[offset[i] : offset[i + 1]].tobytes() for i in where], label[where].astype(np.int64))
    return found


def _sample_images() -> dict[str, tuple[list[Any], NDArray[np.int64]]]:
    found = {}
    for name, file in (("training", "calib.npz"), ("evaluation", "eval.npz")):
        with np.load(SAMPLE / file) as data:
            found[name] = (list(data["images"]), data["labels"].astype(np.int64))
    return found


def _decode(images: list[Any], size: int) -> NDArray[np.uint8]:
    """uint8 (N, size, size, 3); larger pictures are averaged over areas."""
    from PIL import Image

    def pixels(image: Any) -> NDArray[np.uint8]:
        picture = Image.open(io.BytesIO(image)).convert("RGB") if isinstance(image, bytes) else Image.fromarray(image)
        return np.asarray(
            picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BOX), np.uint8
        )

    return np.stack([pixels(image) for image in images])


def calibration_batches(folder: Path, seed: int) -> list[NDArray[np.float32]]:
    """Calibration images as the graph takes them."""
    return as_batches(folder, np.load(folder / f"calibration-{seed}.npy"))


def as_batches(folder: Path, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Normalised batches, float32 (N, 3, H, W)."""
    preprocessing = read_metadata(folder / "fp32.onnx").spec.preprocessing
    assert preprocessing is not None
    return [normalize(images[start : start + BATCH], preprocessing) for start in range(0, len(images), BATCH)]

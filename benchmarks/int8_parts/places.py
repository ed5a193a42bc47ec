"""Where the benchmark's models are, and whether ModelOpt is installed.

Imports the standard library only: the program that measures must stay small.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = ROOT / "models" / "sample"
DETECTOR = ROOT / "models" / "sample-detector"
DEEP = ROOT / "models" / "checkpoints"
Kind: TypeAlias = Literal["classifier", "detector", "pyramid"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A trained model and its images.

    Attributes:
        checkpoint: In training form.
        size: Height and width in pixels.
        images: The .npz with both splits, or with the evaluation images.
        kind: A chain that classifies; the sample detector; the backbone with a pyramid and two dense heads on it.
    """

    checkpoint: Path
    size: int
    images: Path
    kind: Kind = "classifier"


SUBJECTS = {
    "A0": Subject(SHARED / "repvgg-a0-imagenette.pth", 128, SHARED / "imagenette128.npz"),
    "A0g4": Subject(SHARED / "repvgg-a0g4-imagenette-early.pth", 96, SHARED / "imagenette128.npz"),
    "sample": Subject(SAMPLE / "repvgg-sample.pth", 32, SAMPLE / "eval.npz"),
    "detector": Subject(DETECTOR / "detector-silu.pth", 128, SAMPLE / "eval.npz", "detector"),
    "detector-relu": Subject(DETECTOR / "detector-relu.pth", 128, SAMPLE / "eval.npz", "detector"),
    "A0-fpn": Subject(SHARED / "repvgg-a0-imagenette.pth", 128, SHARED / "imagenette128.npz", "pyramid"),
    # What `python -m benchmarks.int8_parts.train_deep NAME` makes; left out where it has not been run.
    **{
        f"deep-{blocks}-{se}": Subject(DEEP / f"deep-{blocks}-{se}-12.pth", 64, SHARED / "imagenette128.npz")
        for blocks in (24, 48)
        for se in ("none", "before", "after")
    },
}


def is_there(name: str) -> bool:
    """Whether a model's files are here."""
    return SUBJECTS[name].checkpoint.is_file() and SUBJECTS[name].images.is_file()


def has_modelopt() -> bool:
    """Whether ModelOpt is installed; it is no dependency."""
    return importlib.util.find_spec("modelopt") is not None

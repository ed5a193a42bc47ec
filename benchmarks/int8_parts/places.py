"""Where the benchmark's models are, and whether ModelOpt is installed.

Imports the standard library only: the program that measures must stay small.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = ROOT / "models" / "sample"
DEEP = ROOT / "models" / "checkpoints"


@dataclass(frozen=True, slots=True)
class Subject:
    """A trained model and its images.

    Attributes:
        checkpoint: In training form.
        size: Height and width in pixels.
        images: The .npz with both splits, or with the evaluation images.
    """

    checkpoint: Path
    size: int
    images: Path


SUBJECTS = {
    "A0": Subject(SHARED / "repvgg-a0-imagenette.pth", 128, SHARED / "imagenette128.npz"),
    "A0g4": Subject(SHARED / "repvgg-a0g4-imagenette-early.pth", 96, SHARED / "imagenette128.npz"),
    "sample": Subject(SAMPLE / "repvgg-sample.pth", 32, SAMPLE / "eval.npz"),
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

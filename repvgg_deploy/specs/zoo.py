"""Cards of published checkpoints: is this file one of them, and what did its authors measure?

The cards stand in `data/zoo.toml` (`models/zoo.toml` is a link to it). Standard library only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..specs import codec


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A published top-1 accuracy.

    Attributes:
        image_size: Height and width of the images in pixels.
        top1_percent: 0–100.
    """

    image_size: int
    top1_percent: float


@dataclass(frozen=True, slots=True)
class CheckpointCard:
    """What is known of one published checkpoint; None where it is not known.

    Attributes:
        file: Name of the file as published.
        variant: Name of its variant.
        classes: Rows of the classifier.
        input_size: Height and width of the published evaluation, in pixels.
        accuracy: As published, one entry an image size.
        licence: Of whoever publishes it.
        source: Where it is published.
        training: How long, or at which size.
        bytes: Size of the file.
        sha256: Of the file.
        hash_source: Who stated size and hash.
    """

    file: str
    variant: str
    classes: int
    input_size: int
    accuracy: tuple[Accuracy, ...]
    licence: str
    source: str
    training: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    hash_source: str | None = None

    def summary(self) -> str:
        """One line, such as `RepVGG-B2-train.pth (B2, 1000 classes; published top-1 78.78 % at 224 px)`."""
        measured = ", ".join(f"{entry.top1_percent:.2f} % at {entry.image_size} px" for entry in self.accuracy)
        return f"{self.file} ({self.variant}, {self.classes} classes; published top-1 {measured})"


@dataclass(frozen=True, slots=True)
class _Zoo:
    checkpoint: tuple[CheckpointCard, ...]


def load_cards() -> tuple[CheckpointCard, ...]:
    """All cards, in the order of `zoo.toml`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    table: dict[str, Any] = tomllib.loads(
        resources.files("repvgg_deploy").joinpath("data/zoo.toml").read_text(encoding="utf-8")
    )
    return codec.decode(_Zoo, table).checkpoint


def find_card(sha256: str) -> CheckpointCard | None:
    """The card of the file with this hexadecimal SHA-256, or None: then it is none of the published files, bit for bit."""
    return next((card for card in load_cards() if card.sha256 == sha256.lower()), None)


def find_card_by_name(file: str) -> CheckpointCard | None:
    """The card of the published file of this name, or None. A file that has the name but another size is damaged, or another's."""
    return next((card for card in load_cards() if card.file == file), None)

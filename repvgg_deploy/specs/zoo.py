"""Cards of published checkpoints: is this file one of them, and what did its authors measure?

The cards stand in `data/zoo.toml` (`models/zoo.toml` is a link to it).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from . import codec


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A published top-1 accuracy, 0–100, and the height and width in pixels of the images that it was measured on."""

    image_size: int
    top1_percent: float


@dataclass(frozen=True, slots=True)
class CheckpointCard:
    """What is known of one published checkpoint; None where it is not known.

    Attributes:
        file: Name of the file as published.
        classes: Rows of the classifier.
        input_size: Height and width of the published evaluation, in pixels.
        accuracy: As published, one entry an image size.
        source: Where it is published.
        training: How long it was trained, or at which size.
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
    path = resources.files("repvgg_deploy").joinpath("data/zoo.toml")
    return codec.decode(_Zoo, codec.read_toml(path, "the cards", remedy="install repvgg-deploy again")).checkpoint


def find_card(sha256: str) -> CheckpointCard | None:
    """The card of the published file with this hexadecimal SHA-256, or None where no published file has it."""
    return next((card for card in load_cards() if card.sha256 == sha256.lower()), None)


def find_card_by_name(file: str) -> CheckpointCard | None:
    """The card of the published file of this name, or None; its content may be another."""
    return next((card for card in load_cards() if card.file == file), None)

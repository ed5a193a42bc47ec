"""Images → labels with scores: what `Engine.classify` and `Engine.stream` answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, ModelError, RepVGGDeployError
from ..images.ahead import Piece, decode_ahead
from ..images.decode import Picture as Picture  # noqa: PLC0414 - handed on
from ..images.decode import normalize
from ..specs.values import ModelSpec, Preprocessing
from .results import Result, rank_classes


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class that a model sees in an image.

    Attributes:
        label: Its name; `class 3` where the model has none.
        score: Its probability, 0–1; of a top-5 model, what it gives.
        index: Its number, from 0.
    """

    label: str
    score: float
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What became of one image.

    Attributes:
        image: As it was given.
        predictions: Best first; empty where there is an error.
        error: Why the image cannot be read, or that the model answered with NaN; None where all went well.
    """

    image: Picture
    predictions: tuple[Prediction, ...] = ()
    error: RepVGGDeployError | None = None


@dataclass(frozen=True, slots=True)
class Classifying:
    """How images become answers.

    Attributes:
        spec: The model's.
        top: Classes of each image, at most.
        labels: By class; None where there are none.
        preprocessing: How images become the input.
    """

    spec: ModelSpec
    top: int
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing

    def answer(self, piece: Piece, result: Result | None) -> list[Answer]:
        """The answers of a piece; `result` is of those of its images that can be read, None where none can."""
        ranked = iter(()) if result is None else rank_classes(result, self.spec, self.top)
        answers = []
        for picture, error in piece.pictures:
            if error is not None:
                answers.append(Answer(picture, error=error))
                continue
            classes, scores = next(ranked)
            if np.isfinite(scores).all():
                pairs = zip(classes.tolist(), scores.tolist(), strict=True)
                found = tuple(
                    Prediction(self.label_of(index) or f"class {index}", score, index) for index, score in pairs
                )
                answers.append(Answer(picture, found))
            else:
                message = f"{show_picture(picture)}: the model answers with NaN or infinities"
                remedy = "export it again from the checkpoint, and verify it"
                answers.append(Answer(picture, error=ModelError(message, remedy=remedy)))
        return answers

    def label_of(self, index: int) -> str | None:
        """A class's name; None where it has none."""
        return self.labels[index] if self.labels is not None and 0 <= index < len(self.labels) else None


def plan_answers(spec: ModelSpec, path: object, *, top: int, labels: Sequence[str] | None = None) -> Classifying:
    """How images become answers of this model.

    Args:
        spec: The model's.
        path: Names the model, in messages.
        top: Classes of each image, where the model gives so many.
        labels: In place of the model's own.

    Raises:
        InputError: The model gives no classes, does not say how an image becomes its input, or `top` is no positive
            number.
    """
    remedy = "run it from Python: Engine(path).infer(batch)"
    if spec.kind not in ("logits", "probabilities", "top5"):
        raise InputError(f"{path}: gives {spec.kind}, not classes", remedy=remedy)
    if spec.preprocessing is None:
        raise InputError(f"{path}: does not say how an image becomes its input", remedy=remedy)
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise InputError(f"top: expected a whole number of at least 1, found {top!r}", remedy="give top=5, say")
    names = tuple(labels) if labels is not None else spec.labels
    return Classifying(spec, top, names, spec.preprocessing)


def answer_images(
    pictures: Iterable[Picture], how: Classifying, *, infer: Callable[[NDArray[Any]], Result], batch_size: int
) -> Iterator[Answer]:
    """Answers images in their order, decoded ahead in threads; what cannot be read is an answer with an error."""
    for piece in decode_ahead(pictures, how.preprocessing, batch_size=batch_size):
        result = infer(to_input(piece.pixels, how.preprocessing)) if len(piece.pixels) else None
        yield from how.answer(piece, result)


def to_input(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8] | NDArray[np.float32]:
    """uint8 (N, H, W, 3) as a model takes it: as it is where it normalises itself, else float32 (N, 3, H, W)."""
    return pixels if preprocessing.in_graph else normalize(pixels, preprocessing)


def show_picture(picture: Picture) -> str:
    """An image's name for a message: its path, or what it is."""
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else "the image in memory"

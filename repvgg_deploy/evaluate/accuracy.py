"""A classifier on labelled images → an AccuracyReport. The caller runs the model."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, ModelError
from ..images.classes import best_classes
from ..images.sets import ImageBatch

_BEST = 5
_CONFUSED_WITH = 3
MATRIX_CLASSES = 20
"""Rows of a confusion matrix at most: what a person can read."""


class Ranked(Protocol):
    """The best classes of each image, best first, as a top-5 model gives them: float32 (N, K) and int64 (N, K)."""

    @property
    def scores(self) -> NDArray[np.float32]: ...  # noqa: D102

    @property
    def classes(self) -> NDArray[np.int64]: ...  # noqa: D102


Answer: TypeAlias = "NDArray[Any] | Ranked"
Run: TypeAlias = Callable[[NDArray[Any]], Answer]
"""A batch as the model takes it → logits or probabilities (N, classes), or the ranked best."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """The class that a model named in place of the right one, its name where it is known, and for how many images."""

    index: int
    label: str | None
    images: int


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """The images of one class.

    Attributes:
        label: Name of the class, or None.
        images: How many images have this label.
        top1: Share of them whose best class is right, 0 to 1.
        confused_with: What the others were taken for, most frequent first; at most three.
    """

    index: int
    label: str | None
    images: int
    top1: float
    confused_with: tuple[Confusion, ...]


@dataclass(frozen=True, slots=True)
class ConfusionMatrix:
    """How often images of one class were taken for another.

    Attributes:
        classes: Indices of the classes, in order: all that occur, or those that are confused most where they are many.
        labels: Their names, where they are known.
        counts: By the right class and then by the class that was said, images.
        others: By the right class, images that were taken for a class that is not in `classes`.
    """

    classes: tuple[int, ...]
    labels: tuple[str | None, ...]
    counts: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """How well a classifier does on labelled images.

    Attributes:
        images: How many were evaluated.
        skipped: How many could not be read; they count nowhere else.
        top1: Share of images whose best class is right, 0 to 1.
        top5: Share of images whose class is among the best five (or all, of fewer classes).
        top1_standard_error: √(p·(1 − p) / n): other images of the same kind would give a top-1 within twice this in 95
            of 100 cases.
        decode_seconds: Reading, decoding, resizing and normalising.
        inference_seconds: Running the model.
        worst: Classes with the lowest top-1, worst first; none of them perfect.
        confusion: Of at most MATRIX_CLASSES classes.
    """

    images: int
    skipped: int
    top1: float
    top5: float
    top1_standard_error: float
    decode_seconds: float
    inference_seconds: float
    decode_images_per_second: float
    inference_images_per_second: float
    worst: tuple[ClassAccuracy, ...]
    confusion: ConfusionMatrix


def evaluate(
    run: Run,
    batches: Iterable[ImageBatch],
    *,
    labels: Sequence[str] | None = None,
    worst: int = 5,
    progress: Callable[[int], None] | None = None,
) -> AccuracyReport:
    """Runs a model on labelled images; memory does not grow with their number.

    Args:
        run: The model.
        batches: As `images.open_images` gives them.
        labels: Names of the classes.
        worst: How many of the worst classes to report.
        progress: Called with the number of images done since the last call.

    Raises:
        InputError: There are no images, or they have no labels.
        ModelError: The model answers with NaN or infinities.
    """
    tally = Tally()
    skipped, reading, running = 0, 0.0, 0.0
    begun = time.perf_counter()
    for batch in batches:
        reading += time.perf_counter() - begun
        skipped += len(batch.skipped)
        if len(batch.images):
            if batch.labels is None:
                raise InputError(
                    "the images have no labels to compare with",
                    remedy="give images with labels; see repvgg-trt eval --help",
                )
            begun = time.perf_counter()
            answer = run(batch.images)
            running += time.perf_counter() - begun
            tally.add(rank(answer), batch.labels)
        if progress is not None:
            progress(len(batch.images) + len(batch.skipped))
        begun = time.perf_counter()
    if not tally.images:
        raise InputError(
            f"no image could be evaluated, {skipped} could not be read",
            remedy="check the images that the warnings name",
        )
    reading, running = max(reading, 1e-9), max(running, 1e-9)
    return AccuracyReport(
        images=tally.images,
        skipped=skipped,
        top1=tally.top1,
        top5=tally.top5,
        top1_standard_error=standard_error(tally.top1, tally.images),
        decode_seconds=reading,
        inference_seconds=running,
        decode_images_per_second=tally.images / reading,
        inference_images_per_second=tally.images / running,
        worst=tally.worst(worst, labels),
        confusion=tally.matrix(labels),
    )


def rank(answer: Answer) -> NDArray[np.int64]:
    """The best classes of each image, best first; of equal scores, the lower class first.

    Args:
        answer: Logits or probabilities (N, classes), or the ranked best.

    Returns:
        int64 (N, K), K at most 5.

    Raises:
        ModelError: The model answers with NaN or infinities.
    """
    scores = answer if isinstance(answer, np.ndarray) else answer.scores
    if not np.isfinite(scores).all():
        raise ModelError(
            "the model answers with NaN or infinities", remedy="export it again from the checkpoint, and verify it"
        )
    if not isinstance(answer, np.ndarray):
        return answer.classes
    return best_classes(answer, _BEST)


def standard_error(share: float, count: int) -> float:
    """Standard error of a share p of n independent trials, √(p·(1 − p) / n)."""
    return math.sqrt(share * (1 - share) / count)


class Tally:
    """Counts right and wrong answers."""

    def __init__(self) -> None:
        self.images = 0
        self._best = 0
        self._among = 0
        self._pairs: Counter[tuple[int, int]] = Counter()

    def add(self, ranked: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Counts one batch: the ranked classes int64 (N, K), best first, against the labels int64 (N,)."""
        self.images += len(labels)
        hits = ranked == labels[:, np.newaxis]
        self._best += int(hits[:, 0].sum())
        self._among += int(hits.any(axis=1).sum())
        self._pairs.update(zip(labels.tolist(), ranked[:, 0].tolist(), strict=True))

    @property
    def top1(self) -> float:
        """Share of images whose best class is right."""
        return self._best / self.images

    @property
    def top5(self) -> float:
        """Share of images whose class is among the best five."""
        return self._among / self.images

    def worst(self, count: int, names: Sequence[str] | None) -> tuple[ClassAccuracy, ...]:
        """The classes with the lowest top-1, of equal ones those with more images first; without perfect ones."""
        totals: Counter[int] = Counter()
        wrong: dict[int, list[tuple[int, int]]] = {}
        for (truth, said), images in self._pairs.items():
            totals[truth] += images
            if said != truth:
                wrong.setdefault(truth, []).append((-images, said))
        found = []
        for truth, others in wrong.items():
            most = sorted(others)[:_CONFUSED_WITH]
            best = tuple(Confusion(said, _name(names, said), -images) for images, said in most)
            top1 = self._pairs[truth, truth] / totals[truth]
            found.append(ClassAccuracy(truth, _name(names, truth), totals[truth], top1, best))
        return tuple(sorted(found, key=lambda item: (item.top1, -item.images, item.index))[:count])

    def matrix(self, names: Sequence[str] | None) -> ConfusionMatrix:
        """The confusion matrix of all classes that occur, or of those that are confused most."""
        known = sorted({index for pair in self._pairs for index in pair})
        if len(known) > MATRIX_CLASSES:
            wrong = sorted((-images, pair) for pair, images in self._pairs.items() if pair[0] != pair[1])
            chosen: dict[int, None] = {}
            for _, pair in wrong:
                if len(chosen.keys() | set(pair)) <= MATRIX_CLASSES:
                    chosen.update(dict.fromkeys(pair))
            known = sorted(chosen)
        counts = tuple(tuple(self._pairs[truth, said] for said in known) for truth in known)
        totals: Counter[int] = Counter()
        for (truth, _), images in self._pairs.items():
            totals[truth] += images
        others = tuple(totals[truth] - sum(row) for truth, row in zip(known, counts, strict=True))
        return ConfusionMatrix(tuple(known), tuple(_name(names, index) for index in known), counts, others)


def _name(names: Sequence[str] | None, index: int) -> str | None:
    return names[index] if names is not None and 0 <= index < len(names) else None

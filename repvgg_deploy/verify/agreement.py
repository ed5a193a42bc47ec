"""Two models on the same images → an AgreementReport: how often they name the same class, and how far apart their numbers are. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..images.sets import ImageBatch
from .accuracy import Answer, Run, Tally, rank, standard_error
from .layers import LayerAgreement, decibels

Kind: TypeAlias = Literal["logits", "probabilities"]


@dataclass(frozen=True, slots=True)
class ModelAccuracy:
    """Accuracy of one of the two models.

    Attributes:
        top1: Share of images whose best class is right, 0 to 1.
        top1_standard_error: Of that share.
        top5: Share of images whose class is among the best five.
    """

    top1: float
    top1_standard_error: float
    top5: float


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far the other model's outputs are from the reference's.

    Attributes:
        kind: Of the outputs: logits or probabilities.
        largest: Largest absolute difference.
        rms: Root of the mean squared difference.
        reference_rms: Root of the mean square of the reference.
        sqnr_db: 10·log10(Σ reference² / Σ (reference − other)²) over all outputs of all images; 200 where they are equal.
    """

    kind: Kind
    largest: float
    rms: float
    reference_rms: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class AgreementReport:
    """What another model makes of the images that a reference model saw.

    Attributes:
        images: Compared.
        skipped: Could not be read.
        agreement: Share of images to which both give the same best class, 0 to 1.
        agreement_standard_error: Of that share.
        output: None where the two do not both give logits or both give probabilities.
        reference: Its accuracy, or None where the images have no labels.
        other: Accuracy of the other model, or None.
        layers: Layer by layer, in order; empty where they were not compared.
        first_apart: First layer whose signal-to-quantization-noise ratio is below `apart_below_db`, or None.
        apart_below_db: That bound.
        layers_note: Why the layers were not compared; empty where they were.
    """

    images: int
    skipped: int
    agreement: float
    agreement_standard_error: float
    output: OutputError | None
    reference: ModelAccuracy | None
    other: ModelAccuracy | None
    layers: tuple[LayerAgreement, ...] = ()
    first_apart: str | None = None
    apart_below_db: float = 20.0
    layers_note: str = ""


def compare(
    reference: Run,
    other: Run,
    batches: Iterable[ImageBatch],
    *,
    kind: Kind | None = "logits",
    progress: Callable[[int], None] | None = None,
) -> AgreementReport:
    """Runs two models on the same images; memory does not grow with their number. `layers.compare_layers` looks inside them.

    Args:
        reference: Usually the FP32 model.
        other: Usually the typed one.
        batches: As `image_sets.open_images` gives them; labels are used where there are any.
        kind: What both give; None where they give different things, or the ranked best: then only the classes are compared.
        progress: Called with the number of images done since the last call.

    Raises:
        InputError: There are no images, or the models have different classes.
        ModelError: A model answers with NaN or infinities.
    """
    truth, found, errors = Tally(), Tally(), _Errors()
    images = skipped = agreeing = 0
    labelled = True
    for batch in batches:
        skipped += len(batch.skipped)
        if len(batch.images):
            answers = reference(batch.images), other(batch.images)
            ranks = [rank(answer) for answer in answers]
            agreeing += int((ranks[0][:, 0] == ranks[1][:, 0]).sum())
            images += len(batch.images)
            if kind is not None:
                errors.add(*map(_as_array, answers))
            labelled = labelled and batch.labels is not None
            if batch.labels is not None:
                truth.add(ranks[0], batch.labels)
                found.add(ranks[1], batch.labels)
        if progress is not None:
            progress(len(batch.images) + len(batch.skipped))
    if not images:
        raise InputError(f"no image could be compared, {skipped} could not be read", remedy="check the images that the warnings name")
    share = agreeing / images
    return AgreementReport(
        images=images,
        skipped=skipped,
        agreement=share,
        agreement_standard_error=standard_error(share, images),
        output=errors.report(kind) if kind is not None else None,
        reference=_accuracy(truth) if labelled else None,
        other=_accuracy(found) if labelled else None,
    )


def _accuracy(tally: Tally) -> ModelAccuracy:
    return ModelAccuracy(tally.top1, standard_error(tally.top1, tally.images), tally.top5)


def _as_array(answer: Answer) -> NDArray[Any]:
    assert isinstance(answer, np.ndarray), "only arrays of scores have a kind"
    return answer


class _Errors:
    """Sums over all outputs, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._largest = 0.0
        self._signal = 0.0
        self._noise = 0.0

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        if reference.shape != other.shape:
            raise InputError(
                f"the models have {reference.shape[1]} and {other.shape[1]} classes, so their answers cannot be compared",
                remedy="compare two models of the same classes",
            )
        difference = np.subtract(reference, other, dtype=np.float64)
        self._count += difference.size
        self._largest = max(self._largest, float(np.abs(difference).max()))
        self._signal += float(np.square(reference, dtype=np.float64).sum())
        self._noise += float(np.square(difference).sum())

    def report(self, kind: Kind) -> OutputError:
        rms = [float(np.sqrt(total / self._count)) for total in (self._noise, self._signal)]
        return OutputError(kind, self._largest, rms[0], rms[1], decibels(self._signal, self._noise))

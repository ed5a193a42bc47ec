"""Two models on the same images: how often they agree on the class, and how far their outputs and layers are apart.

The signal-to-quantization-noise ratio (SQNR) is 10·log10(Σ reference² / Σ (reference − other)²), in decibels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..images.sets import ImageBatch
from .accuracy import Run, Tally, rank, standard_error

Kind: TypeAlias = Literal["logits", "probabilities"]
_LIMIT_DB = 200.0


@dataclass(frozen=True, slots=True)
class ModelAccuracy:
    """Shares of images, 0 to 1, whose class one of the two models gives as its best, or among its best five."""

    top1: float
    top1_standard_error: float
    top5: float


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far the other model's outputs are from the reference's.

    Attributes:
        kind: What the outputs are.
        largest: Largest absolute difference.
        rms: Root of the mean squared difference.
        reference_rms: Root of the mean square of the reference.
        sqnr_db: Over all outputs of all images; 200 where they are equal.
    """

    kind: Kind
    largest: float
    rms: float
    reference_rms: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """One layer of two networks.

    Attributes:
        sqnr_db: SQNR of its output before any ReLU, after the channels of the other network were scaled back; 200 where
            both are equal, 0 where the other carries nothing of the reference.
        smallest_factor: Smallest factor that a channel was multiplied with to scale it back; 1 where no channel was.
        largest_factor: Largest such factor.
    """

    name: str
    sqnr_db: float
    smallest_factor: float
    largest_factor: float


@dataclass(frozen=True, slots=True)
class AgreementReport:
    """What another model makes of the images that a reference model saw.

    Attributes:
        images: How many were compared.
        skipped: How many could not be read.
        agreement: Share of images to which both give the same best class, 0 to 1.
        output: None where the two do not both give logits or both give probabilities.
        reference: Its accuracy, or None where the images have no labels.
        other: Accuracy of the other model, or None.
        layers: Layer by layer, in order; empty where they were not compared.
        first_apart: First layer whose SQNR is below `apart_below_db`, or None.
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
    """Runs two models on the same images; memory does not grow with their number. `compare_layers` looks inside them.

    Args:
        reference: Usually the FP32 model.
        other: Usually the typed one.
        batches: As `images.open_images` gives them; labels are used where there are any.
        kind: What both give; None where they give different things, or the ranked best: then only the classes are
            compared.
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
                one, two = answers
                assert isinstance(one, np.ndarray) and isinstance(two, np.ndarray), "only arrays of scores have a kind"
                errors.add(one, two)
            labelled = labelled and batch.labels is not None
            if batch.labels is not None:
                truth.add(ranks[0], batch.labels)
                found.add(ranks[1], batch.labels)
        if progress is not None:
            progress(len(batch.images) + len(batch.skipped))
    if not images:
        raise InputError(
            f"no image could be compared, {skipped} could not be read", remedy="check the images that the warnings name"
        )
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
                f"the models have {reference.shape[1]} and {other.shape[1]} classes, so their answers cannot be "
                f"compared",
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


def compare_layers(
    pairs: Iterable[Mapping[str, tuple[NDArray[Any], NDArray[Any]]]], *, fixed: Collection[str] = ()
) -> tuple[LayerAgreement, ...]:
    """Compares two networks whose channels may have been rescaled.

    Equalization and FP16 range fitting divide each channel of a layer by a positive factor and multiply it again where
    it is read: the outputs of a layer then differ though nothing was lost. So each channel of the other network is
    first multiplied with the factor f ≥ 0 that brings it closest to the reference, f = Σ reference·other / Σ other²,
    found from the images themselves. Channels that were not rescaled get a factor near one. What a quantized channel
    has lost or gained in gain alone is undone with it, too, so that the figures of layers other than `fixed` may lie
    slightly above those of a comparison with the factors known exactly.

    Args:
        pairs: Batch by batch: by name of the layer, in order, what the reference and the other give: (N, C, H, W) or
            (N, C).
        fixed: Layers whose channels nobody rescales (the classifier): compared as they are.

    Returns:
        One for each layer of the first batch, in its order.
    """
    sums: dict[str, _Sums] = {}
    for pair in pairs:
        for name, (reference, other) in pair.items():
            sums.setdefault(name, _Sums()).add(reference, other)
    return tuple(total.report(name, rescaled=name not in fixed) for name, total in sums.items())


def first_below(layers: Iterable[LayerAgreement], bound_db: float) -> str | None:
    """The first layer whose SQNR is below `bound_db`: where two networks part."""
    return next((layer.name for layer in layers if layer.sqnr_db < bound_db), None)


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), between −200 and 200: 200 without noise, −200 where either is NaN."""
    if np.isnan(signal) or np.isnan(noise):
        return -_LIMIT_DB
    if noise <= 0:
        return _LIMIT_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / max(noise, 1e-300)), -_LIMIT_DB, _LIMIT_DB))


class _Sums:
    """Sums of one layer by channel, float64 (C,): reference², reference·other, other², and squared differences."""

    def __init__(self) -> None:
        self._products: NDArray[np.float64] = np.zeros((3, 1))
        self._noise: NDArray[np.float64] = np.zeros(1)

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        assert reference.shape == other.shape, "the caller pairs layers of the same shape"
        axes = (0, *range(2, reference.ndim))
        one, two = reference.astype(np.float64), other.astype(np.float64)
        products = [np.sum(a * b, axis=axes) for a, b in ((one, one), (one, two), (two, two))]
        self._products = self._products + np.stack(products)
        self._noise = self._noise + np.sum(np.square(one - two), axis=axes)

    def report(self, name: str, *, rescaled: bool) -> LayerAgreement:
        signal, shared, power = self._products
        if not rescaled:
            return LayerAgreement(name, decibels(float(signal.sum()), float(self._noise.sum())), 1.0, 1.0)
        alive = (power > 0) & (shared > 0)
        factors = np.divide(shared, power, out=np.zeros_like(shared), where=alive)
        # At the best f, Σ (reference − f·other)² is this difference. Where nothing was rescaled, the sum of the squares
        # themselves is exact.
        noise = np.where(factors == 1, self._noise, np.maximum(signal - factors * shared, 0.0))
        used = factors[alive]
        extent = (float(used.min()), float(used.max())) if used.size else (1.0, 1.0)
        sqnr = decibels(float(signal.sum()), float(noise.sum()))
        return LayerAgreement(name, sqnr, *extent)

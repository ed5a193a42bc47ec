"""Two networks layer by layer: the signal-to-quantization-noise ratio of every layer's output, and where they part. NumPy only.

Source: SQNR as in ../agreement: 10·log10(Σ reference² / Σ (reference − other)²).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIMIT_DB = 200.0


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """One layer of two networks.

    Attributes:
        name: Of the layer.
        sqnr_db: Of its output before any ReLU, after the channels of the other network were scaled back; 200 where both are equal, 0 where the
            other carries nothing of the reference.
        smallest_factor: Smallest factor that a channel was multiplied with to scale it back; 1 where no channel was.
        largest_factor: Largest such factor.
    """

    name: str
    sqnr_db: float
    smallest_factor: float
    largest_factor: float


def compare_layers(pairs: Iterable[Mapping[str, tuple[NDArray[Any], NDArray[Any]]]], *, fixed: Collection[str] = ()) -> tuple[LayerAgreement, ...]:
    """Compares two networks whose channels may have been rescaled.

    Equalization and FP16 range fitting divide each channel of a layer by a positive factor and multiply it again where it is read: the outputs of
    a layer then differ though nothing was lost. So each channel of the other network is first multiplied with the factor f ≥ 0 that brings it
    closest to the reference, f = Σ reference·other / Σ other², found from the images themselves. Channels that were not rescaled get a factor near
    one. What a quantized channel has lost or gained in gain alone is undone with it, too, so that the figures of layers other than `fixed` may lie
    slightly above those of a comparison with the factors known exactly.

    Args:
        pairs: Batch by batch: by name of the layer, in order, what the reference and the other give: (N, C, H, W) or (N, C).
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
    """The first layer whose ratio is below `bound_db`: where two networks part."""
    return next((layer.name for layer in layers if layer.sqnr_db < bound_db), None)


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), between −200 and 200; 200 without noise."""
    if noise <= 0:
        return _LIMIT_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -_LIMIT_DB, _LIMIT_DB))


class _Sums:
    """Of one layer and by channel, float64 (C,): reference², reference·other, other²; and over all, the squared difference."""

    def __init__(self) -> None:
        self._products: NDArray[np.float64] = np.zeros((3, 1))
        self._noise: NDArray[np.float64] = np.zeros(1)

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        assert reference.shape == other.shape, "the caller pairs layers of the same shape"
        axes = (0, *range(2, reference.ndim))
        one, two = reference.astype(np.float64), other.astype(np.float64)
        self._products = self._products + np.stack([np.sum(a * b, axis=axes) for a, b in ((one, one), (one, two), (two, two))])
        self._noise = self._noise + np.sum(np.square(one - two), axis=axes)

    def report(self, name: str, *, rescaled: bool) -> LayerAgreement:
        signal, shared, power = self._products
        if not rescaled:
            return LayerAgreement(name, decibels(float(signal.sum()), float(self._noise.sum())), 1.0, 1.0)
        alive = (power > 0) & (shared > 0)
        factors = np.divide(shared, power, out=np.zeros_like(shared), where=alive)
        # At the best f, Σ (reference − f·other)² is this difference. Where nothing was rescaled, the sum of the squares themselves is exact.
        noise = np.where(factors == 1, self._noise, np.maximum(signal - factors * shared, 0.0))
        used = factors[alive]
        return LayerAgreement(
            name,
            decibels(float(signal.sum()), float(noise.sum())),
            float(used.min()) if used.size else 1.0,
            float(used.max()) if used.size else 1.0,
        )

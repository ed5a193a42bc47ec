"""The roofline: how fast layers could be at best on a device, and which of its two limits holds them. Standard library only.

A layer takes at least the longer of two times: its operations at the device's peak, its bytes at the memory's bandwidth.
Source: Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009 (https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .costs import LayerCost


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a device can do at most.

    Attributes:
        device: For people.
        operations_per_second: By precision (`fp32`, `fp16`, `int8`); a multiply-accumulate is two. A precision that is not known is not there.
        bytes_per_second: Of its memory.
        source: Who says so, or how it was measured.
        measured: Whether it was measured on the spot.
    """

    device: str
    operations_per_second: dict[str, float]
    bytes_per_second: float
    source: str
    measured: bool

    def ridge(self, precision: str) -> float:
        """Operations a byte from which on arithmetic is the limit."""
        return self.operations_per_second[precision] / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class LayerBound:
    """The roofline of one layer at one batch size.

    Attributes:
        name: Of the layer.
        batch: Images.
        precision: That it computes in.
        operations: Of the batch.
        bytes: Of the batch.
        intensity: Operations a byte.
        bound: Which limit it meets first.
        floor_ms: The least time.
    """

    name: str
    batch: int
    precision: str
    operations: int
    bytes: int
    intensity: float
    bound: Literal["compute", "memory"]
    floor_ms: float

    @property
    def attainable(self) -> float:
        """Operations a second at the roof."""
        return self.operations / (self.floor_ms / 1e3)


def bound_layers(costs: Sequence[LayerCost], ceiling: Ceiling, batch: int) -> tuple[LayerBound, ...] | None:
    """The roofline of every layer; None where the peak of one of their precisions is not known.

    Args:
        costs: The layers.
        ceiling: Of the device.
        batch: Images at a time.
    """
    if any(cost.precision not in ceiling.operations_per_second for cost in costs):
        return None
    return tuple(_bound(cost, ceiling, batch) for cost in costs)


def _bound(cost: LayerCost, ceiling: Ceiling, batch: int) -> LayerBound:
    operations, moved = cost.count_operations(batch), cost.count_bytes(batch)
    computing = operations / ceiling.operations_per_second[cost.precision]
    moving = moved / ceiling.bytes_per_second
    kind: Literal["compute", "memory"] = "compute" if computing >= moving else "memory"
    return LayerBound(cost.name, batch, cost.precision, operations, moved, cost.intensity(batch), kind, 1e3 * max(computing, moving))


def total_floor_ms(bounds: Sequence[LayerBound]) -> float:
    """The least time of a batch through all layers, one after the other."""
    return sum(bound.floor_ms for bound in bounds)

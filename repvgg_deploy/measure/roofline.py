"""What each layer of a variant's deploy form costs by arithmetic, and how fast it could be at best on a device.

Bytes are the least that must move: every weight once, every layer's input and output once, in the precision that the
layer computes in. What caches save (a layer whose input is still there) or waste is not in them.

The roofline: a layer takes at least the longer of two times, its operations at the device's peak and its bytes at the
memory's bandwidth.
Source: Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009 (https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..specs.values import Precision, VariantSpec
from ..specs.variants import LayerRow, layer_rows

ITEM_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "fp8": 1, "int8": 1}
_INPUT_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
_LOGIT_BYTES = 4
_FILTER = 9  # 3×3


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        name: In the official key names; `.se` for a squeeze-and-excitation block, `linear` for pooling and classifier.
        groups: Groups of the convolution.
        precision: What it computes in.
        macs: Multiply-accumulates of one image.
        weight_bytes: Read once a batch.
        activation_bytes: Read and written for each image.
    """

    name: str
    groups: int
    precision: Precision
    macs: int
    weight_bytes: int
    activation_bytes: int

    def count_operations(self, batch: int) -> int:
        """Multiplications and additions of a batch: two a multiply-accumulate."""
        return 2 * self.macs * batch

    def count_bytes(self, batch: int) -> int:
        """Bytes that a batch moves at least."""
        return self.weight_bytes + batch * self.activation_bytes

    def intensity(self, batch: int) -> float:
        """Operations a byte."""
        return self.count_operations(batch) / self.count_bytes(batch)


def count_costs(
    variant: VariantSpec,
    size: tuple[int, int],
    precision_of: Callable[[str], Precision],
    *,
    input_dtype: Literal["float32", "float16", "uint8"] = "float32",
) -> tuple[LayerCost, ...]:
    """The costs of all layers, first to last.

    Args:
        variant: The architecture.
        size: (height, width) of the image in pixels.
        precision_of: The precision of a layer by its name.
        input_dtype: Number type of the image.
    """
    costs: list[LayerCost] = []
    before, image = _INPUT_BYTES[input_dtype] * 3 * size[0] * size[1], 0
    for row in layer_rows(variant, size):
        precision = precision_of(row.name)
        item = ITEM_BYTES[precision]
        if not costs:
            moved = before + item * _count_outputs(row)
        elif row.name.endswith(".se"):
            moved = 3 * item * image  # read to be pooled, read and written to be scaled
        elif row.name == "linear":
            moved = item * image + _LOGIT_BYTES * row.channels[1]  # the pooling reads the last map
        else:
            moved = item * (image + _count_outputs(row))
        costs.append(LayerCost(row.name, row.groups, precision, row.macs or 0, item * _count_weights(row), moved))
        image = image if row.name.endswith(".se") else _count_outputs(row)
    return tuple(costs)


def _count_outputs(row: LayerRow) -> int:
    assert row.output_size is not None, "the size is given"
    return row.channels[1] * row.output_size[0] * row.output_size[1]


def _count_weights(row: LayerRow) -> int:
    """Without biases, which are few."""
    if row.name == "linear" or row.name.endswith(".se"):
        return row.macs or 0
    return _FILTER * row.channels[0] // row.groups * row.channels[1]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a device can do at most.

    Attributes:
        device: Its name for people.
        operations_per_second: By precision (`fp32`, `fp16`, `int8`), where it is known; a multiply-accumulate is two.
        bytes_per_second: Bandwidth of its memory.
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
        name: As in `LayerCost`.
        batch: Images at a time.
        precision: What it computes in.
        operations: Operations of the batch.
        bytes: Bytes that the batch moves at least.
        intensity: Operations a byte.
        bound: Which limit it meets first.
        floor_ms: The least time of the batch.
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
    """The roofline of every layer at a batch size; None where the peak of one of their precisions is not known."""
    bounds = []
    for cost in costs:
        peak = ceiling.operations_per_second.get(cost.precision)
        if peak is None:
            return None
        operations, moved = cost.count_operations(batch), cost.count_bytes(batch)
        computing, moving = operations / peak, moved / ceiling.bytes_per_second
        kind: Literal["compute", "memory"] = "compute" if computing >= moving else "memory"
        floor_ms = 1e3 * max(computing, moving)
        bounds.append(
            LayerBound(cost.name, batch, cost.precision, operations, moved, cost.intensity(batch), kind, floor_ms)
        )
    return tuple(bounds)


def total_floor_ms(bounds: Sequence[LayerBound]) -> float:
    """The least time of a batch through all layers, one after the other."""
    return sum(bound.floor_ms for bound in bounds)

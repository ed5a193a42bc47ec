"""What each layer of a variant's deploy form costs by arithmetic: multiply-accumulates and bytes. Standard library only.

Bytes are the least that must move: every weight once, every layer's input and output once, in the precision that the layer computes in. What
caches save (a layer whose input is still there) or waste is not in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..specs.values import Precision, VariantSpec
from ..specs.variants import LayerRow, layer_rows

ITEM_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
_INPUT_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
_LOGIT_BYTES = 4
_FILTER = 9  # 3×3


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer.

    Attributes:
        name: In the official key names; `.se` for a squeeze-and-excitation block, `linear` for pooling and classifier.
        groups: Of the convolution.
        precision: That it computes in.
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
        precision_of: Of a layer by its name.
        input_dtype: Of the image.
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

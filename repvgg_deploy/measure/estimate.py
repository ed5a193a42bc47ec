"""Latency of a variant that was not measured, from its roofline and two constants. Pure arithmetic.

Of each layer: the longer of operations ÷ (peak · efficiency) and bytes ÷ bandwidth, and then a fixed time for its start, its end, and a GPU that one
image does not fill. A grouped convolution pays that once a group: each group is a small product of its own.

The constants for FP32 were chosen to meet published times of TensorRT 8.0 on a V100 (`PUBLISHED_V100_MS`): ten of the twelve estimates are within
17 %; B3, whose published times are hardly longer than those of the smaller B2, is 21 % and 47 % too long. For FP16 and INT8 no published times were
at hand: that tensor cores reach 40 % of their peak is an assumption. Copies to and from the GPU are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .costs import LayerCost
from .roofline import Ceiling

EFFICIENCY: dict[str, float] = {"fp32": 0.9, "fp16": 0.4, "int8": 0.4}
OVERHEAD_US = 50.0
PUBLISHED_V100_MS: dict[str, tuple[float, float]] = {
    "A0": (1.38, 2.81),
    "B0": (1.99, 4.67),
    "B1": (3.56, 13.94),
    "B1g4": (4.73, 11.14),
    "B2": (4.45, 19.13),
    "B3": (4.28, 21.14),
}
"""Batch 1 and 8 at 224 px, FP32. Source: PaddleClas, documentation of its RepVGG models (https://github.com/PaddlePaddle/PaddleClas)."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What an estimate rests on.

    Attributes:
        efficiency: Share of the peak that a layer short of arithmetic reaches, by precision.
        overhead_us: Microseconds of a layer besides, once a group.
    """

    efficiency: dict[str, float] = field(default_factory=lambda: dict(EFFICIENCY))
    overhead_us: float = OVERHEAD_US


FITTED = Assumptions()
"""The defaults."""


def estimate_ms(costs: Sequence[LayerCost], ceiling: Ceiling, batch: int, assumptions: Assumptions = FITTED) -> float | None:
    """Milliseconds of one batch; None where the peak of a precision is not known.

    Args:
        costs: The layers.
        ceiling: Of the device.
        batch: Images.
        assumptions: The constants.
    """
    total = 0.0
    for cost in costs:
        peak = ceiling.operations_per_second.get(cost.precision)
        if peak is None:
            return None
        computing = cost.count_operations(batch) / (peak * assumptions.efficiency[cost.precision])
        total += max(computing, cost.count_bytes(batch) / ceiling.bytes_per_second) + 1e-6 * assumptions.overhead_us * cost.groups
    return 1e3 * total

"""Which limit holds a layer, and for how long at least."""

from __future__ import annotations

import pytest

from repvgg_deploy.measure.roofline import Ceiling, LayerCost, bound_layers, count_costs, total_floor_ms
from repvgg_deploy.specs.variants import get_variant

CEILING = Ceiling("device", {"fp32": 1e12, "int8": 4e12}, 1e11, "made", measured=False)
BUSY = LayerCost("busy", 1, "fp32", macs=500_000_000, weight_bytes=1_000_000, activation_bytes=1_000_000)
MOVING = LayerCost("moving", 1, "fp32", macs=1_000_000, weight_bytes=8_000_000, activation_bytes=2_000_000)


def test_layer_meets_the_limit_that_takes_longer() -> None:
    busy, moving = bound_layers([BUSY, MOVING], CEILING, 1) or ()
    assert (busy.bound, busy.floor_ms) == ("compute", pytest.approx(1.0))  # 1e9 operations at 1e12 a second
    assert (moving.bound, moving.floor_ms) == ("memory", pytest.approx(0.1))  # 1e7 bytes at 1e11 a second
    assert busy.attainable == pytest.approx(1e12)
    assert moving.attainable == pytest.approx(moving.intensity * 1e11)
    assert total_floor_ms((busy, moving)) == pytest.approx(1.1)


def test_batch_shares_the_weights() -> None:
    (one,), (many,) = bound_layers([MOVING], CEILING, 1) or (), bound_layers([MOVING], CEILING, 100) or ()
    assert (one.bytes, many.bytes) == (10_000_000, 208_000_000)
    assert many.operations == 100 * one.operations
    assert many.intensity == pytest.approx(100 * 2e6 / 208e6)


def test_every_layer_lies_under_both_roofs_and_the_ridge_divides_them() -> None:
    bounds = bound_layers(count_costs(get_variant("B1g4"), (224, 224), lambda _: "int8"), CEILING, 8) or ()
    assert len(bounds) == 29
    for bound in bounds:
        assert bound.attainable <= 4e12 * (1 + 1e-9)
        assert bound.attainable <= bound.intensity * 1e11 * (1 + 1e-9)
        assert (bound.bound == "compute") == (bound.intensity >= CEILING.ridge("int8"))
    assert {bound.bound for bound in bounds} == {"compute", "memory"}


def test_precision_without_a_peak_has_no_roofline() -> None:
    costs = count_costs(get_variant("A0"), (224, 224), lambda name: "fp16" if name == "linear" else "int8")
    assert bound_layers(costs, CEILING, 1) is None

"""What layers cost, against the paper and graphs; which limit holds a layer, and for how long."""

from __future__ import annotations

import dataclasses
import math

import onnx
import pytest

from repvgg_deploy.measure.roofline import ITEM_BYTES, Ceiling, LayerCost, bound_layers, count_costs, total_floor_ms
from repvgg_deploy.specs.values import Precision, VariantSpec
from repvgg_deploy.specs.variants import PUBLISHED, count_macs, get_variant
from tests.precision.make_variant import SMALL_G4, make_variant

PAPER_GFLOPS = {
    "A0": 1.4, "A1": 2.4, "A2": 5.1, "B0": 3.1, "B1": 11.8, "B1g2": 8.8, "B1g4": 7.3, "B2": 18.4, "B2g4": 11.3,
    "B3": 26.2, "B3g4": 16.1,
}  # fmt: skip
"""Billions of multiply-accumulates, from the paper's tables 2 and 3 (theoretical FLOPs), rounded there to one digit."""
SMALL_SE = dataclasses.replace(SMALL_G4, name="small-se", se="before_relu", se_reduction=4, groups=(1,) * 8)


def full(_: str) -> Precision:
    return "fp32"


@pytest.mark.parametrize("name", PAPER_GFLOPS)
def test_macs_of_a_published_variant_are_those_of_the_paper(name: str) -> None:
    total = sum(cost.macs for cost in count_costs(get_variant(name), (224, 224), full))
    assert round(total / 1e9, 1) == PAPER_GFLOPS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sum_of_the_layers_is_the_count_of_the_variant(name: str) -> None:
    assert sum(cost.macs for cost in count_costs(get_variant(name), (192, 320), full)) == count_macs(
        get_variant(name), 192, 320
    )


@pytest.mark.parametrize("spec", [SMALL_G4, SMALL_SE], ids=lambda spec: spec.name)
def test_costs_are_those_of_the_graph(spec: VariantSpec) -> None:
    """Shapes from onnx's own inference on a graph: what each convolution multiplies, reads and writes."""
    model = onnx.shape_inference.infer_shapes(make_variant(spec, size=48), strict_mode=True)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {
        v.name: [max(1, d.dim_value) for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = {cost.name: cost for cost in count_costs(spec, (48, 48), full)}
    seen = 0
    for node in model.graph.node:
        name = node.name.removesuffix(".conv")
        if node.op_type != "Conv" or name not in found:
            continue
        weight, source, target = weights[node.input[1]], shapes[node.input[0]], shapes[node.output[0]]
        assert found[name].macs == math.prod(weight) * target[2] * target[3], name
        assert found[name].weight_bytes == 4 * math.prod(weight)
        assert found[name].activation_bytes == 4 * (math.prod(source) + math.prod(target))
        seen += 1
    assert seen == len(spec.layers())
    scaled = [cost for cost in found.values() if cost.name.endswith(".se")]
    assert len(scaled) == (len(spec.layers()) if spec.se != "none" else 0)
    for cost in scaled:
        before = found[cost.name.removesuffix(".se")]
        channels = weights[
            next(
                node.input[1]
                for node in model.graph.node
                if node.name.startswith(before.name) and node.op_type == "Conv"
            )
        ][0]
        assert cost.macs == 2 * channels * (channels // spec.se_reduction)


@pytest.mark.parametrize("precision", ITEM_BYTES)
def test_bytes_follow_the_precision_and_the_input(precision: Precision) -> None:
    spec, item = get_variant("B0"), ITEM_BYTES[precision]
    wide, narrow = (
        count_costs(spec, (224, 224), full),
        count_costs(spec, (224, 224), lambda _: precision, input_dtype="uint8"),
    )
    for one, two in zip(wide[1:-1], narrow[1:-1], strict=True):
        assert (two.weight_bytes * 4, two.activation_bytes * 4) == (
            one.weight_bytes * item,
            one.activation_bytes * item,
        )
    assert narrow[0].activation_bytes == 3 * 224 * 224 + item * 64 * 112 * 112
    assert narrow[-1].activation_bytes == item * 1280 * 7 * 7 + 4 * 1000  # logits stay float32


def test_intensity_grows_with_the_batch_and_groups_lower_it() -> None:
    plain, grouped = (count_costs(get_variant(name), (224, 224), full) for name in ("B1", "B1g4"))
    for one, two in zip(plain, grouped, strict=True):
        assert one.intensity(32) > one.intensity(1)
        if two.groups == 4:
            assert one.macs == 4 * two.macs and two.intensity(1) < one.intensity(1)
    assert sum(cost.groups == 4 for cost in grouped) == 13


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

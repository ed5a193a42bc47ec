from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import pytest

from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.images.calibration import Images
from repvgg_deploy.precision.check import check_quantized
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, Int8Options, quantize_graph
from repvgg_deploy.precision.metrics import QuantizationCost, count_macs, fewest_kept, rank_layers
from repvgg_deploy.precision.network import read_network, read_weights
from repvgg_deploy.precision.round import RoundedLayer, round_nearest
from repvgg_deploy.precision.round_network import Prepared
from tests.precision.compare import judge
from tests.precision.make_chain import KINDS, make_batches, make_model
from tests.precision.make_quantized import input_ranges

TRT10 = dataclasses.replace(FAST, target="trt10")


def rounded_with_damage(
    model: onnx.ModelProto, batches: list[np.ndarray], damaged: str
) -> tuple[Prepared, dict[str, RoundedLayer]]:
    """Scales and weights of the plainest calibration; the damaged layer has 3 levels a side in place of 127."""
    network = read_network(model)
    weights = read_weights(network)
    scales = {name: float(value.max() / 127) for name, value in input_ranges(model, batches).items()}
    found = {layer.name: round_nearest(weights[layer.weight], weights[layer.bias]) for layer in network.layers}
    coarse = (np.round(found[damaged].integers / 42) * 42).astype(np.int8)
    return Prepared(network, scales), found | {damaged: dataclasses.replace(found[damaged], integers=coarse)}


@pytest.mark.parametrize("damaged", ["stage1.conv", "stage3.conv"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "features"])
def test_rank_layers_puts_a_damaged_layer_first(kind: str, damaged: str) -> None:
    # Channels all of a scale: with plain calibration their spread would cost more than any damage.
    options = dataclasses.replace(KINDS[kind], outliers=0.3)
    model, batches = make_model(options), make_batches(options, 32)
    seen: list[tuple[int, int]] = []
    prepared, rounded = rounded_with_damage(model, batches, damaged)
    macs = count_macs(prepared.network, batches[0])
    costs = rank_layers(prepared, rounded, batches, macs=macs, progress=lambda done, total: seen.append((done, total)))
    assert costs[0].name == damaged
    assert costs[0].sqnr_db < costs[1].sqnr_db - 3
    names = {layer.name for layer in read_network(model).layers}
    assert {cost.name for cost in costs} == names
    assert [cost.sqnr_db for cost in costs] == sorted(cost.sqnr_db for cost in costs)
    assert seen == [(index + 1, len(names)) for index in range(len(names))]


def test_rank_layers_features_and_layers_that_are_kept_already() -> None:
    model, batches = make_model(KINDS["features"]), make_batches(KINDS["features"], 16)
    prepared, rounded = rounded_with_damage(model, batches, "stage2.conv")
    del rounded["stage1.conv"]
    costs = rank_layers(prepared, rounded, batches, macs=count_macs(prepared.network, batches[0]))
    assert [cost.name for cost in costs] == ["stage2.conv", "stage0.conv"]


def test_count_macs_are_those_of_the_shapes() -> None:
    options = KINDS["grouped"]
    macs = count_macs(read_network(make_model(options)), make_batches(options, 2)[0])
    sides = (8, 8, 4, 4, 4)
    widths, groups = (3, *options.widths), options.groups
    expected = {f"stage{i}.conv": widths[i + 1] * widths[i] // groups[i] * 9 * sides[i] ** 2 for i in range(5)} | {
        "linear": 320
    }
    assert macs == expected


@pytest.mark.parametrize("needed", [*range(8), None])
def test_fewest_kept_is_the_shortest_prefix_that_meets_the_bound(needed: int | None) -> None:
    ranked = [QuantizationCost(f"layer{index}", float(index), 1) for index in range(7)]
    asked: list[int] = []

    def meets(names: tuple[str, ...]) -> bool:
        assert names == tuple(cost.name for cost in ranked[: len(names)])
        asked.append(len(names))
        return needed is not None and len(names) >= needed

    found = fewest_kept(ranked, meets)
    assert found == (None if needed is None else tuple(cost.name for cost in ranked[:needed]))
    assert len(asked) <= math.ceil(math.log2(len(ranked) + 1)) + 1


def drop_of(model: onnx.ModelProto, graph: onnx.ModelProto, images: list[np.ndarray]) -> float:
    drop = judge(model, graph, images).expected_drop
    assert drop is not None
    return drop


def test_max_drop_keeps_the_costliest_layers_and_no_more_than_it_takes() -> None:
    model, batches, others = make_model(), make_batches(count=64), make_batches(count=200, seed=9)
    # Rounding to nearest: a layer's weights do not depend on which others are kept, so that the fewest are the fewest.
    images, plain = Images(batches, others), MAX_CALIBRATION
    loose, report = quantize_graph(model, images, dataclasses.replace(plain, sensitivity=True))
    assert (report.kept, report.int8_share) == ((), 1.0)
    costliest = tuple(cost.name for cost in report.costs)
    everything = drop_of(model, loose, others)
    assert report.held_out.expected_drop == pytest.approx(everything, rel=1e-6)
    bound = everything / 3
    graph, met = quantize_graph(model, images, dataclasses.replace(plain, max_drop=bound))
    assert 0 < len(met.kept) < 6
    assert met.kept == costliest[: len(met.kept)]
    assert drop_of(model, graph, others) <= bound
    check_quantized(graph, kept=met.kept)
    macs = {cost.name: cost.macs for cost in met.costs}
    assert met.int8_share == pytest.approx(1 - sum(macs[name] for name in met.kept) / sum(macs.values()))
    fewer, _ = quantize_graph(model, images, dataclasses.replace(plain, keep=met.kept[:-1]))
    assert drop_of(model, fewer, others) > bound


@pytest.mark.parametrize("options", [FAST, TRT10], ids=["trt8", "trt10"])
def test_max_drop_of_nothing_may_keep_all_and_a_large_one_keeps_none(options: Int8Options) -> None:
    model, images = make_model(), Images(make_batches(count=32), make_batches(count=200, seed=9))
    graph, report = quantize_graph(model, images, dataclasses.replace(options, max_drop=0.0))
    check_quantized(graph, target=options.target, kept=report.kept)
    assert report.held_out.expected_drop == 0.0
    graph, report = quantize_graph(model, images, dataclasses.replace(options, max_drop=100.0))
    assert report.kept == ()


@pytest.mark.parametrize("options", [FAST, TRT10], ids=["trt8", "trt10"])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_leaves_layers_without_any_pair(kind: str, options: Int8Options) -> None:
    model, named = make_model(KINDS[kind]), ("stage0.conv", "stage2.conv")
    graph, report = quantize_graph(model, make_batches(KINDS[kind], 16), dataclasses.replace(options, keep=named))
    kept = (*named, *read_network(model).gates)
    check_quantized(graph, target=options.target, kept=kept)
    assert report.kept == kept and 0 < report.int8_share < 1
    assert {layer.name for layer in report.layers if layer.kept} == set(kept)
    paired = {
        node.input[1] for node in graph.graph.node if node.op_type == "Conv" and node.input[1].endswith(".dequantized")
    }
    assert not paired & {"stage0.weight.dequantized", "stage2.weight.dequantized"}
    assert "stage1.weight.dequantized" in paired


def test_keep_unknown_layer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no layer is called 'stage9'") as caught:
        quantize_graph(make_model(), make_batches(), dataclasses.replace(FAST, keep=("stage1.conv", "stage9")))
    assert "its layers are stage0.conv, stage1.conv" in caught.value.remedy


def test_keep_block_as_inspect_lists_it_is_refused_with_the_name_of_its_convolution() -> None:
    with pytest.raises(CalibrationError, match="no layer is called 'stage1'") as caught:
        quantize_graph(make_model(), make_batches(), dataclasses.replace(FAST, keep=("stage1",)))
    assert caught.value.remedy == "give stage1.conv"


def test_max_drop_without_a_classifier_is_refused() -> None:
    options = KINDS["features"]
    with pytest.raises(CalibrationError, match="needs a classifier"):
        quantize_graph(make_model(options), make_batches(options), dataclasses.replace(FAST, max_drop=0.3))


@pytest.mark.parametrize("bound", [-0.1, 101.0, float("nan")])
def test_max_drop_out_of_range_is_refused(bound: float) -> None:
    with pytest.raises(CalibrationError, match="largest drop"):
        Int8Options(max_drop=bound)

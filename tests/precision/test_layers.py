"""The layers of FP32, FP16 and INT8 graphs found under one name, and compared whatever was rescaled."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from repvgg_deploy.errors import InputError, ModelError
from repvgg_deploy.evaluate.agreement import LayerAgreement, compare_layers
from repvgg_deploy.graph.edit import replace_weights
from repvgg_deploy.precision.fp16 import Fp16Options, to_fp16
from repvgg_deploy.precision.grids import INT8
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, quantize_graph
from repvgg_deploy.precision.layers import LayerRun, cut_behind, quantize_alone, run_pairs
from repvgg_deploy.precision.mixed import halve_quantized, round_scales_to_half
from repvgg_deploy.precision.network import read_network, read_weights
from repvgg_deploy.precision.qdq import insert_pairs
from repvgg_deploy.precision.round import round_nearest
from repvgg_deploy.precision.run_onnx import run_tensors
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model, metadata_of
from tests.runtime.make_model import build_quantized


def compare(reference: onnx.ModelProto, other: onnx.ModelProto, batches: list[Any]) -> tuple[LayerAgreement, ...]:
    one, two = LayerRun(reference), LayerRun(other)
    one.require_same(two)
    return compare_layers(run_pairs(one, two, ((batch, batch) for batch in batches)), fixed=one.classifiers)


def with_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    from repvgg_deploy.specs import codec
    from repvgg_deploy.specs.values import METADATA_KEY

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    return copy


def test_outputs_are_those_of_the_graph() -> None:
    model, batch = make_model(), make_batches()[0]
    run = LayerRun(model)
    assert list(run.outputs) == [*(f"stage{index}.conv" for index in range(5)), "linear"]
    truth = next(run_tensors(model, list(run.outputs.values()), [batch]))
    assert all(np.array_equal(value, truth[run.outputs[name]]) for name, value in run.run(batch).items())


@pytest.mark.parametrize("kind", ["plain", "grouped", "se_after", "uint8_top5"])
def test_int8_layers_lose_what_calibration_reports_though_they_were_equalized(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind])
    graph, report = quantize_graph(model, batches, FAST)
    layers = compare(model, graph, batches)
    assert [layer.name for layer in layers] == [layer.name for layer in report.layers]
    assert max(layer.largest_factor for layer in layers) > 3  # six octaves of spread were evened out
    # The report knows the factors and compares in the rescaled units, where the channels weigh differently.
    difference = [layer.sqnr_db - expected.sqnr_db for layer, expected in zip(layers, report.layers, strict=True)]
    assert np.abs(difference).max() < 8
    assert abs(layers[-1].sqnr_db - report.layers[-1].sqnr_db) < 1
    assert layers[-1].smallest_factor == layers[-1].largest_factor == 1


def test_int8_layers_without_equalization_are_worse_from_the_first_to_the_last() -> None:
    model, batches = make_model(), make_batches()
    worse = compare(model, quantize_graph(model, batches, MAX_CALIBRATION)[0], batches)
    better = compare(model, quantize_graph(model, batches, FAST)[0], batches)
    assert all(one.sqnr_db < two.sqnr_db + 1 for one, two in zip(worse, better, strict=True))
    assert worse[-1].sqnr_db < better[-1].sqnr_db - 10


def test_int8_with_fp16_layers_lose_no_more_than_int8() -> None:
    model, batches = make_model(), make_batches()
    graph, _ = quantize_graph(model, batches, FAST)
    mixed = onnx.ModelProto()
    mixed.CopyFrom(graph)
    for tensor in mixed.graph.initializer:
        if tensor.name.endswith(".scale"):
            tensor.CopyFrom(numpy_helper.from_array(round_scales_to_half(numpy_helper.to_array(tensor)), tensor.name))
    layers = [compare(model, other, batches) for other in (graph, halve_quantized(mixed))]
    assert all(abs(one.sqnr_db - two.sqnr_db) < 1.5 for one, two in zip(*layers, strict=True)), layers


@pytest.mark.parametrize("io", ["fp32", "fp16"])
def test_fp16_layers_are_found_under_the_same_names(io: Literal["fp32", "fp16"]) -> None:
    model, batches = make_model(), make_batches()
    typed, _ = to_fp16(with_metadata(model), batches, Fp16Options(io=io))
    layers = compare(model, typed.model, batches)
    # Eleven digits of two are 66 dB; a few layers add up.
    assert all(50 < layer.sqnr_db < 120 for layer in layers), layers


def test_int8_with_fp16_around_it_is_computed_as_it_stands() -> None:
    graph = build_quantized()
    batch = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    found = LayerRun(graph).run(batch)
    weights = {tensor.name: numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.graph.initializer}
    image = np.clip(np.rint(batch.astype(np.float16) / np.float16(0.02)), -128, 127) * np.float32(np.float16(0.02))
    centre = (
        np.einsum("nchw,ochw->no", image[:, :, 4:7, 6:9], weights["c1.w"] * weights["c1.s"].reshape(-1, 1, 1, 1))
        + weights["c1.b"]
    )
    assert np.abs(found["c1"][:, :, 5, 7] - centre).max() < 0.02 * np.abs(centre).max()


def test_networks_that_are_not_one_are_refused() -> None:
    one = LayerRun(make_model())
    with pytest.raises(InputError, match=r"different networks: stage0\.conv"):
        one.require_same(LayerRun(make_model(ChainOptions(widths=(16, 16, 16, 24, 32)))))
    with pytest.raises(InputError, match="different networks"):
        one.require_same(LayerRun(make_model(KINDS["se_after"])))


def test_files_and_batches_that_cannot_be_used_are_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="cannot be read as ONNX"):
        LayerRun(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="failed on float32"):
        LayerRun(make_model()).run(np.zeros((1, 4, 16, 16), np.float32))
    broken = make_model()
    broken.graph.node[1].op_type = "Nonsense"
    with pytest.raises(ModelError, match="refuses the graph"):
        LayerRun(broken)


def test_cut_behind_a_layer_ends_at_the_last_layer() -> None:
    network = read_network(make_model())
    assert {cut_behind(network, layer).ends for layer in network.layers} == {("logits",)}
    cut = cut_behind(network, network.layer("stage4.conv"))
    assert [node.name for node in cut.nodes] == ["stage4.conv", "stage4", "gap", "flatten", "linear"]
    assert cut.given == ("stage3",)
    features = read_network(make_model(KINDS["features"]))
    both = ("stage1", "stage2")
    assert [cut_behind(features, layer).ends for layer in features.layers] == [both, both, ("stage2",)]


def test_cut_behind_se_takes_what_the_gate_multiplies() -> None:
    network = read_network(make_model(KINDS["se_after"]))
    cut = cut_behind(network, network.layer("stage1.se.up.conv"))
    assert cut.given == ("stage1.se.down", "stage1")
    assert [node.name for node in cut.nodes][:3] == ["stage1.se.up.conv", "stage1.se.gate", "stage1.se.scaled"]


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_alone_errs_as_the_graph_with_one_layer_quantized(kind: str) -> None:
    network, batches, step = read_network(make_model(KINDS[kind])), make_batches(KINDS[kind], 16), 0.05
    weights = read_weights(network)
    for layer in network.layers:
        ends = cut_behind(network, layer).ends
        fine = round_nearest(weights[layer.weight], weights[layer.bias])
        coarse = dataclasses.replace(fine, integers=(np.round(fine.integers / 16) * 16).astype(np.int8))
        for rounded in (coarse, dataclasses.replace(coarse, bias=coarse.bias + np.float32(2.0))):
            others = [other.name for other in network.layers if other is not layer]
            changed = {layer.weight: rounded.weight(), layer.bias: rounded.bias}
            graph = replace_weights(insert_pairs(network, {layer.input: step}, kept=others), changed)
            worst = []
            for end in ends:
                truth, found = (
                    np.concatenate([values[end] for values in run_tensors(model, [end], batches)]).astype(np.float64)
                    for model in (network.model, graph)
                )
                worst.append(10 * np.log10(np.square(truth).sum() / np.square(found - truth).sum()))
            sqnr_db = quantize_alone(network, layer, rounded, steps=(step, INT8), images=batches)
            assert list(sqnr_db.values()) == pytest.approx(worst, abs=0.01)  # float32 order of summation

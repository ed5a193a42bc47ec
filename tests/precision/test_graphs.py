"""Networks that are no chain: read in one form, rescaled, rounded, typed and judged as chains are."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import CalibrationError, ModelError
from repvgg_deploy.graph.edit import GraphView
from repvgg_deploy.precision.answers import find_answers, judged_tensors
from repvgg_deploy.precision.check import check_halves, check_types
from repvgg_deploy.precision.equalize import EqualizeOptions, equalize
from repvgg_deploy.precision.fp16 import Fp16Options, find_islands, find_large, fit_ranges, measure_ranges
from repvgg_deploy.precision.halves import LARGEST, write_halves
from repvgg_deploy.precision.int8 import FAST, Int8Options, quantize_graph
from repvgg_deploy.precision.layers import cut_behind
from repvgg_deploy.precision.metrics import Judge
from repvgg_deploy.precision.network import read_layer, read_network
from repvgg_deploy.precision.normalise import normalise
from repvgg_deploy.precision.qdq import insert_pairs
from repvgg_deploy.precision.ranges import collect, columns, output_size
from repvgg_deploy.precision.run_onnx import run_tensors
from repvgg_deploy.precision.search import SearchOptions
from tests.precision.compare import relative, values
from tests.precision.make_graph import GRAPHS, Network, draw

LAYERS = {"neck": 14, "neck with SiLU": 14, "mobile": 13, "tokens": 8}
QUICK = Int8Options(search=SearchOptions(exponents=(0.5, 1.0), images=16, positions=256))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_layer_is_found_and_is_the_convolution_that_it_is_read_as(name: str) -> None:
    network, (batch,) = read_network(GRAPHS[name]()), draw(8)
    assert len(network.layers) == LAYERS[name]
    assert relative(values(network.model, [batch]), values(GRAPHS[name](), [batch])) == 0.0
    for layer in network.layers:
        (found,) = run_tensors(network.model, [layer.input, layer.output], [batch])
        x, truth = found[layer.input], found[layer.output]
        weight, bias = read_layer(network, layer)
        assert weight.shape == layer.weight_shape
        assert np.array_equal(layer.translate(layer.translate(weight)), weight)
        count = int(np.prod(x.shape[1:-1] if layer.axis == -1 else output_size(x.shape, layer)))
        seen = columns(x, layer, np.tile(np.arange(count), (len(x), 1)))
        rows = weight.reshape(layer.groups, -1, seen.shape[2])
        given = np.concatenate([s @ r.T for s, r in zip(seen, rows, strict=True)], axis=1) + bias
        wanted = np.moveaxis(truth, layer.axis, -1).reshape(given.shape)
        assert np.abs(given - wanted).max() <= 1e-5 * np.abs(wanted).max(), layer.name  # float32 in another order


@pytest.mark.parametrize("name", GRAPHS)
def test_equalized_graph_computes_the_same(name: str) -> None:
    network, batches = read_network(GRAPHS[name]()), draw(16)
    equalized, factors, reports = equalize(network, collect(network, batches).ranges(), EqualizeOptions(1.0))
    # The sums are those of before, each term rounded to float32 after its factor; Exp takes up to a few times as much.
    assert relative(values(equalized.model, batches), values(network.model, batches)) <= 2e-5
    moved = sum(report.blocked_by is None for report in reports)
    assert moved == {"neck": 7, "neck with SiLU": 1, "mobile": 6, "tokens": 0}[name]
    assert bool(np.any(factors != 1)) == bool(moved)
    assert all(report.spread_after <= report.spread_before + 1e-9 for report in reports)


@pytest.mark.parametrize("target", ["trt8", "trt10"])
@pytest.mark.parametrize("name", GRAPHS)
def test_int8_graph_is_near_fp32_at_every_answer(name: str, target: str) -> None:
    model, options = GRAPHS[name](), dataclasses.replace(QUICK, target=target)
    graph, report = quantize_graph(model, draw(64), options)
    onnx.checker.check_model(graph, full_check=True)
    found = Judge(read_network(model), draw(32, seed=9)).compare(graph)
    assert len(found.outputs) == {"neck": 4, "neck with SiLU": 4}.get(name, 1)
    assert min(output.sqnr_db for output in found.outputs) > 20  # what is asked of a graph without a classifier
    gates = read_network(model).gates
    assert report.kept == gates and bool(gates) == (name == "mobile")
    assert report.int8_share > 0.95
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    producers = {output: node for node in graph.graph.node for output in node.output}
    for layer in (layer for layer in read_network(model).layers if layer.name not in gates):
        node = next(node for node in graph.graph.node if node.name == layer.name)
        assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        weight, scale, _ = (constants[name] for name in producers[node.input[1]].input)
        axis = 1 if layer.op_type in ("MatMul", "ConvTranspose") else 0
        assert (weight.data_type, list(scale.dims)) == (TensorProto.INT8, [weight.dims[axis]])
        assert list(scale.dims) == [layer.out_channels]


@pytest.mark.parametrize("name", GRAPHS)
def test_fp16_graph_is_near_fp32_at_every_answer(name: str) -> None:
    model = GRAPHS[name]()
    network, batches = read_network(model), draw(16)
    fitted, _, beyond = fit_ranges(network, measure_ranges(network, batches), Fp16Options())
    islands = find_islands(fitted, [*beyond, *find_large(fitted, batches, LARGEST / 8)])
    graph = write_halves(fitted.model, full=islands)
    check_halves(graph)
    onnx.checker.check_model(graph, full_check=True)
    assert (beyond, islands) == ([], set())
    assert Judge(network, draw(16, seed=9)).compare(graph).sqnr_db > 45  # FP16 rounds to 66 dB, some ten times here


def test_fp16_tensor_that_does_not_fit_is_an_island_with_what_makes_and_reads_it() -> None:
    """A sum of squares over an image: nothing between two layers can be rescaled through a Pow."""
    n = Network()
    x = n.layer("x", 8)
    total = n.node(
        "ReduceSum",
        [n.node("Pow", [n.node("Mul", [x, n.constant(300.0)]), n.constant(2.0)]), n.constant_integers([2, 3])],
        keepdims=1,
    )
    normal = n.node("Div", [x, n.node("Add", [n.node("Sqrt", [total]), n.constant(1e-6)])])
    model = n.finish(n.layer(normal, 4))
    network, batches = read_network(model), draw(16)
    ranges = measure_ranges(network, batches)
    fitted, _, beyond = fit_ranges(network, ranges, Fp16Options())
    assert beyond == []
    islands = find_islands(fitted, find_large(fitted, batches, LARGEST / 8))
    kinds = {node.output[0]: node.op_type for node in fitted.model.graph.node}
    assert {kinds[name] for name in islands} == {"Pow", "ReduceSum", "Sqrt", "Add", "Div"}
    graph = write_halves(fitted.model, full=islands)
    check_halves(graph)
    assert Judge(network, batches).compare(graph).sqnr_db > 50
    large = [
        name for name, kind in ((node.output[0], node.op_type) for node in graph.graph.node) if kind == "ReduceSum"
    ]
    assert max(float(np.max(found[large[0]])) for found in run_tensors(network.model, large, batches)) > LARGEST


def test_pairs_stand_where_integers_can_be_moved_and_added() -> None:
    """What a convolution's output is added to, and what MaxPool, Concat and Resize read for a layer."""
    network = read_network(GRAPHS["neck"]())
    graph = insert_pairs(network, dict.fromkeys(network.quantized_tensors(), 0.1)).graph
    producers = {output: node for node in graph.node for output in node.output}
    (add,) = (node for node in graph.node if node.op_type == "Add")
    assert sorted(producers[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]
    for concat in (node for node in graph.node if node.op_type == "Concat"):
        scales = {producers[name].input[1] for name in concat.input}
        assert all(producers[name].op_type == "DequantizeLinear" for name in concat.input)
        assert scales == {f"{name.removesuffix('.dequantized')}.scale" for name in concat.input}
        (reader,) = (node for node in graph.node if concat.output[0] in node.input)
        assert reader.op_type == "QuantizeLinear"
    behind = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert not any(producers[node.input[0]].op_type == "Conv" for node in behind if node.input[0] in producers)


def test_pair_that_a_float_reader_would_see_is_not_moved() -> None:
    n = Network()
    pooled = n.node("MaxPool", [n.layer("x", 8)], kernel_shape=[2, 2])
    model = n.finish(n.layer(pooled, 4), n.node("Sigmoid", [pooled]))
    network = read_network(model)
    graph = insert_pairs(network, dict.fromkeys(network.quantized_tensors(), 0.1)).graph
    (pool,) = (node for node in graph.node if node.op_type == "MaxPool")
    assert not pool.input[0].endswith(".dequantized")


def test_answers_stay_in_fp32_and_layers_do_not() -> None:
    model = GRAPHS["neck"]()
    answers = find_answers(model)
    assert sorted(node.op_type for node in answers) == ["Exp", "Exp", "Mul", "Mul"]
    graph, _ = quantize_graph(model, draw(16), dataclasses.replace(FAST, target="trt10"))
    casts = {node.output[0]: node for node in graph.graph.node if node.op_type == "Cast"}
    for node in (node for node in graph.graph.node if node.op_type == "Exp"):
        assert helper.get_attribute_value(casts[node.input[0]].attribute[0]) == TensorProto.FLOAT


def test_coordinates_added_to_what_a_layer_gives_are_answers() -> None:
    """FP16 has steps of half a pixel above 512: a grid that is added, or a stride that multiplies, is no gate."""
    n = Network()
    head = n.layer("x", 4, "")
    grid = n.constant(np.arange(16, dtype=np.float32).reshape(1, 1, 16, 1) * 40)
    model = n.finish(n.node("Mul", [n.node("Add", [head, grid]), n.constant(8.0)]))
    assert [node.op_type for node in find_answers(model)] == ["Add", "Mul"]


def test_what_is_compared_is_chosen_from_and_each_answer_apart() -> None:
    n = Network()
    x = n.layer("x", 8)
    boxes, scores = n.layer(x, 4, ""), n.node("Sigmoid", [n.layer(x, 2, "")])
    both = n.node("Concat", [boxes, scores], 6, axis=1)
    flat = n.node("Reshape", [scores, n.constant_integers([0, -1])])
    best = n.node("TopK", [flat, n.constant_integers([5])], axis=1)
    n.nodes[-1].output.append("where")
    model = n.finish(both, best, rank=2)
    network, mobile = read_network(model), read_network(GRAPHS["mobile"]())
    assert (network.classifies, network.judged) == (False, (boxes, scores))
    assert (mobile.classifies, mobile.judged) == (True, (mobile.layers[-1].output,))


@pytest.mark.parametrize("name", GRAPHS)
def test_cut_of_every_layer_ends_where_it_is_judged(name: str) -> None:
    network = read_network(GRAPHS[name]())
    judged = set(network.judged)
    ends = [set(cut_behind(network, layer).ends) for layer in network.layers]
    assert all(end and end <= judged for end in ends)
    assert set().union(*ends) == judged


def _gemm(n: Network, x: str, **attributes: float) -> str:
    flat = n.node("Flatten", [n.pooled(x)])
    return n.node("Gemm", [flat, n.random_constant(8, 5), n.random_constant(1)], 5, **attributes)


def test_normal_form_of_a_gemm_is_rows_with_a_bias() -> None:
    n = Network()
    model = n.finish(_gemm(n, "x", alpha=0.5, beta=2.0), rank=2)
    (layer,) = read_network(model).layers
    assert (layer.weight_shape, layer.op_type) == ((5, 8), "Gemm")
    assert relative(values(normalise(model), draw(8)), values(model, draw(8))) <= 1e-6


def test_normal_form_gives_every_layer_constants_and_a_name_of_its_own() -> None:
    n = Network()
    first = n.node("Relu", [n.conv("x", 8)])
    n.nodes[0].name = ""
    weight = numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32) / 8)
    n.nodes.append(helper.make_node("Constant", [], ["weight"], value=weight))
    second = n.node("Conv", [first, "weight"], 8)
    third = n.node("Conv", [second, *n.nodes[0].input[1:]], 8, pads=[1] * 4)
    model = n.finish(third)
    network = read_network(model)
    assert len({layer.name for layer in network.layers}) == 3
    assert len({name for layer in network.layers for name in (layer.weight, layer.bias)}) == 6
    assert relative(values(network.model, draw(8)), values(model, draw(8))) == 0.0
    assert normalise(network.model) is network.model


def test_grouped_transposed_convolution_stays_in_the_wider_type() -> None:
    n = Network()
    model = n.finish(n.layer(n.node("Relu", [n.transposed(n.layer("x", 8), 6, group=2)]), 4))
    graph, report = quantize_graph(model, draw(16), dataclasses.replace(FAST, target="trt10"))
    assert len(report.layers) == 2
    (node,) = (node for node in graph.graph.node if node.op_type == "ConvTranspose")
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert kinds[node.input[1]] == TensorProto.FLOAT16


def _sides(n: Network, bins: str, product: str) -> str:
    """Distances to the sides of boxes, (N, 4, cells), as the means of distributions over 16 bins."""
    parts = n.node("Reshape", [bins, n.constant_integers([0, 4, 16, 256])])
    if product == "Conv":
        turned = n.node("Softmax", [n.node("Transpose", [parts], perm=[0, 2, 1, 3])], axis=1)
        mean = n.node("Conv", [turned, n.constant(np.arange(16.0).reshape(1, 16, 1, 1))], 1)
    else:
        turned = n.node("Transpose", [n.node("Softmax", [parts], axis=2)], perm=[0, 1, 3, 2])
        steps = np.arange(16.0) if product == "vector" else np.arange(16.0).reshape(16, 1)
        mean = n.node("MatMul", [turned, n.constant(steps)])
    return n.node("Reshape", [mean, n.constant_integers([0, 4, 256])])


@pytest.mark.parametrize("product", ["Conv", "column", "vector"])
def test_layer_that_decodes_boxes_of_a_distribution_computes_in_fp32(product: str) -> None:
    """Distribution focal loss: Softmax over 16 bins, and their mean by a fixed layer, which is no layer to quantize."""
    n = Network()
    sides = _sides(n, n.layer(n.layer("x", 16), 64, ""), product)
    grid = n.node("Add", [sides, n.constant(np.arange(256.0).reshape(1, 1, 256))])
    model = n.finish(n.node("Mul", [grid, n.constant(8.0)]), rank=3)
    network = read_network(model)
    assert [layer.out_channels for layer in network.layers] == [16, 64]
    int8, _ = quantize_graph(model, draw(16), dataclasses.replace(FAST, target="trt10"))
    halves = write_halves(network.model)
    check_halves(halves, full=[node.name for node in find_answers(network.model)])
    for graph in (int8, halves):
        kinds, made_by = check_types(graph), {name: node for node in graph.graph.node for name in node.output}
        (softmax,) = (node for node in graph.graph.node if node.op_type == "Softmax")
        kind, layers = "Conv" if product == "Conv" else "MatMul", {layer.name for layer in network.layers}
        (mean,) = (node for node in graph.graph.node if node.op_type == kind and node.name not in layers)
        assert kinds[softmax.output[0]] == kinds[mean.output[0]] == kinds[mean.input[1]] == TensorProto.FLOAT
        assert mean.input[1] not in made_by  # the very weights, not rounded to FP16 on the way
    found, truth = (values(each, draw(8, seed=1))[0] for each in (halves, model))
    # Coordinates reach 2,000 pixels, where FP16 has steps of one; sides up to 120, where it has steps of 1/16.
    assert np.abs(found - truth).mean() < 1 / 64


def test_graphs_with_branches_of_control_or_two_inputs_are_refused_by_name() -> None:
    model = GRAPHS["neck"]()
    model.graph.input.append(helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [1]))
    with pytest.raises(ModelError, match=r"2 inputs \(x, threshold\)"):
        read_network(model)
    model = GRAPHS["neck"]()
    model.graph.node[3].op_type, model.graph.node[3].name = "If", "choose"
    with pytest.raises(ModelError, match="If 'choose'"):
        read_network(model)


def test_graph_that_gives_numbers_of_classes_alone_is_judged_by_what_they_are_chosen_from() -> None:
    n = Network()
    head = n.layer("x", 4, "")
    model = n.model(n.node("ArgMax", [head], axis=1))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    assert judged_tensors(GraphView(model)) == (head,)
    whole = helper.make_model(
        helper.make_graph(
            [helper.make_node("Shape", ["x"], ["s"])], "g", [model.graph.input[0]], [onnx.ValueInfoProto()]
        )
    )
    whole.graph.output[0].CopyFrom(helper.make_tensor_value_info("s", TensorProto.INT64, [4]))
    with pytest.raises(CalibrationError, match="nothing to compare"):
        judged_tensors(GraphView(whole))

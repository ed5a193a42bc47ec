from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import CalibrationError, ModelError
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.qdq import insert_pairs
from tests.precision.make_chain import KINDS, ChainOptions, make_model
from tests.precision.make_graph import GRAPHS


def test_plain_graph_is_read_layer_by_layer() -> None:
    network = read_network(make_model(ChainOptions(groups=(1, 2, 1, 4, 2))))
    assert [layer.name for layer in network.layers] == [*(f"stage{index}.conv" for index in range(5)), "linear"]
    assert [layer.groups for layer in network.layers] == [1, 2, 1, 4, 2, 1]
    assert [layer.strides[0] for layer in network.layers] == [2, 1, 2, 1, 1, 1]
    assert [layer.in_channels for layer in network.layers] == [3, 8, 16, 16, 24, 32]
    assert [i.readers for i in network.interfaces] == [
        *((f"stage{index}.conv",) for index in range(1, 5)),
        ("linear",),
        (),
    ]
    assert [i.blocked_by for i in network.interfaces] == [None] * 5 + ["output logits"]


def test_last_outputs_are_what_no_layer_reads_again() -> None:
    network = read_network(make_model(KINDS["se_after"]))
    assert network.last_outputs() == (network.layer("linear").output,)
    neck = GRAPHS["neck with SiLU"]()  # two heads of boxes, two of scores, each with something behind it
    maker = {node.output[0]: node for node in neck.graph.node}
    behind = [maker[value.name].input[0] for value in neck.graph.output]
    heads = {maker[x].input[0] if maker[x].op_type == "Exp" else x for x in behind}
    assert len(heads) == 4 and {maker[x].op_type for x in heads} == {"Conv"}
    assert set(read_network(neck).last_outputs()) == heads


@pytest.mark.parametrize("kind", ["se_before", "se_after"])
def test_se_interface_is_read_by_squeeze_and_next_block(kind: str) -> None:
    network = read_network(make_model(KINDS[kind]))
    found = {i.source: i for i in network.interfaces}
    assert set(found["stage1.conv"].readers) == {"stage1.se.down.conv", "stage2.conv"}
    assert set(found["stage4.conv"].readers) == {"stage4.se.down.conv", "linear"}
    assert found["stage1.se.down.conv"].readers == ("stage1.se.up.conv",)
    assert found["stage1.se.up.conv"].blocked_by == "Sigmoid"
    assert found["stage1.conv"].blocked_by is None


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_the_layers_of_se_and_no_others(kind: str) -> None:
    network = read_network(make_model(KINDS[kind]))
    assert network.gates == tuple(layer.name for layer in network.layers if ".se." in layer.name)
    assert bool(network.gates) == kind.startswith("se")


def test_gates_of_linear_layers_and_silu_are_found_and_an_exposed_one_is_none() -> None:
    """As PyTorch modules write SE: averages as a list, Gemm, SiLU, HardSigmoid, and back to a map."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {"conv": (8, 3, 3, 3), "down": (4, 8), "up": (8, 4), "linear": (5, 8)}
    constants = [numpy_helper.from_array(draw(s).astype(np.float32), f"{n}.weight") for n, s in shapes.items()]
    constants += [numpy_helper.from_array(np.zeros(s[0], np.float32), f"{n}.bias") for n, s in shapes.items()]
    constants.append(numpy_helper.from_array(np.array([2, 3]), "axes"))

    def layer(kind: str, x: str, name: str, **named: object) -> onnx.NodeProto:
        return helper.make_node(kind, [x, f"{name}.weight", f"{name}.bias"], [name], name=name, **named)

    nodes = [
        layer("Conv", "image", "conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["conv"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["list"]),
        layer("Gemm", "list", "down", transB=1),
        helper.make_node("Sigmoid", ["down"], ["half"]),
        helper.make_node("Mul", ["down", "half"], ["silu"]),
        layer("Gemm", "silu", "up", transB=1),
        helper.make_node("HardSigmoid", ["up"], ["gate"]),
        helper.make_node("Unsqueeze", ["gate", "axes"], ["factors"]),
        helper.make_node("Mul", ["conv", "factors"], ["gated"]),
        helper.make_node("GlobalAveragePool", ["gated"], ["features"]),
        helper.make_node("Flatten", ["features"], ["flat"]),
        layer("Gemm", "flat", "linear", transB=1),
    ]
    values = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("linear", TensorProto.FLOAT, ["N", 5])]
    exposed = helper.make_tensor_value_info("up", TensorProto.FLOAT, ["N", 8])
    opset = [helper.make_opsetid("", 17)]
    for more, expected in (([], ("down", "up")), ([exposed], ())):
        graph = helper.make_graph(nodes, "g", values, [*outputs, *more], constants)
        assert read_network(helper.make_model(graph, opset_imports=opset)).gates == expected


def test_exposed_and_tail_outputs_block_their_interfaces() -> None:
    features = read_network(make_model(KINDS["features"]))
    assert {i.source: i.blocked_by for i in features.interfaces} == {
        "stage0.conv": None,
        "stage1.conv": "output stage1",
        "stage2.conv": "output stage2",
    }
    top5 = read_network(make_model(KINDS["uint8_top5"]))
    assert (top5.image, top5.interfaces[-1].blocked_by) == ("normalised", "Softmax")


def test_typed_graphs_are_refused() -> None:
    model = make_model()
    pairs = insert_pairs(read_network(model), dict.fromkeys(read_network(model).quantized_tensors(), 0.1))
    with pytest.raises(CalibrationError, match="typed already") as refused:
        read_network(pairs)
    assert refused.value.remedy.startswith("it is quantized already: build or run it as it is")
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    with pytest.raises(CalibrationError, match="typed already"):
        read_network(model)


def test_graph_without_a_layer_names_its_operators_and_a_step_that_leads_on() -> None:
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    pooled = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [1, 3, 4, 4])
    node = helper.make_node("MaxPool", ["images"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2])
    graph = helper.make_graph([node], "g", [image], [pooled])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(ModelError, match="no layer with stored weights, only MaxPool") as refused:
        read_network(model)
    assert "repvgg-trt build" in refused.value.remedy


def _computed_weight(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("free", TensorProto.FLOAT, [8, 3, 3, 3]))
    model.graph.node[0].input[1] = "free"


def _empty(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


@pytest.mark.parametrize(("change", "why"), [(_computed_weight, "2 inputs"), (_empty, "no layer")])
def test_graphs_that_cannot_be_quantized_are_refused(change, why: str) -> None:
    model = make_model()
    change(model)
    with pytest.raises(ModelError, match=why) as caught:
        read_network(model)
    assert caught.value.remedy

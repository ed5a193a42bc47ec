"""Number types of a graph's tensors, against the onnx package's own inference; which weights are 2:4 sparse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from repvgg_deploy.build.compile import compile_plan
from repvgg_deploy.build.source import Source, find_dense_layers, read_source, tensor_types
from repvgg_deploy.files.onnx import read_graph, read_metadata, weighted_nodes
from repvgg_deploy.files.plan_place import Library
from repvgg_deploy.specs.values import BuildConfig
from tests.build.fake_trt import FakeTrt
from tests.build.make_typed import A10, inferred_types, make_request, make_typed


@pytest.mark.parametrize("kind", ["plain", "se_after", "uint8_top5", "probabilities", "features"])
@pytest.mark.parametrize("typing", ["fp32", "fp16", "int8", "mixed"])
def test_types_of_all_tensors_are_those_that_onnx_infers(tmp_path: Path, kind: str, typing: str) -> None:
    path = make_typed(tmp_path, typing, kind)
    found = tensor_types(read_graph(path), read_metadata(path).spec)
    wanted = inferred_types(path)
    assert {name: found.get(name) for name in wanted} == wanted
    assert ("float16" in found.values()) == (typing in ("fp16", "mixed"))


def prune(source: Source, keep: str = "") -> Source:
    """The same with zeros in two of each four input channels of all weights, but for the layer `keep`."""
    model = onnx.load_from_string(source.data)
    producers = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.name == keep:
            continue
        producer = producers.get(node.input[1])
        tensor = tensors[node.input[1] if producer is None else producer.input[0]]
        values = onnx.numpy_helper.to_array(tensor).copy()
        turned = node.op_type == "Gemm" and not any(one.name == "transB" and one.i for one in node.attribute)
        by_output = values.T if turned else values
        by_output[:, 1::4], by_output[:, 2::4] = 0, 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return dataclasses.replace(source, data=model.SerializeToString())


@pytest.mark.parametrize("typing", ["fp32", "fp16", "int8", "mixed"])
def test_layers_without_2_4_sparse_weights_are_found(tmp_path: Path, typing: str) -> None:
    source = read_source(make_typed(tmp_path, typing))
    layers = [node.name for node in weighted_nodes(source.graph)]
    assert find_dense_layers(source) == (layers[1:], len(layers) - 1)  # the first has three input channels
    assert find_dense_layers(prune(source)) == ([], len(layers) - 1)
    assert find_dense_layers(prune(source, keep=layers[-1])) == ([layers[-1]], len(layers) - 1)
    # In a layer of 8 channels, three of four in one place are one too many.
    model = onnx.load_from_string(prune(source).data)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.ndim == 4 and values.shape[1] >= 4:
            values[-1, 5, -1, -1] = values[-1, 7, -1, -1] = values[-1, 4, -1, -1] = 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            break
    assert len(find_dense_layers(dataclasses.replace(source, data=model.SerializeToString()))[0]) == 1


def test_sparse_is_said_to_have_no_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = read_source(make_typed(tmp_path, "fp16"))
    last, count = weighted_nodes(source.graph)[-1].name, len(weighted_nodes(source.graph)) - 1
    for given, said in (
        (source, f"--sparse has no effect: the weights of none of the {count} layers are 2:4 sparse"),
        (prune(source, keep=last), f"--sparse: 1 of {count} layers have no 2:4 sparse weights: {last}"),
        (prune(source), ""),
    ):
        caplog.clear()
        library = Library("tensorrt", FakeTrt("10.9.0.34", source.graph, source.spec), "10.9.0.34")
        compile_plan(make_request(library, given, BuildConfig(sparse=True), gpu=A10))
        assert said in caplog.text and bool(said) == ("--sparse" in caplog.text)

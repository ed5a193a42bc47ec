"""Tracing, simplification, names, the contract and the writer, on graphs of every option."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from repvgg_deploy.errors import ContractError, ExportError, InputError
from repvgg_deploy.export.contract import check_contract, describe_graph
from repvgg_deploy.export.graph import rename, simplify, stamp, to_onnx
from repvgg_deploy.export.graph import trace as trace_module
from repvgg_deploy.export.options import GraphOptions, model_spec
from repvgg_deploy.export.writer import write_model
from repvgg_deploy.files import onnx as onnx_file
from repvgg_deploy.images.decode import default_preprocessing
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import ModelSpec, VariantSpec
from repvgg_deploy.specs.variants import PUBLISHED
from tests.model.generated import random_model
from tests.model.random_blocks import small_variant

SIZE = (64, 96)
OPTIONS = [
    {},
    {"batch": 3},
    {"opset": 20, "dynamic_size": True},
    {"opset": 18, "input": "uint8"},
    {"opset": 19, "output": "probabilities"},
    {"output": "top5", "input": "uint8", "batch": 2},
    {"features": True},
    {"features": True, "dynamic_size": True, "opset": 20},
]


def trace(network: RepVGG, options: GraphOptions) -> tuple[onnx.ModelProto, ModelSpec, dict[str, torch.Tensor]]:
    spec = model_spec(network.spec, options, default_preprocessing(*SIZE, in_graph=options.input == "uint8"), None)
    model, tensors = to_onnx(network, options, spec)
    model = simplify(model)
    names = rename(model)
    return model, spec, {new: tensors[old] for old, new in names.items()}


def write(path: Path, network: RepVGG, options: GraphOptions) -> ModelSpec:
    model, spec, tensors = trace(network, options)
    check_contract(model, network.spec, options, spec)
    write_model(path, model, {name: tensor.numpy() for name, tensor in tensors.items()})
    return spec


def options_of(fields: dict[str, Any]) -> GraphOptions:
    return GraphOptions(image_size=SIZE, **fields)


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize("se", ["none", "before_relu", "after_relu"])
def test_export_every_option_meets_the_contract_and_runs(tmp_path: Path, fields: dict[str, Any], se: Any) -> None:
    options = options_of(fields)
    network = random_model(small_variant(se=se), "deploy")
    spec = write(tmp_path / "m.onnx", network, options)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input"]
    count, (height, width) = options.batch or 2, (50, 70) if options.dynamic_size else SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    preprocessing = default_preprocessing(*SIZE)
    normalised = ((pixels - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)).transpose(0, 3, 1, 2)
    feed = pixels if options.input == "uint8" else np.ascontiguousarray(normalised, np.float32)
    results = dict(zip([o.name for o in spec.outputs], session.run(None, {"input": feed}), strict=True))
    x = torch.from_numpy(np.ascontiguousarray(normalised, np.float32))
    with torch.no_grad():
        expected = expected_outputs(network, options, x)
    for output in spec.outputs:
        result = results[output.name]
        assert result.dtype == output.dtype
        sizes = [
            size if isinstance(size, int) else found for size, found in zip(output.shape, result.shape, strict=True)
        ]
        assert list(result.shape) == sizes
        # float32 rounding of nine layers, in units of the largest value
        np.testing.assert_allclose(
            result, expected[output.name], atol=1e-5 * np.abs(expected[output.name]).max(), rtol=1e-5
        )


def expected_outputs(network: RepVGG, options: GraphOptions, x: torch.Tensor) -> dict[str, Any]:
    stages = network.stage_outputs(x)
    if options.features:
        return {name: tensor.numpy() for name, tensor in stages.items()}
    logits = network.classify(stages["stage4"])
    probabilities = torch.softmax(logits, 1)
    scores, classes = probabilities.topk(5, 1)
    return {
        "logits": logits.numpy(),
        "probabilities": probabilities.numpy(),
        "scores": scores.numpy(),
        "classes": classes.numpy(),
    }


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_export_published_variant_structure_meets_the_contract(name: str) -> None:
    """The real depths, groups and SE positions of each published variant, at a sixteenth of the width."""
    spec = PUBLISHED[name]
    divisor = 16 if spec.se == "none" else 4
    widths = tuple(
        max(spec.se_reduction if spec.se != "none" else 4, width // divisor // 4 * 4) for width in spec.widths
    )
    narrow = dataclasses.replace(spec, widths=widths, num_classes=7)  # type: ignore[arg-type]
    network = RepVGG(narrow, "deploy").eval()
    options = options_of({})
    model, model_spec_, _ = trace(network, options)
    check_contract(model, narrow, options, model_spec_)
    ops = [node.op_type for node in model.graph.node]
    convolutions = 1 + sum(spec.depths)
    assert ops.count("Conv") == convolutions * (1 if spec.se == "none" else 3)
    assert set(ops) <= {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Sigmoid", "Mul"}
    assert set(ops) == {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"} or spec.se != "none"


def test_export_names_are_short_and_speak_of_blocks() -> None:
    model, _, tensors = trace(random_model(small_variant(), "deploy"), options_of({}))
    assert [node.name for node in model.graph.node][:4] == ["stage0.conv", "stage0", "stage1.0.conv", "stage1.0"]
    assert model.graph.node[0].input[1:] == ["stage0.weight", "stage0.bias"]
    assert {"stage0.weight", "stage4.0.bias", "linear.weight", "linear.bias"} <= set(tensors)
    assert not any("rbr" in name for name in tensors)


def test_export_same_network_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    network = random_model(small_variant(se="before_relu"), "deploy")
    for name in ("a.onnx", "b.onnx"):
        write(tmp_path / name, network, options_of({"output": "top5"}))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("fields", [{}, {"output": "top5", "input": "uint8"}], ids=str)
def test_write_model_is_what_protobuf_would_write(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Loading and saving elsewhere must not change a byte, or the certificate would be lost."""
    write(tmp_path / "m.onnx", random_model(small_variant(), "deploy"), options_of(fields))
    model = onnx.load(tmp_path / "m.onnx")
    assert model.SerializeToString(deterministic=True) == (tmp_path / "m.onnx").read_bytes()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert weights["stage0.weight"].shape == (8, 3, 3, 3)
    assert onnx_file.read_graph(tmp_path / "m.onnx").initializers == {
        name: array.shape for name, array in weights.items()
    }


def test_write_model_above_two_gigabytes_is_refused(tmp_path: Path) -> None:
    model, _, _ = trace(random_model(small_variant(), "deploy"), options_of({}))
    huge = np.broadcast_to(np.float32(0), (600_000_000,))  # no memory behind it
    with pytest.raises(ExportError, match=r"2\.1 GB"):
        write_model(tmp_path / "m.onnx", model, {"huge": huge})
    assert not (tmp_path / "m.onnx").exists()


def graph_and_spec(**changes: Any) -> tuple[onnx.ModelProto, VariantSpec, GraphOptions, ModelSpec]:
    variant, options = small_variant(**changes), options_of({})
    model, spec, _ = trace(random_model(variant, "deploy"), options)
    return model, variant, options, spec


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def set_ints(node: onnx.NodeProto, name: str, values: list[int]) -> None:
    attribute = next(a for a in node.attribute if a.name == name)
    del attribute.ints[:]
    attribute.ints.extend(values)


def _stride(model: onnx.ModelProto) -> None:
    set_ints(node_of(model, "stage2.1.conv"), "strides", [2, 2])


def _pads(model: onnx.ModelProto) -> None:
    set_ints(node_of(model, "stage2.1.conv"), "pads", [1, 1, 0, 0])


def _group(model: onnx.ModelProto) -> None:
    next(a for a in node_of(model, "stage2.0.conv").attribute if a.name == "group").i = 1


def _identity(model: onnx.ModelProto) -> None:
    model.graph.node.insert(2, onnx.helper.make_node("Identity", ["stage0"], ["copy"], name="copy"))
    node_of(model, "stage1.0.conv").input[0] = "copy"


def _wiring(model: onnx.ModelProto) -> None:
    node_of(model, "stage2.1.conv").input[0] = "stage1.0"


def _missing_relu(model: onnx.ModelProto) -> None:
    node_of(model, "stage2.1.conv").input[0] = "stage2.0.conv"
    model.graph.node.remove(node_of(model, "stage2.0"))


def _output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    node_of(model, "linear").output[0] = "scores"


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def _domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 65


def _bias(model: onnx.ModelProto) -> None:
    del node_of(model, "stage3.0.conv").input[2]


def _gemm(model: onnx.ModelProto) -> None:
    next(a for a in node_of(model, "linear").attribute if a.name == "alpha").f = 2.0


MUTATIONS = [_stride, _pads, _group, _identity, _wiring, _missing_relu, _output, _opset, _domain, _shape, _bias, _gemm]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__.strip("_"))
def test_contract_changed_graph_fails_with_the_difference(mutate: Any) -> None:
    model, variant, options, spec = graph_and_spec()
    check_contract(model, variant, options, spec)
    before = describe_graph(model, "input")
    mutate(model)
    with pytest.raises(ContractError) as caught:
        check_contract(model, variant, options, spec)
    changed = [line for line in describe_graph(model, "input") if line not in before]
    assert all(f"+{line}" in caught.value.message for line in changed[:3])
    assert "\n    -" in caught.value.message


def test_contract_dropped_se_fails() -> None:
    model, _, options, spec = graph_and_spec()
    with pytest.raises(ContractError, match="GlobalAveragePool"):
        check_contract(model, small_variant(se="before_relu"), options, spec)


def test_contract_unreparameterized_block_fails() -> None:
    variant = small_variant()
    network = random_model(variant, "deploy")
    network.get_submodule("stage3")[1] = random_model(variant, "training").blocks()["stage3.1"]  # type: ignore[index]
    options = options_of({})
    spec = model_spec(variant, options, default_preprocessing(*SIZE), None)
    model = trace_module(network, torch.zeros(1, 3, *SIZE), opset=17, tensors=(spec.input, *spec.outputs))
    model = simplify(model)
    stamp(model, 17, (spec.input, *spec.outputs))
    with pytest.raises(ContractError, match="Add"):
        check_contract(model, variant, options, spec)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"opset": 16}, "opset"),
        ({"opset": 21}, "opset"),
        ({"batch": 0}, "batch"),
        ({"features": True, "output": "top5"}, "features"),
    ],
)
def test_graph_options_that_cannot_hold_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        GraphOptions(**fields)


def test_graph_options_image_size_must_be_positive() -> None:
    with pytest.raises(InputError, match="image size"):
        GraphOptions(image_size=(0, 224))


def test_write_model_leaves_no_metadata_of_onnxsim(tmp_path: Path) -> None:
    """onnxsim leaves entries of its own, which a reader would not find among what was hashed."""
    write(tmp_path / "m.onnx", random_model(small_variant(), "deploy"), options_of({}))
    assert list(onnx.load(tmp_path / "m.onnx").metadata_props) == []

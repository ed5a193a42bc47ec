"""The graph contract: what an exported RepVGG may consist of, node by node, and nothing else.

Both the graph that is expected of a variant and the graph that is there are written as text, one line a node; where
they differ, the difference is the error message. An un-reparameterized block, a missing SE, a shape computation or a
leftover Identity each show as a line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import helper, numpy_helper

from ..errors import ContractError
from ..specs.values import LayerSpec, ModelSpec, TensorSpec, VariantSpec
from .options import IR_VERSIONS, TOP_K, GraphOptions

_FORBIDDEN_IN_MODULES = {
    "BatchNormalization": "give the BatchNorm running statistics (track_running_stats=True), for it normalises by the "
    "batch",
    "Dropout": "make the dropout depend on self.training, for it works in eval(), too",
    **dict.fromkeys(("If", "Loop", "Scan"), "leave torch.jit.script out: what is traced has no control flow"),
}


def check_contract(model: onnx.ModelProto, variant: VariantSpec, options: GraphOptions, spec: ModelSpec) -> None:
    """Fails when the graph is anything but the plain chain of `variant`.

    Args:
        model: The simplified graph; its weights are graph inputs or initializers.
        variant: What it must compute.
        options: What was asked for.
        spec: Its inputs and outputs.

    Raises:
        ContractError: With the difference, `-` expected, `+` found.
    """
    expected = [_header(options.opset), _signature("input", spec.input), *_expected_nodes(variant, options, spec)]
    found = describe_graph(model, spec.input.name)
    if expected != found:
        difference = list(difflib.unified_diff(expected, found, "expected", "found", n=1, lineterm=""))[2:]
        shown = "\n".join(f"    {line}" for line in difference[:40])
        if len(difference) > 40:
            shown += f"\n    … {len(difference) - 40} more lines"
        raise ContractError(
            f"the graph of {variant.name} is not the plain chain that was expected (- expected, + found):\n{shown}",
            remedy="export with the tested versions of constraints.txt; if they are installed, report the model",
        )


def check_module_contract(model: onnx.ModelProto) -> None:
    """Fails when a graph of a user's own module holds what no deployed network may: training mode, or control flow.

    A BatchNorm that no convolution could take up, such as one behind a ReLU, is as it should be.

    Raises:
        ContractError: It names the nodes.
    """
    found = [
        node
        for node in model.graph.node
        if node.op_type in _FORBIDDEN_IN_MODULES
        and (node.op_type != "BatchNormalization" or any(a.name == "training_mode" and a.i for a in node.attribute))
    ]
    if found:
        names = ", ".join(f"{node.op_type} {node.name}" for node in found[:5])
        raise ContractError(
            f"{len(found)} nodes are left that a deploy form should not have: {names}",
            remedy=_FORBIDDEN_IN_MODULES[found[0].op_type],
        )


def describe_graph(model: onnx.ModelProto, input_name: str) -> list[str]:
    """The graph as text: header, input, one line a node (numbered, with the numbers of what it reads), outputs."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in graph.input
        if value.name != input_name
    }
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    extra = [entry.domain for entry in model.opset_import if entry.domain not in ("", "ai.onnx")]
    lines = [_header(opset, model.ir_version) + "".join(f", domain {domain}" for domain in extra)]
    lines += [_signature("input", _tensor_spec(value)) for value in graph.input if value.name == input_name]
    source = {input_name: "input"}
    for index, node in enumerate(graph.node):
        operands = [source[name] for name in node.input if name in source]
        lines.append(_line(index, node.op_type, operands, _detail(node, shapes, constants)))
        source |= {
            name: f"%{index}" if position == 0 else f"%{index}.{position}" for position, name in enumerate(node.output)
        }
    return lines + [
        _signature("output", _tensor_spec(value), source.get(value.name, "nothing")) for value in graph.output
    ]


def _header(opset: int, ir_version: int | None = None) -> str:
    return f"opset {opset}, IR version {IR_VERSIONS[opset] if ir_version is None else ir_version}"


def _line(index: int, op_type: str, operands: list[str], detail: str) -> str:
    return f"%{index} = {op_type}({', '.join(operands)}) {detail}".rstrip()


def _signature(what: str, tensor: TensorSpec, source: str | None = None) -> str:
    origin = "" if source is None else f" = {source}"
    return f"{what} {tensor.name}: {tensor.dtype} ({', '.join(map(str, tensor.shape))}){origin}"


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorSpec(value.name, dtype, shape, "other")


def _detail(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], constants: dict[str, onnx.TensorProto]) -> str:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    weights = [shapes[name] for name in node.input if name in shapes and name not in constants]
    if node.op_type == "Conv":
        text = [_conv_text(weights, attributes)] if weights else []
    else:
        defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        text = ["×".join(map(str, shape)) for shape in weights]
        text += [f"{name}={_value(value)}" for name, value in sorted(attributes.items()) if defaults.get(name) != value]
    text += [f"k={numpy_helper.to_array(constants[name]).tolist()}" for name in node.input if name in constants]
    return " ".join(text)


def _value(value: Any) -> str:
    repeated = isinstance(value, (list, tuple)) or type(value).__name__.startswith("Repeated")
    return str(list(value)) if repeated else str(value)


def _conv_text(weights: list[tuple[int, ...]], attributes: dict[str, object]) -> str:
    shape = weights[0]
    shown = {name: _value(attributes.get(name)) for name in ("strides", "pads", "dilations", "group")}
    auto = f" auto_pad={attributes['auto_pad']}" if "auto_pad" in attributes else ""
    bias = "bias" if len(weights) > 1 and weights[1] == shape[:1] else "no bias"
    return f"{'×'.join(map(str, shape))} {bias} " + " ".join(f"{name}={value}" for name, value in shown.items()) + auto


class _Writer:
    """Collects the expected lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, op_type: str, operands: list[str], detail: str = "") -> str:
        self.lines.append(_line(len(self.lines), op_type, operands, detail))
        return f"%{len(self.lines) - 1}"

    def conv(self, source: str, shape: tuple[int, int, int, int], *, stride: int = 1, groups: int = 1) -> str:
        pad = 1 if shape[2] == 3 else 0
        detail = f"{'×'.join(map(str, shape))} bias strides=[{stride}, {stride}] pads=[{pad}, {pad}, {pad}, {pad}]"
        return self.add("Conv", [source], f"{detail} dilations=[1, 1] group={groups}")


def _expected_nodes(variant: VariantSpec, options: GraphOptions, spec: ModelSpec) -> Iterator[str]:
    writer = _Writer()
    x = "input"
    if options.input == "uint8":
        x = writer.add("Cast", [x], f"to={onnx.TensorProto.FLOAT}")
        x = writer.add("Transpose", [x], "perm=[0, 3, 1, 2]")
        x = writer.add("Sub", [x], "1×3×1×1")
        x = writer.add("Div", [x], "1×3×1×1")
    stages: dict[int, str] = {}
    for layer in variant.layers():
        x = stages[layer.stage] = _expect_block(writer, x, layer, variant)
    if options.features:
        sources = [stages[stage] for stage in (1, 2, 3, 4)]
    else:
        sources = _expect_head(writer, x, variant, options)
    yield from writer.lines
    yield from (_signature("output", tensor, source) for tensor, source in zip(spec.outputs, sources, strict=True))


def _expect_block(writer: _Writer, x: str, layer: LayerSpec, variant: VariantSpec) -> str:
    shape = (layer.out_channels, layer.in_channels // layer.groups, 3, 3)
    x = writer.conv(x, shape, stride=layer.stride, groups=layer.groups)
    if variant.se == "before_relu":
        x = _expect_se(writer, x, layer.out_channels, variant)
    x = writer.add("Relu", [x])
    return _expect_se(writer, x, layer.out_channels, variant) if variant.se == "after_relu" else x


def _expect_se(writer: _Writer, x: str, channels: int, variant: VariantSpec) -> str:
    hidden = channels // variant.se_reduction
    gate = writer.add("GlobalAveragePool", [x])
    gate = writer.conv(gate, (hidden, channels, 1, 1))
    gate = writer.add("Relu", [gate])
    gate = writer.conv(gate, (channels, hidden, 1, 1))
    gate = writer.add("Sigmoid", [gate])
    return writer.add("Mul", [x, gate])


def _expect_head(writer: _Writer, x: str, variant: VariantSpec, options: GraphOptions) -> list[str]:
    x = writer.add("GlobalAveragePool", [x])
    x = writer.add("Flatten", [x], "axis=1")
    x = writer.add("Gemm", [x], f"{variant.num_classes}×{variant.widths[4]} {variant.num_classes} transB=1")
    if options.output != "logits":
        x = writer.add("Softmax", [x], "axis=1")
    if options.output == "top5":
        x = writer.add("TopK", [x], f"axis=1 largest=1 sorted=1 k=[{min(TOP_K, variant.num_classes)}]")
        return [x, f"{x}.1"]
    return [x]

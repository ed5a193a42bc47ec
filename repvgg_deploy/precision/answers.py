"""What a graph's outputs are made of: its classifier, the answers behind its last layers, what is compared in them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import onnx
from onnx import TensorProto, helper, shape_inference

from ..errors import CalibrationError
from ..graph.edit import GraphView

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "QuantizeLinear", "DequantizeLinear")
MOVES = ("Concat", "Split", "Slice", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Resize")
ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Clip")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_CHOICES = (
    "TopK",
    "ArgMax",
    "ArgMin",
    "NonMaxSuppression",
    "NonZero",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def find_types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of each tensor (TensorProto.DataType) as its operator gives it, by name, whatever the graph declares."""
    stored = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
    names = {value.name for value in stored}
    given = [*stored, *(value for value in model.graph.input if value.name not in names)]
    made = [onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output if name]
    graph = helper.make_graph(list(model.graph.node), "types", given, made)
    light = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    found = shape_inference.infer_shapes(light).graph
    return {value.name: int(value.type.tensor_type.elem_type) for value in (*found.input, *found.output)}


def find_answers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes behind the last layers that compute with more than moves, activations and gates, and all behind them.

    They make answers of what the layers give, such as boxes or probabilities. A fixed layer among them (`find_means`)
    is one of them.
    """
    constants, types = {tensor.name for tensor in model.graph.initializer}, find_types(model)
    layers = {node.output[0] for node in model.graph.node if is_layer(node, constants)} - find_means(model)
    leading: set[str] = set()
    for node in reversed(model.graph.node):
        if node.output[0] in layers or leading.intersection(node.output):
            leading.update(node.input)
    found: list[onnx.NodeProto] = []
    behind, answered = set[str](), set[str]()  # floats that layers give, and that answers give
    for node in model.graph.node:
        if node.output[0] not in layers:
            if not behind.intersection(node.input):
                continue
            joins = node.op_type in ("Mul", "Add") and behind.issuperset(node.input)
            is_plain = joins or node.op_type in (*MOVES, *ACTIVATIONS, *POOLS)
            if not leading.intersection(node.output) and (not is_plain or answered.intersection(node.input)):
                found.append(node)
                answered.update(node.output)
        behind.update(name for name in node.output if types.get(name, 0) in _FLOATS)
    return found


def is_layer(node: onnx.NodeProto, constants: AbstractSet[str]) -> bool:
    """Whether a node is of a layer: it has weights, stored or behind DequantizeLinear, or is a pair."""
    return node.op_type in _LAYERS or (node.op_type == "MatMul" and not constants.isdisjoint(node.input))


def find_means(model: onnx.ModelProto) -> set[str]:
    """Outputs of the fixed layers of detectors' decoding: the mean of a distribution that a Softmax gives.

    One number of each distribution: a product with a stored vector, or a convolution to one channel. Its result is a
    side of a box in strides, and its weights, 0 to 15 say, are nothing that was trained.
    Source: Li et al. 2020, Generalized Focal Loss, arXiv:2006.04388, which names each side of a box by a distribution.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    return {node.output[0] for node in model.graph.node if _takes_mean(node, made_by, shapes)}


def _takes_mean(
    node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in shapes:
        return False
    shape = shapes[node.input[1]]
    turned = node.op_type == "Gemm" and any(entry.name == "transB" and entry.i for entry in node.attribute)
    outputs = shape[0] if node.op_type == "Conv" or turned else shape[1] if len(shape) > 1 else 1
    maker = made_by.get(node.input[0])
    while maker is not None and maker.op_type in ("Transpose", "Reshape", "Unsqueeze", "Squeeze"):
        maker = made_by.get(maker.input[0])
    return outputs == 1 and maker is not None and maker.op_type == "Softmax"


def makes_all(view: GraphView, tensor: str) -> bool:
    """Whether every output of a graph is made of a tensor."""
    behind = {tensor}
    for node in view.nodes:
        if behind.intersection(node.input):
            behind.update(node.output)
    return behind.issuperset(value.name for value in view.model.graph.output)


def judged_tensors(view: GraphView) -> tuple[str, ...]:
    """The float tensors in which a graph's answers are compared, in the order of its outputs.

    Of what hangs on a choice (TopK, ArgMax, NonMaxSuppression), that which is chosen from: two almost equal scores may
    change places. Of several answers in one tensor (boxes beside scores), each apart.

    Raises:
        CalibrationError: There are none.
    """
    types = find_types(view.model)
    chosen: dict[str, list[str]] = {}
    for node in view.nodes:
        behind = [name for read in node.input for name in chosen.get(read, ())]
        if node.op_type in _CHOICES:
            behind += [name for name in node.input if types.get(name) == TensorProto.FLOAT and name in view.made_by]
        if behind:
            chosen |= {name: list(dict.fromkeys(behind)) for name in node.output}
    found: dict[str, None] = {}
    queue = [name for value in view.model.graph.output for name in chosen.get(value.name, [value.name])]
    while queue:
        name = queue.pop(0)
        maker = view.made_by.get(name)
        parts: list[str] = []
        if maker is not None and maker.op_type in MOVES:
            count = len(maker.input) if maker.op_type == "Concat" else 1
            parts = [part for part in maker.input[:count] if part in view.made_by and view.raw_constant(part) is None]
        if parts and all(types.get(part) == TensorProto.FLOAT for part in parts):
            queue = parts + queue
        elif types.get(name) == TensorProto.FLOAT:
            found[name] = None
    if not found:
        raise CalibrationError(
            "no output of the graph is made of floating-point values: there is nothing to compare",
            remedy="export the model with an output before its post-processing",
        )
    return tuple(found)

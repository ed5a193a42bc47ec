"""A typed INT8 graph as TensorRT wants it → the same function in a form that a CPU computes fast.

`prepare` gives a backend the rewritten graph, or the file as it stands. Every quantized activation keeps scale and
integers.

TensorRT wants signed activations, zero point 0. ONNX Runtime makes one integer operation of a convolution, its ReLU and
its Q/DQ pairs only where activations are unsigned: with signed ones it computes in FP32 and is slower than the FP32
model. OpenVINO is faster with unsigned ones, too, but with AMX, where they gain nothing and the clips below cost 15 %.

- What cannot be negative (behind a ReLU) gets zero point 0. An int8 stops at 127 and a uint8 at 255, and good
  calibration clips. So for ONNX Runtime the uint8 is clipped to 127 between the pair, as an integer, where it does not
  stand in the way of the fusion; for OpenVINO, which fuses either, the ReLU becomes a clip to what 127 stands for.
- All else (the image) gets zero point 128 in ONNX Runtime: the same integers, moved. In OpenVINO, where there is a
  Concat: of signed integers it computes one wrongly.
- FP16 between the pairs becomes FP32, which is what a CPU computes in anyhow: it saves the casts, and the faults of old
  versions, which truncate where they should round to FP16's scales
  (https://github.com/microsoft/onnxruntime/pull/32452). The image is still rounded to FP16 first.
- For ONNX Runtime, biases of fused convolutions become INT32 at the scale of the products, as the integer operation
  needs them (half a step of the products at most), and weights of layers whose output nothing quantizes are stored as
  FP32, in place of being dequantized at each run.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import ModelError
from ...files import wire
from ...files.onnx import graph_precision, read_graph, weighted_nodes
from .graph import FLOAT, FLOAT16, Graph, GraphError, Node, makers, parse, readers
from .processor import explain_inexact_products, multiplies_int8_in_tiles

logger = logging.getLogger(__name__)
_KEEPS_SIGN = frozenset(
    {"AveragePool", "Cast", "Flatten", "GlobalAveragePool", "Identity", "MaxPool", "ReduceMean", "Reshape", "Transpose"}
)
_NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})
_TYPED = frozenset({"EyeLike", "If", "Loop", "RandomNormal", "RandomUniform", "Scan"})
"""Operators that may say inside themselves that they give FP16."""
_OWN = "repvgg_deploy.cpu."
_DEAD_BIAS = 2.0**20
_LARGEST_BIAS = 2.0**30  # the products of 2,560 channels stay below 2**29


def prepare(path: Path, target: Literal["onnxruntime", "openvino"]) -> bytes | str:
    """The rewritten graph, or the path where it must be run as it stands (as FP8 is); which and why is logged.

    Args:
        path: An ONNX with Q/DQ pairs.
        target: What is to run it.

    Raises:
        ModelError: The file cannot be read.
    """
    if graph_precision(weighted_nodes(read_graph(path))) == "fp8":
        logger.info("%s: FP8 is run as it stands: a CPU computes it in FP32", path)
        return str(path)
    inexact = explain_inexact_products()
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # A Concat of signed integers OpenVINO computes wrongly.
        signed = target == "openvino" and multiplies_int8_in_tiles() and mapped.find(b"Concat") < 0
        graph = rewrite(memoryview(mapped), Options(target, unsigned=inexact is None and not signed))
    except GraphError as error:
        if target == "openvino" and mapped.find(b"Concat") >= 0:
            raise _refuse_concat(path, str(error)) from error
        logger.warning("%s: run as it stands, which is slow on a CPU: %s", path, error)
        return str(path)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read"
        ) from error
    if target == "openvino" and inexact is not None and b"Concat" in graph:
        raise _refuse_concat(path, inexact)
    kind = "unsigned for speed" if inexact is None else f"signed, and slow: {inexact}"
    if signed:
        kind = "signed: this CPU has AMX"
    logger.info("%s: activations are %s", path, kind)
    return graph


def _refuse_concat(path: Path, why: str) -> ModelError:
    """OpenVINO 2026.4 computes Concat and what follows wrongly where signed INT8 meets in it, by 10 dB and more."""
    return ModelError(
        f"{path}: OpenVINO computes a Concat of INT8 wrongly unless its activations are unsigned, and here they stay "
        f"signed: {why}",
        remedy="leave backend out, to run on ONNX Runtime",
    )


@dataclass(frozen=True, slots=True)
class Options:
    """Which steps are taken.

    Attributes:
        target: What is to run the graph.
        unsigned: Whether activations become unsigned, and convolutions integer operations.
        integer_biases: Whether their biases become INT32. Without, the graph computes the very same integers, and ONNX
            Runtime fuses nothing.
    """

    target: Literal["onnxruntime", "openvino"] = "onnxruntime"
    unsigned: bool = True
    integer_biases: bool = True


def rewrite(buffer: memoryview, options: Options = Options()) -> bytes:
    """The bytes of the rewritten ONNX, without metadata, from those of an ONNX with Q/DQ pairs.

    Raises:
        GraphError: The graph holds what these steps do not know; it can still be run as it stands.
    """
    graph = parse(buffer)
    if any(name.startswith(_OWN) for name in graph.stored()):
        raise GraphError("it has been rewritten already")
    _widen(graph)
    if options.target == "openvino":
        if options.unsigned:
            _clip_relus(graph)
            if any(node.op_type == "Concat" for node in graph.nodes):
                _move_to_middle(graph)
        return graph.serialize()
    if options.unsigned:
        _make_unsigned(graph)
        if options.integer_biases:
            _make_biases_integer(graph)
    _store_floating_weights(graph, fused=options.unsigned)
    return graph.serialize()


def _widen(graph: Graph) -> None:
    """FP16 → FP32 within the graph. Inputs and outputs keep their types, and what is cast to FP16 is still rounded."""
    if FLOAT16 not in graph.kinds.values() and not any(map(_casts_to_half, graph.nodes)):
        return
    unknown = {node.op_type for node in graph.nodes if node.op_type in _TYPED or node.domain or _holds_half(node)}
    if unknown:
        raise GraphError(f"it computes in FP16, with {', '.join(sorted(unknown))}")
    for name in graph.stored():
        if graph.kinds[name] == FLOAT16:
            graph.store(name, graph.read(name).astype(np.float32))
    renamed = {name: f"{name}.wide" for name in (*graph.inputs, *graph.outputs) if graph.kinds[name] == FLOAT16}
    nodes = [_cast(name, renamed[name], FLOAT) for name in graph.inputs if name in renamed]
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        node.outputs = [renamed.get(name, name) for name in node.outputs]
        nodes.append(node)
        if _casts_to_half(node):
            wide, node.outputs = node.outputs[0], [f"{node.outputs[0]}.half"]
            nodes.append(_cast(node.outputs[0], wide, FLOAT))
    graph.nodes = nodes + [_cast(renamed[name], name, FLOAT16) for name in graph.outputs if name in renamed]


def _holds_half(node: Node) -> bool:
    """Whether an attribute is an FP16 tensor, as of a Constant."""
    for attribute in wire.walk(node.rest):
        for item in wire.walk(node.rest, attribute.payload, attribute.end) if attribute.number == 5 else ():
            tensor = wire.walk(node.rest, item.payload, item.end) if item.number == 5 else ()
            if any(field.number == 2 and field.value == FLOAT16 for field in tensor):
                return True
    return False


def _casts_to_half(node: Node) -> bool:
    return node.op_type == "Cast" and node.attribute("to") == FLOAT16


def _cast(source: str, target: str, kind: int) -> Node:
    return Node("Cast", [source], [target], _integer_attribute("to", kind))


def _integer_attribute(name: str, value: int) -> bytes:
    number = wire.varint(3 << 3) + wire.varint(value) + wire.varint(20 << 3) + wire.varint(2)
    return wire.bytes_field(5, wire.bytes_field(1, name.encode()) + number)


def _make_unsigned(graph: Graph) -> None:
    reading, making = readers(graph.nodes), makers(graph.nodes)
    zero, middle = (graph.store(f"{_OWN}{value}", np.array(value, np.uint8)) for value in (0, 128))
    last = graph.store(f"{_OWN}127", np.array(127, np.uint8))
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if not _quantizes_signed(graph, node, reading):
            continue
        pairs = reading[node.outputs[0]]
        sign = _is_never_negative(node.inputs[0], making)
        for one in (node, *pairs):
            one.inputs = [*one.inputs[:2], zero if sign else middle]
        if sign:
            clipped = f"{node.outputs[0]}.clipped"
            nodes.append(Node("Clip", [node.outputs[0], "", last], [clipped]))
            for pair in pairs:
                pair.inputs[0] = clipped
    graph.nodes = nodes


def _clip_relus(graph: Graph) -> None:
    reading, making = readers(graph.nodes), makers(graph.nodes)
    zero, lowest = graph.store(f"{_OWN}0", np.array(0, np.uint8)), graph.store(f"{_OWN}0.0", np.array(0, np.float32))
    for node in graph.nodes:
        if not _quantizes_signed(graph, node, reading):
            continue
        relu = making.get(node.inputs[0])
        if relu is None or relu.op_type != "Relu":
            continue
        if relu.outputs[0] in graph.outputs or len(reading[relu.outputs[0]]) > 1:
            continue
        for one in (node, *reading[node.outputs[0]]):
            one.inputs = [*one.inputs[:2], zero]
        largest = (127 * graph.read(node.inputs[1])).reshape(()).astype(np.float32)
        relu.op_type = "Clip"
        relu.inputs += [lowest, graph.store(f"{_OWN}{relu.outputs[0]}.largest", largest)]


def _move_to_middle(graph: Graph) -> None:
    """Zero point 128 for all that is still signed: OpenVINO 2026.4 computes a Concat of signed INT8 wrongly."""
    reading, middle = readers(graph.nodes), graph.store(f"{_OWN}128", np.array(128, np.uint8))
    for node in graph.nodes:
        if _quantizes_signed(graph, node, reading):
            for one in (node, *reading[node.outputs[0]]):
                one.inputs = [*one.inputs[:2], middle]


def _quantizes_signed(graph: Graph, node: Node, reading: dict[str, list[Node]]) -> bool:
    """Whether a node gives int8 with one scale and zero point 0, and only DequantizeLinears like it read it."""
    pairs = reading.get(node.outputs[0], [])
    if node.op_type != "QuantizeLinear" or node.outputs[0] in graph.outputs or not pairs:
        return False
    for one in (node, *pairs):
        if one is not node and one.op_type != "DequantizeLinear":
            return False
        if len(one.inputs) != 3 or not all(map(graph.holds, one.inputs[1:])):
            return False
        scale, zero = map(graph.read, one.inputs[1:])
        if zero.dtype != np.int8 or zero.size != 1 or scale.size != 1 or zero.any():
            return False
    return True


def _is_never_negative(name: str, making: dict[str, Node]) -> bool:
    node = making.get(name)
    if node is None:
        return False
    if node.op_type in _NEVER_NEGATIVE:
        return True
    if node.op_type == "Mul":
        return all(_is_never_negative(factor, making) for factor in node.inputs)
    return node.op_type in _KEEPS_SIGN and _is_never_negative(node.inputs[0], making)


def _make_biases_integer(graph: Graph) -> None:
    reading, making = readers(graph.nodes), makers(graph.nodes)
    nodes: list[Node] = []
    for node in graph.nodes:
        pairs = [making.get(name) for name in node.inputs[:2]]
        between_pairs = len(node.inputs) == 3 and all(pair and pair.op_type == "DequantizeLinear" for pair in pairs)
        if between_pairs and _is_fused(graph, node, reading):
            nodes += _make_bias_integer(graph, node, making)
        nodes.append(node)
    graph.nodes = nodes


def _is_fused(graph: Graph, node: Node, reading: dict[str, list[Node]]) -> bool:
    """Whether ONNX Runtime makes an integer operation of a layer: only a QuantizeLinear reads it, or its ReLU."""
    if node.op_type != "Conv" or node.outputs[0] in graph.outputs:
        return False
    following = reading.get(node.outputs[0], [])
    if len(following) == 1 and following[0].op_type == "Relu" and following[0].outputs[0] not in graph.outputs:
        following = reading.get(following[0].outputs[0], [])
    return len(following) == 1 and following[0].op_type == "QuantizeLinear"


def _make_bias_integer(graph: Graph, node: Node, making: dict[str, Node]) -> list[Node]:
    """The DequantizeLinear of a layer's bias, now INT32; none where it does not fit, and the layer stays in FP32."""
    source, weight = (making[name] for name in node.inputs[:2])
    if not all(map(graph.holds, (source.inputs[1], *weight.inputs[:2], node.inputs[2]))):
        return []
    bias = graph.read(node.inputs[2])
    weight_scale = np.broadcast_to(graph.read(weight.inputs[1]), bias.shape)
    dead = ~graph.read(weight.inputs[0]).reshape(len(bias), -1).any(axis=1)
    if dead.any():  # a channel without weights may have any scale: one that its bias fits
        enough = np.abs(bias) / (graph.read(source.inputs[1]) * _DEAD_BIAS)
        weight_scale = np.where(dead, np.maximum(weight_scale, enough), weight_scale).astype(np.float32)
    scale = (graph.read(source.inputs[1]) * weight_scale).astype(np.float32)
    integers = np.rint(bias.astype(np.float64) / scale)
    if not np.abs(integers).max(initial=0.0) < _LARGEST_BIAS:
        return []
    if dead.any():
        weight.inputs[1] = graph.store(f"{_OWN}{weight.outputs[0]}.scale", weight_scale)
    name = f"{_OWN}{node.outputs[0]}.bias"
    inputs = [graph.store(name, integers.astype(np.int32)), graph.store(f"{name}.scale", scale)]
    node.inputs[2] = f"{name}.dequantized"
    return [Node("DequantizeLinear", inputs, [node.inputs[2]], _integer_attribute("axis", 0))]


def _store_floating_weights(graph: Graph, *, fused: bool) -> None:
    reading, making = readers(graph.nodes), makers(graph.nodes)
    done: set[str] = set()
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 2 or len(reading[node.inputs[1]]) != 1:
            continue
        maker = making.get(node.inputs[1])
        if maker is None or maker.op_type != "DequantizeLinear" or not all(map(graph.holds, maker.inputs)):
            continue
        if fused and _is_fused(graph, node, reading):
            continue
        integers, scale = map(graph.read, maker.inputs[:2])
        zero = graph.read(maker.inputs[2]) if len(maker.inputs) > 2 else np.zeros(1, np.int8)
        if zero.any() or scale.dtype != np.float32 or (scale.size > 1 and maker.attribute("axis") != 0):
            continue
        scale = scale.reshape(-1, *[1] * (integers.ndim - 1))
        graph.store(node.inputs[1], np.multiply(integers, scale, dtype=np.float32))
        done.add(node.inputs[1])
    graph.nodes = [node for node in graph.nodes if node.outputs[0] not in done]

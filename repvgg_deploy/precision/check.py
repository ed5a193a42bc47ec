"""What TensorRT refuses of a Q/DQ graph, found before it is asked."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError

_REMEDY = (
    "quantize the FP32 file with repvgg-trt quantize --int8; in ONNX Runtime's own tool: ActivationSymmetric, WeightSymmetric, QuantizeBias=False"
)


def check_quantized(model: onnx.ModelProto) -> None:
    """Fails when a Q/DQ graph holds what TensorRT's parser refuses, or what keeps a convolution from INT8.

    Refused: integers other than INT8 (an INT32 bias), zero points other than 0, scales that are not positive and finite, a convolution or Gemm whose
    input or weight has no DequantizeLinear, and a pair between a convolution and its ReLU.

    Raises:
        CalibrationError: It names the node.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _check_constants(node, constants)
        if node.op_type == "QuantizeLinear" and _type_of(producers, node.input[0]) == "Conv" and _feeds_relu(model, node):
            raise _refusal(node, "stands between a convolution and its ReLU, which breaks their fusion")
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            _check_weight(node, constants)
        if node.op_type in ("Conv", "Gemm"):
            missing = [name for name in node.input[:2] if _type_of(producers, name) != "DequantizeLinear"]
            if missing:
                raise _refusal(node, f"reads {missing[0]} without a Q/DQ pair")
            if len(node.input) > 2 and node.input[2] not in constants:
                raise _refusal(node, "has a bias that is not a stored FP32 tensor")


def _check_constants(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    if len(node.input) != 3 or any(name not in constants for name in node.input[1:]):
        raise _refusal(node, "needs a stored scale and zero point")
    scale, zero_point = (constants[name] for name in node.input[1:])
    if zero_point.data_type != TensorProto.INT8:
        raise _refusal(node, f"is of {TensorProto.DataType.Name(zero_point.data_type)}, expected INT8")
    if np.any(numpy_helper.to_array(zero_point) != 0):
        raise _refusal(node, "has a zero point other than 0")
    values = numpy_helper.to_array(scale).astype(np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise _refusal(node, "has a scale that is not positive and finite")


def _check_weight(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    weight, scale = constants[node.input[0]], constants[node.input[1]]
    axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
    if list(scale.dims) != [weight.dims[0]] or axis != 0:
        raise _refusal(node, f"needs one scale per output channel on axis 0, found shape {list(scale.dims)} on axis {axis}")


def _type_of(producers: dict[str, onnx.NodeProto], tensor: str) -> str:
    return str(producers[tensor].op_type) if tensor in producers else ""


def _feeds_relu(model: onnx.ModelProto, quantize: onnx.NodeProto) -> bool:
    """Whether what the pair gives is read by a ReLU."""
    pair = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == quantize.output[0]]
    return any(node.op_type == "Relu" and node.input[0] == p.output[0] for p in pair for node in model.graph.node)


def _refusal(node: onnx.NodeProto, what: str) -> CalibrationError:
    return CalibrationError(f"TensorRT would refuse this INT8 graph or not run it in INT8: {node.op_type} {node.name!r} {what}", remedy=_REMEDY)

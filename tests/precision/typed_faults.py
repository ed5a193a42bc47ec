"""What can be wrong with a typed graph: how to make it so, what our own check says, and what NVIDIA's parser does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.precision.make_variant import read_array


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        change: Spoils a graph of `make_chain`'s plain kind, in place.
        message: Of our check.
        parser: Of TensorRT-RTX 1.7; None where it takes the graph: then `why` says why we do not.
        why: See `parser`.
    """

    change: Callable[[onnx.ModelProto], None]
    message: str
    parser: str | None
    why: str = ""


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(found for found in model.graph.node if found.name == name)


def put(model: onnx.ModelProto, name: str, value) -> None:
    """Replaces an initializer, or adds one."""
    tensor = (
        next((found for found in model.graph.initializer if found.name == name), None) or model.graph.initializer.add()
    )
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def _float_of(model: onnx.ModelProto) -> type:
    return read_array(model, "stage0.scale").dtype.type


def _bias_pair(model: onnx.ModelProto) -> None:
    put(model, "stage0.bias", np.ones(8, np.int32))
    put(model, "bias.scale", np.ones(8, _float_of(model)))
    put(model, "bias.zero", np.zeros(8, np.int32))
    pair = helper.make_node(
        "DequantizeLinear", ["stage0.bias", "bias.scale", "bias.zero"], ["bias"], name="bias.dequantize", axis=0
    )
    model.graph.node.insert(0, pair)
    node(model, "stage0.conv").input[2] = "bias"


def _pair_before_relu(model: onnx.ModelProto) -> None:
    constants = ["stage0.scale", "stage0.zero_point"]
    index = [found.name for found in model.graph.node].index("stage0")
    model.graph.node[index].input[0] = "between"
    model.graph.node.insert(index, helper.make_node("DequantizeLinear", ["q", *constants], ["between"], name="d"))
    model.graph.node.insert(
        index, helper.make_node("QuantizeLinear", ["stage0.conv", *constants], ["q"], name="between.quantize")
    )


def _per_tensor(model: onnx.ModelProto) -> None:
    put(model, "stage0.weight.scale", read_array(model, "stage0.weight.scale").max())
    put(model, "stage0.weight.zero_point", np.int8(0))


def _per_channel_activation(model: onnx.ModelProto) -> None:
    put(model, "stage0.scale", np.full(8, read_array(model, "stage0.scale")))
    put(model, "stage0.zero_point", np.zeros(8, np.int8))
    for name in ("stage0.quantize", "stage0.dequantize"):
        node(model, name).attribute.append(helper.make_attribute("axis", 1))


def _wrong_axis(model: onnx.ModelProto) -> None:
    inner = read_array(model, "stage1.weight").shape[1]
    put(model, "stage1.weight.scale", np.ones(inner, _float_of(model)))
    put(model, "stage1.weight.zero_point", np.zeros(inner, np.int8))
    node(model, "stage1.weight.dequantize").attribute[0].i = 1


def _uint8(model: onnx.ModelProto) -> None:
    for tensor in list(model.graph.initializer):
        if tensor.name.endswith("zero_point"):
            put(model, tensor.name, np.zeros(tensor.dims, np.uint8))
        if tensor.name.endswith(".weight"):
            put(model, tensor.name, (read_array(model, tensor.name).astype(int) + 128).astype(np.uint8))


def _int16(model: onnx.ModelProto) -> None:
    put(model, "stage0.zero_point", np.int16(0))


def _scale(value: float) -> Callable[[onnx.ModelProto], None]:
    return lambda model: put(model, "stage0.scale", np.array(value, _float_of(model)))


def _no_weight_pair(model: onnx.ModelProto) -> None:
    put(model, "plain", read_array(model, "stage1.weight").astype(_float_of(model)))
    node(model, "stage1.conv").input[1] = "plain"


def _no_activation_pair(model: onnx.ModelProto) -> None:
    node(model, "stage1.conv").input[0] = "stage0"


def _retype(name: str, dtype: type) -> Callable[[onnx.ModelProto], None]:
    return lambda model: put(model, name, read_array(model, name).astype(dtype))


def _opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _declare(kind: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.elem_type = kind

    return change


def _no_cast(model: onnx.ModelProto) -> None:
    cast = next(found for found in model.graph.node if found.op_type == "Cast")
    for found in model.graph.node:
        found.input[:] = ["input" if name == cast.output[0] else name for name in found.input]
    model.graph.node.remove(cast)


def _infinite_bias(model: onnx.ModelProto) -> None:
    bias = read_array(model, "stage1.bias").copy()
    bias[0] = np.inf
    put(model, "stage1.bias", bias)


_ZERO_POINT = "Non-zero zero point is not supported"
_POSITIVE = "Scale coefficients must all be positive"
_SAME_TYPE = "must be of same type"

BOTH_TARGETS = {
    "zero point": Fault(lambda m: put(m, "stage0.zero_point", np.int8(3)), "zero point other than 0", _ZERO_POINT),
    "zero point of a weight": Fault(
        lambda m: put(m, "stage1.weight.zero_point", np.ones(16, np.int8)), "zero point other than 0", _ZERO_POINT
    ),
    "INT32 bias": Fault(_bias_pair, "is of INT32", "input has type Int32"),
    "UINT8": Fault(_uint8, "is of UINT8", "UINT8"),
    "INT16": Fault(_int16, "is of INT16", "Failed to import initializer"),
    "scale 0": Fault(_scale(0.0), "not positive", _POSITIVE),
    "scale NaN": Fault(_scale(np.nan), "not positive", _POSITIVE),
    "scale infinite": Fault(_scale(np.inf), "not positive", None, "it does not look; everything would become 0 or NaN"),
    "per tensor": Fault(_per_tensor, "one scale per output channel", None, "allowed, and it costs accuracy"),
    "wrong axis": Fault(_wrong_axis, "on axis 1", None, "it parses; no integer convolution can use it"),
    "per channel activation": Fault(
        _per_channel_activation,
        "one scale for the whole activation",
        None,
        "it parses; no integer convolution can use it",
    ),
    "before ReLU": Fault(
        _pair_before_relu, "between a convolution and its ReLU", None, "allowed, and it breaks the fusion"
    ),
    "no weight pair": Fault(_no_weight_pair, "reads plain without", None, "allowed, and the convolution is not INT8"),
    "no activation pair": Fault(
        _no_activation_pair, "reads stage0 without", None, "allowed, and the convolution is not INT8"
    ),
}
TRT8 = {
    "FP16 scale": Fault(_retype("stage1.weight.scale", np.float16), "type FLOAT16, expected FLOAT", _SAME_TYPE),
    "FP16 bias": Fault(_retype("stage1.bias", np.float16), "both FP32 and FP16", _SAME_TYPE),
    "opset": Fault(_opset(19), "opset 19", None, "TensorRT 8 knows opset 17, RTX every one"),
}
TRT10 = {
    "FP32 scale": Fault(_retype("stage1.weight.scale", np.float32), "type FLOAT, expected FLOAT16", _SAME_TYPE),
    "FP32 activation scale": Fault(_retype("stage0.scale", np.float32), "type FLOAT, expected FLOAT16", _SAME_TYPE),
    "FP32 bias": Fault(_retype("stage1.bias", np.float32), "both FP32 and FP16", _SAME_TYPE),
    "subnormal scale": Fault(_scale(1e-6), "subnormal", None, "it keeps few digits"),
    "opset": Fault(_opset(17), "opset 17", None, "it ignores the operator set; ONNX and ONNX Runtime do not"),
    "output type": Fault(
        _declare(TensorProto.FLOAT16),
        "the graph declares FLOAT16",
        None,
        "it believes the graph rather than the declaration",
    ),
    "infinite bias": Fault(_infinite_bias, "infinity or NaN", None, "it does not look"),
}
HALF = {
    "FP32 weight": Fault(_retype("stage1.weight", np.float32), "both FP32 and FP16", _SAME_TYPE),
    "FP32 bias": Fault(_retype("stage1.bias", np.float32), "both FP32 and FP16", _SAME_TYPE),
    "no cast": Fault(_no_cast, "both FP32 and FP16", _SAME_TYPE),
    "output type": Fault(
        _declare(TensorProto.FLOAT16),
        "the graph declares FLOAT16",
        None,
        "it believes the graph rather than the declaration",
    ),
    "infinite bias": Fault(_infinite_bias, "infinity or NaN", None, "it does not look"),
}

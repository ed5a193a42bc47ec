"""What TensorRT refuses of a typed graph, or does not run as it is typed, found before it is asked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError
from ..graph.edit import opset_of
from .answers import find_types
from .grids import INT8, Grid
from .halves import FULL_INPUTS, SMALLEST_NORMAL
from .normalise import KINDS

Target: TypeAlias = Literal["trt8", "trt10"]
"""`trt8`: FP32 scales, opset 17 at most (TensorRT 8.5 and 8.6).
`trt10`: strongly typed, FP16 scales, opset 19 at least (TensorRT 10 and later, RTX)."""
_REMEDY = (
    "quantize the FP32 file with repvgg-trt quantize --int8; in ONNX Runtime's own tool: ActivationSymmetric, "
    "WeightSymmetric, QuantizeBias=False"
)
_HALF_REMEDY = "make the graph of the FP32 file with repvgg-trt quantize --fp16"
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_HIGHEST_TRT8, _LOWEST_TRT10 = 17, 19


def check_quantized(
    model: onnx.ModelProto, *, target: Target = "trt8", kept: Collection[str] = (), grid: Grid = INT8
) -> None:
    """Fails when a Q/DQ graph holds what TensorRT's parser refuses, or what keeps a convolution from INT8 (or FP8).

    Refused: other 8-bit numbers than those of `grid` (UINT8, an INT32 bias), zero points other than 0, scales that are
    not stored, positive and finite, of the target's type, or subnormal; activations with more than one scale, weights
    without one scale per output channel; a convolution or Gemm whose input or weight has no DequantizeLinear, but for
    those in `kept`, which must have none; a pair between a convolution and its ReLU; operands of different types; an
    opset that the target's scales do not have.

    Raises:
        CalibrationError: It names the node.
    """
    opset = opset_of(model)
    if target == "trt10" and opset < _LOWEST_TRT10:
        raise CalibrationError(
            f"opset {opset}: FP16 scales need at least {_LOWEST_TRT10}",
            remedy="make the graph with mixed.halve_quantized",
        )
    if target == "trt8" and opset > _HIGHEST_TRT8:
        raise CalibrationError(
            f"opset {opset}: TensorRT 8.5 and 8.6 know {_HIGHEST_TRT8} at most",
            remedy="export with --opset 17, or quantize for trt10",
        )
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in _PAIR:
            _check_constants(node, constants, TensorProto.FLOAT16 if target == "trt10" else TensorProto.FLOAT, grid)
            _check_granularity(model, node, constants, grid)
        behind_conv = node.op_type == "QuantizeLinear" and _type_of(producers, node.input[0]) == "Conv"
        if behind_conv and _feeds_relu(model, node):
            raise _refusal(node, "stands between a convolution and its ReLU, which breaks their fusion")
        if node.op_type in KINDS and (node.op_type != "MatMul" or _is_stored(node.input[1], producers, constants)):
            _check_layer(node, producers, constants, node.name in kept)
    check_types(model)


def check_halves(model: onnx.ModelProto, *, full: Collection[str] = ()) -> None:
    """Fails when a layer of a graph is not FP16, but for those in `full`.

    Refused: a layer in FP32, operands of different types, a stored infinity or NaN.

    Raises:
        CalibrationError: It names the node or tensor.
    """
    kinds = check_types(model)
    for node in model.graph.node:
        if node.op_type in _PAIR:
            raise CalibrationError(
                f"this is not a plain FP16 graph: it holds {node.op_type} {node.name!r}",
                remedy="check it with check_quantized",
            )
        if node.op_type in KINDS and node.name not in full and kinds[node.output[0]] != TensorProto.FLOAT16:
            raise CalibrationError(
                f"{node.op_type} {node.name!r} computes in {_name(kinds[node.output[0]])}, expected FLOAT16",
                remedy=_HALF_REMEDY,
            )


def check_types(model: onnx.ModelProto) -> dict[str, int]:
    """Follows the types through a graph as a strongly typed network does; an operator may not read two of them.

    Returns:
        Type of each tensor, by name (TensorProto.DataType).

    Raises:
        CalibrationError: Two floating-point types meet, an 8-bit image is read by anything but Cast, an output is not
            of the type that it declares, or a stored FP16 tensor holds infinity or NaN.
    """
    kinds = find_types(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise CalibrationError(f"{tensor.name} holds infinity or NaN in FP16", remedy=_HALF_REMEDY)
    for node in model.graph.node:
        fixed = FULL_INPUTS.get(node.op_type, ())
        read = [kinds[name] for index, name in enumerate(node.input) if name in kinds and index not in fixed]
        if TensorProto.UINT8 in read and node.op_type not in ("Cast", *_PAIR):
            raise CalibrationError(
                f"{node.op_type} {node.name!r} reads 8-bit images, and TensorRT takes them into Cast only",
                remedy=_HALF_REMEDY,
            )
        floats = {kind for kind in read if kind in _FLOATS}
        if len(floats) > 1:
            raise CalibrationError(
                f"{node.op_type} {node.name!r} reads both FP32 and FP16, and a strongly typed network refuses it",
                remedy=_REMEDY,
            )
    for value in model.graph.output:
        if kinds.get(value.name) != value.type.tensor_type.elem_type:
            found, said = (_name(kind) for kind in (kinds.get(value.name, 0), value.type.tensor_type.elem_type))
            raise CalibrationError(
                f"output {value.name} is of type {found}, and the graph declares {said}", remedy=_HALF_REMEDY
            )
    return kinds


def _name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind))


def _check_constants(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], kind: int, grid: Grid) -> None:
    if len(node.input) != 3 or any(name not in constants for name in node.input[1:]):
        raise _refusal(node, "needs a stored scale and zero point")
    scale, zero_point = (constants[name] for name in node.input[1:])
    if zero_point.data_type != grid.kind:
        raise _refusal(node, f"is of {_name(zero_point.data_type)}, expected {_name(grid.kind)}")
    if np.any(numpy_helper.to_array(zero_point).astype(np.float32) != 0):
        raise _refusal(node, "has a zero point other than 0")
    if scale.data_type != kind:
        raise _refusal(node, f"has a scale of type {_name(scale.data_type)}, expected {_name(kind)}")
    values = numpy_helper.to_array(scale).astype(np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise _refusal(node, "has a scale that is not positive and finite")
    if kind == TensorProto.FLOAT16 and (values < SMALLEST_NORMAL).any():
        raise _refusal(node, "has a scale that is subnormal in FP16")


def _check_granularity(
    model: onnx.ModelProto, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], grid: Grid
) -> None:
    """One scale for a whole activation, one for each output channel of a weight."""
    scale = constants[node.input[1]]
    if node.input[0] not in constants:
        if list(scale.dims) not in ([], [1]):
            raise _refusal(node, f"needs one scale for the whole activation, found shape {list(scale.dims)}")
        return
    weight = constants[node.input[0]]
    if weight.data_type != grid.kind:
        raise _refusal(node, f"is of {_name(weight.data_type)}, expected {_name(grid.kind)}")
    axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
    readers = [reader.op_type for reader in model.graph.node if node.output[0] in reader.input]
    wanted = 1 if any(reader in ("MatMul", "ConvTranspose") for reader in readers) else 0
    if axis != wanted or list(scale.dims) != [weight.dims[wanted]]:
        raise _refusal(
            node, f"needs one scale per output channel on axis {wanted}, found shape {list(scale.dims)} on axis {axis}"
        )


def _is_stored(tensor: str, producers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a tensor is stored, as it is or behind DequantizeLinear."""
    node = producers.get(tensor)
    return tensor in constants or (node is not None and node.op_type == _PAIR[1] and node.input[0] in constants)


def _check_layer(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto], kept: bool
) -> None:
    paired = [name for name in node.input[:2] if _type_of(producers, name) == "DequantizeLinear"]
    missing = [name for name in node.input[:2] if name not in paired]
    if kept and paired:
        raise _refusal(node, f"is to be kept in floating point, and reads {paired[0]} from a Q/DQ pair")
    if not kept and missing:
        raise _refusal(node, f"reads {missing[0]} without a Q/DQ pair")
    if len(node.input) > 2 and (node.input[2] not in constants or constants[node.input[2]].data_type not in _FLOATS):
        raise _refusal(node, "has a bias that is not a stored floating-point tensor")


def _type_of(producers: dict[str, onnx.NodeProto], tensor: str) -> str:
    return str(producers[tensor].op_type) if tensor in producers else ""


def _feeds_relu(model: onnx.ModelProto, quantize: onnx.NodeProto) -> bool:
    """Whether what the pair gives is read by a ReLU."""
    pair = [
        node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == quantize.output[0]
    ]
    return any(node.op_type == "Relu" and node.input[0] == p.output[0] for p in pair for node in model.graph.node)


def _refusal(node: onnx.NodeProto, what: str) -> CalibrationError:
    return CalibrationError(
        f"TensorRT would refuse this 8-bit graph or not run it in 8 bits: {node.op_type} {node.name!r} {what}",
        remedy=_REMEDY,
    )

"""INT8 with FP16 for the rest: a Q/DQ graph with FP32 scales → the strongly typed graph for TensorRT 10 and later.

Scales, biases and everything between the layers become FP16, at opset 19, the first whose Q/DQ operators have FP16
scales. So that nothing is lost on the way, `scales.fit_scales` rescales the FP32 network before it is quantized, by
powers of two (exactly), until scales and values lie well inside FP16; `round_activation_scales` and
`round_layer_to_half` make the scales exact in FP16; `halve_quantized` then only changes types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper

from ..errors import CalibrationError, ModelError
from ..graph.edit import copy_model, opset_of
from .check import check_quantized
from .grids import INT8, Grid
from .halves import LARGEST, SMALLEST_NORMAL, Io, write_halves
from .network import FloatArray, Network
from .round import RoundedLayer

OPSET = 19
"""The first whose QuantizeLinear and DequantizeLinear have FP16 scales."""
_WIDENED = (
    *("Cast", "QuantizeLinear", "DequantizeLinear", "Relu", "LeakyRelu", "PRelu", "Add", "Mul", "Sub", "Div", "Equal"),
    *(
        "Identity",
        "Reshape",
        "Flatten",
        "Shape",
        "Size",
        "Constant",
        "ConstantOfShape",
        "Where",
        "Scatter",
        "ScatterND",
    ),
    *("GreaterOrEqual", "LessOrEqual", "Resize", "Pad", "ScatterElements", "CumSum", "Pow", "BatchNormalization"),
)
"""Operators that opsets 14 to 19 gave more types or attributes, whose defaults mean what they meant before."""
_REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp")
_REWRITTEN = ("Split", "AveragePool", *_REDUCTIONS)
"""Operators that `_rewrite` writes as opset 18 wants them; of pooling only `ceil_mode` changed, which it refuses."""


def round_scales_to_half(scales: NDArray[np.floating]) -> FloatArray:
    """The normal FP16 numbers nearest to positive ones, as float32; the smallest normal one, 2⁻¹⁴, for all below it.

    Raises:
        CalibrationError: One exceeds FP16; see `fit_scales`.
    """
    if not float(np.max(scales, initial=0.0)) <= LARGEST:
        raise CalibrationError(
            f"a scale of {float(np.max(scales)):.3g} exceeds FP16",
            remedy="rescale the network with fit_scales before it is quantized",
        )
    return np.asarray(np.maximum(np.asarray(scales, np.float16), np.float16(SMALLEST_NORMAL)), np.float32)


def round_activation_scales(scales: Mapping[str, float]) -> dict[str, float]:
    """Scales by tensor, each exact in FP16; rounded before weights are, which then see what the graph will compute.

    Raises:
        CalibrationError: One exceeds FP16.
    """
    return {name: float(round_scales_to_half(np.array(scale))) for name, scale in scales.items()}


def round_layer_to_half(rounded: RoundedLayer, grid: Grid = INT8) -> RoundedLayer:
    """The layer with scales and bias that are exact in FP16.

    A scale moves by 2⁻¹² of itself at most and the integers stay; only those of a row whose scale would be subnormal
    are rounded again.

    Raises:
        CalibrationError: A scale or bias exceeds FP16.
    """
    scales = round_scales_to_half(rounded.scales)
    raised = rounded.scales < np.float32(SMALLEST_NORMAL)
    integers = rounded.integers.copy()
    ratio = (rounded.scales[raised] / scales[raised]).reshape(-1, *[1] * (integers.ndim - 1))
    integers[raised] = grid.pack(grid.nearest(integers[raised] * ratio))
    if not float(np.abs(rounded.bias).max(initial=0.0)) <= LARGEST:
        raise CalibrationError(
            "a bias exceeds FP16", remedy="rescale the network with fit_scales before it is quantized"
        )
    return dataclasses.replace(
        rounded, integers=integers, scales=scales, bias=rounded.bias.astype(np.float16).astype(np.float32)
    )


def halve_quantized(
    model: onnx.ModelProto,
    *,
    io: Io = "fp32",
    kept: Collection[str] = (),
    full: Collection[str] = (),
    grid: Grid = INT8,
) -> onnx.ModelProto:
    """A copy with FP16 scales, biases and activations, strongly typed, at opset 19 or higher; 8-bit weights stay.

    Args:
        model: As `insert_pairs` and `write_integers` make it: FP32 scales, each exact in FP16.
        io: Type of floating-point input and outputs.
        kept: Names of layers without pairs: they compute in FP16, their weights rounded to it.
        full: Outputs of other nodes that compute in FP32.
        grid: The number format of the weights and pairs.

    Raises:
        CalibrationError: A scale is not exact in FP16 or subnormal, or the result is not what TensorRT takes.
        ModelError: An operator of the graph means something else at opset 19.
    """
    scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            values = numpy_helper.to_array(tensor)
            if np.any(values != round_scales_to_half(values)):
                raise CalibrationError(
                    f"{tensor.name} is not exact in FP16, or subnormal",
                    remedy="round it first: round_activation_scales, round_layer_to_half",
                )
    result = write_halves(model, io=io, full=full)
    raise_opset(result, OPSET)
    check_quantized(result, target="trt10", kept=kept, grid=grid)
    return result


def fit_opset(network: Network, grid: Grid) -> Network:
    """The network at an opset whose QuantizeLinear knows the number format; the same where it is high enough."""
    if not grid.floating or opset_of(network.model) >= OPSET:
        return network
    model = copy_model(network.model)
    raise_opset(model, OPSET)
    return dataclasses.replace(network, model=model)


def raise_opset(model: onnx.ModelProto, opset: int) -> None:
    """Declares a higher opset, in place, with the IR version that came with it; a graph's own that is as high stays.

    Raises:
        ModelError: An operator means something else there.
    """
    entry = next((entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if entry is None:
        raise ModelError(
            "the graph names no ONNX operator set", remedy="give the FP32 file, as it was exported or folded"
        )
    if entry.version < opset:
        for op_type in sorted({node.op_type for node in model.graph.node}):
            old, new = (
                defs.get_schema(op_type, max_inclusive_version=version).since_version
                for version in (entry.version, opset)
            )
            if old != new and op_type not in (*_WIDENED, *_REWRITTEN):
                raise ModelError(
                    f"{op_type} of opset {entry.version} means something else at {opset}",
                    remedy=f"export with --opset {opset}",
                )
        if entry.version < 18 <= opset:
            for node in model.graph.node:
                _rewrite(node, model.graph)
        entry.version = opset
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import))


def _rewrite(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Writes an operator of opset 13 to 17 as opset 18 and later want it, in place."""
    if node.op_type == "Split" and len(node.input) < 2:
        node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    if node.op_type == "AveragePool" and any(a.name == "ceil_mode" and a.i for a in node.attribute):
        raise ModelError(
            f"AveragePool {node.name!r} with ceil_mode means something else at opset {OPSET}",
            remedy=f"export with --opset {OPSET}, or quantize for TensorRT 8 (--target trt8)",
        )
    axes = next((a for a in node.attribute if a.name == "axes"), None)
    if node.op_type in _REDUCTIONS and axes is not None:
        name = f"{node.output[0]}.axes"
        graph.initializer.append(numpy_helper.from_array(np.array(axes.ints, np.int64), name))
        node.input.append(name)
        node.attribute.remove(axes)

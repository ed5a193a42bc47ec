"""FP32 ONNX → FP16 ONNX: weights and everything between the image and the logits are FP16; inputs and outputs stay FP32.

FP16 ends at 65504, and loses digits below 6e-5. Where the measured range of a channel, with a margin, or its weights come near either end, the
channel is rescaled by a power of two along the chain: exact, and never a clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError
from .chain import Chain, FloatArray, read_chain, read_weights, replace_weights
from .equalize import rescale
from .execute import run_tensors
from .typed_model import StrPath, TypedModel, extend, load_parent

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)
_COMFORTABLE = 16.0  # where a channel that must be moved is moved to: far from both ends


@dataclass(frozen=True, slots=True)
class Fp16Options:
    """How a graph becomes FP16.

    Attributes:
        margin: Other images may give values this many times as large as the calibration images.
    """

    margin: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.margin <= 1024:
            raise CalibrationError(f"the margin must lie between 1 and 1024, found {self.margin}", remedy="give 8, or leave it out")


@dataclass(frozen=True, slots=True)
class Fp16Report:
    """What was found and done.

    Attributes:
        largest: By layer: the largest absolute value of its output in FP32, before any rescaling.
        rescaled: By layer: how many of its output channels were rescaled; layers without any are left out.
    """

    largest: dict[str, float]
    rescaled: dict[str, int]


def to_fp16(source: StrPath | onnx.ModelProto, batches: Sequence[NDArray[Any]], options: Fp16Options | None = None) -> tuple[TypedModel, Fp16Report]:
    """Makes the FP16 graph of an FP32 ONNX that repvgg-export wrote; `typed_model.write_typed` writes it.

    Args:
        source: File, or the model in memory.
        batches: Images as the model takes them, in a list: what the ranges are measured on.
        options: Margin.

    Raises:
        CalibrationError: The graph is typed already, there are no images, or a tensor that cannot be rescaled does not fit FP16.
        ModelError: The file is damaged or not one of ours.
    """
    options = options or Fp16Options()
    parent = load_parent(source)
    chain = read_chain(parent.model)
    ranges = _output_ranges(parent.model, chain, batches)
    model, rescaled = fit_ranges(parent.model, ranges, options)
    said: dict[str, str | int | float | bool | None] = {"margin": options.margin, "rescaled_channels": sum(rescaled.values())}
    largest = {layer.name: float(ranges[layer.output].max()) for layer in chain.layers}
    return extend(parent, write_halves(model), stage="fp16", options=said), Fp16Report(largest, rescaled)


def _output_ranges(model: onnx.ModelProto, chain: Chain, batches: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Largest absolute value of each output channel of every layer, by tensor."""
    names = [layer.output for layer in chain.layers]
    found: dict[str, NDArray[np.float64]] = {}
    for values in run_tensors(model, names, batches):
        for name, value in values.items():
            largest = np.abs(value).max(axis=(0, *range(2, value.ndim))).astype(np.float64)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    if not found:
        raise CalibrationError("there are no images to measure ranges on", remedy="give some images of the training split")
    bad = [name for name, value in found.items() if not np.isfinite(value).all()]
    if bad:
        raise CalibrationError(f"the images give NaN or infinite values at {bad[0]}", remedy="look for NaN in the images and in the checkpoint")
    return found


def fit_ranges(model: onnx.ModelProto, ranges: dict[str, NDArray[np.float64]], options: Fp16Options) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Rescales channels by powers of two, first layer to last, wherever FP16 could not hold them or the weights that make them.

    Args:
        model: FP32; not changed.
        ranges: By name of a layer's output: largest absolute value of each channel, (C,).
        options: Margin.

    Returns:
        The same function, and by layer how many channels were rescaled.

    Raises:
        CalibrationError: What cannot be rescaled does not fit.
    """
    chain, weights = read_chain(model), read_weights(model)
    rescaled: dict[str, int] = {}
    for layer, interface in zip(chain.layers, chain.interfaces, strict=True):
        wanted = _factors(ranges[layer.output], weights[layer.weight], weights[layer.bias], options.margin)
        if interface.blocked_by is None and np.any(wanted != 1):
            rescale(weights, chain, interface, wanted)
            rescaled[layer.name] = int((wanted != 1).sum())
        values = ranges[layer.output] / (wanted if interface.blocked_by is None else 1.0)
        largest = max(float(values.max()) * options.margin, *(float(np.abs(weights[name]).max()) for name in (layer.weight, layer.bias)))
        if largest > LARGEST:
            raise CalibrationError(
                f"{layer.name}: FP16 ends at 65504, and values up to {largest:.3g} are expected; they cannot be rescaled: {interface.blocked_by}",
                remedy="keep this model in FP32, or give a smaller margin",
            )
    return replace_weights(model, weights), rescaled


def _factors(ranges: NDArray[np.float64], weight: FloatArray, bias: FloatArray, margin: float) -> NDArray[np.float64]:
    """Powers of two by which the channels of a layer's output are to be divided; 1 where FP16 holds them as they are."""
    rows = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    top = np.maximum(np.maximum(ranges * margin, rows), np.abs(bias))
    # Of the weights only the largest matters: what is a thousand times smaller than it changes nothing that FP16 shows.
    tiny = (rows > 0) & (rows < SMALLEST_NORMAL * 1024)
    move = (top > 0) & ((top > LARGEST) | tiny)
    return np.where(move, np.exp2(np.round(np.log2(np.where(move, top, 1.0) / _COMFORTABLE))), 1.0)


def write_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose layers compute in FP16: cast after the normalised image, cast back at the logits and at exposed outputs."""
    chain = read_chain(model)
    result = replace_weights(model, {})
    used = {name for layer in chain.layers for name in (layer.weight, layer.bias)}
    for tensor in result.graph.initializer:
        if tensor.name in used:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    exposed = {value.name for value in result.graph.output}
    back = exposed | {layer.output for layer in chain.layers if layer.op_type == "Gemm"}
    half = {chain.image: f"{chain.image}.fp16"}
    nodes = []
    if chain.image == result.graph.input[0].name:
        nodes.append(_cast(chain.image, half[chain.image], TensorProto.FLOAT16))
    for node in result.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [half.get(name, name) for name in node.input]
        nodes.append(copy)
        name = node.output[0]
        if name == chain.image:
            nodes.append(_cast(name, half[name], TensorProto.FLOAT16))
        elif name in back and node.op_type not in ("Softmax", "TopK"):
            copy.output[0] = f"{name}.fp16"
            if node.op_type != "Gemm":
                half[name] = copy.output[0]
            nodes.append(_cast(copy.output[0], name, TensorProto.FLOAT))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)

"""What the BatchNorm layers of a graph in training form say of its tensors and of its images; folded, it would be gone.

A BatchNorm's output has mean β and standard deviation |γ| over the training data, its input the running mean and
variance. Of a sum of such outputs, taken as independent, means and variances add.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from ..specs.values import ChannelStatistics, InputStatistics
from .edit import GraphView, attributes

_Float64: TypeAlias = NDArray[np.float64]
_Moments: TypeAlias = tuple[_Float64, _Float64]
INPUT_SUFFIX = ".input"
"""Ends the name under which the metadata states what a layer reads: `stage1.0.input` of what makes `stage1.0.conv`."""
_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_LEAST_CHANNELS = 12  # twice the numbers in the covariance of three channels: fewer equations would fit anything
_DECAYS = tuple(0.7 + 0.02 * step for step in range(15))
# Of what was never trained, or whose BatchNorms saw something else, nothing is told. Measured: the mean within 0.01 of
# a channel's deviation (0.07 without a 1×1 branch, of small images), the variances within 0.02 (0.09); of random
# numbers 0.1 and 0.2 at least.
_WORST_MEAN, _WORST_FIT = 0.08, 0.2
_DECIMALS = 6


def read_statistics(training: onnx.ModelProto, folded: onnx.ModelProto) -> dict[str, ChannelStatistics]:
    """Mean and standard deviation of what the layers of a folded graph read and give, per channel.

    Args:
        training: The graph with its BatchNormalization nodes.
        folded: What became of it; tensors that both have are the same.

    Returns:
        By the name of a layer's output, and with `.input` in place of `.conv` at its end, or after it, of its input;
        what no BatchNorm tells is left out.
    """
    view, found = GraphView(training), dict[str, ChannelStatistics]()
    for node in (node for node in folded.graph.node if node.op_type in _LAYERS):
        output = node.output[0]
        for key, name in ((output, output), (name_input(output), node.input[0])):
            moments = _seen(view, name) or _stated(view, name)
            if moments is not None:
                found[key] = ChannelStatistics(*map(encode_channels, moments))
    return found


def name_input(output: str) -> str:
    """The name under which the metadata states what the layer reads that makes a tensor."""
    return output.removesuffix(".conv") + INPUT_SUFFIX


def encode_channels(values: _Float64) -> str:
    """One number a channel, of `ChannelStatistics`; (C,)."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def decode_channels(text: str) -> _Float64:
    """One number a channel, of `ChannelStatistics`; float64 (C,)."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def _parameters(view: GraphView, node: onnx.NodeProto) -> list[_Float64] | None:
    """γ, β, running mean and running variance of a BatchNormalization, (C,) each; None of any other node."""
    if node.op_type != "BatchNormalization" or attributes(node).get("training_mode", 0):
        return None
    found = [array for array in map(view.constant, node.input[1:5]) if array is not None]
    return found if len(found) == 4 and all(np.isfinite(array).all() for array in found) else None


def _seen(view: GraphView, name: str) -> _Moments | None:
    """What a BatchNorm that reads a tensor has seen of it."""
    for node in view.readers.get(name, []):
        parameters = _parameters(view, node) if node.input[0] == name else None
        if parameters is not None:
            return parameters[2], np.sqrt(np.maximum(parameters[3], 0.0))
    return None


def _stated(view: GraphView, name: str) -> _Moments | None:
    """What the BatchNorms state of which a tensor is a sum."""
    node = view.made_by.get(name)
    if node is None:
        return None
    parameters = _parameters(view, node)
    if parameters is not None:
        return parameters[1], np.abs(parameters[0])
    if node.op_type in ("Add", "Sum", "Sub"):
        parts = [part for part in (_seen(view, n) or _stated(view, n) for n in node.input) if part is not None]
        if len(parts) < len(node.input) or len({part[0].shape for part in parts}) > 1:
            return None
        signs = (1, -1) if node.op_type == "Sub" else (1,) * len(parts)
        mean = np.sum([sign * part[0] for sign, part in zip(signs, parts, strict=True)], axis=0)
        return mean, np.sqrt(np.sum([np.square(part[1]) for part in parts], axis=0))
    if node.op_type == "Identity":
        return _seen(view, node.input[0]) or _stated(view, node.input[0])
    return None


def read_trained_on(training: onnx.ModelProto) -> InputStatistics | None:
    """What the BatchNorms behind the first convolutions have seen of the images; None where they do not tell.

    Only where the graph's one input is what the convolutions read: normalised outside.
    """
    view = GraphView(training)
    stored = {tensor.name for tensor in training.graph.initializer}
    inputs = [value.name for value in training.graph.input if value.name not in stored]
    stems = []
    for node in view.readers.get(inputs[0], []) if len(inputs) == 1 else []:
        weight = view.constant(node.input[1]) if node.op_type == "Conv" else None
        bias = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
        if weight is None or bias is None or weight.ndim != 4 or attributes(node).get("group", 1) != 1:
            continue
        for parameters in (_parameters(view, reader) for reader in view.readers.get(node.output[0], [])):
            if parameters is not None:
                stems.append((weight, parameters[2] - bias, parameters[3]))
    # The smallest kernel tells most: of 1×1, no correlation of pixels must be guessed.
    return solve_images(*min(stems, key=lambda stem: stem[0][0, 0].size)) if stems else None


def solve_images(weight: _Float64, mean: _Float64, variance: _Float64) -> InputStatistics | None:
    """Mean and deviation of images per channel, of what a convolution without bias gives of them; None if nothing fits.

    A running mean is the convolution of the images' mean, and a running variance that of their covariance: equations
    for three and six numbers, one for each output channel, solved by least squares. A 1×1 convolution gives them
    exactly; a larger one does if the correlation of pixels falls with their distance d as ρ^d, with the ρ that fits
    best (0.9 to 1 of photographs). Measured in tests/export/test_statistics.py.

    Args:
        weight: (out, 3, height, width).
        mean: Of the output, (out,).
        variance: Of the output, (out,).
    """
    known = all(np.isfinite(array).all() for array in (weight, mean, variance)) and (variance > 0).all()
    if not known or weight.shape[1] != 3 or len(weight) < _LEAST_CHANNELS:
        return None
    sums = weight.sum(axis=(2, 3))
    solution: _Float64 = np.linalg.lstsq(sums, mean, rcond=None)[0]
    if not np.mean(np.abs(sums @ solution - mean) / np.sqrt(variance)) < _WORST_MEAN:
        return None
    tried = [_fit_covariance(weight, variance, decay) for decay in (_DECAYS if weight[0, 0].size > 1 else (1.0,))]
    error, found = min(tried, key=lambda pair: pair[0])
    if not (error < _WORST_FIT and (found > 0).all()):
        return None
    # Least squares give other last digits where memory lies otherwise, and equal exports must be equal files.
    return InputStatistics(_triple(solution), _triple(np.sqrt(found)))


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = (round(float(value), _DECIMALS) for value in values)
    return first, second, third


def _fit_covariance(weight: _Float64, variance: _Float64, decay: float) -> tuple[float, _Float64]:
    """Mean relative error of the fit, and the variance of each input channel, (3,)."""
    places = np.indices(weight.shape[2:]).reshape(2, -1).T.astype(np.float64)
    correlation = decay ** np.sqrt(np.square(places[:, None] - places[None]).sum(-1))
    flat = weight.reshape(len(weight), 3, -1)
    products = np.einsum("cik,kl,cjl->cij", flat, correlation, flat, optimize=True)
    rows, columns = np.triu_indices(3)
    system = products[:, rows, columns] * np.where(rows == columns, 1.0, 2.0) / variance[:, None]
    solution: _Float64 = np.linalg.lstsq(system, np.ones(len(variance)), rcond=None)[0]
    return float(np.abs(system @ solution - 1).mean()), solution[rows == columns]

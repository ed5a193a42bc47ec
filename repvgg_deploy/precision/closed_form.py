"""Statistics of a network's activations without a single image: what the BatchNorm layers of the training form say.

What a block reads is taken from the BatchNorm of its identity branch, which has seen it, or, for its mean, from that of
its 1×1 branch. Where neither is there, a channel is taken as normally distributed before its ReLU, with the mean and
standard deviation that the export kept, and cut off at zero after it: real activations are rarer and larger than that.
Pooling keeps the mean and divides the variance. Convolutions over one pixel (SE) and what they read are propagated as
sums of independent channels. Behind all else (SiLU, Concat, Resize, sums) nothing closed is known: there the graph is
run with normally distributed numbers in place of what the layers give (`_sample`). It takes no time; images, also
synthetic ones, give better scales.

Source: Nagel et al. 2019, Data-free quantization, https://arxiv.org/abs/1906.04721, section 4 and appendix C (the
rectified normal distribution).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import CalibrationError
from ..graph.batchnorm import decode_channels, name_input
from ..graph.edit import copy_model, set_nodes
from ..specs.values import ChannelStatistics, Preprocessing
from .fp16 import draw_batches
from .network import Float64, FloatArray, Layer, Network, read_weights
from .ranges import BINS, Statistics, TensorStatistics, collect
from .run_onnx import run_tensors
from .scales import graph_sha256
from .typed_model import Parent

DEVIATIONS = 6.0
"""Largest value of a channel known before its ReLU only, in standard deviations above its mean there."""
SEEN_DEVIATIONS = 12.0
"""The same, where a BatchNorm layer has seen the channel after its ReLU. Its tail is longer: most values are 0."""
_WITHIN = 2 / 3  # of a channel's variance lies within images, the rest between them
_ROUNDS = 8  # of the drawn images
_STRETCH = 1.5  # of the largest of some ten thousand normally distributed numbers, four deviations: up to `DEVIATIONS`
_REMEDY = "give --calib with images, or export the training-form checkpoint, whose BatchNorm layers say it"


@dataclass(frozen=True, slots=True)
class _Normal:
    """Channels as normally distributed, cut off at zero where `rectified`; `bound` is what |x| cannot exceed."""

    mean: Float64
    std: Float64
    rectified: bool = False
    bound: Float64 | None = None

    def moments(self) -> tuple[Float64, Float64]:
        """Mean and standard deviation after the cut."""
        if not self.rectified:
            return self.mean, self.std
        ratio = self.mean / self.std
        density, share = np.exp(-np.square(ratio) / 2) / np.sqrt(2 * np.pi), _normal_below(ratio)
        mean = self.mean * share + self.std * density
        square = (np.square(self.mean) + np.square(self.std)) * share + self.mean * self.std * density
        return mean, np.sqrt(np.maximum(square - np.square(mean), 0.0))


def closed_form_statistics(parent: Parent) -> tuple[Statistics, dict[str, tuple[Float64, Float64]]]:
    """What `ranges.collect` would measure, and mean and deviation of the channels that layers read, by tensor.

    Raises:
        CalibrationError: The metadata holds no BatchNorm statistics, or none of a layer that needs them.
    """
    network, metadata = parent.network, parent.metadata
    if not metadata.statistics or metadata.spec.preprocessing is None:
        raise CalibrationError(
            "the ONNX states no BatchNorm statistics: it was exported from a deploy form", remedy=_REMEDY
        )
    known = _propagate(network, metadata.statistics, metadata.spec.preprocessing)
    stated = _stated_inputs(network, metadata.statistics)
    tensors = {name: _as_statistics(known[name], stated.get(name)) for name in known}
    moments = {name: _moments(known[name], stated.get(name)) for name in known}
    missing = [name for name in network.quantized_tensors() if name not in known]
    for name, (found, drawn) in (_sample(parent, missing) if missing else {}).items():
        tensors[name], moments[name] = found, _prefer(stated.get(name), drawn)
    ordered = {name: tensors[name] for name in network.quantized_tensors()}
    return Statistics(ordered, 0, f"statistics:{graph_sha256(network.model)}"), {n: moments[n] for n in ordered}


def _sample(parent: Parent, names: Sequence[str]) -> dict[str, tuple[TensorStatistics, tuple[Float64, Float64]]]:
    """Statistics, and mean and standard deviation, of tensors when layers give normally distributed numbers.

    Of each channel as the BatchNorms state it; what layers give that have none is computed of the others.
    """
    network, spec = parent.network, parent.metadata.spec
    drawn = dataclasses.replace(network, model=_draw_outputs(network, parent.metadata.statistics))
    batches = draw_batches(spec) * _ROUNDS
    statistics, axes = collect(drawn, batches).tensors, network.axes()
    sums: dict[str, list[Float64]] = {}
    for values in run_tensors(drawn.model, names, batches):
        for name, value in values.items():
            rows = np.moveaxis(value, axes[name], 0).reshape(statistics[name].largest.size, -1).astype(np.float64)
            sums.setdefault(name, []).append(np.stack((rows.mean(1), np.square(rows).mean(1))))
    found = {}
    for name in names:
        mean, square = np.mean(sums[name], axis=0)
        moments = mean, np.sqrt(np.maximum(square - np.square(mean), 1e-12))
        found[name] = (statistics[name].stretched(_STRETCH), moments)
    return found


def _draw_outputs(network: Network, statistics: Mapping[str, ChannelStatistics]) -> onnx.ModelProto:
    """The graph with normally distributed numbers, mean and deviation as stated, for what convolutions give."""
    model = copy_model(network.model)
    stated = {layer.output: statistics[layer.output] for layer in network.layers if layer.output in statistics}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        nodes.append(node)
        output = node.output[0]
        if node.op_type not in ("Conv", "ConvTranspose") or output not in stated:
            continue
        moments = (decode_channels(stated[output].mean), decode_channels(stated[output].std))
        names = [
            f"{output}.{part}" for part in ("computed", "pooled", "alone", "shared", "sum", "spread", "mean", "std")
        ]
        node.output[0], (computed, pooled, alone, shared, total, spread, mean, std) = names[0], names
        for name, value in zip((mean, std), moments, strict=True):
            constant = numpy_helper.from_array(value.reshape(1, -1, 1, 1).astype(np.float32), name)
            model.graph.initializer.append(constant)
        nodes += [
            helper.make_node("GlobalAveragePool", [computed], [pooled]),
            helper.make_node("RandomNormalLike", [computed], [alone], scale=_WITHIN**0.5, seed=float(2 * index)),
            helper.make_node(
                "RandomNormalLike", [pooled], [shared], scale=(1 - _WITHIN) ** 0.5, seed=float(2 * index + 1)
            ),
            helper.make_node("Add", [alone, shared], [total]),
            helper.make_node("Mul", [total, std], [spread]),
            helper.make_node("Add", [spread, mean], [output]),
        ]
    set_nodes(model.graph, nodes)
    return model


def _propagate(
    network: Network, statistics: Mapping[str, ChannelStatistics], preprocessing: Preprocessing
) -> dict[str, _Normal]:
    """Walks the graph, from the image on; by tensor, those of which something is known."""
    weights, layers = read_weights(network), {layer.name: layer for layer in network.layers}
    known = {network.image: _image(preprocessing)}
    made_by = {name: node for node in network.model.graph.node for name in node.output}
    for node in network.model.graph.node:
        if node.name in layers:
            layer = layers[node.name]
            found, output = (
                _behind_layer(layer, known.get(layer.input), statistics.get(layer.output), weights),
                layer.output,
            )
        else:
            found, output = _behind(node, known, made_by), node.output[0]
        if found is not None:
            known[output] = found
    return known


def _behind(
    node: onnx.NodeProto, known: Mapping[str, _Normal], made_by: Mapping[str, onnx.NodeProto]
) -> _Normal | None:
    source, op_type = known.get(node.input[0]) if node.input else None, node.op_type
    if source is None or op_type not in ("Relu", "GlobalAveragePool", "Flatten", "Mul"):
        return None
    if op_type == "Mul":
        gate = made_by.get(node.input[1])
        is_gate = gate is not None and gate.op_type in ("Sigmoid", "HardSigmoid") and gate.input[0] != node.input[0]
        return source if is_gate else None  # it lies between 0 and 1: the bound holds
    if op_type == "Relu":
        return _Normal(source.mean, source.std, rectified=True)
    if op_type == "GlobalAveragePool":
        # A third of the variance lies between images: pooling averages away what lies within one.
        mean, std = source.moments()
        return _Normal(mean, std * np.sqrt(1 - _WITHIN))
    return source


def _behind_layer(
    layer: Layer, source: _Normal | None, stated: ChannelStatistics | None, weights: Mapping[str, FloatArray]
) -> _Normal | None:
    if stated is not None:
        return _Normal(decode_channels(stated.mean), np.maximum(decode_channels(stated.std), 1e-6))
    if source is None or int(np.prod(layer.weight_shape[2:])) != 1:
        return None
    mean, std = source.moments()
    weight = weights[layer.weight].reshape(layer.out_channels, -1).astype(np.float64)
    spread = np.sqrt(np.square(weight) @ np.square(std))
    return _Normal(weight @ mean + weights[layer.bias], np.maximum(spread, 1e-6))


def _moments(normal: _Normal, stated: tuple[Float64, Float64] | None) -> tuple[Float64, Float64]:
    """Mean and standard deviation: as stated, or where nothing is, of the normal distribution."""
    return _prefer(stated, normal.moments())


def _prefer(stated: tuple[Float64, Float64] | None, other: tuple[Float64, Float64]) -> tuple[Float64, Float64]:
    return other if stated is None else (stated[0], np.where(stated[1] > 0, stated[1], other[1]))


def _stated_inputs(network: Network, statistics: Mapping[str, ChannelStatistics]) -> dict[str, tuple[Float64, Float64]]:
    """Mean and standard deviation of what blocks read, by tensor; the standard deviation is 0 where it is not known."""
    found = {}
    for layer in network.layers:
        value = statistics.get(name_input(layer.output))
        if value is not None:
            found[layer.input] = (decode_channels(value.mean), decode_channels(value.std))
    return found


def _image(preprocessing: Preprocessing) -> _Normal:
    """Normalised: mean 0 and standard deviation 1 are what normalisation is for, and black and white bound it."""
    low, high = ((level - np.array(preprocessing.mean)) / np.array(preprocessing.std) for level in (0.0, 255.0))
    return _Normal(np.zeros(3), np.ones(3), bound=np.maximum(np.abs(low), np.abs(high)))


def _as_statistics(normal: _Normal, stated: tuple[Float64, Float64] | None) -> TensorStatistics:
    """Ranges and histogram of |x| for a million values a channel."""
    low = np.maximum(normal.mean - DEVIATIONS * normal.std, 0.0 if normal.rectified else -np.inf)
    high = np.maximum(normal.mean + DEVIATIONS * normal.std, 0.0)
    largest = np.maximum(np.abs(low), np.abs(high)) if normal.bound is None else normal.bound
    if stated is not None and normal.bound is None:
        largest = np.where(stated[1] > 0, stated[0] + SEEN_DEVIATIONS * stated[1], largest)
    edges = largest[:, None] * np.linspace(0, 1, BINS + 1)[None]
    above = _normal_below((edges - normal.mean[:, None]) / normal.std[:, None])
    shares = np.diff(above, axis=1)
    if normal.rectified:
        shares[:, 0] += above[:, 0]
    else:
        shares -= np.diff(_normal_below((-edges - normal.mean[:, None]) / normal.std[:, None]), axis=1)
    return TensorStatistics(largest, np.rint(np.maximum(shares, 0) * 1e6).astype(np.int64))


def _normal_below(value: Float64) -> Float64:
    """Share of a standard normal distribution below `value`; absolute error under 1.5e-7.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17.
    """
    size = np.abs(value)
    t = 1 / (1 + 0.2316419 * size)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-np.square(size) / 2) / np.sqrt(2 * np.pi) * series
    return np.asarray(np.where(value >= 0, 1 - tail, tail), np.float64)


def correct_bias(weight: FloatArray, found: FloatArray, bias: FloatArray, *, groups: int, mean: Float64) -> FloatArray:
    """The bias, (out,), that takes up what rounding `weight` to `found` changes of the mean output, borders left aside.

    Weights are (out, in / groups, …); `mean` is that of the layer's input channels, (in,).
    """
    change = (weight.astype(np.float64) - found).reshape(groups, len(weight) // groups, weight.shape[1], -1).sum(axis=3)
    shift = np.einsum("goi,gi->go", change, mean.reshape(groups, -1)).reshape(-1)
    return np.asarray(bias + shift, np.float32)

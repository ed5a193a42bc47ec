"""Statistics of a network's activations without a single image: what the BatchNorm layers of the training form say.

What a block reads is taken from the BatchNorm of its identity branch, which has seen it, or, for its mean, from that of
its 1×1 branch. Where neither is there, a channel is taken as normally distributed before its ReLU, with the mean and
standard deviation that the export kept, and cut off at zero after it: real activations are rarer and larger than that.
Pooling keeps the mean and divides the variance. Convolutions over one pixel (SE) and what they read are propagated as
sums of independent channels. It takes no time; images, also synthetic ones, give better scales.

Source: Nagel et al. 2019, Data-free quantization, https://arxiv.org/abs/1906.04721, section 4 and appendix C (the
rectified normal distribution).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import CalibrationError
from ..graph.batchnorm import decode_channels, name_input
from ..specs.values import ChannelStatistics, Preprocessing
from .network import Float64, FloatArray, Layer, Network, read_weights
from .ranges import BINS, Statistics, TensorStatistics
from .scales import graph_sha256
from .typed_model import Parent

DEVIATIONS = 6.0
"""Largest value of a channel known before its ReLU only, in standard deviations above its mean there."""
SEEN_DEVIATIONS = 12.0
"""The same, where a BatchNorm layer has seen the channel after its ReLU. Its tail is longer: most values are 0."""
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
    missing = [name for name in network.quantized_tensors() if name not in known]
    if missing:
        raise CalibrationError(f"nothing is known of {missing[0]} without images", remedy=_REMEDY)
    stated = _stated_inputs(network, metadata.statistics)
    tensors = {name: _as_statistics(known[name], stated.get(name)) for name in network.quantized_tensors()}
    moments = {name: _moments(known[name], stated.get(name)) for name in tensors}
    return Statistics(tensors, 0, f"statistics:{graph_sha256(network.model)}"), moments


def _propagate(
    network: Network, statistics: Mapping[str, ChannelStatistics], preprocessing: Preprocessing
) -> dict[str, _Normal]:
    """Walks the graph, from the image on; by tensor, those of which something is known."""
    weights, layers = read_weights(network), {layer.name: layer for layer in network.layers}
    known = {network.image: _image(preprocessing)}
    for node in network.model.graph.node:
        if node.name in layers:
            layer = layers[node.name]
            found, output = (
                _behind_layer(layer, known.get(layer.input), statistics.get(layer.output), weights),
                layer.output,
            )
        else:
            found, output = _behind(node.op_type, known.get(node.input[0])), node.output[0]
        if found is not None:
            known[output] = found
    return known


def _behind(op_type: str, source: _Normal | None) -> _Normal | None:
    if source is None or op_type not in ("Relu", "GlobalAveragePool", "Flatten", "Mul"):
        return None
    if op_type == "Relu":
        return _Normal(source.mean, source.std, rectified=True)
    if op_type == "GlobalAveragePool":
        # A third of the variance lies between images: pooling averages away what lies within one.
        mean, std = source.moments()
        return _Normal(mean, std / np.sqrt(3))
    return source  # an SE gate (Mul) lies between 0 and 1: the bound holds


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
    mean, std = normal.moments()
    return (mean, std) if stated is None else (stated[0], np.where(stated[1] > 0, stated[1], std))


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

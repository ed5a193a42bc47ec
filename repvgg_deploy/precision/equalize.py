"""Exact rescaling of channels along the chain: channels get alike ranges, and the network computes the same.

ReLU(x / s) = ReLU(x) / s for s > 0: output channel c of a layer (weight row and bias) is divided by s_c, and input
channel c of every layer that reads it is multiplied by s_c. Pooling, Flatten and SE gates pass the factor on; a channel
that a graph output shows stays as it is.
Source: Nagel et al. 2019, https://arxiv.org/abs/1906.04721 (cross-layer equalization); Xiao et al. 2022,
https://arxiv.org/abs/2211.10438 (the exponent between activations and weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .chain import Chain, Float64, FloatArray, Interface, Layer, input_norms, read_weights, scale_inputs

_LARGEST_RATIO = 2.0**20
"""Factors of one interface span at most this range: a channel that is weaker carries nothing that INT8 could keep."""


@dataclass(frozen=True, slots=True)
class EqualizeOptions:
    """How channels are rescaled.

    Attributes:
        exponent: 0.5 shares the differences between activations and weights evenly; 1 makes all activation ranges
            alike; 0 the weights' columns.
        by_interface: Other exponents, by the name of the layer before the interface.
        powers_of_two: Round factors to powers of two, so that even float rounding stays as it was.
    """

    exponent: float = 0.5
    by_interface: Mapping[str, float] | None = None
    powers_of_two: bool = False

    def __post_init__(self) -> None:
        values = [self.exponent, *(self.by_interface or {}).values()]
        if not all(0 <= value <= 1 for value in values):
            raise CalibrationError(
                f"equalization exponents must lie between 0 and 1, found {values}", remedy="give 0.5, or leave it out"
            )


@dataclass(frozen=True, slots=True)
class InterfaceReport:
    """What was done to one interface.

    Attributes:
        source: Name of the layer before it.
        exponent: Between weights (0) and activations (1).
        spread_before: Largest by median channel range of its activations, before.
        spread_after: The same, after.
        blocked_by: Why it was left as it was, or None.
    """

    source: str
    exponent: float
    spread_before: float
    spread_after: float
    blocked_by: str | None


def equalize(
    chain: Chain, ranges: Mapping[str, NDArray[np.floating]], options: EqualizeOptions | None = None
) -> tuple[Chain, dict[str, Float64], tuple[InterfaceReport, ...]]:
    """Rescales every interface that allows it, by the range of each channel of each layer's input, (C,), by tensor.

    Returns:
        A network that computes what the original does; what the channels of each layer's input were divided by, float64
        (C,), by tensor; and a report of each interface.

    Raises:
        CalibrationError: Ranges are missing, not finite, or of another shape.
    """
    options = options or EqualizeOptions()
    weights = read_weights(chain.model)
    factors: dict[str, Float64] = {}
    reports = []
    for interface in chain.interfaces:
        exponent = (options.by_interface or {}).get(interface.source, options.exponent)
        if interface.blocked_by is not None:
            reports.append(InterfaceReport(interface.source, exponent, 1.0, 1.0, interface.blocked_by))
            continue
        reader = main_reader(interface, chain)
        activation = read_range(reader, ranges)
        norms = reader_norms(reader, weights)
        scale = choose_factors(activation, norms, exponent, powers_of_two=options.powers_of_two)
        rescale(weights, chain, interface, scale)
        factors |= {chain.layer(name).input: scale for name in interface.readers}
        before, after = _spread(activation), _spread(activation / scale)
        reports.append(InterfaceReport(interface.source, exponent, before, after, None))
    return chain.with_weights(weights), factors, tuple(reports)


def apply_factors(chain: Chain, factors: Mapping[str, Float64]) -> Chain:
    """Rescales interfaces by given factors: positive, (C,), by name of the layer before the interface.

    Raises:
        CalibrationError: They are of another graph, or an interface cannot be rescaled.
    """
    weights = read_weights(chain.model)
    interfaces = {interface.source: interface for interface in chain.interfaces if interface.blocked_by is None}
    for source, scale in factors.items():
        if source not in interfaces or scale.shape != (chain.layer(source).out_channels,) or not (scale > 0).all():
            raise CalibrationError(f"saved factors of {source!r} do not suit this graph", remedy="calibrate again")
        rescale(weights, chain, interfaces[source], scale)
    return chain.with_weights(weights)


def choose_factors(activation: Float64, weight: Float64, exponent: float, *, powers_of_two: bool = False) -> Float64:
    """Factors s = activation^exponent / weight^(1 − exponent), (C,), by their median.

    Activations are divided by them, weights multiplied; `weight` is the largest magnitude that reads each channel.
    """
    alive = (activation > 0) & (weight > 0)
    if not alive.any():
        return np.ones_like(activation)
    logs = np.zeros_like(activation)
    logs[alive] = exponent * np.log2(activation[alive]) - (1 - exponent) * np.log2(weight[alive])
    logs[alive] -= np.median(logs[alive])
    limit = np.log2(_LARGEST_RATIO) / 2
    logs = np.clip(logs, -limit, limit)
    return np.exp2(np.round(logs) if powers_of_two else logs)


def rescale(weights: dict[str, FloatArray], chain: Chain, interface: Interface, scale: Float64) -> None:
    """Divides the output channels of an interface by `scale`, and multiplies what reads them; changes `weights`."""
    source = chain.layer(interface.source)
    column = scale.reshape(-1, *[1] * (len(source.weight_shape) - 1))
    weights[source.weight] = (weights[source.weight] / column).astype(np.float32)
    weights[source.bias] = (weights[source.bias] / scale).astype(np.float32)
    for name in interface.readers:
        reader = chain.layer(name)
        weights[reader.weight] = scale_inputs(weights[reader.weight].astype(np.float64), reader.groups, scale).astype(
            np.float32
        )


def main_reader(interface: Interface, chain: Chain) -> Layer:
    """The reader with most weights: of a block's convolution and its SE, the convolution."""
    return max(map(chain.layer, interface.readers), key=lambda layer: int(np.prod(layer.weight_shape)))


def read_range(layer: Layer, ranges: Mapping[str, NDArray[np.floating]]) -> Float64:
    """The range of each of a layer's input channels, float64 (in,).

    Raises:
        CalibrationError: It is missing, not finite, or of another shape.
    """
    found = ranges.get(layer.input)
    if found is None or found.shape != (layer.in_channels,) or not np.isfinite(found).all():
        what = "nothing" if found is None else f"shape {found.shape}, {int(np.isfinite(found).sum())} of them finite"
        raise CalibrationError(
            f"ranges of {layer.input}: expected {layer.in_channels} finite numbers, found {what}",
            remedy="collect them with ranges.collect on this model",
        )
    return np.asarray(found, np.float64)


def reader_norms(layer: Layer, weights: Mapping[str, FloatArray]) -> Float64:
    """Largest absolute weight that reads each input channel, float64 (in,)."""
    return input_norms(weights[layer.weight], layer.groups, order="max")


def _spread(ranges: Float64) -> float:
    alive = ranges[ranges > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 1.0

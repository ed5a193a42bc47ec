"""Exact rescaling of channels: they get alike ranges, and the network computes the same.

ReLU(x / s) = ReLU(x) / s for s > 0: output channel c of a layer (weight row and bias) is divided by s_c, and input
channel c of every layer that reads it is multiplied by s_c. What lets a factor pass, and which channels must share one,
`graph.flow` knows; a channel that something sees as it is stays as it is.
Source: Nagel et al. 2019, https://arxiv.org/abs/1906.04721 (cross-layer equalization); Xiao et al. 2022,
https://arxiv.org/abs/2211.10438 (the exponent between activations and weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from .network import Float64, FloatArray, Ids, Interface, Layer, Network, input_norms, read_weights, scale_inputs

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
    network: Network, ranges: Mapping[str, NDArray[np.floating]], options: EqualizeOptions | None = None
) -> tuple[Network, Float64, tuple[InterfaceReport, ...]]:
    """Rescales every interface that allows it, by the range of each channel of each layer's input, (C,), by tensor.

    Returns:
        A network that computes what the original does; what each variable was divided by, float64 (count,); and a
        report of each interface.

    Raises:
        CalibrationError: Ranges are missing, not finite, or of another shape.
    """
    options = options or EqualizeOptions()
    weights = read_weights(network)
    activation = network.gather({layer.input: read_range(layer, ranges) for layer in network.layers})
    factors, reports = network.ones(), []
    for interface in network.interfaces:
        exponent = (options.by_interface or {}).get(interface.source, options.exponent)
        free = interface.variables
        if interface.blocked_by is None:
            seen, is_free = read_beside(interface, network)
            chosen = choose_factors(
                activation[seen],
                reader_norms(interface, network, weights)[seen],
                exponent,
                free=is_free,
                powers_of_two=options.powers_of_two,
            )
            factors[seen] = chosen
        before, after = _spread(activation[free]), _spread(activation[free] / factors[free])
        reports.append(InterfaceReport(interface.source, exponent, before, after, interface.blocked_by))
    return network.with_weights(rescale(weights, network, factors)), factors, tuple(reports)


def encode(network: Network, factors: Float64) -> dict[str, Float64]:
    """Factors as a calibration keeps them: what the output channels of each layer are divided by, (C,), by its name."""
    found = {layer.name: factors[layer.result] for layer in network.layers}
    return {name: values for name, values in found.items() if np.any(values != 1)}


def apply_factors(network: Network, saved: Mapping[str, Float64]) -> Network:
    """The network rescaled by what `encode` gave.

    Raises:
        CalibrationError: They are of another graph.
    """
    return network.with_weights(rescale(read_weights(network), network, decode(network, saved)))


def decode(network: Network, saved: Mapping[str, Float64]) -> Float64:
    """The factor of each variable, (count,), of what `encode` gave.

    Raises:
        CalibrationError: They are of another graph.
    """
    layers, factors, free = {layer.name: layer for layer in network.layers}, network.ones(), network.free()
    for name, values in saved.items():
        layer = layers.get(name)
        if (
            layer is None
            or values.shape != (layer.out_channels,)
            or not (values > 0).all()
            or not np.isin(layer.result[values != 1], free).all()
        ):
            raise CalibrationError(f"saved factors of {name!r} do not suit this graph", remedy="calibrate again")
        factors[layer.result] = values
    return factors


def choose_factors(
    activation: Float64,
    weight: Float64,
    exponent: float,
    *,
    free: NDArray[np.bool_] | None = None,
    powers_of_two: bool = False,
) -> Float64:
    """Factors s = activation^exponent / weight^(1 − exponent), (C,), by their median.

    Activations are divided by them, weights multiplied; `weight` is the largest magnitude that reads each channel.
    Channels that are not `free` keep 1, and the others get ranges like theirs: it is their median that counts then.
    """
    free = np.ones(len(activation), bool) if free is None else free
    alive = (activation > 0) & (weight > 0)
    if not (alive & free).any():
        return np.ones_like(activation)
    logs = np.zeros_like(activation)
    logs[alive] = exponent * np.log2(activation[alive]) - (1 - exponent) * np.log2(weight[alive])
    logs[alive] -= np.median(logs[alive & ~free] if (alive & ~free).any() else logs[alive])
    limit = np.log2(_LARGEST_RATIO) / 2
    logs = np.where(free, np.clip(logs, -limit, limit), 0.0)
    return np.exp2(np.round(logs) if powers_of_two else logs)


def rescale(weights: dict[str, FloatArray], network: Network, factors: Float64) -> dict[str, FloatArray]:
    """What computes the same with every channel divided by the factor of its variable, (count,); changes `weights`."""
    for layer in network.layers:
        source, result = factors[layer.source], factors[layer.result]
        if np.any(source != 1):
            wide = weights[layer.weight].astype(np.float64)
            weights[layer.weight] = scale_inputs(wide, layer.groups, source).astype(np.float32)
        if np.any(result != 1):
            column = result.reshape(-1, *[1] * (len(layer.weight_shape) - 1))
            weights[layer.weight] = (weights[layer.weight] / column).astype(np.float32)
            weights[layer.bias] = (weights[layer.bias] / result).astype(np.float32)
    for name, ids in network.shifts:
        if np.any(factors[ids] != 1):
            weights[name] = (weights[name] / factors[ids]).astype(np.float32)
    return weights


def main_reader(interface: Interface, network: Network) -> Layer:
    """The reader with most weights; an SE's layers count only where nothing else reads.

    With few classes the SE of the last block has more weights than the classifier. It reads averages, before a ReLU or
    a gate perhaps, whose ranges say nothing of what the classifier reads, and it stays in floating point anyway.
    """
    readers = [name for name in interface.readers if name not in network.gates] or interface.readers
    return max(map(network.layer, readers), key=lambda layer: int(np.prod(layer.weight_shape)))


def read_beside(interface: Interface, network: Network) -> tuple[Ids, NDArray[np.bool_]]:
    """The variables of an interface and those that its main reader reads beside them; and which are the former."""
    seen = np.union1d(interface.variables, main_reader(interface, network).source)
    return seen, np.isin(seen, interface.variables)


def reader_norms(interface: Interface, network: Network, weights: Mapping[str, FloatArray]) -> Float64:
    """Largest absolute weight that reads each variable of an interface, (count,): of the main reader, where it does."""
    main, found = main_reader(interface, network), np.zeros(network.count)
    others = np.zeros(network.count)
    for layer in map(network.layer, interface.readers):
        norms = input_norms(weights[layer.weight], layer.groups, order="max")
        np.maximum.at(found if layer is main else others, layer.source, norms)
    return np.where(np.isin(np.arange(network.count), main.source), found, others)


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


def _spread(ranges: Float64) -> float:
    alive = ranges[ranges > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 1.0

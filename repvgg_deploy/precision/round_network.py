"""Every layer's weights → 8 bits, first layer to last, each seeing what the quantized layers before it give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graph.edit import copy_without, set_weights
from .grids import INT8, Grid
from .mixed import round_layer_to_half
from .network import Network, read_layer
from .qdq import insert_pairs
from .ranges import Moments
from .round import RoundedLayer, RoundOptions, round_layer, round_nearest
from .run_onnx import LayerWalk, Tell, count_images, spread_images, tell_nobody

_IMAGES_FOR_MEANS = 64  # a mean needs no more


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A network whose weights are all that is left to quantize.

    Attributes:
        network: FP32, equalized or not.
        scales: Of each layer's input, by tensor name.
        kept: Names of layers that stay in floating point.
        half: Whether weight scales and biases are to be exact in FP16; see `mixed`.
        grid: The number format.
    """

    network: Network
    scales: Mapping[str, float]
    kept: tuple[str, ...] = ()
    half: bool = False
    grid: Grid = INT8

    def keeping(self, names: Sequence[str]) -> Prepared:
        """The same with further layers kept."""
        return dataclasses.replace(self, kept=(*self.kept, *names))

    def finish(self, layer: RoundedLayer) -> RoundedLayer:
        """The layer with scales and bias as the graph will hold them."""
        return round_layer_to_half(layer, self.grid) if self.half else layer


def round_weights(
    prepared: Prepared, batches: Sequence[NDArray[Any]], options: RoundOptions, *, progress: Tell = tell_nobody
) -> dict[str, RoundedLayer]:
    """Rounds every layer that is not kept, by name; activations of one layer are in memory at a time."""
    model, scales = prepared.network.model, prepared.scales
    layers = [layer for layer in prepared.network.layers if layer.name not in prepared.kept]
    rounded: dict[str, RoundedLayer] = {}
    if options.method == "nearest" and not options.bias_correction:
        for layer in layers:
            rounded[layer.name] = prepared.finish(round_nearest(*read_layer(prepared.network, layer), prepared.grid))
        return rounded
    # A layer's weights come into this copy when they are rounded; nothing before needs them.
    paired = insert_pairs(prepared.network, scales, kept=prepared.kept, grid=prepared.grid)
    current = copy_without(paired, {layer.weight for layer in layers})
    full = options.method == "second_order"
    some = batches if full else spread_images(model, batches, _IMAGES_FOR_MEANS)
    # In another order, so that the first batches, where not all fit into memory, show a bit of everything.
    mixed = [some[int(index)] for index in np.random.default_rng(options.seed).permutation(len(some))]
    inputs = [layer.input for layer in layers]
    reference, quantized = LayerWalk(model, mixed, tensors=inputs), LayerWalk(current, mixed, tensors=inputs)
    positions = max(1, -(-options.samples // count_images(mixed)))
    for index, layer in enumerate(layers):
        weight, bias = read_layer(prepared.network, layer)
        moments = Moments(layer, weight, positions=positions, seed=options.seed + index, full=full)
        for seen, truth in zip(quantized.advance(layer.input), reference.advance(layer.input), strict=True):
            moments.add(prepared.grid.through(seen, scales[layer.input]), truth)
        found = rounded[layer.name] = prepared.finish(round_layer(weight, bias, moments, options, grid=prepared.grid))
        set_weights(current, {layer.weight: layer.translate(found.weight()), layer.bias: found.bias})
        progress(index + 1, len(layers))
    return rounded

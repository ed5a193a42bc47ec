"""Every layer's weights → INT8, first layer to last, each seeing what the quantized layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .chain import copy_without, read_chain, read_weight, set_weights
from .mixed import round_layer_to_half
from .qdq import fake_quantize, insert_pairs
from .ranges import Moments
from .round import RoundedLayer, RoundOptions, round_layer, round_nearest
from .run_onnx import Steps, count_images, spread_images

_IMAGES_FOR_MEANS = 64  # a mean needs no more


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A network whose weights are all that is left to quantize.

    Attributes:
        model: FP32, equalized or not.
        scales: Of each layer's input, by tensor name.
        kept: Names of layers that stay in floating point.
        half: Whether weight scales and biases are to be exact in FP16; see `mixed`.
    """

    model: onnx.ModelProto
    scales: Mapping[str, float]
    kept: tuple[str, ...] = ()
    half: bool = False


def round_weights(
    prepared: Prepared,
    batches: Sequence[NDArray[Any]],
    options: RoundOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, RoundedLayer]:
    """Rounds every layer.

    Args:
        prepared: Not changed.
        batches: Calibration images; activations of one layer are in memory at a time.
        options: Method.
        progress: Called with layers done and layers in all.

    Returns:
        By name of the layer; without those that are kept.
    """
    model, scales = prepared.model, prepared.scales
    layers = [layer for layer in read_chain(model).layers if layer.name not in prepared.kept]

    def finish(layer: RoundedLayer) -> RoundedLayer:
        return round_layer_to_half(layer) if prepared.half else layer

    if options.method == "nearest" and not options.bias_correction:
        return {
            layer.name: finish(round_nearest(read_weight(model, layer.weight), read_weight(model, layer.bias)))
            for layer in layers
        }
    # A layer's weights come into this copy when they are rounded; nothing before needs them.
    current = copy_without(insert_pairs(model, dict(scales), kept=prepared.kept), {layer.weight for layer in layers})
    full = options.method == "second_order"
    spread = _mixed_order(batches if full else spread_images(model, batches, _IMAGES_FOR_MEANS), options.seed)
    reference, quantized = Steps(model, spread), Steps(current, spread)
    positions = max(1, -(-options.samples // count_images(spread)))
    rounded: dict[str, RoundedLayer] = {}
    for index, layer in enumerate(layers):
        weight, bias = read_weight(model, layer.weight), read_weight(model, layer.bias)
        moments = Moments(layer, weight, positions=positions, seed=options.seed + index, full=full)
        for found, truth in zip(quantized.advance(layer.input), reference.advance(layer.input), strict=True):
            moments.add(fake_quantize(found, scales[layer.input]), truth)
        rounded[layer.name] = finish(round_layer(weight, bias, moments, options))
        set_weights(current, {layer.weight: rounded[layer.name].weight(), layer.bias: rounded[layer.name].bias})
        if progress is not None:
            progress(index + 1, len(layers))
    return rounded


def _mixed_order(batches: Sequence[NDArray[Any]], seed: int) -> list[NDArray[Any]]:
    """The batches in another order, so that the first of them, where not all fit into memory, show a bit of everything."""
    return [batches[int(index)] for index in np.random.default_rng(seed).permutation(len(batches))]

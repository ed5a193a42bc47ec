"""Every layer's weights → INT8, first layer to last, each seeing what the quantized layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .chain import read_chain, read_weights, replace_weights
from .execute import Steps, count_images
from .mixed import round_layer_to_half
from .qdq import fake_quantize, insert_pairs
from .round import Moments, RoundedLayer, RoundOptions, round_layer, round_nearest


def round_weights(
    model: onnx.ModelProto,
    scales: Mapping[str, float],
    batches: Sequence[NDArray[Any]],
    options: RoundOptions,
    *,
    kept: Collection[str] = (),
    half: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, RoundedLayer]:
    """Rounds every layer.

    Args:
        model: FP32, equalized or not.
        scales: Of each layer's input.
        batches: Calibration images; activations of one layer are in memory at a time.
        options: Method.
        kept: Names of layers that stay in floating point.
        half: Make weight scales and biases exact in FP16; see `mixed`.
        progress: Called with layers done and layers in all.

    Returns:
        By name of the layer; without those that are kept.
    """
    chain, weights = read_chain(model), read_weights(model)
    layers = [layer for layer in chain.layers if layer.name not in kept]

    def finish(layer: RoundedLayer) -> RoundedLayer:
        return round_layer_to_half(layer) if half else layer

    if options.method == "nearest" and not options.bias_correction:
        return {layer.name: finish(round_nearest(weights[layer.weight], weights[layer.bias])) for layer in layers}
    current = insert_pairs(model, dict(scales), kept=kept)
    spread = _mixed_order(batches, options.seed)
    reference, quantized = Steps(model, spread), Steps(current, spread)
    positions = max(1, -(-options.samples // count_images(batches)))
    rounded: dict[str, RoundedLayer] = {}
    for index, layer in enumerate(layers):
        moments = Moments(layer, weights[layer.weight], positions=positions, seed=options.seed + index, full=options.method == "second_order")
        for found, truth in zip(quantized.advance(layer.input), reference.advance(layer.input), strict=True):
            moments.add(fake_quantize(found, scales[layer.input]), truth)
        rounded[layer.name] = finish(round_layer(weights[layer.weight], weights[layer.bias], moments, options))
        current = replace_weights(current, {layer.weight: rounded[layer.name].weight(), layer.bias: rounded[layer.name].bias})
        quantized.update(current)
        if progress is not None:
            progress(index + 1, len(layers))
    return rounded


def _mixed_order(batches: Sequence[NDArray[Any]], seed: int) -> list[NDArray[Any]]:
    """The batches in another order, so that the first of them, where not all fit into memory, show a bit of everything."""
    return [batches[int(index)] for index in np.random.default_rng(seed).permutation(len(batches))]

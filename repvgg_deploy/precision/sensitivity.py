"""What each layer costs when it alone is quantized, and the fewest layers to keep in floating point that meet a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .chain import Layer, read_chain
from .cut import Trial, cut_after
from .execute import run_tensors, spread_images
from .metrics import decibels
from .round import RoundedLayer

_IMAGES = 64


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer.

    Attributes:
        name: Of its node.
        sqnr_db: Of the logits (of the last layer reached, where there is no classifier), in decibels, with this layer alone quantized.
        macs: Multiply-accumulates of one image.
    """

    name: str
    sqnr_db: float
    macs: int


def rank_layers(
    model: onnx.ModelProto,
    scales: Mapping[str, float],
    rounded: Mapping[str, RoundedLayer],
    batches: Sequence[NDArray[Any]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LayerCost, ...]:
    """Measures every layer, the costliest first.

    Args:
        model: FP32, equalized or not.
        scales: Of each layer's input.
        rounded: By name of the layer; layers that it does not have are left out.
        batches: Images; 64 of them are used.
        progress: Called with layers done and layers in all.
    """
    chain, images = read_chain(model), spread_images(model, batches, _IMAGES)
    macs = count_macs(model, images[0])
    costs = []
    for layer in (layer for layer in chain.layers if layer.name in rounded):
        cut = cut_after(model, chain, layer, len(chain.layers))
        trial = Trial(model, cut, list(run_tensors(model, cut.given, images)))
        noise = trial.error(scales[layer.input], np.ones(layer.in_channels), rounded[layer.name].weight(), bias=rounded[layer.name].bias)
        costs.append(LayerCost(layer.name, decibels(trial.signal, noise), macs[layer.name]))
        if progress is not None:
            progress(len(costs), len(rounded))
    return tuple(sorted(costs, key=lambda cost: cost.sqnr_db))


def count_macs(model: onnx.ModelProto, batch: NDArray[Any]) -> dict[str, int]:
    """Multiply-accumulates of one image by layer name.

    Args:
        model: FP32, as exported.
        batch: One batch as it takes them; its size decides.
    """
    layers = read_chain(model).layers
    shapes = next(iter(run_tensors(model, [layer.output for layer in layers], [batch])))
    return {layer.name: _macs(layer, shapes[layer.output].shape) for layer in layers}


def blank_batch(model: onnx.ModelProto) -> NDArray[Any]:
    """A batch of zeros as the model takes it: one image, 224 pixels where any size goes."""
    kind = model.graph.input[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else usual for dim, usual in zip(kind.shape.dim, (1, 224, 224, 224), strict=True)]
    return np.zeros(sizes, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _macs(layer: Layer, output: tuple[int, ...]) -> int:
    return int(np.prod(output[1:]) * np.prod(layer.weight_shape[1:]))


def fewest_kept(ranked: Sequence[LayerCost], meets: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """The shortest prefix of the ranking that meets a bound when kept, or None where not even all of them do.

    Args:
        ranked: Costliest first.
        meets: Whether the network does with these layers kept; asked about log₂ of their number times.
    """
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(_names(ranked, middle)) else (middle + 1, high)
    return _names(ranked, low) if meets(_names(ranked, low)) else None


def _names(ranked: Sequence[LayerCost], count: int) -> tuple[str, ...]:
    return tuple(cost.name for cost in ranked[:count])

"""What each layer costs when it alone is quantized, and the fewest layers to keep in floating point that meet a bound.

How far a quantized network is from its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .chain import Layer, read_chain
from .layers import Trial, cut_after
from .round import RoundedLayer
from .run_onnx import run_tensors, split_batches, spread_images


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), between −200 and 200; −200 where either is NaN."""
    if np.isnan(signal) or np.isnan(noise):
        return -200.0
    tiny = 1e-300
    return float(np.clip(10 * np.log10(max(signal, tiny) / max(noise, tiny)), -200.0, 200.0)) if noise > 0 else 200.0


def layer_sqnr(
    reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[NDArray[Any]]
) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of every layer's output in decibels, by tensor; 200 where there is no difference.

    Args:
        reference: FP32, with the same factors on its channels as `quantized`.
        quantized: With the same tensor names.
        batches: Images.
    """
    names = [layer.output for layer in read_chain(reference).layers]
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    kept = split_batches(reference, batches, 4)  # every layer's output of a batch is in memory, twice
    for truth, found in zip(run_tensors(reference, names, kept), run_tensors(quantized, names, kept), strict=True):
        for name in names:
            signal[name] += float(np.square(truth[name], dtype=np.float64).sum())
            noise[name] += float(np.square(np.subtract(truth[name], found[name], dtype=np.float64)).sum())
    return {name: decibels(signal[name], noise[name]) for name in names}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a quantized network makes of images, against FP32.

    Attributes:
        images: How many.
        agreement: Share of images whose best class is the same, 0 to 1.
        expected_drop: Top-1 that is lost, in points, if FP32's own probabilities are right: the mean over images of
            what FP32 gives its best class less what it gives the quantized network's. No labels are needed; changing
            between two classes that FP32 holds for equally likely costs nothing.
        sqnr_db: Of the logits, in decibels.
    """

    images: int
    agreement: float
    expected_drop: float
    sqnr_db: float


def judge(reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> Judgement | None:
    """Compares logits.

    Args:
        reference: FP32.
        quantized: With FP32 at its logits, and the same name for them.
        batches: Images that took no part in the calibration.

    Returns:
        None where the graph has no classifier (features).
    """
    last = read_chain(reference).layers[-1]
    if last.op_type != "Gemm":
        return None
    kept = list(batches)
    pairs = zip(run_tensors(reference, [last.output], kept), run_tensors(quantized, [last.output], kept), strict=True)
    both = [(truth[last.output], found[last.output]) for truth, found in pairs]
    truth, found = (np.concatenate([pair[side] for pair in both]).astype(np.float64) for side in (0, 1))
    powers = np.exp(truth - truth.max(axis=1, keepdims=True))
    best, named = truth.argmax(axis=1), found.argmax(axis=1)
    rows = np.arange(len(truth))
    lost = (powers[rows, best] - powers[rows, named]) / powers.sum(axis=1)
    sqnr = decibels(float(np.square(truth).sum()), float(np.square(truth - found).sum()))
    return Judgement(len(truth), float((best == named).mean()), float(100 * lost.mean()), sqnr)


_IMAGES = 64


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer.

    Attributes:
        name: Of its node.
        sqnr_db: Of the logits (of the last layer reached, where there is no classifier), in decibels, with this layer
            alone quantized.
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
        noise = trial.error(
            scales[layer.input], np.ones(layer.in_channels), rounded[layer.name].weight(), bias=rounded[layer.name].bias
        )
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
    sizes = [
        dim.dim_value if dim.HasField("dim_value") else usual
        for dim, usual in zip(kind.shape.dim, (1, 224, 224, 224), strict=True)
    ]
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

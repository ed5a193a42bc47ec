"""How far a quantized network is from its original: as a whole, at every layer, and with each layer quantized alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..errors import ParityError
from ..evaluate.agreement import decibels
from ..graph.edit import copy_model
from ..images.classes import softmax
from .layers import quantize_alone
from .network import Network
from .round import RoundedLayer
from .round_network import Prepared
from .run_onnx import Tell, Tensors, count_images, open_tensors, run_tensors, split_batches, spread_images, tell_nobody

_IMAGES = 64


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output is from FP32's, over all images.

    Attributes:
        name: Of its tensor.
        sqnr_db: Signal-to-quantization-noise ratio in decibels.
        relative: Root mean square of the error by that of the output.
    """

    name: str
    sqnr_db: float
    relative: float


@dataclass(frozen=True, slots=True)
class Verification:
    """A typed graph against the FP32 graph, on the same images.

    Attributes:
        images: How many were run.
        held_out: Whether they took no part in the calibration.
        agreement: Share of images whose best class is the same, 0 to 1; None where the graph has no classifier.
        expected_drop: Top-1 that is lost, in points, if FP32's own probabilities are right: the mean over images of
            what FP32 gives its best class less what it gives the other's. No labels are needed; changing between two
            classes that FP32 holds for equally likely costs nothing. None without a classifier.
        sqnr_db: Of the logits, in decibels; without a classifier, of the worst of the outputs.
        outputs: What was compared (`Network.judged`), each apart.
        median_db: SQNR of the logits of the median image; None without a classifier. Where it is far above `sqnr_db`,
            few images have most of the error: such as make activations explode, which INT8 clips.
    """

    images: int
    held_out: bool
    agreement: float | None
    expected_drop: float | None
    sqnr_db: float
    outputs: tuple[OutputError, ...] = ()
    median_db: float | None = None

    @property
    def differing(self) -> int:
        """Images whose best class is another."""
        return 0 if self.agreement is None else round((1 - self.agreement) * self.images)


class Judge:
    """Compares typed graphs with one FP32 graph on the same images. What FP32 gives its classes is computed once."""

    def __init__(self, network: Network, batches: Sequence[NDArray[Any]], *, held_out: bool = True) -> None:
        self.classifies, self._names = network.classifies, list(network.judged)
        self._reference = network.model
        self._batches = batches
        self._held_out = held_out
        self._logits: list[Tensors] = []

    def compare(self, typed: onnx.ModelProto, *, progress: Tell = tell_nobody) -> Verification:
        """Runs a typed graph; `progress` is called with images done and images in all.

        Raises:
            ParityError: It gives NaN or infinite values.
        """
        signal, noise = dict.fromkeys(self._names, 0.0), dict.fromkeys(self._names, 0.0)
        agreeing, done, lost, run = 0, 0, 0.0, None
        by_image: list[float] = []
        outputs = run_tensors(accept_floats(typed), self._names, self._batches)
        for index, (found, batch) in enumerate(zip(outputs, self._batches, strict=True)):
            if index < len(self._logits):
                truth = self._logits[index]
            else:
                run = run or open_tensors(self._reference, self._names)
                truth = run(batch)
                self._logits += [truth] if self.classifies else []
            for name in self._names:
                one, two = truth[name].astype(np.float64), found[name].astype(np.float64)
                if not np.isfinite(two).all():
                    raise ParityError(
                        f"the typed graph gives NaN or infinite values at {name}",
                        remedy="keep this model in FP32, and please report it",
                    )
                signal[name] += float(np.square(one).sum())
                noise[name] += float(np.square(one - two).sum())
                if self.classifies:
                    agreeing += int((one.argmax(axis=1) == two.argmax(axis=1)).sum())
                    lost += _lost(one, two)
                    by_image += map(decibels, np.square(one).sum(axis=1), np.square(one - two).sum(axis=1))
            done += len(batch)
            progress(done, count_images(self._batches))
        share, drop = (agreeing / done, 100 * lost / done) if self.classifies else (None, None)
        ratios = {name: decibels(signal[name], noise[name]) for name in self._names}
        each = tuple(OutputError(name, sqnr_db, 10 ** (-sqnr_db / 20)) for name, sqnr_db in ratios.items())
        median = float(np.median(by_image)) if self.classifies else None
        return Verification(done, self._held_out, share, drop, min(ratios.values()), each, median)


def _lost(truth: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """What FP32 gives its best classes less what it gives the other's best, as probabilities, summed."""
    shares, rows = softmax(truth), np.arange(len(truth))
    return float((shares[rows, truth.argmax(axis=1)] - shares[rows, found.argmax(axis=1)]).sum())


def accept_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a cast before a float16 input, so that it takes what the FP32 graph takes."""
    if model.graph.input[0].type.tensor_type.elem_type != TensorProto.FLOAT16:
        return model
    result = copy_model(model)
    given = result.graph.input[0]
    result.graph.node.insert(0, helper.make_node("Cast", [f"{given.name}.fp32"], [given.name], to=TensorProto.FLOAT16))
    given.name, given.type.tensor_type.elem_type = f"{given.name}.fp32", TensorProto.FLOAT
    return result


def layer_sqnr(network: Network, quantized: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of every layer's output in decibels, by tensor; 200 without any difference.

    `network` is FP32, with the same factors on its channels as `quantized`, which has the same tensor names.
    """
    names = [layer.output for layer in network.layers]
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    small = split_batches(network.model, batches, 4)  # every layer's output of a batch is in memory, twice
    for truth, found in zip(
        run_tensors(network.model, names, small), run_tensors(quantized, names, small), strict=True
    ):
        for name in names:
            signal[name] += float(np.square(truth[name], dtype=np.float64).sum())
            noise[name] += float(np.square(np.subtract(truth[name], found[name], dtype=np.float64)).sum())
    return {name: decibels(signal[name], noise[name]) for name in names}


def count_macs(network: Network, batch: NDArray[Any]) -> dict[str, int]:
    """Multiply-accumulates of one image by layer name; the size of the batch's images decides."""
    shapes = open_tensors(network.model, [layer.output for layer in network.layers])(batch)
    return {
        layer.name: int(np.prod(shapes[layer.output].shape[1:]) * np.prod(layer.weight_shape[1:]))
        for layer in network.layers
    }


def blank_batch(model: onnx.ModelProto) -> NDArray[Any]:
    """A batch of zeros as the model takes it: one image, 224 pixels where any size goes."""
    kind = model.graph.input[0].type.tensor_type
    usual = (1, 224, 224, 224)
    sizes = [dim.dim_value if dim.HasField("dim_value") else n for dim, n in zip(kind.shape.dim, usual, strict=True)]
    return np.zeros(sizes, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


@dataclass(frozen=True, slots=True)
class QuantizationCost:
    """What it costs to quantize one layer.

    Attributes:
        name: Of its node.
        sqnr_db: Of the logits, or of the worst of the answers that it reaches, in decibels, with this layer
            alone quantized.
        macs: Multiply-accumulates of one image.
        outputs: The same of each that it reaches.
    """

    name: str
    sqnr_db: float
    macs: int
    outputs: dict[str, float] = field(default_factory=dict)


def rank_layers(
    prepared: Prepared,
    rounded: Mapping[str, RoundedLayer],
    batches: Sequence[NDArray[Any]],
    *,
    macs: Mapping[str, int],
    progress: Tell = tell_nobody,
) -> tuple[QuantizationCost, ...]:
    """What every layer costs when it alone is quantized, measured on 64 of the images; the costliest first.

    Layers that `rounded` does not have are left out; `macs` and `rounded` are by name of the layer.
    """
    network, images = prepared.network, spread_images(prepared.network.model, batches, _IMAGES)
    costs = []
    for layer in (layer for layer in network.layers if layer.name in rounded):
        steps = (prepared.scales[layer.input], prepared.grid)
        found = quantize_alone(network, layer, rounded[layer.name], steps=steps, images=images)
        costs.append(QuantizationCost(layer.name, min(found.values()), macs[layer.name], found))
        progress(len(costs), len(rounded))
    return tuple(sorted(costs, key=lambda cost: cost.sqnr_db))


def fewest_kept(ranked: Sequence[QuantizationCost], meets: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """The shortest prefix of the ranking (costliest first) that meets a bound when kept; None where none does.

    `meets` says whether the network does with these layers kept; it is asked about log₂ of their number times.
    """
    names = tuple(cost.name for cost in ranked)
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(names[:middle]) else (middle + 1, high)
    return names[:low] if meets(names[:low]) else None

"""The gate of a quantization: the very graph that is to be written against the FP32 graph, on the same images; and which layers are to blame."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..errors import ParityError
from ..evaluate.agreement import compare_layers
from ..specs.values import Check
from .chain import read_chain, read_weights
from .equalize import apply_factors
from .layers import LayerRun, run_pairs
from .metrics import decibels, rank_layers
from .round import round_nearest
from .run_onnx import count_images, run_tensors, spread_images
from .scales import ScaleFile

MIN_FP16_DB = 40.0
"""FP16 rounds to 66 dB an operation; some thirty layers in a row leave 50 or more. Below 40, a hundredth of the logits, something has overflowed or
gone subnormal."""
_BLAMED = 3
_BLAME_IMAGES = 16
Steps = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """The typed graph against the FP32 graph.

    Attributes:
        images: How many were run.
        held_out: Whether they took no part in the calibration.
        agreement: Share of images whose best class is the same, 0 to 1; None where the graph has no classifier.
        expected_drop: Top-1 that is lost, in points, if FP32's own probabilities are right (see `metrics.Judgement`);
            None likewise.
        sqnr_db: Of the logits; without a classifier of all outputs.
    """

    images: int
    held_out: bool
    agreement: float | None
    expected_drop: float | None
    sqnr_db: float

    @property
    def differing(self) -> int:
        """Images whose best class is another."""
        return 0 if self.agreement is None else round((1 - self.agreement) * self.images)


def verify_typed(
    reference: onnx.ModelProto,
    typed: onnx.ModelProto,
    batches: Sequence[NDArray[Any]],
    *,
    held_out: bool,
    progress: Steps | None = None,
) -> Verification:
    """Runs both in ONNX Runtime.

    Args:
        reference: FP32.
        typed: What was made of it.
        batches: As `reference` takes them.
        held_out: Whether they took no part in the calibration.
        progress: Called with images done and images in all.

    Raises:
        ParityError: The typed graph gives NaN or infinite values.
    """
    last = read_chain(reference).layers[-1]
    classifies = last.op_type == "Gemm"
    names = [last.output] if classifies else [value.name for value in reference.graph.output]
    signal = noise = lost = 0.0
    agreeing = done = 0
    runs = zip(
        run_tensors(reference, names, batches), run_tensors(_accept_floats(typed), names, batches), batches, strict=True
    )
    for truth, found, batch in runs:
        for name in names:
            one, two = truth[name].astype(np.float64), found[name].astype(np.float64)
            if not np.isfinite(two).all():
                raise ParityError(
                    f"the typed graph gives NaN or infinite values at {name}",
                    remedy="keep this model in FP32, and please report it",
                )
            signal, noise = signal + float(np.square(one).sum()), noise + float(np.square(one - two).sum())
            if classifies:
                agreeing += int((one.argmax(axis=1) == two.argmax(axis=1)).sum())
                lost += _lost(one, two)
        done += len(batch)
        if progress is not None:
            progress(done, count_images(batches))
    share, drop = (agreeing / done, 100 * lost / done) if classifies else (None, None)
    return Verification(done, held_out, share, drop, decibels(signal, noise))


def _lost(truth: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """What FP32 gives its best classes less what it gives the other's best, as probabilities, summed."""
    powers = np.exp(truth - truth.max(axis=1, keepdims=True))
    rows = np.arange(len(truth))
    return float(((powers[rows, truth.argmax(axis=1)] - powers[rows, found.argmax(axis=1)]) / powers.sum(axis=1)).sum())


def _accept_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a cast before a float16 input, so that it takes what the FP32 graph takes."""
    if model.graph.input[0].type.tensor_type.elem_type != TensorProto.FLOAT16:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    given = result.graph.input[0]
    result.graph.node.insert(0, helper.make_node("Cast", [f"{given.name}.fp32"], [given.name], to=TensorProto.FLOAT16))
    given.name, given.type.tensor_type.elem_type = f"{given.name}.fp32", TensorProto.FLOAT
    return result


def allowed_to_differ(images: int, min_agreement: float) -> int:
    """How many of so many images may have another best class: one where even one is more than the share allows, for it says nothing."""
    allowed = math.floor(images * (1 - min_agreement) + 1e-9)
    return max(allowed, 1) if min_agreement < 1 else 0


def agreement_check(found: Verification, precision: str, min_agreement: float) -> Check:
    """The comparison as the certificate states it."""
    what = "held-out images" if found.held_out else "images"
    name = f"{precision} against fp32 in ONNX Runtime, {found.images} {what}: share of other best classes"
    return Check(
        name, found.differing / found.images, allowed_to_differ(found.images, min_agreement) / found.images, 1.0
    )


def error_check(found: Verification, precision: str) -> Check:
    """Root mean square of the error of FP16 by that of the outputs, as the certificate states it."""
    name = f"{precision} against fp32 in ONNX Runtime, {found.images} images: rms error of the outputs"
    return Check(name, 10 ** (-found.sqnr_db / 20), 10 ** (-MIN_FP16_DB / 20), 1.0)


def blame_int8(
    reference: onnx.ModelProto, scales: ScaleFile, kept: Sequence[str], batches: Sequence[NDArray[Any]]
) -> list[tuple[str, float]]:
    """The layers that cost most when each alone is quantized with the chosen scales, and the SQNR of the logits then, the worst first.

    Weights are rounded to nearest and few images are run, so that it takes a fraction of the time that the quantization
    took.
    """
    factors = {
        name: np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64) for name, text in scales.factors.items()
    }
    prepared = apply_factors(reference, factors)
    weights = read_weights(prepared)
    layers = [layer for layer in read_chain(prepared).layers if layer.name not in kept]
    rounded = {layer.name: round_nearest(weights[layer.weight], weights[layer.bias]) for layer in layers}
    ranked = rank_layers(prepared, scales.scales, rounded, spread_images(reference, batches, _BLAME_IMAGES))
    return [(cost.name, cost.sqnr_db) for cost in ranked[:_BLAMED]]


def blame_fp16(
    reference: onnx.ModelProto, typed: onnx.ModelProto, batches: Sequence[NDArray[Any]]
) -> list[tuple[str, float]]:
    """The first layers whose outputs have an SQNR too low, rescaled channels scaled back; where none has, those with the lowest."""
    one, two = LayerRun(reference), LayerRun(typed)
    images = spread_images(reference, batches, _BLAME_IMAGES)
    layers = compare_layers(
        run_pairs(one, two, ((batch, batch) for batch in images)), fixed=one.shared_with(two).classifiers
    )
    below = [layer for layer in layers if layer.sqnr_db < MIN_FP16_DB] or sorted(
        layers, key=lambda layer: layer.sqnr_db
    )
    return [(layer.name, layer.sqnr_db) for layer in below[:_BLAMED]]

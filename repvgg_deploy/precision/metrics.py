"""How far a quantized network is from its original."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .chain import read_chain
from .execute import run_tensors, split_batches


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), between −200 and 200; −200 where either is NaN."""
    if np.isnan(signal) or np.isnan(noise):
        return -200.0
    tiny = 1e-300
    return float(np.clip(10 * np.log10(max(signal, tiny) / max(noise, tiny)), -200.0, 200.0)) if noise > 0 else 200.0


def layer_sqnr(reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> dict[str, float]:
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
        expected_drop: Top-1 that is lost, in points, if FP32's own probabilities are right: the mean over images of what FP32 gives its best class
            less what it gives the quantized network's. No labels are needed; changing between two classes that FP32 holds for equally likely
            costs nothing.
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

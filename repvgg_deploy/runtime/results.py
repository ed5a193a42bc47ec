"""What `infer` returns, and how the outputs of several runs become one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..specs.values import ModelSpec

Arrays: TypeAlias = "tuple[NDArray[Any], ...]"


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The best classes of each image, best first.

    Attributes:
        scores: float32 (N, K).
        classes: int64 (N, K), indices into the labels.
    """

    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


Result: TypeAlias = "NDArray[np.float32] | TopK | dict[str, NDArray[Any]]"


def package(outputs: Sequence[NDArray[Any]], spec: ModelSpec) -> Result:
    """Outputs in the order of the specification → what the caller gets.

    Returns:
        TopK of a top-5 model; else the array where there is one output, a dict by name where there are several.
    """
    if spec.kind == "top5":
        scores, classes = outputs
        return TopK(scores.astype(np.float32, copy=False), classes.astype(np.int64, copy=False))
    widened = [array.astype(np.float32) if array.dtype == np.float16 else array for array in outputs]
    if len(widened) == 1:
        return widened[0]
    return {output.name: array for output, array in zip(spec.outputs, widened, strict=True)}


def join(parts: Sequence[Arrays]) -> Arrays:
    """The outputs of consecutive pieces of a batch as those of the whole."""
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities (…, classes) in float64 of logits (…, classes)."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    total: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return total


def rank_classes(result: Result, spec: ModelSpec, top: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Classes and scores of each image, best first; of equal ones, the lower class first.

    Args:
        result: Of a classifier.
        spec: Of the same model. The scores of logits are their softmax over all classes, those of other models what
            they give.
        top: How many of each image, where there are so many.
    """
    if isinstance(result, TopK):
        yield from zip(result.classes[:, :top], result.scores[:, :top].astype(np.float64), strict=True)
        return
    assert isinstance(result, np.ndarray), "a classifier has one output"
    for row in result.astype(np.float64):
        scores = softmax(row) if spec.kind == "logits" else row
        order = np.argsort(-scores, kind="stable")[:top]
        yield order, scores[order]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """One run of a plan, in milliseconds.

    Attributes:
        to_device_ms: Copy of the input from page-locked memory.
        compute_ms: The network.
        to_host_ms: Copies of the outputs to page-locked memory.
        enqueue_ms: Of the CPU, to hand the network to the GPU; the GPU works meanwhile.
    """

    to_device_ms: float
    compute_ms: float
    to_host_ms: float
    enqueue_ms: float

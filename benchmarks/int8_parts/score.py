"""How good a graph is: top-1, agreement with FP32, and the signal-to-quantization-noise ratio (SQNR) of the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repvgg_deploy.evaluate.agreement import decibels
from repvgg_deploy.precision.run_onnx import open_session

from .data import as_batches


def score(folder: Path, graph: Path) -> dict[str, Any]:
    """Runs a graph in ONNX Runtime, every Q/DQ pair as it stands, on all evaluation images.

    Methods are chosen on the first half of them and reported on the second; top-1 is of all. Logits of `fp32.onnx` are
    kept beside it.

    Args:
        folder: See `data`.
        graph: FP32, FP16 or INT8, in either form.
    """
    logits = run(folder, graph)
    if graph.name == "fp32.onnx":
        np.save(folder / "logits.npy", logits)
    truth, labels = np.load(folder / "logits.npy"), np.load(folder / "labels.npy")
    half = len(labels) // 2
    parts = {"choosing": slice(0, half), "reported": slice(half, None), "all": slice(None)}
    return {name: _compare(truth[part], logits[part], labels[part]) for name, part in parts.items()}


def run(folder: Path, graph: Path) -> NDArray[np.float64]:
    """Logits of all evaluation images, (N, classes)."""
    session = open_session(onnx.load(graph))
    name, half = session.get_inputs()[0].name, session.get_inputs()[0].type == "tensor(float16)"
    batches = as_batches(folder, np.load(folder / "evaluation.npy"))
    found = [session.run(None, {name: batch.astype(np.float16) if half else batch})[0] for batch in batches]
    return np.concatenate(found).astype(np.float64)


def _compare(truth: NDArray[np.float64], found: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    answers = found.argmax(axis=1)
    right, reference = (answers == labels).mean(), (truth.argmax(axis=1) == labels).mean()
    return {
        "images": len(labels),
        "top1": float(100 * right),
        "drop": float(100 * (reference - right)),
        "agreement": float(100 * (answers == truth.argmax(axis=1)).mean()),
        "sqnr_db": decibels(float(np.square(truth).sum()), float(np.square(truth - found).sum())),
    }

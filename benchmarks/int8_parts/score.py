"""How good a graph is: the signal-to-quantization-noise ratio (SQNR) of each output, and what its task is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repvgg_deploy.evaluate.agreement import decibels
from repvgg_deploy.precision.run_onnx import open_session

from .data import as_batches
from .places import SUBJECTS


def score(folder: Path, graph: Path, subject: str) -> dict[str, Any]:
    """Runs a graph in ONNX Runtime, every Q/DQ pair as it stands, on all evaluation images.

    Methods are chosen on the first half of them and reported on the second; top-1 and mAP are of all. Outputs of
    `fp32.onnx` are kept beside it.

    Args:
        folder: See `data`.
        graph: FP32, FP16 or INT8, in either form.
        subject: Of `SUBJECTS`.
    """
    found, kind = run(folder, graph), SUBJECTS[subject].kind
    if graph.name == "fp32.onnx":
        np.savez(folder / "outputs.npz", **found)  # type: ignore[arg-type]  # a name could be allow_pickle
    with np.load(folder / "outputs.npz") as stored:
        truth = {name: stored[name] for name in stored.files}
    count = len(next(iter(truth.values())))
    parts = {"choosing": slice(0, count // 2), "reported": slice(count // 2, None), "all": slice(None)}
    scores: dict[str, Any] = {name: _compare(truth, found, part) for name, part in parts.items()}
    if kind == "classifier":
        labels = np.load(folder / "labels.npy")
        for name, part in parts.items():
            reference, answers = (next(iter(each.values()))[part].argmax(axis=1) for each in (truth, found))
            scores[name] |= _classify(reference, answers, labels[part])
            scores[name]["median_db"] = _find_median(*(next(iter(each.values()))[part] for each in (truth, found)))
    if kind == "detector":
        from .detection import measure

        scores["all"] |= measure(folder, found, is_reference=graph.name == "fp32.onnx")
    return scores


def run(folder: Path, graph: Path) -> dict[str, NDArray[np.float32]]:
    """Outputs of all evaluation images by name, (N, …)."""
    session = open_session(onnx.load(graph))
    name, half = session.get_inputs()[0].name, session.get_inputs()[0].type == "tensor(float16)"
    batches = as_batches(folder, np.load(folder / "evaluation.npy"))
    found = [session.run(None, {name: batch.astype(np.float16) if half else batch}) for batch in batches]
    names = [output.name for output in session.get_outputs()]
    return {
        n: np.concatenate(arrays).astype(np.float32) for n, arrays in zip(names, zip(*found, strict=True), strict=True)
    }


def _compare(truth: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]], part: slice) -> dict[str, Any]:
    """SQNR of each output in decibels, and of the worst."""
    outputs = {}
    for name in truth:
        one, two = (each[name][part].astype(np.float64) for each in (truth, found))
        outputs[name] = decibels(float(np.square(one).sum()), float(np.square(one - two).sum()))
    return {"images": len(one), "outputs": outputs, "sqnr_db": min(outputs.values())}


def _find_median(truth: NDArray[Any], found: NDArray[Any]) -> float:
    """SQNR of the median image in decibels."""
    one, two = (each.astype(np.float64) for each in (truth, found))
    return float(np.median([decibels(s, n) for s, n in zip((one**2).sum(1), ((one - two) ** 2).sum(1), strict=True)]))


def _classify(reference: NDArray[np.int64], answers: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Of best classes, in percent."""
    full, top1 = (float(100 * (each == labels).mean()) for each in (reference, answers))
    return {"top1": top1, "drop": full - top1, "agreement": float(100 * (answers == reference).mean())}

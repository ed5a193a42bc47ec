"""An ONNX file in ONNX Runtime against reference outputs that were computed before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingDependencyError, ParityError, say_install
from ..files.onnx import open_initializers
from ..images.classes import softmax
from ..images.drawn import Batch
from ..model.tolerance import FLOAT32_FLOOR, allow_float32, compare, largest
from ..specs.values import Check, ModelSpec

_MAX_PROBABILITY_TOLERANCE = 0.01  # relative
Arrays = Mapping[str, NDArray[Any]]


def verify_onnx(
    path: Path, spec: ModelSpec, batches: tuple[Batch, ...], references: Mapping[str, Arrays], *, training_error: float
) -> tuple[Check, ...]:
    """Compares an exported model with the training-mode model's outputs.

    Args:
        path: The `.onnx`.
        spec: Its inputs and outputs.
        batches: What to run; those that do not fit its fixed batch, size or input are left out, and at least one must
            fit.
        references: By batch name: the training-mode model's `logits` and `stage1` … `stage4`.
        training_error: Its own float32 error.

    Raises:
        ParityError: ONNX Runtime refuses the model, or no batch fits.
    """
    usable = [batch for batch in batches if batch.name in references and _fits(batch, spec)]
    if not usable:
        raise ParityError(
            f"no verification batch fits the input {spec.input.shape}", remedy="report the export options"
        )
    fixed = spec.batch
    feeds = {}
    for batch in usable:
        array = batch.input_for(spec.input.dtype)
        filled = array if fixed is None else np.resize(array, (fixed, *array.shape[1:]))
        feeds[batch.name] = {spec.input.name: filled}
    results = run_onnx(path, feeds)
    allowed = allow_float32(training_error)
    checks: list[Check] = []
    for batch in usable:
        count = len(batch.array) if fixed is None else min(fixed, len(batch.array))
        reference = {name: array[:count] for name, array in references[batch.name].items()}
        result = {name: array[:count] for name, array in results[batch.name].items()}
        checks += _compare(batch.name, spec, result, reference, allowed=allowed)
    if not checks:
        raise ParityError(
            "no verification batch gives probabilities that can be compared: the logits are too large",
            remedy="export with --output logits",
        )
    return tuple(checks)


def _fits(batch: Batch, spec: ModelSpec) -> bool:
    if spec.input.dtype == "uint8" and batch.images is None:
        return False
    wanted = [spec.input.shape[axis] for axis in spec.input.image_axes or ()]
    return all(isinstance(want, str) or want == size for want, size in zip(wanted, batch.array.shape[2:], strict=True))


def _compare(name: str, spec: ModelSpec, result: Arrays, reference: Arrays, *, allowed: float) -> list[Check]:
    """The checks of one batch; none where they could not fail."""
    if spec.kind == "features":
        return [
            compare(f"ONNX, {output.name}, {name}", result[output.name], reference[output.name], allowed)
            for output in spec.outputs
        ]
    logits = reference["logits"]
    if spec.kind == "logits":
        return [compare(f"ONNX, {name}", result["logits"], logits, allowed)]
    # An error d of every logit changes a probability by a factor of at most exp(2·d).
    relative = float(np.expm1(2 * allowed * largest(logits)))
    if relative > _MAX_PROBABILITY_TOLERANCE:
        return []  # logits so large that rounding alone decides the probabilities
    probabilities, tolerance = softmax(logits), relative + FLOAT32_FLOOR
    if spec.kind == "probabilities":
        return [compare(f"ONNX, {name}", result["probabilities"], probabilities, tolerance)]
    # Scores against the largest probabilities, and against the probability of each class that was named: ties may be in
    # any order.
    scores, classes = result["scores"], result["classes"]
    best = -np.sort(-probabilities, axis=1)[:, : scores.shape[1]]
    named = np.take_along_axis(probabilities, np.clip(classes, 0, probabilities.shape[1] - 1), axis=1)
    return [
        compare(f"ONNX, top-{scores.shape[1]} scores, {name}", scores, best, tolerance),
        compare(f"ONNX, top-{scores.shape[1]} classes, {name}", scores, named, tolerance),
    ]


def require_same_weights(path: Path, weights: Arrays) -> None:
    """Compares every weight of the file with what it was written from, bit for bit: no run excites all of them.

    Args:
        path: The `.onnx`.
        weights: By initializer name; float32, C-contiguous.

    Raises:
        ParityError: A weight is missing, of another shape or differs.
    """
    different = []
    with open_initializers(path) as found:
        for name, array in weights.items():
            shape, data = found.get(name, ((), memoryview(b"")))
            expected = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            if shape != array.shape or not np.array_equal(np.frombuffer(data, np.uint8), expected):
                different.append(name)
    if different:
        raise ParityError(
            f"the deploy form against the ONNX: {len(different)} of {len(weights)} weights differ, first "
            f"{different[0]}",
            remedy="the model was not written; report the checkpoint and the versions",
        )


def run_onnx(
    path: Path, feeds: Mapping[str, Mapping[str, NDArray[Any]]], *, content: bytes | None = None
) -> dict[str, dict[str, NDArray[Any]]]:
    """Runs an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: The file.
        feeds: By batch name: arrays by input name.
        content: Run this in place of what the file holds; messages name the file.

    Returns:
        By batch name: arrays by output name.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ParityError: ONNX Runtime refuses the file or a batch.
    """
    session = _open(path, content)
    names = [output.name for output in session.get_outputs()]
    results = {}
    for batch, arrays in feeds.items():
        try:
            results[batch] = dict(zip(names, session.run(names, dict(arrays)), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            other = batch.removeprefix("another ")
            fixed = f"give it a fixed {other}: what torch or another exporter wrote holds for one {other} only"
            raise ParityError(
                f"ONNX Runtime cannot run {path.name} on the batch {batch!r}: {error}",
                remedy=fixed if other != batch else "report the model and the versions",
            ) from error
    return results


def _open(path: Path, content: bytes | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is not installed, and nothing is written that was not verified",
            remedy=say_install("export,cpu"),
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A verification runs each batch once, and memory is the limit: no arena that only grows, and none of the layout
    # optimizations that hold every weight twice more while a session opens (B2: 1,125 MB against 428 MB, and no CPU
    # time saved).
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ParityError(
            f"ONNX Runtime refuses {path.name}: {error}", remedy="report the model and the versions"
        ) from error

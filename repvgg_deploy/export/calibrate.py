"""Checkpoint + its ONNX → `NAME.calib.npz`: calibration images synthesised from BatchNorm statistics, resumable.

What is done so far stands in `NAME.calib.partial.npz` beside it: finished images and the batch under way, with all that
the optimiser knows. It is written every half minute and on any interruption, used when the same is asked for again, and
removed at the end.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ArtifactError, InputError, RepVGGDeployError
from ..files.onnx import read_metadata
from ..files.output import PendingOutput, atomic_output, sha256_file
from ..files.versions import tool_versions
from ..images.calibration import calibration_path, load_calibration_file
from ..model.checkpoint.load import Checkpoint, build_model, load_checkpoint
from ..specs import codec
from ..specs.values import CALIBRATION_SCHEMA, CalibrationProvenance, ModelMetadata, Preprocessing
from .synthesize import BatchState, SynthesisOptions, SynthesisPlan, Synthesizer, plan_synthesis

_SAVE_SECONDS = 30.0
_LOG = logging.getLogger(__name__)
Steps = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What was synthesised.

    Attributes:
        output: The `.calib.npz`, and whether it was written or stood there already.
        provenance: What it carries.
    """

    output: PendingOutput
    provenance: CalibrationProvenance


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done so far: images and mismatch of the finished batches, and the batch under way."""

    images: tuple[NDArray[np.uint8], ...] = ()
    mismatch: tuple[float, ...] = ()
    batch: BatchState | None = None


def partial_path(onnx: Path) -> Path:
    """Where unfinished work stands: `b2.calib.partial.npz` beside `b2.onnx`."""
    return calibration_path(onnx).with_suffix(".partial.npz")


def write_calibration(
    ckpt: Path | str,
    onnx: Path | str,
    *,
    options: SynthesisOptions | None = None,
    force: bool = False,
    progress: Steps | None = None,
) -> CalibrationResult:
    """Synthesises calibration images for an exported ONNX and writes them beside it; goes on where it was interrupted.

    Equal arguments, versions and thread counts give equal bytes, interrupted or not. Memory holds one batch under
    optimisation, whatever the number of images, and the finished ones as bytes.

    Args:
        ckpt: The training-form checkpoint that the ONNX was exported from.
        onnx: From `export_checkpoint`.
        options: How many images and steps, and the seed.
        force: Replace a different calibration file.
        progress: Called with steps done, those of an interrupted run included, and steps in all.

    Raises:
        CalibrationError: The checkpoint is in deploy form and has no statistics.
        CheckpointError: The checkpoint cannot be read.
        ModelError: The ONNX is damaged or not one of ours.
        InputError: The ONNX was made from another checkpoint, or the number of images does not suit it.
        ArtifactError: A different calibration file stands there, or it cannot be written.
    """
    onnx, options = Path(onnx), options or SynthesisOptions()
    metadata = read_metadata(onnx)
    checkpoint = load_checkpoint(ckpt, arch=metadata.variant)
    preprocessing = _preprocessing(onnx, metadata, checkpoint)
    plan = plan_synthesis(checkpoint.spec, preprocessing.crop, options, multiple=metadata.spec.batch or 1)
    synthesizer = Synthesizer(build_model(checkpoint), preprocessing, seed=options.seed, steps=plan.steps)
    wanted = _provenance(onnx, checkpoint, plan, options.seed)
    target = calibration_path(onnx)
    found = _existing(target, wanted, force)
    if found is not None:
        partial_path(onnx).unlink(missing_ok=True)
        return CalibrationResult(PendingOutput(target, target, "up to date"), found)
    journal = _Journal(partial_path(onnx), plan, wanted)
    _optimise(synthesizer, plan, journal, progress or _silent)
    work = journal.work
    provenance = dataclasses.replace(wanted, loss=float(np.average(work.mismatch, weights=plan.batches)))
    with atomic_output(target, force=force) as output, output.partial.open("wb") as file:
        np.savez(file, images=np.concatenate(work.images), provenance=np.array(codec.dumps(provenance)))
    partial_path(onnx).unlink(missing_ok=True)
    return CalibrationResult(output, provenance)


def _silent(done: int, total: int) -> None:
    """No progress wanted."""


def _preprocessing(onnx: Path, metadata: ModelMetadata, checkpoint: Checkpoint) -> Preprocessing:
    if metadata.source is None or metadata.spec.preprocessing is None or metadata.source.sha256 != checkpoint.sha256:
        made_of = (
            "weights in memory"
            if metadata.source is None
            else f"a checkpoint with sha256 {metadata.source.sha256[:16]}…"
        )
        raise InputError(
            f"{onnx}: exported from {made_of}, expected {checkpoint.path} with {checkpoint.sha256[:16]}…",
            remedy="give the checkpoint that the ONNX was exported from, or export this one",
        )
    return metadata.spec.preprocessing


def _provenance(onnx: Path, checkpoint: Checkpoint, plan: SynthesisPlan, seed: int) -> CalibrationProvenance:
    """As it will be, but for the mismatch."""
    return CalibrationProvenance(
        schema=CALIBRATION_SCHEMA,
        onnx_sha256=sha256_file(onnx),
        checkpoint_sha256=checkpoint.sha256,
        method="bn_statistics",
        images=plan.images,
        seed=seed,
        steps=plan.steps,
        loss=0.0,
        versions=tool_versions(),
    )


def _existing(target: Path, wanted: CalibrationProvenance, force: bool) -> CalibrationProvenance | None:
    """The provenance of what stands there when it is what is wanted; None when there is nothing, or it may be replaced."""
    if not target.exists():
        return None
    try:
        _, found = load_calibration_file(target)
    except RepVGGDeployError:
        found = None
    if found is not None and dataclasses.replace(found, loss=0.0) == wanted:
        return found
    if not force:
        raise ArtifactError(
            f"{target}: exists and differs from what would be written",
            remedy="give --force to replace it, or another --out",
        )
    return None


class _Journal:
    """The work, and the file that keeps it.

    Args:
        path: The file.
        plan: What is to be done.
        wanted: For what.

    Attributes:
        work: What is done so far: by an interrupted run, where the file is of the same work. It is replaced, not
            changed: whole at any moment.
    """

    def __init__(self, path: Path, plan: SynthesisPlan, wanted: CalibrationProvenance) -> None:
        self._path = path
        self._key = codec.dumps({"wanted": wanted, "batches": plan.batches})
        self.work = _read_work(path, self._key, plan)
        self.save()  # a folder that cannot be written to should not be found out after the work

    def save(self) -> None:
        """Writes the file."""
        work, batch = self.work, self.work.batch
        nothing = np.zeros(0, np.float32)
        arrays: dict[str, Any] = {
            "key": np.array(self._key),
            "images": np.concatenate(work.images) if work.images else np.zeros(0, np.uint8),
            "mismatch": np.array(work.mismatch, np.float64),
            "step": np.array(0 if batch is None else batch.step),
            "pixels": nothing if batch is None else batch.pixels.numpy(),
            "first": nothing if batch is None else batch.first.numpy(),
            "second": nothing if batch is None else batch.second.numpy(),
        }
        with atomic_output(self._path, force=True) as output, output.partial.open("wb") as file:
            np.savez(file, **arrays)
        self._saved = time.monotonic()

    def save_at_times(self) -> None:
        """Writes the file if that was some time ago."""
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self.save()


def _optimise(synthesizer: Synthesizer, plan: SynthesisPlan, journal: _Journal, progress: Steps) -> None:
    """Completes the work of `journal`; on any interruption it is saved as it stands."""
    total = len(plan.batches) * plan.steps
    try:
        for index in range(len(journal.work.images), len(plan.batches)):
            batch = journal.work.batch or synthesizer.start(index, plan.batches[index])
            progress(index * plan.steps + batch.step, total)
            while batch.step < plan.steps:
                batch = synthesizer.advance(batch)
                journal.work = dataclasses.replace(journal.work, batch=batch)
                progress(index * plan.steps + batch.step, total)
                journal.save_at_times()
            images, mismatch = synthesizer.finish(batch)
            journal.work = _Work((*journal.work.images, images), (*journal.work.mismatch, mismatch))
            _LOG.info("calibration images: batch %d of %d, mismatch %.4f", index + 1, len(plan.batches), mismatch)
    except BaseException:
        journal.save()
        raise


def _read_work(path: Path, key: str, plan: SynthesisPlan) -> _Work:
    """What an interrupted run left; nothing where the file is missing, damaged or of other work."""
    if not path.exists():
        return _Work()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("key", "images", "mismatch", "step", "pixels", "first", "second")}
    except (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error):
        _LOG.warning("%s is damaged: the work begins anew", path)
        return _Work()
    if str(arrays["key"]) != key:
        _LOG.warning("%s is of other work: this one begins anew", path)
        return _Work()
    done, batch = len(arrays["mismatch"]), None
    starts = np.cumsum((0, *plan.batches))
    images = tuple(arrays["images"][starts[index] : starts[index + 1]] for index in range(done))
    if arrays["pixels"].size:
        pixels, first, second = (
            torch.from_numpy(arrays[name]).contiguous(memory_format=torch.channels_last)
            for name in ("pixels", "first", "second")
        )
        batch = BatchState(pixels, first, second, int(arrays["step"]))
    return _Work(images, tuple(arrays["mismatch"].tolist()), batch)

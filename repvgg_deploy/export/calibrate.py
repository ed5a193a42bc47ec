"""Training form + its ONNX → `NAME.calib.npz`: calibration images synthesised from BatchNorm statistics."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, InputError, RepVGGDeployError
from ..files.onnx import read_metadata
from ..files.output import PendingOutput, atomic_output, sha256_file
from ..files.versions import tool_versions
from ..images.calibration import calibration_path, load_calibration_file
from ..model.checkpoint.load import Checkpoint, build_model, load_checkpoint
from ..specs import codec
from ..specs.values import CALIBRATION_SCHEMA, CalibrationProvenance, ModelMetadata, Preprocessing
from .synthesize import (
    ModuleMismatch,
    StatisticsMismatch,
    Steps,
    SynthesisOptions,
    SynthesisPlan,
    image_cost,
    plan_synthesis,
    synthesize_images,
)


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What was synthesised.

    Attributes:
        output: The `.calib.npz`, and whether it was written or stood there already.
        provenance: What it carries.
    """

    output: PendingOutput
    provenance: CalibrationProvenance


def write_calibration(
    ckpt: Path | str,
    onnx: Path | str,
    *,
    options: SynthesisOptions | None = None,
    force: bool = False,
    progress: Steps | None = None,
) -> CalibrationResult:
    """Synthesises calibration images for an exported ONNX and writes them beside it, all or nothing.

    Equal arguments, versions and thread counts give equal bytes. Memory holds one batch under optimisation, whatever
    the number of images, and the finished ones as bytes.

    Args:
        ckpt: The training-form checkpoint that the ONNX was exported from.
        onnx: From `export_checkpoint`.
        options: How many images and steps, and the seed.
        force: Replace a different calibration file.
        progress: Called with the optimisation steps done and in all.

    Raises:
        CalibrationError: The checkpoint is in deploy form and has no statistics.
        CheckpointError: The checkpoint cannot be read.
        ModelError: The ONNX is damaged or not one of ours.
        InputError: The ONNX was made from another checkpoint, or the number of images does not suit it.
        ArtifactError: A different calibration file stands there, or it cannot be written.
    """
    onnx, options = Path(onnx), options or SynthesisOptions()
    metadata = read_metadata(onnx)
    weights = None if metadata.source is None else metadata.source.weights
    checkpoint = load_checkpoint(ckpt, arch=metadata.variant, weights=weights)
    preprocessing = _require_same_checkpoint(onnx, metadata, checkpoint)
    plan = plan_synthesis(image_cost(checkpoint.spec, preprocessing.crop), options, multiple=metadata.spec.batch or 1)
    made = _Synthesis(StatisticsMismatch(build_model(checkpoint)), preprocessing, plan, options.seed)
    return _write(onnx, made, checkpoint.sha256, force=force, progress=progress)


def write_module_calibration(
    model: nn.Module, onnx: Path | str, preprocessing: Preprocessing, options: SynthesisOptions, *, force: bool = False
) -> CalibrationResult:
    """The same for any module with BatchNorm layers, and the ONNX that `export_module` wrote of it.

    Args:
        model: In training form and `eval()`.
        onnx: From `export_module`.
        preprocessing: How an image becomes the module's input.
        options: How many images and steps, and the seed.
        force: Replace a different calibration file.

    Raises:
        CalibrationError: The module has no BatchNorm, or cannot be run with gradients.
        InputError: The number of images does not suit the ONNX.
        ArtifactError: A different calibration file stands there, or it cannot be written.
    """
    onnx = Path(onnx)
    with ModuleMismatch(model) as mismatch:
        plan = plan_synthesis(
            mismatch.measure_cost(preprocessing.crop), options, multiple=read_metadata(onnx).spec.batch or 1
        )
        return _write(onnx, _Synthesis(mismatch, preprocessing, plan, options.seed), hash_module(model), force=force)


def hash_module(model: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, names and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Synthesis(NamedTuple):
    """What is to be made."""

    mismatch: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    plan: SynthesisPlan
    seed: int


def _write(
    onnx: Path, made: _Synthesis, training_sha256: str, *, force: bool, progress: Steps | None = None
) -> CalibrationResult:
    plan = made.plan
    wanted = CalibrationProvenance(
        schema=CALIBRATION_SCHEMA,
        onnx_sha256=sha256_file(onnx),
        checkpoint_sha256=training_sha256,
        method="bn_statistics",
        images=plan.images,
        seed=made.seed,
        steps=plan.steps,
        loss=0.0,  # known at the end
        versions=tool_versions(),
    )
    target = calibration_path(onnx)
    found = _find_equal(target, wanted, force)
    if found is not None:
        return CalibrationResult(PendingOutput(target, target, "up to date"), found)
    # Opened first: a folder that cannot be written to should not be found out after the work.
    with atomic_output(target, force=force) as output:
        batches = list(synthesize_images(made.mismatch, made.preprocessing, plan, seed=made.seed, progress=progress))
        loss = float(np.average([loss for _, loss in batches], weights=plan.batches))
        provenance = dataclasses.replace(wanted, loss=loss)
        with output.partial.open("wb") as file:
            images = np.concatenate([images for images, _ in batches])
            np.savez(file, images=images, provenance=np.array(codec.dumps(provenance)))
    return CalibrationResult(output, provenance)


def _require_same_checkpoint(onnx: Path, metadata: ModelMetadata, checkpoint: Checkpoint) -> Preprocessing:
    """How images become the ONNX's input, if it was exported from this checkpoint."""
    source, preprocessing = metadata.source, metadata.spec.preprocessing
    if source is None or preprocessing is None or source.sha256 != checkpoint.sha256:
        made_of = "weights in memory" if source is None else f"a checkpoint with sha256 {source.sha256[:16]}…"
        raise InputError(
            f"{onnx}: exported from {made_of}, expected {checkpoint.path} with {checkpoint.sha256[:16]}…",
            remedy="give the checkpoint that the ONNX was exported from, or export this one",
        )
    return preprocessing


def _find_equal(target: Path, wanted: CalibrationProvenance, force: bool) -> CalibrationProvenance | None:
    """The provenance of what stands there, if it is what is wanted; None where the file may be written."""
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

"""Checkpoint → verified ONNX: the stages in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CalibrationError, CheckpointError, InputError
from ..files.output import (
    PendingOutput,
    atomic_output,
    explain_os_errors,
    release_freed_memory,
    require_distinct,
    require_replaceable,
)
from ..files.versions import tool_versions
from ..graph.fold import FoldReport
from ..images.calibration import calibration_path
from ..images.classes import IMAGENET_CLASSES, imagenet_labels
from ..images.decode import default_preprocessing
from ..images.drawn import make_batches
from ..images.labels import require_printable
from ..model.checkpoint.containers import open_checkpoint
from ..model.checkpoint.hub import Located, locate
from ..model.checkpoint.load import Checkpoint, all_facts, build_model, load_checkpoint, write_deploy
from ..model.fold import reparameterize
from ..model.parity import compare_forms, reference_of_deploy
from ..model.tolerance import require_passed
from ..specs.values import (
    METADATA_SCHEMA,
    Certificate,
    ChannelStatistics,
    Check,
    CheckpointSource,
    HistoryEntry,
    ModelMetadata,
    ModelSpec,
    Preprocessing,
    VariantSpec,
)
from ..specs.zoo import find_card
from .calibrate import CalibrationResult, write_calibration
from .contract import check_contract
from .graph import plain_torch, rename, simplify, to_onnx
from .options import GraphOptions, ResizeOptions, model_spec, require_units_of_255
from .statistics import collect_statistics, read_trained_on
from .synthesize import Steps, SynthesisOptions, image_cost, plan_synthesis
from .verify import require_same_weights, verify_onnx
from .writer import append_metadata, write_model

_SMALL_SIZES = ((48, 64), (33, 47))  # float64 is slow; not square, and one odd, so that every stride meets a remainder
_SMALL_PIXELS = 96 * 96
TRAINING_REFERENCE = "the training form in eval mode"
DEPLOY_REFERENCE = "the deploy form (the checkpoint holds no training form to compare the reparameterization with)"
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        graph: The shape of the graph.
        arch: The variant that the checkpoint must be; None finds it.
        strides: Of the stem and of the first block of stages 1 to 4, which tensors do not tell.
        weights: Which of several sets of weights in the file, as `load_checkpoint` takes it.
        mean: Per RGB channel, 0–255 units; None takes the checkpoint's own, else ImageNet's.
        std: Likewise.
        labels: Names of the classes; None takes the checkpoint's own, ImageNet's for a published checkpoint, else none.
        save_deploy: Write the deploy-form checkpoint here, too.
        force: Replace different files.
        calibration: Synthesise calibration images from the BatchNorm statistics, too, and write them beside the ONNX as
            `NAME.calib.npz`.
        resizing: How images are resized; what it does not state is the checkpoint's own, else the original's.

    Raises:
        InputError: `mean` or `std` is in units of 0–1.
    """

    graph: GraphOptions = field(default_factory=GraphOptions)
    arch: VariantSpec | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    labels: tuple[str, ...] | None = None
    save_deploy: Path | None = None
    force: bool = False
    calibration: SynthesisOptions | None = None
    resizing: ResizeOptions = field(default_factory=ResizeOptions)
    strides: tuple[int, int, int, int, int] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        require_units_of_255(self.mean, self.std)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export did.

    Attributes:
        output: The ONNX, and whether it was written or stood there already.
        metadata: What it carries, its certificate included.
        notes: What a person should know of the checkpoint.
        deploy_output: The deploy-form checkpoint, if one was asked for.
        calibration: The synthetic calibration images, if they were asked for.
        folded: What was folded by algebra (of `export_module` only).
    """

    output: PendingOutput
    metadata: ModelMetadata
    notes: tuple[str, ...] = ()
    deploy_output: PendingOutput | None = None
    calibration: CalibrationResult | None = None
    folded: FoldReport | None = None


@plain_torch()
def export_checkpoint(
    ckpt: Path | str | Located,
    out: Path | str,
    *,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    calibration_progress: Steps | None = None,
) -> ExportResult:
    """Checkpoint → verified ONNX. Nothing is written that did not pass its verification.

    Args:
        ckpt: A RepVGG checkpoint of any family, in training or deploy form: a file, or a name as `load_checkpoint`
            takes it, such as `hf-hub:timm/repvgg_a0.rvgg_in1k`. What its `config.json` says holds where neither the
            options nor the file say it.
        out: The `.onnx`.
        options: How it is exported.
        progress: Called with the name of each stage when it begins.
        calibration_progress: Called with the optimisation steps done and in all, while calibration images are
            synthesised.

    Raises:
        CalibrationError: Calibration images are asked for, and the checkpoint is in deploy form: it has no statistics.
        CheckpointError: The checkpoint cannot be fetched or read, is incomplete or of another network.
        ExportError: torch, onnxsim or the graph contract refuse the graph.
        ParityError: The deploy form or the ONNX does not give what the training-mode model gives.
        ArtifactError: A file cannot be written, or exists and differs.
    """
    out, options, report = Path(out), options or ExportOptions(), progress or _silent
    located = locate(ckpt)
    path = located.path
    beside = [] if options.calibration is None else [calibration_path(out)]
    deploy_out = options.save_deploy
    require_distinct([out, *beside] if deploy_out is None else [out, deploy_out, *beside], [path])
    open_checkpoint(path).close()  # what is read comes first, then where it is written
    # Opened first: a folder that cannot be written to should not be found out after the work. Written both or not at
    # all.
    deploying = nullcontext() if deploy_out is None else atomic_output(deploy_out, force=options.force)
    with deploying as deploy_output, atomic_output(out, force=options.force) as output:
        metadata = _write_verified(located, output.partial, deploy_output, options=options, report=report)
    calibration = None
    if options.calibration is not None:
        report("synthesise calibration images")
        release_freed_memory()
        calibration = write_calibration(
            path, out, options=options.calibration, force=options.force, progress=calibration_progress
        )
    return ExportResult(output, metadata, metadata.notes, deploy_output, calibration)


def _silent(stage: str) -> None:
    """No progress wanted."""


def _write_verified(
    located: Located, path: Path, deploy_output: PendingOutput | None, *, options: ExportOptions, report: Progress
) -> ModelMetadata:
    """The export itself: writes the ONNX to `path`, and the deploy form where it is wanted."""
    report("read the checkpoint")
    checkpoint = load_checkpoint(located, arch=options.arch, strides=options.strides, weights=options.weights)
    _require_classifier(checkpoint, options.graph)
    model = build_model(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, state={})  # the model holds the only reference to the weights
    preprocessing, assumed = _choose_preprocessing(checkpoint, options)
    checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, *assumed))
    graph = dataclasses.replace(options.graph, image_size=preprocessing.crop)
    spec = model_spec(checkpoint.spec, graph, preprocessing, _choose_labels(checkpoint, options))
    _require_statistics(checkpoint, spec, options.calibration)
    batches = make_batches(preprocessing, [preprocessing.crop, *_SMALL_SIZES])
    arrays = {batch.name: batch.array for batch in batches}
    small = [batch.name for batch in batches if batch.array[0, 0].size <= _SMALL_PIXELS]
    if model.form == "deploy":
        report("measure the float32 error of the deploy form")
        deploy, statistics = model, {}
        forms = reference_of_deploy(model, arrays, small=small)
    else:
        report("reparameterize")
        deploy = reparameterize(model)
        statistics = collect_statistics(model) if checkpoint.has_statistics else {}
        if checkpoint.has_statistics:
            spec = dataclasses.replace(spec, trained_on=read_trained_on(model))
        report("verify the deploy form against the training form")
        forms = compare_forms(model, deploy, arrays, small=small)
        require_passed(forms.checks, "the deploy form against the training form")
    del model  # the training form has served; its memory is needed
    release_freed_memory()
    if deploy_output is not None:
        with explain_os_errors(deploy_output.target):
            write_deploy(deploy, deploy_output.partial, headless=checkpoint.headless)
        require_replaceable(deploy_output, force=options.force)

    report("export and simplify the graph")
    traced, tensors = to_onnx(deploy, graph, spec)
    plain = simplify(traced)
    names = rename(plain)
    check_contract(plain, deploy.spec, graph, spec)
    weights = {new: tensors[old].numpy() for old, new in names.items()}
    digest = write_model(path, plain, weights)
    require_same_weights(path, weights)
    del deploy, tensors, weights
    release_freed_memory()

    report("verify the ONNX in ONNX Runtime")
    checks = verify_onnx(path, spec, batches, forms.references, training_error=forms.training_error)
    require_passed(checks, f"{checkpoint.path.name}: the {checkpoint.form} form against the ONNX")
    metadata = _make_metadata(checkpoint, spec, graph, checks=(*forms.checks, *checks), statistics=statistics)
    append_metadata(path, digest, metadata)
    return metadata


def _require_classifier(checkpoint: Checkpoint, graph: GraphOptions) -> None:
    if checkpoint.headless and not graph.features:
        raise CheckpointError(
            f"{checkpoint.path}: holds no classifier: a backbone",
            remedy="give --features to export the outputs of its four stages, or a checkpoint with its classifier",
        )


def _choose_preprocessing(checkpoint: Checkpoint, options: ExportOptions) -> tuple[Preprocessing, tuple[str, ...]]:
    """How images become the input, and a note of what was assumed because nobody states it."""
    own = checkpoint.preprocessing
    card = find_card(checkpoint.sha256)
    usual = (224, 224) if card is None else (card.input_size, card.input_size)
    height, width = options.graph.image_size or (own.crop if own is not None else usual)
    found = default_preprocessing(height, width, in_graph=options.graph.input == "uint8")
    if own is not None:
        if own.crop != (height, width):
            own = dataclasses.replace(own, resize_short=found.resize_short, box=None, crop=found.crop)
            own = own if own.fit == "letterbox" else dataclasses.replace(own, fit="cover")
        found = dataclasses.replace(own, in_graph=found.in_graph)
    found = dataclasses.replace(found, mean=options.mean or found.mean, std=options.std or found.std)
    resizing = options.resizing
    found = resizing.restate(found)
    if own is not None or card is not None:
        return found, ()
    assumed = {
        f"the short side resized to {found.resize_short} for {height}×{width} (--resize or --crop-pct)":
            (resizing.resize, resizing.crop_pct, resizing.letterbox),
        f"{found.interpolation} (--interpolation)": (resizing.interpolation,),
        "ImageNet's mean and standard deviation (--mean, --std)": (options.mean, options.std),
    }  # fmt: skip
    unstated = [what for what, stated in assumed.items() if stated == (None,) * len(stated)]
    note = f"the checkpoint does not say how images are prepared; assumed: {', '.join(unstated)}"
    return found, (note,) if unstated else ()


def _choose_labels(checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, ...] | None:
    labels = options.labels
    if labels is None and checkpoint.labels is not None:
        labels = require_printable(checkpoint.labels, checkpoint.path.name)
    card = find_card(checkpoint.sha256)
    if labels is None and card is not None and card.classes == IMAGENET_CLASSES:
        labels = imagenet_labels()  # the published checkpoints were all trained on ImageNet-1k
    if labels is not None and len(labels) != checkpoint.spec.num_classes:
        raise InputError(
            f"{len(labels)} labels for {checkpoint.spec.num_classes} classes",
            remedy="give --labels a file with one line a class, in the classifier's order",
        )
    return labels


def _require_statistics(checkpoint: Checkpoint, spec: ModelSpec, calibration: SynthesisOptions | None) -> None:
    """Before the work: whether calibration images can be synthesised, if they are asked for."""
    if calibration is None:
        return
    if checkpoint.form != "training":
        raise CalibrationError(
            f"{checkpoint.path}: in deploy form, so the BatchNorm statistics that images could be synthesised "
            f"from are gone",
            remedy="give the training-form checkpoint, or leave --synthetic-calibration out and calibrate with real "
            "images",
        )
    if not checkpoint.has_statistics:
        raise CalibrationError(
            f"{checkpoint.path}: branches without BatchNorm say nothing of what they saw in training",
            remedy="leave --synthetic-calibration out and calibrate with real images",
        )
    assert spec.preprocessing is not None
    plan_synthesis(image_cost(checkpoint.spec, spec.preprocessing.crop), calibration, multiple=spec.batch or 1)


def _make_metadata(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    graph: GraphOptions,
    *,
    checks: tuple[Check, ...],
    statistics: dict[str, ChannelStatistics],
) -> ModelMetadata:
    versions = tool_versions()
    reference = TRAINING_REFERENCE if checkpoint.form == "training" else DEPLOY_REFERENCE
    names = ("opset", "batch", "dynamic_size", "input", "output", "features")
    asked = {name: getattr(graph, name) for name in names}
    asked["image_size"] = "x".join(map(str, graph.image_size or ()))
    history = HistoryEntry("export", versions, asked, parent_sha256=checkpoint.sha256)
    return ModelMetadata(
        schema=METADATA_SCHEMA,
        spec=spec,
        variant=checkpoint.spec,
        source=CheckpointSource(
            checkpoint.path.name,
            checkpoint.sha256,
            checkpoint.family,
            checkpoint.form,
            checkpoint.weights,
            checkpoint.origin,
        ),
        certificate=Certificate(reference, checks, versions, all_facts(checkpoint, spec.preprocessing, spec.labels)),
        statistics=statistics,
        history=(history,),
        notes=checkpoint.notes,
    )

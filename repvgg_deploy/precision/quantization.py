"""Exported ONNX → typed ONNX in FP16, INT8 or FP8: calibrated, judged, and only then written. Needs no torch.

`quantize` is the story. A new precision gets a function beside `_make_fp16` and `_make_int8`, and its name in
`QuantizeOptions.precision`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import CalibrationError
from ..files.output import PendingOutput, atomic_output, require_distinct, require_replaceable
from ..images.calibration import (
    Images,
    calibration_path,
    find_calibration_file,
    load_calibration,
    load_calibration_file,
    split_held_out,
)
from ..images.drawn import draw_images
from ..images.likeness import Likeness
from ..images.sets import SetOptions
from ..specs import codec
from ..specs.values import Check, ModelMetadata
from .fp16 import Fp16Report, draw_batches, to_fp16
from .gate import (
    agreement_check,
    blame_int8,
    error_check,
    refuse_fp16,
    refuse_int8,
    refuse_outputs,
    refuse_score,
    score_check,
)
from .int8 import Int8Report, Progress, to_int8
from .metrics import Judge, Verification
from .options import MIN_AGREEMENT, STATISTICS, QuantizeOptions
from .scales import ScaleOptions, read_scales
from .score import Demand, Score, demand_score
from .typed_model import Parent, TypedModel, load_parent, write_typed

LEAST_IMAGES = 8
"""Fewer cannot be calibrated with and judged on."""
_EXTRA_SHARE = 0.5  # held out beyond the images to calibrate with, where there are so many
_HELD_OUT_SHARE = 0.2
_DRAWN = 16
_NO_IMAGES = "there are no images: nothing was compared with FP32"
_NO_CLASSIFIER = "the graph has no classifier: there is no best class to agree on"
_DRAWN_ONLY = "there are no images: drawn ones were run, and their error judged"


@dataclass(frozen=True, slots=True)
class ImageUse:
    """What images took part.

    Attributes:
        name: Where they came from.
        synthetic: Whether `repvgg-export --synthetic-calibration` made them, of this very ONNX.
        calibration: How many were calibrated with.
        held_out: How many were kept aside to judge the result.
        skipped: How many could not be read.
        likeness: How they compare with what the model was trained on.
        left_out: What stood beside them and is no image, counted and named; empty where nothing did.
    """

    name: str
    synthetic: bool
    calibration: int
    held_out: int
    skipped: int
    likeness: Likeness | None = None
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a quantization did.

    Attributes:
        output: The typed ONNX, and whether it was written or stood there already.
        images: What images took part; None where there were none.
        verification: The written graph against the FP32 graph; None without images to run.
        ungated: Why no agreement was demanded; empty where it was.
        scales_output: The saved calibration, if that was asked for.
        score: What the user's own measure says, if one was given.
    """

    output: PendingOutput
    metadata: ModelMetadata
    images: ImageUse | None
    int8: Int8Report | None
    fp16: Fp16Report | None
    verification: Verification | None
    ungated: str
    bytes_before: int
    bytes_after: int
    stages: tuple[StageTime, ...]
    scales_output: PendingOutput | None = None
    score: Score | None = None


def default_typed_output(model: Path, precision: str) -> Path:
    """`b2-int8.onnx` beside `b2.onnx`."""
    stem = model.name[: -len(".onnx")] if model.name.lower().endswith(".onnx") else model.name
    return model.with_name(f"{stem}-{precision}.onnx")


def quantize(
    model: Path | str,
    out: Path | str | None,
    options: QuantizeOptions,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Makes a typed ONNX of an FP32 one of ours; writes it if it agrees with FP32, where that can be judged.

    Args:
        model: The FP32 `.onnx`.
        out: The typed `.onnx`; None: beside `model`, with -fp16, -int8 or -fp8 added to its name.
        options: The precision, its images and its steps.
        force: Replace different files.
        progress: Called with the name of the stage, steps done and steps in all.

    Raises:
        CalibrationError: There are no images or they do not do, the graph is typed already, saved scales are of another
            graph or other images, or a bound cannot be met.
        ParityError: The typed graph does not agree with the FP32 graph; the message names the layers to blame.
        ModelError: The file is missing, damaged or not one of ours.
        ArtifactError: A file cannot be written, or exists and differs.
        InputError: Two outputs are one file, or an output is an input; or the user's own measure fails.
    """
    source = Path(model)
    target = default_typed_output(source, options.precision) if out is None else Path(out)
    _require_distinct(source, target, options)
    clock = _Clock(progress)
    parent = load_parent(source)  # refuses what is typed already or not ours, before the images are read
    # Opened before the work: a folder that cannot be written to should not be found out after it. Written both or none.
    saving = nullcontext() if options.save_scales is None else atomic_output(options.save_scales, force=force)
    with saving as scales_output, atomic_output(target, force=force) as output:
        demand = _demand(parent, options, clock)  # before the work: a function that fails should not be found after it
        images, use = _gather_images(source, parent, options, clock)
        clock("read images", 1, 1)
        make = _make_fp16 if options.precision == "fp16" else _make_int8  # and judge: what does not pass is refused
        made = make(parent, images, options, clock, demand=demand)
        typed = _certify(made, options, use, clock)
        if scales_output is not None:
            assert made.int8 is not None, "QuantizeOptions refuses it of FP16"
            scales_output.partial.write_text(codec.dumps(made.int8.scales) + "\n", encoding="utf-8")
            require_replaceable(scales_output, force=force)
        write_typed(output.partial, typed, force=True)
        bytes_after = output.partial.stat().st_size
    clock("write", 1, 1)
    return QuantizeResult(
        output,
        typed.metadata,
        use,
        made.int8,
        made.fp16,
        made.verification,
        made.ungated,
        source.stat().st_size,
        bytes_after,
        clock.stages(),
        scales_output,
        made.score,
    )


def _require_distinct(source: Path, target: Path, options: QuantizeOptions) -> None:
    outputs = [target, *([] if options.save_scales is None else [options.save_scales])]
    inputs = [source, *([] if options.scales is None else [options.scales])]
    if options.calibration is not None and not options.from_statistics:
        inputs.append(Path(options.calibration))
    require_distinct(outputs, inputs)


class _Clock:
    """Passes progress on, and adds up how long each stage took."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now
        if self._progress is not None:
            self._progress(stage, done, total)

    def stages(self) -> tuple[StageTime, ...]:
        """Each stage with its time, in order."""
        return tuple(StageTime(name, seconds) for name, seconds in self._seconds.items())


def _gather_images(
    source: Path, parent: Parent, options: QuantizeOptions, clock: _Clock
) -> tuple[Images, ImageUse] | tuple[None, None]:
    """The images that the options name, or those beside the ONNX. None where FP16 has none, or INT8 is to do without.

    Raises:
        CalibrationError: There are none, too few or unusable ones; where a file stands beside the ONNX, it is damaged
            or of another ONNX.
    """
    clock("read images", 0, 1)
    if options.from_statistics or (options.precision == "fp16" and options.calibration is None):
        return None, None
    if options.calibration is not None:
        path, synthetic = Path(options.calibration), False
    else:
        path, synthetic = _find_beside(source, parent, options.precision), True
    limit = options.images + int(options.images * _EXTRA_SHARE)
    chosen = SetOptions(limit, seed=options.seed, max_value=options.max_value)
    found = load_calibration(path, parent.metadata.spec, options=chosen, accept_data=options.accept_data or synthetic)
    if options.precision == "fp16":
        return found, ImageUse(found.name, synthetic, found.images, 0, found.skipped, found.likeness, found.left_out)
    if found.images < LEAST_IMAGES:
        raise CalibrationError(
            f"{found.name}: expected at least {LEAST_IMAGES} images to calibrate with and to judge the result, "
            f"found {found.images}",
            remedy="give some hundred images of the training split, and no smaller --images",
        )
    share = max(_HELD_OUT_SHARE, 1 - options.images / found.images)
    images = split_held_out(found, share=share)
    held_out = sum(map(len, images.held_out))
    return images, ImageUse(
        found.name, synthetic, images.images, held_out, found.skipped, found.likeness, found.left_out
    )


def _find_beside(model: Path, parent: Parent, precision: str) -> Path:
    path = find_calibration_file(model)
    if path is None:
        raise CalibrationError(
            f"{model}: {precision.upper()} needs calibration images: none were given, and "
            f"{calibration_path(model).name} is not there",
            remedy=f"repvgg-export --ckpt CHECKPOINT --out {model} --synthetic-calibration makes them of a "
            "training-form checkpoint alone, and ModuleOptions.synthetic_calibration of a module; or give --calib DIR "
            "with images of the training split; or "
            "--calib statistics, which takes no time and is less exact",
        )
    load_calibration_file(path, parent.sha256)
    return path


@dataclass(frozen=True, slots=True)
class _Made:
    """A typed graph that may be written, and what is to be said of it in its metadata."""

    typed: TypedModel
    checks: Sequence[Check]
    said: Mapping[str, str | int | float | None]
    int8: Int8Report | None = None
    fp16: Fp16Report | None = None
    verification: Verification | None = None
    ungated: str = ""
    score: Score | None = None


def _demand(parent: Parent, options: QuantizeOptions, clock: _Clock) -> Demand | None:
    """What the user's own measure gives FP32 and must give the typed graph; None where there is none."""
    if options.metric is None:
        return None
    clock("score FP32", 0, 1)
    bounds = {"least": options.min_metric, "most_lost": options.int8.max_drop}
    found = demand_score(options.metric, parent.network.model, **bounds, share=MIN_AGREEMENT)
    clock("score FP32", 1, 1)
    return found


def _score(demand: Demand, typed: TypedModel, clock: _Clock) -> Score:
    clock("score", 0, 1)
    found = demand.judge(typed.model)
    clock("score", 1, 1)
    return found


def _make_fp16(
    parent: Parent, images: Images | None, options: QuantizeOptions, clock: _Clock, *, demand: Demand | None
) -> _Made:
    """Makes the FP16 graph, judges it, and refuses it if it does not pass the gate."""
    clock("ranges", 0, 1)
    typed, report = to_fp16(parent, None if images is None else images.batches, options.fp16)
    clock("ranges", 1, 1)
    batches = images.batches if images is not None else draw_batches(parent.metadata.spec, _draw)
    found = Judge(parent.network, batches, held_out=False).compare(typed.model, progress=partial(clock, "verify"))
    checks = [error_check(found, "fp16")]
    # FP32 itself is undecided on drawn images: there the error counts, not the class.
    if images is not None and found.agreement is not None and demand is None:
        checks.append(agreement_check(found, "fp16", options.min_agreement))
    if not all(check.passed for check in checks):
        raise refuse_fp16(found, parent.network, typed.model, batches)
    score = None if demand is None else _score(demand, typed, clock)
    if score is not None:
        checks.append(score_check(score, "fp16"))
        if not score.passed:
            raise refuse_score(score, "fp16", ())
    ungated = _DRAWN_ONLY if images is None and demand is None else ""
    if found.agreement is None and demand is None:
        ungated = _NO_CLASSIFIER
    said = {"verified": found.images, "sqnr_db": round(found.sqnr_db, 1)}
    return _Made(typed, checks, said, fp16=report, verification=found, ungated=ungated, score=score)


def _draw(height: int, width: int) -> np.ndarray:
    """Other images than those that `fp16` measures ranges on."""
    return draw_images((height, width), _DRAWN, np.random.default_rng(1))


def _make_int8(
    parent: Parent, images: Images | None, options: QuantizeOptions, clock: _Clock, *, demand: Demand | None
) -> _Made:
    """Makes the INT8 or FP8 graph, judges it, and refuses it if it does not pass the gate."""
    assert options.precision != "fp16", "that is another path"
    chosen = dataclasses.replace(options.int8, format=options.precision)
    if images is None:
        clock("closed form", 0, 1)
        typed, report = to_int8(parent, None, chosen, progress=clock)
        clock("closed form", 1, 1)
        if demand is None:
            return _Made(typed, [], {"verified": None}, report, ungated=_NO_IMAGES)
        alone = _score(demand, typed, clock)
        if not alone.passed:
            raise refuse_score(alone, options.precision, ())
        return _Made(typed, [score_check(alone, options.precision)], {"verified": None}, report, score=alone)
    saved, steps = None if options.scales is None else read_scales(options.scales), chosen
    if saved is not None:  # for the history: what the saved calibration was made with
        steps = dataclasses.replace(steps, scales=ScaleOptions(saved.method, steps.scales.percentile))
    # What is judged below is the very graph that is written. Held-out images are given here only where a bound is to be
    # met with them.
    if demand is not None and steps.max_drop is not None:
        steps = dataclasses.replace(steps, max_drop=None, accepts=lambda graph: demand.judge(graph).passed)
    given = images if steps.bounded else dataclasses.replace(images, held_out=())
    typed, report = to_int8(parent, given, steps, saved=saved, progress=clock)
    clock("verify", 0, 1)
    found = Judge(parent.network, images.held_out).compare(typed.model, progress=partial(clock, "verify"))
    said: dict[str, str | int | float | None] = {"verified": found.images, "sqnr_db": round(found.sqnr_db, 1)}
    if saved is not None:
        how = "measured" if saved.exponents else "saved"
        said["equalize"] = how if saved.factors else None
    score = None if demand is None else _score(demand, typed, clock)
    if score is not None:
        check = score_check(score, options.precision)
    elif found.agreement is None:
        check = error_check(found, options.precision, options.min_sqnr_db)
    else:
        check = agreement_check(found, options.precision, options.min_agreement)
    if not (check.passed if score is None else score.passed):
        blamed = blame_int8(parent.network, report.scales, report.kept, images.batches)
        if score is not None:
            raise refuse_score(score, options.precision, blamed)
        if found.agreement is None:
            raise refuse_outputs(found, options.min_sqnr_db, blamed, options.precision.upper())
        raise refuse_int8(found, options.min_agreement, blamed, options.precision.upper())
    report = dataclasses.replace(report, held_out=found)
    return _Made(typed, [check], said, report, verification=found, score=score)


def _certify(made: _Made, options: QuantizeOptions, use: ImageUse | None, clock: _Clock) -> TypedModel:
    """The graph with what was verified of it in its certificate, and how in the last entry of its history."""
    clock("write", 0, 1)
    metadata, said = made.typed.metadata, dict(made.said)
    if options.precision != "fp16":
        source = "synthetic" if use is not None and use.synthetic else "images"
        said["calibration"] = STATISTICS if use is None else source
    if use is not None and use.likeness is not None and use.likeness.verdict == "refused":
        said["accepted_data"] = f"unlike what the model was trained on, unless they are {use.likeness.better}"
    entry = dataclasses.replace(metadata.history[-1], options={**metadata.history[-1].options, **said})
    certificate = dataclasses.replace(metadata.certificate, checks=(*metadata.certificate.checks, *made.checks))
    changed = dataclasses.replace(metadata, certificate=certificate, history=(*metadata.history[:-1], entry))
    return TypedModel(made.typed.model, changed)

"""The work of a quantization: images, typed graph, gate; a step for each precision. What it gives may be written.

Where the images of a quantization come from, and which of them are kept aside to judge it.

Exported ONNX → typed ONNX in FP16 or INT8: calibrated, judged, and only then written. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, InputError, ParityError
from ..files.output import (
    PendingOutput,
    atomic_output,
    explain_os_errors,
    require_distinct,
    require_replaceable,
    sha256_file,
)
from ..images.calibration import (
    CalibrationImages,
    calibration_path,
    find_calibration_file,
    load_calibration,
    load_calibration_file,
    split_held_out,
)
from ..images.decode import normalize
from ..images.drawn import draw_images
from ..specs import codec
from ..specs.values import Check, ModelMetadata, ModelSpec
from .chain import read_chain
from .fp16 import Fp16Report, to_fp16
from .gate import MIN_FP16_DB, Verification, agreement_check, blame_fp16, blame_int8, error_check, verify_typed
from .int8 import Images, Int8Options, Int8Report, to_int8
from .metrics import Judgement
from .options import STATISTICS, QuantizeOptions
from .run_onnx import count_images
from .scales import ScaleFile, ScaleOptions, load_scales
from .typed_model import TypedModel, load_parent, write_typed

LEAST_IMAGES = 8
"""Fewer cannot be calibrated with and judged on."""
_EXTRA_SHARE = 0.5  # held out beyond the images to calibrate with, where there are so many
_HELD_OUT_SHARE = 0.2
_DRAWN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Images as the model takes them.

    Attributes:
        name: Where they came from.
        synthetic: Whether `repvgg-export --synthetic-calibration` made them, of this very ONNX.
        skipped: How many could not be read.
        batches: To calibrate with; of FP16 to measure ranges on.
        held_out: To judge on.
    """

    name: str
    synthetic: bool
    skipped: int
    batches: Sequence[NDArray[Any]]
    held_out: Sequence[NDArray[Any]]

    @property
    def images(self) -> int:
        """How many to calibrate with."""
        return count_images(self.batches)


def gather_images(model: Path, spec: ModelSpec, options: QuantizeOptions) -> Gathered | None:
    """Reads the images that the options name, or those beside the ONNX. None where FP16 has none, or INT8 is to do without.

    Raises:
        CalibrationError: There are none, too few or unusable ones; where a file stands beside the ONNX, it is damaged
            or of another ONNX.
    """
    if options.from_statistics or (options.precision == "fp16" and options.calibration is None):
        return None
    synthetic = options.calibration is None
    source = _find_beside(model) if synthetic else Path(str(options.calibration))
    limit = options.images + int(options.images * _EXTRA_SHARE)
    found = load_calibration(source, spec, limit=limit, seed=options.seed)
    if options.precision == "fp16":
        return Gathered(found.name, synthetic, found.skipped, found.batches, found.batches)
    if found.images < LEAST_IMAGES:
        raise CalibrationError(
            f"{found.name}: expected at least {LEAST_IMAGES} images to calibrate with and to judge the result, "
            f"found {found.images}",
            remedy="give some hundred images of the training split, and no smaller --images",
        )
    calibrate, held_out = split_held_out(found, share=_share(found, options.images))
    return Gathered(found.name, synthetic, found.skipped, calibrate.batches, held_out.batches)


def _share(found: CalibrationImages, wanted: int) -> float:
    return max(_HELD_OUT_SHARE, 1 - wanted / found.images)


def _find_beside(model: Path) -> Path:
    path = find_calibration_file(model)
    if path is None:
        raise CalibrationError(
            f"{model}: INT8 needs calibration images: none were given, and {calibration_path(model).name} is not there",
            remedy=f"repvgg-export --ckpt CHECKPOINT --out {model} --synthetic-calibration makes them of a "
            f"training-form checkpoint alone; or give "
            "--calib DIR with images of the training split; or --calib statistics, which takes no time and is "
            "less exact",
        )
    load_calibration_file(path, sha256_file(model))
    return path


def draw_inputs(spec: ModelSpec) -> list[NDArray[Any]]:
    """Drawn images as the model takes them, others than those that `precision.ranges` measures on; the same every time."""
    assert spec.preprocessing is not None, "precision.ranges refused the model before"
    sizes = spec.input.shape[1:3] if spec.input.dtype == "uint8" else spec.input.shape[2:4]
    height, width = (
        size if isinstance(size, int) else usual for size, usual in zip(sizes, spec.preprocessing.crop, strict=True)
    )
    images: NDArray[Any] = draw_images((height, width), _DRAWN, np.random.default_rng(1))
    if spec.batch is not None:
        images = np.resize(images, (-(-len(images) // spec.batch) * spec.batch, *images.shape[1:]))
    if spec.input.dtype != "uint8":
        images = normalize(images, spec.preprocessing)
    size = spec.batch or len(images)
    return [images[start : start + size] for start in range(0, len(images), size)]


Progress = Callable[[str, int, int], None]
NO_IMAGES = "there are no images: nothing was compared with FP32"
NO_CLASSIFIER = "the graph has no classifier: there is no best class to agree on"
DRAWN_ONLY = "there are no images: drawn ones were run, and their error judged"


@dataclass(frozen=True, slots=True)
class ImageUse:
    """What images took part.

    Attributes:
        name: Where they came from.
        synthetic: Whether `repvgg-export --synthetic-calibration` made them, of this very ONNX.
        calibration: How many were calibrated with.
        held_out: How many were kept aside to judge the result.
        skipped: How many could not be read.
    """

    name: str
    synthetic: bool
    calibration: int
    held_out: int
    skipped: int


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage took."""

    name: str
    seconds: float


class Clock:
    """Passes progress on, and adds up how long each stage took.

    Args:
        progress: Who is told.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """So many steps of a stage are done."""
        now = time.monotonic()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now
        if self._progress is not None:
            self._progress(stage, done, total)

    def stages(self) -> tuple[StageTime, ...]:
        """Each stage with its time, in order."""
        return tuple(StageTime(name, seconds) for name, seconds in self._seconds.items())


@dataclass(frozen=True, slots=True)
class Made:
    """A typed graph that may be written."""

    typed: TypedModel
    images: ImageUse | None
    int8: Int8Report | None = None
    fp16: Fp16Report | None = None
    verification: Verification | None = None
    ungated: str = ""


def make_int8(source: Path, options: QuantizeOptions, clock: Clock) -> Made:
    """The INT8 graph, if it passes the gate; see `quantize.quantize` for what it raises."""
    images = _gather(source, options, clock)
    if images is None:
        clock("closed form", 0, 1)
        typed, report = to_int8(source, None, options.int8, progress=clock)
        clock("closed form", 1, 1)
        return Made(_state(typed, [], {"calibration": STATISTICS, "verified": None}), None, report, ungated=NO_IMAGES)
    saved = None if options.scales is None else _read_scales(options.scales)
    steps = options.int8 if saved is None else _as_saved(options.int8, saved)
    # What is judged below is the very graph that is written. Held-out images are given here only where a bound is to be
    # met with them.
    given = Images(images.batches, images.held_out if steps.max_drop is not None else ())
    typed, report = to_int8(source, given, steps, saved=saved, progress=clock)
    reference = load_parent(source).model
    clock("verify", 0, 1)
    found = verify_typed(
        reference,
        typed.model,
        images.held_out,
        held_out=True,
        progress=lambda done, total: clock("verify", done, total),
    )
    checks = []
    if found.agreement is not None:
        checks = [agreement_check(found, "int8", options.min_agreement)]
        if not checks[0].passed:
            raise _refusal(found, options, blame_int8(reference, report.scales, report.kept, images.batches))
    said: dict[str, str | float | None] = {
        "calibration": "synthetic" if images.synthetic else "images",
        "verified": found.images,
        "sqnr_db": round(found.sqnr_db, 1),
    }
    if found.agreement is not None and found.expected_drop is not None:
        report = dataclasses.replace(
            report, held_out=Judgement(found.images, found.agreement, found.expected_drop, found.sqnr_db)
        )
    if saved is not None:
        said |= {"equalize": None if not saved.factors else "measured" if saved.exponents else "saved"}
    return Made(_state(typed, checks, said), _use(images), report, None, found, "" if checks else NO_CLASSIFIER)


def make_fp16(source: Path, options: QuantizeOptions, clock: Clock) -> Made:
    """The FP16 graph, if it passes the gate; see `quantize.quantize` for what it raises."""
    images = _gather(source, options, clock)
    clock("ranges", 0, 1)
    typed, report = to_fp16(source, None if images is None else images.batches, options.fp16)
    clock("ranges", 1, 1)
    parent = load_parent(source)
    batches = draw_inputs(parent.metadata.spec) if images is None else images.batches
    found = verify_typed(
        parent.model, typed.model, batches, held_out=False, progress=lambda done, total: clock("verify", done, total)
    )
    checks = [error_check(found, "fp16")]
    # FP32 itself is undecided on drawn images: there the error counts, not the class.
    if images is not None and found.agreement is not None:
        checks.append(agreement_check(found, "fp16", options.min_agreement))
    if not all(check.passed for check in checks):
        raise _refusal(found, options, blame_fp16(parent.model, typed.model, batches))
    ungated = "" if len(checks) > 1 else NO_CLASSIFIER if found.agreement is None else DRAWN_ONLY
    said = {"verified": found.images, "sqnr_db": round(found.sqnr_db, 1)}
    return Made(_state(typed, checks, said), None if images is None else _use(images), None, report, found, ungated)


def _gather(source: Path, options: QuantizeOptions, clock: Clock) -> Gathered | None:
    clock("read images", 0, 1)
    images = gather_images(source, load_parent(source).metadata.spec, options)
    clock("read images", 1, 1)
    return images


def _use(images: Gathered) -> ImageUse:
    held_out = 0 if images.held_out is images.batches else sum(map(len, images.held_out))
    return ImageUse(images.name, images.synthetic, images.images, held_out, images.skipped)


def _read_scales(path: Path) -> ScaleFile:
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="check the path, or make it with --save-scales")
    with explain_os_errors(path):
        data = path.read_bytes()
    try:
        return load_scales(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a calibration that --save-scales wrote: not UTF-8",
            remedy="calibrate again with --save-scales",
        ) from error
    except InputError as error:
        raise InputError(
            f"{path}: not a calibration that --save-scales wrote: {error.message}",
            remedy="calibrate again with --save-scales",
        ) from error


def _as_saved(options: Int8Options, saved: ScaleFile) -> Int8Options:
    """The options with what the saved calibration was made with, for the history."""
    return dataclasses.replace(options, scales=ScaleOptions(saved.method, options.scales.percentile))


def _state(typed: TypedModel, checks: list[Check], said: Mapping[str, str | int | float | None]) -> TypedModel:
    """The graph with what was verified of it in its certificate, and how in the last entry of its history."""
    metadata = typed.metadata
    entry = dataclasses.replace(metadata.history[-1], options={**metadata.history[-1].options, **said})
    certificate = dataclasses.replace(metadata.certificate, checks=(*metadata.certificate.checks, *checks))
    changed = dataclasses.replace(metadata, certificate=certificate, history=(*metadata.history[:-1], entry))
    return dataclasses.replace(typed, metadata=changed)


def _refusal(found: Verification, options: QuantizeOptions, blamed: list[tuple[str, float]]) -> ParityError:
    worst = ", ".join(f"{name} ({decibels:.1f} dB)" for name, decibels in blamed)
    what = "held-out images" if found.held_out else "images"
    if options.precision == "fp16":
        share = (
            ""
            if found.agreement is None
            else f", same best class on {100 * found.agreement:.2f} % of {found.images} {what}"
        )
        return ParityError(
            f"FP16 is too far from FP32: SQNR {found.sqnr_db:.1f} dB, at least {MIN_FP16_DB:g} expected{share}; "
            f"they part at {worst}",
            remedy="keep the model in FP32, or give --calib images of the training split, so that ranges are measured",
        )
    assert found.agreement is not None
    return ParityError(
        f"INT8 agrees with FP32 on {100 * found.agreement:.2f} % of {found.images} {what}, at least "
        f"{100 * options.min_agreement:g} % expected; "
        f"the layers that cost most, each quantized alone: {worst}",
        remedy=f"keep those layers in floating point (--keep {blamed[0][0]}, or --max-drop 0.3 to find how few are "
        f"needed); give more images with "
        "--calib; leave --fast and other short cuts out; or accept it with a lower --min-agreement",
    )


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a quantization did.

    Attributes:
        output: The typed ONNX, and whether it was written or stood there already.
        metadata: What it carries.
        images: None where there were none.
        int8: Report of INT8, or None.
        fp16: Report of FP16, or None.
        verification: The written graph against the FP32 graph; None without images to run.
        ungated: Why no agreement was demanded; empty where it was.
        bytes_before: Size of the FP32 file.
        bytes_after: Size of the typed file.
        stages: In order.
        scales_output: The saved calibration, if that was asked for.
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
    """Makes a typed ONNX of one that repvgg-export wrote. Nothing is written unless it agrees with the FP32 graph where that can be judged.

    Args:
        model: The FP32 `.onnx`.
        out: The typed `.onnx`; None: beside `model`, with -fp16 or -int8 added to its name.
        options: See `QuantizeOptions`.
        force: Replace different files.
        progress: Called with the name of the stage, steps done and steps in all.

    Raises:
        CalibrationError: There are no images or they do not do, the graph is typed already, saved scales are of another
            graph or other images, or a bound cannot be met.
        ParityError: The typed graph does not agree with the FP32 graph; the message names the layers to blame.
        ModelError: The file is missing, damaged or not one of ours.
        ArtifactError: A file cannot be written, or exists and differs.
        InputError: Two outputs are one file, or an output is an input.
    """
    source = Path(model)
    target = default_typed_output(source, options.precision) if out is None else Path(out)
    _require_distinct(source, target, options)
    clock = Clock(progress)
    read_chain(load_parent(source).model)  # refuses what is typed already or not ours, before the images are read
    saving = nullcontext() if options.save_scales is None else atomic_output(options.save_scales, force=force)
    # Opened first: a folder that cannot be written to should not be found out after the work. Written both or not at
    # all.
    with saving as scales_output, atomic_output(target, force=force) as output:
        work = make_int8 if options.precision == "int8" else make_fp16
        made = work(source, options, clock)
        clock("write", 0, 1)
        if scales_output is not None:
            assert made.int8 is not None
            scales_output.partial.write_text(codec.dumps(made.int8.scales) + "\n", encoding="utf-8")
            require_replaceable(scales_output, force=force)
        write_typed(output.partial, made.typed, force=True)
        bytes_after = output.partial.stat().st_size
    clock("write", 1, 1)
    return QuantizeResult(
        output,
        made.typed.metadata,
        made.images,
        made.int8,
        made.fp16,
        made.verification,
        made.ungated,
        source.stat().st_size,
        bytes_after,
        clock.stages(),
        scales_output,
    )


def _require_distinct(source: Path, target: Path, options: QuantizeOptions) -> None:
    outputs = [target, *([] if options.save_scales is None else [options.save_scales])]
    inputs = [source, *([] if options.scales is None else [options.scales])]
    if options.calibration is not None and not options.from_statistics:
        inputs.append(Path(options.calibration))
    require_distinct(outputs, inputs)

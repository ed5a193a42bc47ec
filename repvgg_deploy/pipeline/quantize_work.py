"""The work of a quantization: images, typed graph, gate; a step for each precision. What it gives may be written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, ParityError
from ..files.output import explain_os_errors
from ..precision.fp16 import Fp16Report, to_fp16
from ..precision.int8 import to_int8
from ..precision.int8_options import Int8Options, Int8Report
from ..precision.int8_work import Images
from ..precision.metrics import Judgement
from ..precision.scales import ScaleFile, ScaleOptions, load_scales
from ..precision.typed_model import TypedModel, load_parent
from ..specs.values import Check
from .quantize_gate import MIN_FP16_DB, Verification, agreement_check, blame_fp16, blame_int8, error_check, verify_typed
from .quantize_images import Gathered, draw_inputs, gather_images
from .quantize_options import STATISTICS, QuantizeOptions

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
    # What is judged below is the very graph that is written. Held-out images are given here only where a bound is to be met with them.
    given = Images(images.batches, images.held_out if steps.max_drop is not None else ())
    typed, report = to_int8(source, given, steps, saved=saved, progress=clock)
    reference = load_parent(source).model
    clock("verify", 0, 1)
    found = verify_typed(reference, typed.model, images.held_out, held_out=True, progress=lambda done, total: clock("verify", done, total))
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
        report = dataclasses.replace(report, held_out=Judgement(found.images, found.agreement, found.expected_drop, found.sqnr_db))
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
    found = verify_typed(parent.model, typed.model, batches, held_out=False, progress=lambda done, total: clock("verify", done, total))
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
        raise InputError(f"{path}: not a calibration that --save-scales wrote: not UTF-8", remedy="calibrate again with --save-scales") from error
    except InputError as error:
        raise InputError(
            f"{path}: not a calibration that --save-scales wrote: {error.message}", remedy="calibrate again with --save-scales"
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
        share = "" if found.agreement is None else f", same best class on {100 * found.agreement:.2f} % of {found.images} {what}"
        return ParityError(
            f"FP16 is too far from FP32: SQNR {found.sqnr_db:.1f} dB, at least {MIN_FP16_DB:g} expected{share}; they part at {worst}",
            remedy="keep the model in FP32, or give --calib images of the training split, so that ranges are measured",
        )
    assert found.agreement is not None
    return ParityError(
        f"INT8 agrees with FP32 on {100 * found.agreement:.2f} % of {found.images} {what}, at least {100 * options.min_agreement:g} % expected; "
        f"the layers that cost most, each quantized alone: {worst}",
        remedy=f"keep those layers in floating point (--keep {blamed[0][0]}, or --max-drop 0.3 to find how few are needed); give more images with "
        "--calib; leave --fast and other short cuts out; or accept it with a lower --min-agreement",
    )

"""Exported ONNX → typed ONNX in FP16 or INT8: calibrated, judged, and only then written. Needs no torch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..files.output import PendingOutput, atomic_output, require_distinct, require_replaceable
from ..precision.chain import read_chain
from ..precision.fp16 import Fp16Report
from ..precision.int8_options import Int8Report
from ..precision.typed_model import load_parent, write_typed
from ..specs import codec
from ..specs.values import ModelMetadata
from .quantize_gate import Verification
from .quantize_options import QuantizeOptions
from .quantize_work import Clock, ImageUse, Progress, StageTime, make_fp16, make_int8

__all__ = ["ImageUse", "QuantizeOptions", "QuantizeResult", "StageTime", "default_typed_output", "quantize"]


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
    model: Path | str, out: Path | str | None, options: QuantizeOptions, *, force: bool = False, progress: Progress | None = None
) -> QuantizeResult:
    """Makes a typed ONNX of one that repvgg-export wrote. Nothing is written unless it agrees with the FP32 graph where that can be judged.

    Args:
        model: The FP32 `.onnx`.
        out: The typed `.onnx`; None: beside `model`, with -fp16 or -int8 added to its name.
        options: See `QuantizeOptions`.
        force: Replace different files.
        progress: Called with the name of the stage, steps done and steps in all.

    Raises:
        CalibrationError: There are no images or they do not do, the graph is typed already, saved scales are of another graph or other images, or a
            bound cannot be met.
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
    # Opened first: a folder that cannot be written to should not be found out after the work. Written both or not at all.
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

"""`repvgg-trt quantize`: FP32 ONNX → typed ONNX in FP16 or INT8."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..evaluate.figures import require_drawable
from ..evaluate.plots import ChannelSpread, SqnrSeries, draw_quantization
from ..files.output import require_distinct
from ..precision.equalize import EqualizeOptions
from ..precision.fp16 import Fp16Options, Fp16Report
from ..precision.int8 import FAST, Int8Options, Int8Report, LayerReport
from ..precision.options import MIN_AGREEMENT, QuantizeOptions
from ..precision.quantization import QuantizeResult, default_typed_output, quantize
from ..precision.round import RoundOptions
from ..precision.scales import ScaleOptions
from ..specs.codec import encode
from .common import Output
from .stage_progress import StageProgress
from .tables import format_pairs, format_table
from .trt_eval import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST = 5
_RANGES = {
    "images": "measured on {} images",
    "statistics": "stated by the BatchNorm layers, and tried on {} drawn images",
    "synthetic": "32 times what {} drawn images gave",
}


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: The model or the images cannot be used, or the result does not agree with FP32.
    """
    if args.plot is not None:
        target = args.out or default_typed_output(args.model, args.precision)
        require_distinct([Path(args.plot)], [path for path in (args.model, target, args.save_scales, args.scales) if path is not None])
        require_drawable(Path(args.plot))
    options = read_options(args)
    with StageProgress() as progress:
        result = quantize(args.model, args.out, options, force=args.force, progress=progress)
    errors = draw(args, lambda: _figure(args.model, result))
    command = f"repvgg-trt compare {shlex.quote(str(args.model))} {shlex.quote(str(result.output.target))} --data PATH"
    if result.metadata.spec.kind not in ("logits", "probabilities", "top5"):  # `compare` is for classifiers
        command = f"repvgg-trt inspect {shlex.quote(str(result.output.target))}"
    return Output(data=_as_json(args, result), text=_as_text(args, options, result), next_command=command, errors=errors)


def read_options(args: argparse.Namespace) -> QuantizeOptions:
    """What the command line asks for; `quantize_arguments.find_conflict` has passed it.

    Raises:
        CalibrationError: A number is out of range.
        InputError: Likewise.
    """
    is_int8 = args.precision == "int8"
    return QuantizeOptions(
        args.precision,
        args.calib,
        args.images,
        args.seed,
        _int8_options(args) if is_int8 else Int8Options(),
        Fp16Options() if is_int8 else Fp16Options(io=args.io),
        MIN_AGREEMENT if args.min_agreement is None else args.min_agreement,
        args.scales,
        args.save_scales,
    )


def _int8_options(args: argparse.Namespace) -> Int8Options:
    base = FAST if args.fast else Int8Options()
    equalize, search = base.equalize, base.search
    if args.no_equalize:
        equalize, search = None, None
    elif args.exponent is not None:
        equalize, search = EqualizeOptions(args.exponent), None
    scales = ScaleOptions(args.method or base.scales.method, base.scales.percentile if args.percentile is None else args.percentile)
    rounding = RoundOptions(args.rounding or base.rounding.method, bias_correction=not args.no_bias_correction)
    return Int8Options(
        target=args.target or "trt10",
        io=args.io,
        equalize=equalize,
        search=search,
        scales=scales,
        rounding=rounding,
        keep=tuple(args.keep or ()),
        max_drop=args.max_drop,
        sensitivity=args.sensitivity,
    )


def _figure(model: Path, result: QuantizeResult) -> Figure:
    report = result.int8
    assert report is not None, "--plot is of INT8"
    rows = [ChannelSpread(i.source, i.spread_before, i.spread_after) for i in report.interfaces if i.blocked_by is None]
    series = []
    if report.source == "images":
        name = result.output.target.name
        series = [SqnrSeries(name, tuple(layer.name for layer in report.layers), tuple(layer.sqnr_db for layer in report.layers))]
    return draw_quantization(series, rows, reference=model.name)


def _as_text(args: argparse.Namespace, options: QuantizeOptions, result: QuantizeResult) -> str:
    size = f"{args.model} ({result.bytes_before / 1e6:.1f} MB)"
    if result.int8 is not None:
        beside = "FP16" if options.int8.target == "trt10" else "FP32"
        pairs = [("quantized", f"{size} to INT8, with {beside} for the rest"), *_int8_pairs(options, result, result.int8, beside)]
        tables = _layer_lines(result.int8, beside)
    else:
        assert result.fp16 is not None
        pairs, tables = [("converted", f"{size} to FP16"), *_fp16_pairs(result.fp16)], []
    times = ", ".join(f"{stage.name} {stage.seconds:.1f}" for stage in result.stages)
    pairs += [*_verdict(options, result), ("seconds", f"{sum(stage.seconds for stage in result.stages):.1f}: {times}")]
    if result.scales_output is not None:
        pairs.append((f"scales {result.scales_output.status}", str(result.scales_output.target)))
    share = f"{result.bytes_after / 1e6:.1f} MB, {result.bytes_after / result.bytes_before:.0%} of the FP32 file"
    pairs.append((result.output.status, f"{result.output.target} ({share})"))
    return "\n".join([format_pairs(pairs), *tables])


def _int8_pairs(options: QuantizeOptions, result: QuantizeResult, report: Int8Report, beside: str) -> list[tuple[str, str]]:
    steps = options.int8
    nearest = report.source == "statistics" or steps.rounding.method == "nearest"
    weights = "rounded to nearest" if nearest else "rounded so that each layer's output changes least"
    bias = "bias corrected" if steps.rounding.bias_correction else "bias left as it is"
    scales = "as saved" if options.scales is not None else f"chosen by {report.scales.method}"
    pairs = [
        ("calibration", _calibration(result)),
        ("equalization", _equalization(options, report)),
        ("rounding", f"activation scales {scales}; weights {weights}; {bias}"),
    ]
    total = sum(layer.macs for layer in report.layers)
    share = f"{report.int8_share:.1%} of the multiply-accumulates" if total else f"{len(report.layers) - len(report.kept)} layers"
    kept = f"; kept in {beside}: {', '.join(report.kept)}" if report.kept else ": every layer"
    return [*pairs, ("INT8", share + kept)]


def _calibration(result: QuantizeResult) -> str:
    images = result.images
    if images is None:
        return "no images: ranges from the BatchNorm statistics of the checkpoint"
    skipped = f"; {images.skipped} could not be read" if images.skipped else ""
    what = "synthetic images, made from BatchNorm statistics" if images.synthetic else "images"
    return f"{images.name}: {images.calibration} {what}, and {images.held_out} held out to judge the result{skipped}"


def _equalization(options: QuantizeOptions, report: Int8Report) -> str:
    moved = [interface for interface in report.interfaces if interface.blocked_by is None]
    if options.scales is not None:
        return "as saved" if report.scales.factors else "none"
    if not moved:
        return "none"
    used = sorted(interface.exponent for interface in moved)
    measured = options.int8.search is not None and report.source == "images"
    how = f"exponents {used[0]:g} to {used[-1]:g} by measured error" if measured else f"exponent {used[0]:g}"
    before, after = (float(np.median([getattr(interface, name) for interface in moved])) for name in ("spread_before", "spread_after"))
    spread = f"largest ÷ median channel range {before:.1f} → {after:.1f} (median)"
    return f"channels between {len(moved)} of {len(report.interfaces)} layers rescaled, {how}; {spread}"


def _fp16_pairs(report: Fp16Report) -> list[tuple[str, str]]:
    layer = max(report.largest, key=lambda name: report.largest[name])
    found = _RANGES[report.source].format(report.images)
    if report.rescaled:
        low, high = min(pair[0] for pair in report.factors.values()), max(pair[1] for pair in report.factors.values())
        moved = f"{sum(report.rescaled.values())} channels of {len(report.rescaled)} layers by powers of two, {low:g} to {high:g}"
    else:
        moved = "nothing: every value and weight lies within FP16"
    return [("ranges", f"{found}: up to {report.largest[layer]:.3g} at {layer}, and FP16 ends at 65504"), ("rescaled", moved)]


def _verdict(options: QuantizeOptions, result: QuantizeResult) -> list[tuple[str, str]]:
    found = result.verification
    if found is None:
        return [("not verified", result.ungated)]
    what = "held-out images" if found.held_out else "images" if result.images is not None else "drawn images"
    pairs = []
    if found.agreement is not None:
        demanded = result.ungated or describe_demand(found.agreement, options.min_agreement)
        same = found.images - found.differing
        pairs.append(("agreement", f"{100 * found.agreement:.2f} %: {same} of {found.images} {what} keep FP32's best class ({demanded})"))
        pairs.append(("expected drop", f"{found.expected_drop:.2f} points of top-1, by FP32's own probabilities"))
    where = "the logits" if found.agreement is not None else f"the outputs on {found.images} {what} ({result.ungated})"
    return [*pairs, ("SQNR", f"{found.sqnr_db:.1f} dB of {where}")]


def describe_demand(agreement: float, least: float) -> str:
    """What was demanded of a result that passed, both as shares from 0 to 1: below `least` it passed because there were so few images."""
    demanded = f"at least {100 * least:g} % demanded"
    return demanded if agreement >= least else f"{demanded}; of so few images one may differ"


def _layer_lines(report: Int8Report, beside: str) -> list[str]:
    if report.source == "statistics":
        return []
    costs = {cost.name: f"{cost.sqnr_db:.1f}" for cost in report.costs}
    total = sum(layer.macs for layer in report.layers)
    header = ["layer", "SQNR dB", "MACs", "precision", *(["alone dB"] if costs else [])]

    def row(layer: LayerReport) -> list[str]:
        precision = beside if layer.kept else "INT8"
        return [layer.name, f"{layer.sqnr_db:.1f}", f"{layer.macs / total:.1%}", precision, *([costs.get(layer.name, "")] if costs else [])]

    if costs:
        names = {layer.name: layer for layer in report.layers}
        worst, title = [names[cost.name] for cost in report.costs[:_WORST]], "the layers that cost most when each alone is quantized"
    else:
        worst, title = sorted(report.layers, key=lambda layer: layer.sqnr_db)[:_WORST], "the layers with the most noise, on calibration images"
    return [title, format_table([header, *map(row, worst)], "<>><" + (">" if costs else ""))]


def _as_json(args: argparse.Namespace, result: QuantizeResult) -> dict[str, object]:
    int8 = None if result.int8 is None else {name: value for name, value in encode(result.int8).items() if name != "scales"}
    return {
        "model": str(args.model),
        "out": str(result.output.target),
        "status": result.output.status,
        "precision": args.precision,
        "images": result.images,
        "int8": int8,
        "fp16": result.fp16,
        "verification": result.verification,
        "ungated": result.ungated,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "stages": result.stages,
        "scales": None if result.scales_output is None else str(result.scales_output.target),
        "metadata": dataclasses.replace(result.metadata, statistics={}),
    }

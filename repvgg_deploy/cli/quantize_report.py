"""What `repvgg-trt quantize` prints, draws and gives as JSON of a quantization."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from .common import show_seconds
from .eval import describe_data
from .terminal import format_pairs, format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..precision.fp16 import Fp16Report
    from ..precision.int8 import Int8Report, LayerReport
    from ..precision.metrics import Verification
    from ..precision.options import QuantizeOptions
    from ..precision.quantization import QuantizeResult

_NAMED = 6  # of layers that are kept, or of tensors
_WORST = 5
_FEW_DB = 3.0  # so much more has the median image than all together, where few have most of the error
_RANGES = {
    "images": "measured on {} images",
    "statistics": "stated by the BatchNorm layers, and tried on {} drawn images",
    "synthetic": "32 times what {} drawn images gave",
}


def draw_report(model: str, result: QuantizeResult) -> Figure:
    """The SQNR of each layer, and the channels' ranges before and after equalization."""
    from ..evaluate.plots import ChannelSpread, SqnrSeries, draw_quantization

    report = result.int8
    assert report is not None, "--plot is of INT8 and FP8"
    rows = [ChannelSpread(i.source, i.spread_before, i.spread_after) for i in report.interfaces if i.blocked_by is None]
    series = []
    if report.source == "images":
        names, sqnrs = zip(*((layer.name, layer.sqnr_db) for layer in report.layers), strict=True)
        series = [SqnrSeries(result.output.target.name, names, sqnrs)]
    return draw_quantization(series, rows, reference=model)


def as_text(args: argparse.Namespace, options: QuantizeOptions, result: QuantizeResult) -> str:
    """How the graph was made, and how far it is from FP32."""
    size = f"{args.model} ({result.bytes_before / 1e6:.1f} MB)"
    table = ""
    if result.int8 is not None:
        beside = "FP16" if options.int8.target == "trt10" else "FP32"
        pairs = [("quantized", f"{size} to {result.int8.format.upper()}, with {beside} for the rest")]
        pairs += _int8_pairs(options, result, result.int8, beside)
        table = _worst_layers(result.int8, beside)
    else:
        assert result.fp16 is not None
        pairs = [("converted", f"{size} to FP16"), *_fp16_pairs(result.fp16)]
    pairs += describe_data(result.images.left_out, result.images.likeness) if result.images is not None else []
    pairs += _verdict(options, result)
    pairs.append(("seconds", show_seconds((stage.name, stage.seconds) for stage in result.stages)))
    if result.scales_output is not None:
        pairs.append((f"scales {result.scales_output.status}", str(result.scales_output.target)))
    share = f"{result.bytes_after / 1e6:.1f} MB, {result.bytes_after / result.bytes_before:.0%} of the FP32 file"
    pairs.append((result.output.status, f"{result.output.target} ({share})"))
    return "\n".join(filter(None, (format_pairs(pairs), table)))


def _int8_pairs(
    options: QuantizeOptions, result: QuantizeResult, report: Int8Report, beside: str
) -> list[tuple[str, str]]:
    images = result.images
    calibration = "no images: ranges from the BatchNorm statistics of the checkpoint"
    if images is not None:
        skipped = f"; {images.skipped} could not be read" if images.skipped else ""
        what = "synthetic images, made from BatchNorm statistics" if images.synthetic else "images"
        judged = f"{images.held_out} held out to judge the result{skipped}"
        calibration = f"{images.name}: {images.calibration} {what}, and {judged}"
    if report.scales.left_out:
        calibration += (
            f"; {len(report.scales.left_out)} of them left out: beside their activations those of the others vanish"
        )
    nearest = report.source == "statistics" or options.int8.rounding.method == "nearest"
    weights = "rounded to nearest" if nearest else "rounded so that each layer's output changes least"
    bias = "bias corrected" if options.int8.rounding.bias_correction else "bias left as it is"
    scales = "as saved" if options.scales is not None else f"chosen by {report.scales.method}"
    share = f"{len(report.layers) - len(report.kept)} layers"
    if sum(layer.macs for layer in report.layers):
        share = f"{report.int8_share:.1%} of the multiply-accumulates"
    kept = f"; kept in {beside}: {_name(report.kept)}" if report.kept else ": every layer"
    twice = dict.fromkeys(report.requantized)
    why = "one scale for all that reads them would cost 0.5 dB or more"
    why = why if report.source == "images" else "without images it is not known what one scale would cost"
    return [
        ("calibration", calibration),
        ("equalization", _equalization(options, report)),
        ("rounding", f"activation scales {scales}; weights {weights}; {bias}"),
        (report.format.upper(), share + kept),
        *([("in FP16", f"{_reasons(report)}: TensorRT has no FP8 kernels for them")] if report.unsuited else []),
        *([("requantized", f"{len(report.requantized)} times: {_name(list(twice))}; {why}")] if twice else []),
    ]


def _reasons(report: Int8Report) -> str:
    """Each reason why layers stayed, with how many and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for name, why in report.unsuited.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(f"{_name(names)} ({why})" for why, names in by_reason.items())


def _name(names: Sequence[str]) -> str:
    """The first of so many names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _equalization(options: QuantizeOptions, report: Int8Report) -> str:
    moved = [interface for interface in report.interfaces if interface.blocked_by is None]
    if options.scales is not None:
        return "as saved" if report.scales.factors else "none"
    if not moved:
        return "none"
    used = sorted(interface.exponent for interface in moved)
    measured = options.int8.search is not None and report.source == "images"
    how = f"exponents {used[0]:g} to {used[-1]:g} by measured error" if measured else f"exponent {used[0]:g}"
    before = median(interface.spread_before for interface in moved)
    after = median(interface.spread_after for interface in moved)
    spread = f"largest ÷ median channel range {before:.1f} → {after:.1f} (median)"
    return f"channels between {len(moved)} of {len(report.interfaces)} layers rescaled, {how}; {spread}"


def _fp16_pairs(report: Fp16Report) -> list[tuple[str, str]]:
    layer = max(report.largest, key=lambda name: report.largest[name])
    found = _RANGES[report.source].format(report.images)
    moved = "nothing: every value and weight lies within FP16"
    if report.rescaled:
        low, high = min(pair[0] for pair in report.factors.values()), max(pair[1] for pair in report.factors.values())
        channels = f"{sum(report.rescaled.values())} channels of {len(report.rescaled)} layers"
        moved = f"{channels} by powers of two, {low:g} to {high:g}"
    return [
        ("ranges", f"{found}: up to {report.largest[layer]:.3g} at {layer}, and FP16 ends at 65504"),
        ("rescaled", moved),
        *([("in FP32", f"{', '.join(report.islands)}: FP16 does not hold them")] if report.islands else []),
    ]


def _verdict(options: QuantizeOptions, result: QuantizeResult) -> list[tuple[str, str]]:
    found, score = result.verification, result.score
    scored = []
    if score is not None:
        what = f"{score.found:g}, FP32 {score.fp32:g} (at least {score.least:g} demanded)"
        scored = [("score", f"{score.metric} gives {what}")]
    if found is None:
        return scored or [("not verified", result.ungated)]
    what = "held-out images" if found.held_out else "images" if result.images is not None else "drawn images"
    if found.agreement is None:
        least = (
            f" (at least {options.min_sqnr_db:g} dB each)" if options.precision != "fp16" else f" ({result.ungated})"
        )
        each = ", ".join(f"{one.name} {one.sqnr_db:.1f} dB ({one.relative:.2%})" for one in found.outputs)
        said = f"{each} on {found.images} {what}{'' if score is not None else least}"
        return [*scored, ("SQNR (error)", said)]
    demanded = result.ungated or describe_demand(found.agreement, options.min_agreement)
    same = f"{found.images - found.differing} of {found.images} {what} keep FP32's best class"
    return [
        *scored,
        ("agreement", f"{100 * found.agreement:.2f} %: {same}{'' if score is not None else f' ({demanded})'}"),
        ("expected drop", f"{found.expected_drop:.2f} points of top-1, by FP32's own probabilities"),
        ("SQNR", describe_sqnr(found)),
    ]


def describe_sqnr(found: Verification) -> str:
    """That of a classifier's logits; where a few images have most of the error, also that of most images."""
    whole = f"{found.sqnr_db:.1f} dB of the logits"
    if found.median_db is None or found.median_db < found.sqnr_db + _FEW_DB:
        return whole
    return f"{whole}, {found.median_db:.1f} dB of the median image: few images have most of the error"


def describe_demand(agreement: float, least: float) -> str:
    """What was demanded of a result that passed; below `least` it passed because there were so few images.

    Args:
        agreement: The share of the images that kept their best class, 0 to 1.
        least: The share that was demanded.
    """
    demanded = f"at least {100 * least:g} % demanded"
    return demanded if agreement >= least else f"{demanded}; of so few images one may differ"


def _worst_layers(report: Int8Report, beside: str) -> str:
    """A table of the layers that cost most, where that was measured, else of those with the most noise."""
    if report.source == "statistics":
        return ""
    costs = {cost.name: f"{cost.sqnr_db:.1f}" for cost in report.costs}
    total = sum(layer.macs for layer in report.layers)

    def row(layer: LayerReport) -> list[str]:
        numbers = [f"{layer.sqnr_db:.1f}", f"{layer.macs / total:.1%}"]
        return [
            layer.name,
            *numbers,
            beside if layer.kept else report.format.upper(),
            *([costs.get(layer.name, "")] if costs else []),
        ]

    if costs:
        layers = {layer.name: layer for layer in report.layers}
        worst = [layers[name] for name in list(costs)[:_WORST]]
        title = "the layers that cost most when each alone is quantized"
    else:
        worst = sorted(report.layers, key=lambda layer: layer.sqnr_db)[:_WORST]
        title = "the layers with the most noise, on calibration images"
    header = ["layer", "SQNR dB", "MACs", "precision", *(["alone dB"] if costs else [])]
    return f"{title}\n{format_table([header, *map(row, worst)], '<>><' + ('>' if costs else ''))}"


def as_json(args: argparse.Namespace, result: QuantizeResult) -> dict[str, object]:
    """The same for programs."""
    from ..specs.codec import encode

    int8 = None if result.int8 is None else encode(result.int8)
    if int8 is not None:
        del int8["scales"]
        if int8["held_out"] is not None:
            del int8["held_out"]["held_out"]  # which says nothing here
    return {
        "model": str(args.model),
        "out": str(result.output.target),
        "status": result.output.status,
        "precision": args.precision,
        "images": result.images,
        "int8": int8 if args.precision == "int8" else None,
        "fp8": int8 if args.precision == "fp8" else None,
        "fp16": result.fp16,
        "verification": result.verification,
        "score": result.score,
        "ungated": result.ungated,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "stages": result.stages,
        "scales": None if result.scales_output is None else str(result.scales_output.target),
        "metadata": dataclasses.replace(result.metadata, statistics={}),
    }

"""`repvgg-trt quantize`: FP32 ONNX → typed ONNX in FP16, INT8 or FP8. `build` takes the same options."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from .common import Command, Output, Progress, format_pairs, format_table, parse_whole, save_plot, show_seconds
from .eval import add_data_check_option, add_max_value_option, describe_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..precision.fp16 import Fp16Report
    from ..precision.int8 import Int8Options, Int8Report, LayerReport
    from ..precision.options import QuantizeOptions
    from ..precision.quantization import QuantizeResult

EXAMPLES = """examples:
  repvgg-trt quantize b2.onnx --fp16
  repvgg-trt quantize b2.onnx --int8                    (b2.calib.npz is there)
  repvgg-trt quantize b2.onnx --int8 --calib train/ --max-drop 0.3 --plot b2.png
  repvgg-trt quantize b2.onnx --int8 --calib statistics    (no images at all)
  repvgg-trt quantize yolo.onnx --int8 --metric measure:mean_ap --max-drop 0.3
"""
_STATISTICS = "statistics"
_IMAGES = 256
_STEPS = ("--method", "--percentile", "--no-equalize", "--exponent", "--no-bias-correction", "--rounding", "--fast")
_INT8_ONLY = ("--target", *_STEPS, "--keep", "--max-drop", "--sensitivity", "--save-scales", "--scales", "--plot")
_CALIBRATION = ("--method", "--percentile", "--no-equalize", "--exponent", "--save-scales")
_NEEDS_IMAGES = ("--scales", "--save-scales", "--max-drop", "--sensitivity")
_NAMED = 6  # of layers that are kept, or of tensors
_WORST = 5
_RANGES = {
    "images": "measured on {} images",
    "statistics": "stated by the BatchNorm layers, and tried on {} drawn images",
    "synthetic": "32 times what {} drawn images gave",
}


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The precision, its images and its steps."""
    parser.add_argument("model", metavar="MODEL", type=Path,
                        help="the FP32 .onnx of repvgg-export, export_module or fold")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fp16", action="store_const", dest="precision", const="fp16",
                      help="half precision, rescaled so that nothing overflows")
    kind.add_argument("--int8", action="store_const", dest="precision", const="int8",
                      help="8-bit integers, FP16 or FP32 for the rest")
    kind.add_argument("--fp8", action="store_const", dest="precision", const="fp8",
                      help="8-bit floating point (E4M3), FP16 for the rest: for Ada, Hopper and Blackwell")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="the ONNX to write (default: beside MODEL, such as NAME-int8.onnx)")
    add_io_option(parser)
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    add_image_options(parser.add_argument_group("images"))
    steps = parser.add_argument_group("steps of INT8 and FP8")
    steps.add_argument("--target", choices=("trt10", "trt8"),
                       help="trt10: FP16 beside INT8, opset 19, for TensorRT 10 and later; trt8: FP32, opset 17, for "
                            "TensorRT 8.5 and 8.6, too (default: trt10)")
    add_step_options(steps)
    steps.add_argument("--sensitivity", action="store_true", help="rank the layers by what quantizing each alone costs")
    steps.add_argument("--save-scales", type=Path, metavar="FILE", help="write the calibration to a .json, too")
    steps.add_argument("--plot", type=Path, metavar="FILE",
                       help="also draw every layer's SQNR and channel ranges as a .png (needs matplotlib)")


def add_io_option(group: argparse._ActionsContainer) -> None:
    """The type of what goes in and comes out."""
    group.add_argument("--io", choices=("fp32", "fp16"), default="fp32",
                       help="type of floating-point inputs and outputs (default: %(default)s)")


def add_image_options(group: argparse._ArgumentGroup) -> None:
    """What an FP32 graph is calibrated with and judged on."""
    group.add_argument("--calib", metavar="DIR|FILE|statistics",
                       help="images to calibrate with: a folder, .npz, list or image; statistics: no images, ranges "
                            "from the BatchNorm statistics in MODEL (default: for INT8 and FP8 the NAME.calib.npz "
                            "beside MODEL, which repvgg-export --synthetic-calibration writes; for FP16 none)")
    group.add_argument("--images", type=parse_whole, default=_IMAGES, metavar="N",
                       help="calibrate with at most N images; up to half as many more are held out to judge "
                            "(default: %(default)s)")
    group.add_argument("--seed", type=partial(parse_whole, least=0), default=0, metavar="N",
                       help="another choice of images (default: %(default)s)")
    group.add_argument("--min-agreement", type=float, metavar="SHARE",
                       help="write nothing unless this share of the held-out images keeps the best class of FP32 "
                            "(default: 0.97)")
    group.add_argument("--min-sqnr", type=float, metavar="DB",
                       help="the same for a graph without a classifier: every output must reach so many "
                            "decibels (default: 20)")
    group.add_argument("--metric", metavar="MODULE:FUNCTION",
                       help="judge by a measure of your own (mAP, mIoU, …) in place of both: a Python function that "
                            "is given run(batch), which runs the graph as Engine.infer does, and returns one number, "
                            "larger is better; modules of the working directory are found")
    group.add_argument("--min-metric", type=float, metavar="SCORE",
                       help="write nothing unless --metric gives so much (default: 97 %% of what it gives FP32, or "
                            "what --max-drop leaves)")
    add_data_check_option(group)
    add_max_value_option(group)


def add_step_options(group: argparse._ArgumentGroup) -> None:
    """How an FP32 graph becomes INT8."""
    group.add_argument("--fast", action="store_true",
                       help="round weights to nearest and search no exponents: much quicker, some dB less exact")
    group.add_argument("--keep", nargs="+", action="extend", metavar="LAYER",
                       help="layers that stay in floating point, such as stage0.conv")
    group.add_argument("--max-drop", type=_parse_drop, metavar="LOSS",
                       help="keep as few layers in floating point as hold the loss: 0.3 is percentage points of top-1 "
                            "that are expected to be lost, or, with --metric, what its score may fall by; 24dB is "
                            "every output at least 24 dB above its error")
    group.add_argument("--method", choices=("max", "percentile", "entropy", "min_error"),
                       help="how activation scales are chosen (default: min_error)")
    group.add_argument("--percentile", type=float, metavar="P",
                       help="the percentile of --method percentile (default: 99.99)")
    group.add_argument("--no-equalize", action="store_true", help="leave the channels as they are")
    group.add_argument("--exponent", type=float, metavar="E",
                       help="equalize with this exponent, 0 to 1, and do not search for the best")
    group.add_argument("--rounding", choices=("second_order", "nearest"),
                       help="how weights are rounded (default: second_order)")
    group.add_argument("--no-bias-correction", action="store_true", help="leave the biases as they are")
    group.add_argument("--scales", type=Path, metavar="FILE",
                       help="use the calibration that --save-scales wrote for the same model and images")
# fmt: on


def _parse_drop(text: str) -> float | str:
    """`0.3` as a number; `24dB` as it is, in one spelling."""
    number = text.strip().lower()
    is_db = number.endswith("db")
    try:
        value = float(number.removesuffix("db"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a loss such as 0.3, or decibels such as 24dB, found {text!r}"
        ) from None
    return f"{value:g}dB" if is_db else value


def find_given(args: argparse.Namespace) -> list[str]:
    """Which options of the quantization are given."""
    others = {"--calib": args.calib is not None, "--min-agreement": args.min_agreement is not None}
    others |= {"--min-sqnr": args.min_sqnr is not None, "--metric": args.metric is not None}
    others |= {"--min-metric": args.min_metric is not None}
    others |= {"--accept-data": args.accept_data, "--max-value": args.max_value is not None}
    others |= {"--images": args.images != _IMAGES, "--seed": args.seed != 0, "--io": args.io != "fp32"}
    return [*(flag for flag, is_given in others.items() if is_given), *_given_for_int8(args)]


def _given_for_int8(args: argparse.Namespace) -> list[str]:
    return [flag for flag in _INT8_ONLY if getattr(args, flag[2:].replace("-", "_")) not in (None, False)]


def _find_judge_conflict(args: argparse.Namespace) -> str | None:
    if args.min_metric is not None and args.metric is None:
        return "--min-metric needs --metric"
    for flag, value in (("--min-agreement", args.min_agreement), ("--min-sqnr", args.min_sqnr)):
        if args.metric is not None and value is not None:
            return f"--metric judges in place of {flag}: they cannot hold together"
    return None


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    wrong_judge = _find_judge_conflict(args)
    if wrong_judge is not None:
        return wrong_judge
    given = _given_for_int8(args)
    if args.precision == "fp16":
        wrong = [*given, *(["--calib statistics"] if args.calib == _STATISTICS else [])]
        return f"{wrong[0]} is of --int8 and --fp8: it cannot hold with --fp16" if wrong else None
    if args.precision == "fp8" and (args.target == "trt8" or args.method == "entropy"):
        wrong_option = "--target trt8" if args.target == "trt8" else "--method entropy"
        return f"{wrong_option} is of integers: it cannot hold with --fp8"
    if args.target == "trt8" and args.io == "fp16":
        return "--target trt8 keeps FP32 beside INT8: it cannot hold with --io fp16"
    if args.percentile is not None and args.method != "percentile":
        return "--percentile needs --method percentile"
    if args.no_equalize and args.exponent is not None:
        return "--exponent cannot hold with --no-equalize"
    if args.fast and args.rounding == "second_order":
        return "--fast rounds to nearest: it cannot hold with --rounding second_order"
    if args.calib == _STATISTICS:
        wrong = [flag for flag in _NEEDS_IMAGES if flag in given]
        wrong += ["--rounding second_order"] if args.rounding == "second_order" else []
        wrong += ["--min-agreement"] if args.min_agreement is not None else []
        wrong += ["--min-sqnr"] if args.min_sqnr is not None else []
        if wrong:
            return f"{wrong[0]} needs images: it cannot hold with --calib statistics"
        if args.plot is not None and args.no_equalize:
            return "--plot has nothing to draw with --calib statistics and --no-equalize"
    elif args.scales is not None:
        wrong = [flag for flag in _CALIBRATION if flag in given]
        return f"--scales takes a calibration as it was saved: it cannot hold with {wrong[0]}" if wrong else None
    return None


def execute(args: argparse.Namespace) -> Output:
    """Writes the typed ONNX, if it agrees with FP32, and says how it was made and how far apart the two are."""
    from ..evaluate.figures import require_drawable
    from ..files.output import require_distinct
    from ..precision.quantization import default_typed_output, quantize

    if args.plot is not None:
        target = args.out or default_typed_output(args.model, args.precision)
        others = (args.model, target, args.save_scales, args.scales)
        require_distinct([args.plot], [path for path in others if path is not None])
        require_drawable(args.plot)
    options = read_options(args)
    with Progress() as bar:
        result = quantize(args.model, args.out, options, force=args.force, progress=bar.show)
    errors = save_plot(args.plot, lambda: _draw(args.model.name, result), force=args.force)
    target = shlex.quote(str(result.output.target))
    follow = f"compare {shlex.quote(str(args.model))} {target} --data PATH"
    if result.metadata.spec.kind not in ("logits", "probabilities", "top5"):  # `compare` is for classifiers
        follow = f"inspect {target}"
    return Output(
        data=_as_json(args, result),
        text=_as_text(args, options, result),
        next_command=f"repvgg-trt {follow}",
        errors=errors,
    )


def read_options(args: argparse.Namespace) -> QuantizeOptions:
    """What the command line asks for; `find_conflict` has passed it.

    Raises:
        CalibrationError: A number is out of range.
        InputError: Likewise; or --metric names no function.
    """
    from ..precision.fp16 import Fp16Options
    from ..precision.int8 import Int8Options
    from ..precision.options import MIN_AGREEMENT, MIN_SQNR_DB, QuantizeOptions
    from ..precision.score import load_metric

    has_steps = args.precision != "fp16"
    return QuantizeOptions(
        args.precision,
        args.calib,
        args.images,
        args.seed,
        _read_int8_options(args) if has_steps else Int8Options(),
        Fp16Options() if has_steps else Fp16Options(io=args.io),
        MIN_AGREEMENT if args.min_agreement is None else args.min_agreement,
        MIN_SQNR_DB if args.min_sqnr is None else args.min_sqnr,
        None if args.metric is None else load_metric(args.metric),
        args.min_metric,
        args.scales,
        args.save_scales,
        args.accept_data,
        args.max_value,
    )


def _read_int8_options(args: argparse.Namespace) -> Int8Options:
    from ..precision.equalize import EqualizeOptions
    from ..precision.int8 import FAST, Int8Options
    from ..precision.round import RoundOptions
    from ..precision.scales import ScaleOptions

    base = FAST if args.fast else Int8Options()
    equalize, search = base.equalize, base.search
    if args.no_equalize:
        equalize, search = None, None
    elif args.exponent is not None:
        equalize, search = EqualizeOptions(args.exponent), None
    in_db = isinstance(args.max_drop, str)
    percentile = base.scales.percentile if args.percentile is None else args.percentile
    return Int8Options(
        target=args.target or "trt10",
        io=args.io,
        equalize=equalize,
        search=search,
        scales=ScaleOptions(args.method or base.scales.method, percentile),
        rounding=RoundOptions(args.rounding or base.rounding.method, bias_correction=not args.no_bias_correction),
        keep=tuple(args.keep or ()),
        max_drop=None if in_db else args.max_drop,
        least_sqnr_db=float(args.max_drop.removesuffix("dB")) if in_db else None,
        sensitivity=args.sensitivity,
    )


def _draw(model: str, result: QuantizeResult) -> Figure:
    from ..evaluate.plots import ChannelSpread, SqnrSeries, draw_quantization

    report = result.int8
    assert report is not None, "--plot is of INT8 and FP8"
    rows = [ChannelSpread(i.source, i.spread_before, i.spread_after) for i in report.interfaces if i.blocked_by is None]
    series = []
    if report.source == "images":
        names, sqnrs = zip(*((layer.name, layer.sqnr_db) for layer in report.layers), strict=True)
        series = [SqnrSeries(result.output.target.name, names, sqnrs)]
    return draw_quantization(series, rows, reference=model)


def _as_text(args: argparse.Namespace, options: QuantizeOptions, result: QuantizeResult) -> str:
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
        ("SQNR", f"{found.sqnr_db:.1f} dB of the logits"),
    ]


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


def _as_json(args: argparse.Namespace, result: QuantizeResult) -> dict[str, object]:
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


COMMAND = Command(
    "quantize",
    "make a typed ONNX: FP16 that cannot overflow, INT8 and FP8 that keep their accuracy",
    "Makes an FP16, INT8 or FP8 ONNX of an FP32 one: calibrates, compares the result with FP32 on images that took no "
    "part, and writes it only if they agree. Needs neither a GPU nor TensorRT.",
    add_options,
    execute,
    find_conflict,
    EXAMPLES,
)

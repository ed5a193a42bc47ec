"""`repvgg-trt quantize`: FP32 ONNX → typed ONNX in FP16, INT8 or FP8. `build` takes the same options."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Command, Output, parse_whole, save_plot
from .eval import add_data_check_option, add_max_value_option
from .quantize_report import as_json, as_text, draw_report
from .terminal import Progress

if TYPE_CHECKING:
    from ..precision.int8 import Int8Options
    from ..precision.options import QuantizeOptions

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
    values = ((flag, getattr(args, flag[2:].replace("-", "_"))) for flag in _INT8_ONLY)
    return [flag for flag, value in values if value is not None and value is not False]  # 0 is given, too


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
    errors = save_plot(args.plot, lambda: draw_report(args.model.name, result), force=args.force)
    target = shlex.quote(str(result.output.target))
    follow = f"compare {shlex.quote(str(args.model))} {target} --data PATH"
    if result.metadata.spec.kind not in ("logits", "probabilities", "top5"):  # `compare` is for classifiers
        follow = f"inspect {target}"
    return Output(
        data=as_json(args, result),
        text=as_text(args, options, result),
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

"""The options of `repvgg-trt quantize`, those that `build` shares, and which cannot hold together. Standard library only: `--help` must be quick."""

from __future__ import annotations

import argparse
from pathlib import Path

STATISTICS = "statistics"
_INT8_ONLY = {
    "--target": "target",
    "--method": "method",
    "--percentile": "percentile",
    "--no-equalize": "no_equalize",
    "--exponent": "exponent",
    "--no-bias-correction": "no_bias_correction",
    "--rounding": "rounding",
    "--fast": "fast",
    "--keep": "keep",
    "--max-drop": "max_drop",
    "--sensitivity": "sensitivity",
    "--save-scales": "save_scales",
    "--scales": "scales",
    "--plot": "plot",
}
_IMAGES = 256
_CALIBRATION = ("--method", "--percentile", "--no-equalize", "--exponent", "--save-scales")
_NEEDS_IMAGES = ("--scales", "--save-scales", "--max-drop", "--sensitivity")


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """The precision, its images and its steps."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="the FP32 .onnx that repvgg-export wrote")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fp16", action="store_const", dest="precision", const="fp16", help="half precision, rescaled so that nothing overflows")
    kind.add_argument("--int8", action="store_const", dest="precision", const="int8", help="8-bit integers, FP16 or FP32 for the rest")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the ONNX to write (default: NAME-fp16.onnx or NAME-int8.onnx beside MODEL)")
    parser.add_argument("--io", choices=("fp32", "fp16"), default="fp32", help="type of floating-point inputs and outputs (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    add_image_options(parser.add_argument_group("images"))
    steps = parser.add_argument_group("steps of INT8")
    steps.add_argument("--target", choices=("trt10", "trt8"), default=None,
                       help="trt10: FP16 beside INT8, opset 19, for TensorRT 10 and later; trt8: FP32, opset 17, for TensorRT 8.5 and 8.6, too "
                            "(default: trt10)")  # fmt: skip
    add_step_options(steps)
    _add_report_options(steps)
    parser.set_defaults(usage_error=parser.error)


def add_image_options(group: argparse._ArgumentGroup) -> None:
    """What an FP32 graph is calibrated with and judged on."""
    group.add_argument(
        "--calib",
        metavar="DIR|FILE|statistics",
        help="images to calibrate with: a folder, .npz, list or image; statistics: no images, ranges from the BatchNorm statistics in MODEL "
        "(default: for INT8 the NAME.calib.npz beside MODEL, which repvgg-export --synthetic-calibration writes; for FP16 none)",
    )
    group.add_argument("--images", type=parse_positive, default=_IMAGES, metavar="N",
                       help="at most so many to calibrate with; up to half as many more are held out to judge (default: %(default)s)")  # fmt: skip
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="another choice of images (default: %(default)s)")
    group.add_argument("--min-agreement", type=float, default=None, metavar="SHARE",
                       help="write nothing unless so large a share of the held-out images gets the best class of FP32 (default: 0.97)")  # fmt: skip


def add_step_options(group: argparse._ArgumentGroup) -> None:
    """How an FP32 graph becomes INT8."""
    group.add_argument("--fast", action="store_true", help="no search for exponents and weights to nearest: a fraction of the time, some dB less")
    group.add_argument("--keep", nargs="+", action="extend", metavar="LAYER", help="layers that stay in floating point, such as stage0.conv")
    group.add_argument("--max-drop", type=float, metavar="POINTS",
                       help="keep the fewest layers in floating point with which the expected top-1 drop is at most so many points")  # fmt: skip
    group.add_argument("--method", choices=("max", "percentile", "entropy", "min_error"), default=None,
                       help="how activation scales are chosen (default: min_error)")  # fmt: skip
    group.add_argument("--percentile", type=float, metavar="P", help="of --method percentile (default: 99.99)")
    group.add_argument("--no-equalize", action="store_true", help="leave the channels as they are")
    group.add_argument("--exponent", type=float, metavar="E", help="equalize with this exponent, 0 to 1, and do not search for the best")
    group.add_argument("--rounding", choices=("second_order", "nearest"), default=None, help="how weights are rounded (default: second_order)")
    group.add_argument("--no-bias-correction", action="store_true", help="leave the biases as they are")
    group.add_argument("--scales", type=Path, metavar="FILE", help="take the calibration that --save-scales wrote, of the same model and images")


def _add_report_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sensitivity", action="store_true", help="rank the layers by what quantizing each alone costs")
    group.add_argument("--save-scales", type=Path, metavar="FILE", help="write the calibration to a .json, too")
    group.add_argument("--plot", metavar="FILE", help="also draw every layer's SQNR and channel ranges as a .png (needs matplotlib)")


def quantize_flags(args: argparse.Namespace) -> list[str]:
    """Which options of the quantization are given."""
    given = [flag for flag, name in _INT8_ONLY.items() if getattr(args, name) not in (None, False)]
    others = {"--calib": args.calib is not None, "--min-agreement": args.min_agreement is not None}
    others |= {"--images": args.images != _IMAGES, "--seed": args.seed != 0, "--io": args.io != "fp32"}
    return [*(flag for flag, is_given in others.items() if is_given), *given]


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    given = [flag for flag, name in _INT8_ONLY.items() if getattr(args, name) not in (None, False)]
    if args.precision == "fp16":
        wrong = [*given, *(["--calib statistics"] if args.calib == STATISTICS else [])]
        return f"{wrong[0]} is of --int8: it cannot hold with --fp16" if wrong else None
    if args.target == "trt8" and args.io == "fp16":
        return "--target trt8 keeps FP32 beside INT8: it cannot hold with --io fp16"
    if args.percentile is not None and args.method != "percentile":
        return "--percentile needs --method percentile"
    if args.no_equalize and args.exponent is not None:
        return "--exponent cannot hold with --no-equalize"
    if args.fast and args.rounding == "second_order":
        return "--fast rounds to nearest: it cannot hold with --rounding second_order"
    if args.calib == STATISTICS:
        return _statistics_conflict(args, given)
    if args.scales is not None:
        wrong = [flag for flag in _CALIBRATION if flag in given]
        return f"--scales takes a calibration as it was saved: it cannot hold with {wrong[0]}" if wrong else None
    return None


def _statistics_conflict(args: argparse.Namespace, given: list[str]) -> str | None:
    wrong = [flag for flag in _NEEDS_IMAGES if flag in given]
    wrong += ["--rounding second_order"] if args.rounding == "second_order" else []
    wrong += ["--min-agreement"] if args.min_agreement is not None else []
    if wrong:
        return f"{wrong[0]} needs images: it cannot hold with --calib statistics"
    return "--plot has nothing to draw with --calib statistics and --no-equalize" if args.plot is not None and args.no_equalize else None


def parse_positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or not least <= int(text[:10]) < 1 << 31:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
    return int(text)

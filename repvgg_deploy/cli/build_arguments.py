"""The options of `repvgg-trt build` and `repvgg-trt check`. Standard library only: `--help` must be quick."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .quantize_arguments import add_image_options, add_step_options, find_conflict, parse_positive, quantize_flags

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

BUILD_EXAMPLES = """examples:
  repvgg-trt build b2.onnx                               (as the graph is typed)
  repvgg-trt build b2.onnx --fp16 --max-batch 64
  repvgg-trt build b2.onnx --int8 --calib train/ --out b2-int8.plan
  repvgg-trt build b2-int8.onnx --config engines/configs/int8.toml
  repvgg-trt build b2.onnx --backend rtx --target sm_86 sm_89  (needs no GPU)
"""
CHECK_EXAMPLES = """examples:
  repvgg-trt check b2.plan                         (on this machine)
  repvgg-trt check b2.plan --target gpu=a10,trt=10.9
  repvgg-trt check b2.plan --target gpu=sm_120,rtx=1.7.1.116
"""


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """The model, its precision, and what the builder is given."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="an .onnx that repvgg-export or repvgg-trt quantize wrote")
    kind = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "the graph must be FP32: full float32, no TF32 unless --tf32"),
        ("fp16", "half precision: an FP32 graph is converted first"),
        ("int8", "8-bit integers: an FP32 graph is calibrated and quantized first"),
    ):
        kind.add_argument(f"--{name}", action="store_const", dest="precision", const=name, help=f"{text} (default: as the graph is typed)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the plan to write; its passport is FILE.json (default: NAME.plan beside MODEL)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a build configuration, such as engines/configs/fp16.toml; options given here win"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    parser.add_argument("--no-cache", action="store_true", help="build even where an identical plan was built before, and do not keep this one")
    _add_profile_options(parser.add_argument_group("batch sizes"))
    _add_builder_options(parser.add_argument_group("TensorRT"))
    images = parser.add_argument_group("from FP32 to FP16 or INT8, as in repvgg-trt quantize")
    images.add_argument("--io", choices=("fp32", "fp16"), default="fp32", help="type of floating-point inputs and outputs (default: %(default)s)")
    add_image_options(images)
    add_step_options(images)
    parser.set_defaults(usage_error=parser.error, target=None, plot=None, save_scales=None, sensitivity=False)


def _add_profile_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-batch", type=parse_positive, default=None, metavar="N", help="the smallest that the plan accepts (default: 1)")
    group.add_argument("--opt-batch", type=parse_positive, default=None, metavar="N", help="the usual one, that it is tuned for (default: 8)")
    group.add_argument("--max-batch", type=parse_positive, default=None, metavar="N", help="the largest; memory grows with it (default: 32)")


def _add_builder_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=("auto", "tensorrt", "rtx"), default="auto",
                       help="auto: TensorRT where it is installed, else TensorRT-RTX, which builds without a GPU (default: %(default)s)")  # fmt: skip
    group.add_argument("--target", dest="targets", nargs="+", action="extend", type=_capability, default=None, metavar="SM",
                       help="GPUs that a TensorRT-RTX plan is for: compute capabilities such as sm_86 or 8.9, or current (default: all from "
                            "Ampere on)")  # fmt: skip
    group.add_argument("--workspace", type=parse_bytes, default=None, metavar="SIZE", help="scratch memory, such as 512MiB (default: 4GiB)")
    group.add_argument("--optimization-level", type=int, choices=range(6), default=None, metavar="N",
                       help="0 to 5: how long TensorRT searches (default: TensorRT's own)")  # fmt: skip
    group.add_argument("--timing-cache", type=Path, metavar="FILE",
                       help="TensorRT's timings, read and updated (default: a file of this GPU and TensorRT in the cache folder)")  # fmt: skip
    group.add_argument("--tf32", action="store_true", help="let FP32 convolutions round their inputs to TF32: faster, an error of about 1e-3")
    group.add_argument("--sparse", action="store_true", help="allow 2:4 sparse weights")
    group.add_argument("--version-compatible", action="store_true", help="a plan that later TensorRT of the same major version run, too")
    group.add_argument("--hardware-compatible", action="store_true", help="a plan that all GPUs from Ampere on run, if slower")


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """The plan and the place."""
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a plan with its passport PLAN.json beside it")
    parser.add_argument("--target", metavar="KEY=VALUE,…", default=None, type=parse_target,
                        help="another place: gpu=NAME or compute capability, trt=VERSION or rtx=VERSION, driver=VERSION "
                             "(default: this machine)")  # fmt: skip


def find_build_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    given = quantize_flags(args)
    if args.precision == "fp32" and given:
        return f"{given[0]} is of --fp16 and --int8: it cannot hold with --fp32"
    return find_conflict(args) if args.precision in ("fp16", "int8") else None


def parse_bytes(text: str) -> int:
    """`4GiB`, `512 MiB`, `2e9`… as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1 or float(found[1]) * unit >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB or 512MiB, found {text!r}")
    return int(float(found[1]) * unit)


def parse_target(text: str) -> dict[str, str]:
    """`gpu=a10,trt=10.9` as a dict."""
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in ("gpu", "trt", "rtx", "driver") or not equals or not value or key in found:
            raise argparse.ArgumentTypeError(f"expected gpu=…, trt=… or rtx=…, driver=…, each once and apart by commas, found {part!r}")
        found[key] = value
    if {"trt", "rtx"} <= set(found):
        raise argparse.ArgumentTypeError("trt=… and rtx=… cannot hold together: a plan is of one of the two")
    for key in set(found) - {"gpu"}:
        if not re.fullmatch(r"\d+(\.\d+)*", found[key]):
            raise argparse.ArgumentTypeError(f"expected a version such as {key}=10.9, found {found[key]!r}")
    return found


def _capability(text: str) -> str:
    if text.strip().lower() == "current":
        return "current"
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a compute capability such as sm_86 or 8.6, found {text!r}")
    return f"{int(found[1])}.{found[2]}"

"""`repvgg-trt build`: ONNX → TensorRT plan and its passport."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import quantize
from .check import describe_plan
from .common import Command, Output, parse_counts, parse_size, parse_whole, show_bytes, show_seconds
from .terminal import Progress, format_pairs

Size = tuple[int, int]
if TYPE_CHECKING:
    from ..build.build import BuildResult
    from ..build.options import BuildOptions
    from ..specs.values import ShapeProfile

EXAMPLES = """examples:
  repvgg-trt build b2.onnx                               (as the graph is typed)
  repvgg-trt build b2.onnx --fp16 --max-batch 64
  repvgg-trt build b2.onnx --int8 --calib train/ --out b2-int8.plan
  repvgg-trt build b2-int8.onnx --config engines/configs/int8.toml
  repvgg-trt build b2.onnx --backend rtx --target sm_86 sm_89  (needs no GPU)
  repvgg-trt build yolo.onnx --min-size 320 --opt-size 640 --max-size 1280
"""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SWITCHES = ("tf32", "sparse", "version_compatible", "hardware_compatible")


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, its precision, and what the builder is given."""
    parser.add_argument("model", metavar="MODEL", type=Path,
                        help="an .onnx of repvgg-export, fold or quantize")
    kind = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "the graph must be FP32: full float32, no TF32 unless --tf32"),
        ("fp16", "half precision: an FP32 graph is converted first"),
        ("int8", "8-bit integers: an FP32 graph is calibrated and quantized first"),
        ("fp8", "8-bit floating point, for Ada, Hopper and Blackwell: likewise"),
    ):
        kind.add_argument(f"--{name}", action="store_const", dest="precision", const=name,
                          help=f"{text} (default: as the graph is typed)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="the plan to write; its passport is FILE.json (default: NAME.plan beside MODEL)")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="a build configuration, such as engines/configs/fp16.toml; options given here come first")
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    parser.add_argument("--no-cache", action="store_true",
                        help="build even where an identical plan was built before, and do not keep this one")
    batches = parser.add_argument_group("batch sizes")
    for name, text in (
        ("min", "the smallest that the plan accepts (default: 1)"),
        ("opt", "the usual one, which the plan is tuned for (default: 8)"),
        ("max", "the largest; memory grows with it (default: 32)"),
    ):
        batches.add_argument(f"--{name}-batch", type=parse_whole, metavar="N", help=text)
    batches.add_argument("--profiles", type=parse_counts, metavar="N,N",
                         help="several usual ones, such as 1,8,32,128: kernels of their own for each, in place of the "
                              "three above; the build takes as many times as long")
    sizes = parser.add_argument_group("image sizes of a model that takes any (--dynamic-size), in pixels")
    for name, text in (
        ("min", "the smallest that the plan accepts (default: the usual one)"),
        ("opt", "the usual one, which the plan is tuned for"),
        ("max", "the largest; memory grows with it (default: the usual one)"),
    ):
        sizes.add_argument(f"--{name}-size", type=parse_size, metavar="N|HxW", help=text)
    _add_builder_options(parser.add_argument_group("TensorRT"))
    images = parser.add_argument_group("from FP32 to FP16, INT8 or FP8, as in repvgg-trt quantize")
    quantize.add_io_option(images)
    quantize.add_image_options(images)
    quantize.add_step_options(images)
    parser.set_defaults(target=None, plot=None, save_scales=None, sensitivity=False)


def _add_builder_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=("auto", "tensorrt", "rtx"), default="auto",
                       help="auto: TensorRT where it is installed, else TensorRT-RTX, which builds without a GPU "
                            "(default: %(default)s)")
    group.add_argument("--target", dest="targets", nargs="+", action="extend", type=_capability, metavar="SM",
                       help="GPUs that a TensorRT-RTX plan is for: compute capabilities such as sm_86 or 8.9, or "
                            "current (default: all from Ampere on)")
    group.add_argument("--workspace", type=parse_bytes, metavar="SIZE",
                       help="scratch memory, such as 512MiB (default: 4GiB)")
    group.add_argument("--optimization-level", type=int, choices=range(6), metavar="N",
                       help="0 to 5: how long TensorRT searches (default: TensorRT's own)")
    group.add_argument("--timing-cache", type=Path, metavar="FILE",
                       help="TensorRT's timings, read and updated (default: a file of GPU, CUDA and TensorRT in the "
                            "cache folder)")
    for flag, text in (
        ("--tf32", "let FP32 convolutions round their inputs to TF32: faster, an error of about 1e-3"),
        ("--sparse", "allow 2:4 sparse weights"),
        ("--version-compatible", "a plan that later versions of the same major TensorRT can run, too"),
        ("--hardware-compatible", "a plan that every GPU from Ampere on can run, if more slowly"),
    ):
        group.add_argument(flag, action="store_true", help=text)
# fmt: on


def parse_bytes(text: str) -> int:
    """`4GiB`, `512 MiB`, `2GB`… as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not 1 <= float(found[1]) * unit < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB or 512MiB, found {text!r}")
    return int(float(found[1]) * unit)


def _capability(text: str) -> str:
    if text.strip().lower() == "current":
        return "current"
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a compute capability such as sm_86 or 8.6, found {text!r}")
    return f"{int(found[1])}.{found[2]}"


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    for name in ("min", "opt", "max"):
        if args.profiles is not None and getattr(args, f"{name}_batch") is not None:
            return f"--{name}-batch is of one profile: it cannot hold with --profiles, whose batches say it"
    given = quantize.find_given(args)
    if args.precision == "fp32" and given:
        return f"{given[0]} is of --fp16, --int8 and --fp8: it cannot hold with --fp32"
    return quantize.find_conflict(args) if args.precision in ("fp16", "int8", "fp8") else None


def execute(args: argparse.Namespace) -> Output:
    """Builds the plan, or finds an identical one, and says what it is, how it came to be and where it runs."""
    from ..build.build import build_plan

    options = read_build_options(args)
    with Progress() as bar:
        result = build_plan(args.model, args.out, options, force=args.force, progress=bar.show)
    plan = result.output.target
    plan_bytes = plan.stat().st_size
    passport, passport_output = result.passport, result.passport_output
    on = f"on {passport.gpu_name}" if passport.gpu_name else "without a GPU"
    # First, because much hangs on it: a plan of one of the two is nothing to the other, nor to Triton.
    builder = f"{result.library}, {on}"
    if passport.flavour == "tensorrt_rtx":
        builder += "; Triton cannot load its plans"
    pairs = [("builder", builder), ("model", f"{args.model} ({show_bytes(args.model.stat().st_size)})")]
    if result.origin != "built":
        where = "the cache" if result.origin == "cache" else "its place already"
        end = "another build was faster" if "build" in result.seconds else "nothing was built now"
        pairs.append(("reused", f"an identical plan is in {where}, built in {passport.build_seconds:.1f} s: {end}"))
    if result.typed_from_fp32:
        pairs.append(("typed", _describe_typing(result)))
    pairs += describe_plan(passport)
    if result.seconds:
        pairs.append(("seconds", show_seconds(result.seconds.items())))
    pairs.append((result.output.status, f"{plan} ({show_bytes(plan_bytes)})"))
    pairs.append(("passport", f"{passport_output.target} ({passport_output.status})"))
    data = {
        "model": str(args.model),
        "out": str(plan),
        "status": result.output.status,
        "passport_out": str(passport_output.target),
        "origin": result.origin,
        "library": result.library,
        "typed_from_fp32": result.typed_from_fp32,
        "bytes": plan_bytes,
        "seconds": result.seconds,
        "precision_report": result.report,
        "passport": passport,
    }
    return Output(data=data, text=format_pairs(pairs), next_command=f"repvgg-trt check {shlex.quote(str(plan))}")


def read_build_options(args: argparse.Namespace) -> BuildOptions:
    """What the command line and the configuration file ask for.

    Raises:
        InputError: The configuration file cannot be used, or options contradict each other.
        ModelError: The model cannot be read.
    """
    from ..build.options import BuildOptions
    from ..specs.codec import load_build_config
    from ..specs.values import BuildConfig

    base = load_build_config(args.config) if args.config is not None else BuildConfig()
    changes: dict[str, Any] = {name: True for name in _SWITCHES if getattr(args, name)}
    values = {
        "precision": args.precision,
        "workspace_bytes": args.workspace,
        "optimization_level": args.optimization_level,
    }
    changes |= {name: value for name, value in values.items() if value is not None}
    config = dataclasses.replace(base, profile=_merge_profile(base.profile, args), **changes)
    options = BuildOptions(
        config,
        (args.min_batch, args.opt_batch, args.max_batch, args.profiles) != (None, None, None, None),
        args.backend,
        tuple(args.targets or ()),
        args.timing_cache,
        use_cache=not args.no_cache,
    )
    return _with_quantize(args, options)


def _merge_profile(base: ShapeProfile, args: argparse.Namespace) -> ShapeProfile:
    """The batch and image sizes that are given; the others stay, moved as far as they must to fit."""
    low, usual, high = args.min_batch, args.opt_batch, args.max_batch
    batches = base.batches if (low, usual, high) == (None, None, None) else ()
    if args.profiles is not None:
        batches, low, usual, high = args.profiles, 1, args.profiles[-1], args.profiles[-1]
    smallest = low if low is not None else min(base.min_batch, usual or base.min_batch, high or base.min_batch)
    largest = high if high is not None else max(base.max_batch, usual or 1, smallest)
    usual = usual if usual is not None else max(smallest, min(base.opt_batch, largest))
    sizes = _merge_sizes((base.min_size, base.opt_size, base.max_size), (args.min_size, args.opt_size, args.max_size))
    changes: dict[str, Any] = {"min_batch": smallest, "opt_batch": usual, "max_batch": largest, "batches": batches}
    changes |= {"min_size": sizes[0], "opt_size": sizes[1], "max_size": sizes[2]}
    return dataclasses.replace(base, **changes)


def _merge_sizes(base: Sequence[Size | None], given: Sequence[Size | None]) -> tuple[Size | None, ...]:
    """The same of heights and widths: what is given, else what the file says, else the usual size."""
    sizes = [new or old for old, new in zip(base, given, strict=True)]
    known = [size for size in sizes if size is not None]
    if not known:
        return (None, None, None)
    usual = sizes[1] or known[-1]
    low, high = sizes[0] or usual, sizes[2] or usual
    if given[1] is not None:  # the file's limits give way to it
        low = low if given[0] else (min(low[0], usual[0]), min(low[1], usual[1]))
        high = high if given[2] else (max(high[0], usual[0]), max(high[1], usual[1]))
    return low, usual, high


def _with_quantize(args: argparse.Namespace, options: BuildOptions) -> BuildOptions:
    """The options with how an FP32 graph is to be typed, if it is one and that is asked for."""
    from ..files.onnx import graph_precision, read_graph, weighted_nodes

    given, precision = quantize.find_given(args), options.config.precision
    if precision in ("fp16", "int8", "fp8"):
        args.precision = precision  # the configuration file may have asked for it
        conflict = find_conflict(args)
        if conflict is not None:
            raise InputError(conflict, remedy="leave one of the two out, or change precision in the configuration file")
        if given or graph_precision(weighted_nodes(read_graph(args.model))) == "fp32":
            return dataclasses.replace(options, quantize=quantize.read_options(args))
    elif given:
        raise InputError(
            f"{given[0]} is of --fp16, --int8 and --fp8, and none is asked for",
            remedy="give --fp16, --int8 or --fp8, or leave it out",
        )
    return options


def _describe_typing(result: BuildResult) -> str:
    text = f"the graph was FP32 and became {(result.passport.config.precision or '').upper()}"
    checks = result.passport.certificate.checks
    if not checks or " against fp32 " not in checks[-1].name:
        return f"{text}: not verified, there were no images to compare it on"
    last = checks[-1]
    if "the score fell" in last.name:
        return f"{text}: the score fell by {last.error:g}, and {last.tolerance:g} was allowed"
    if "other best classes" in last.name:
        return f"{text}: {1 - last.error:.2%} of the images keep FP32's best class"
    return f"{text}: the outputs differ by {last.error:.1e} of their size"


COMMAND = Command(
    "build",
    "build a TensorRT plan, with a passport that says what it is and where it runs",
    "Builds a TensorRT or TensorRT-RTX plan of an ONNX. The precision is the graph's, on every version; an FP32 graph "
    "is typed first where --fp16, --int8 or --fp8 asks for it. A plan that computes in a wider type than its graph "
    "says is an error.",
    add_options,
    execute,
    find_conflict,
    EXAMPLES,
)

"""The options of `repvgg-trt build` and `repvgg-trt check`. Standard library only: `--help` must be quick.

`repvgg-trt build`: ONNX → TensorRT plan and its passport.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from ..build.build import BuildResult, build_plan
from ..build.options import BuildOptions
from ..errors import InputError
from ..files.onnx import graph_precision, read_graph, weighted_nodes
from ..specs.codec import load_build_config
from ..specs.values import BuildConfig, ShapeProfile
from .check import describe_batches, describe_place, describe_precision
from .common import Output, StageProgress, format_pairs, show_bytes
from .quantize import add_image_options, add_step_options, find_conflict, parse_positive, quantize_flags

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
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="an .onnx that repvgg-export or repvgg-trt quantize wrote"
    )
    kind = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "the graph must be FP32: full float32, no TF32 unless --tf32"),
        ("fp16", "half precision: an FP32 graph is converted first"),
        ("int8", "8-bit integers: an FP32 graph is calibrated and quantized first"),
    ):
        kind.add_argument(
            f"--{name}",
            action="store_const",
            dest="precision",
            const=name,
            help=f"{text} (default: as the graph is typed)",
        )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the plan to write; its passport is FILE.json (default: NAME.plan beside MODEL)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a build configuration, such as engines/configs/fp16.toml; options given here win",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="build even where an identical plan was built before, and do not keep this one",
    )
    _add_profile_options(parser.add_argument_group("batch sizes"))
    _add_builder_options(parser.add_argument_group("TensorRT"))
    images = parser.add_argument_group("from FP32 to FP16 or INT8, as in repvgg-trt quantize")
    images.add_argument(
        "--io",
        choices=("fp32", "fp16"),
        default="fp32",
        help="type of floating-point inputs and outputs (default: %(default)s)",
    )
    add_image_options(images)
    add_step_options(images)
    parser.set_defaults(usage_error=parser.error, target=None, plot=None, save_scales=None, sensitivity=False)


def _add_profile_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--min-batch",
        type=parse_positive,
        default=None,
        metavar="N",
        help="the smallest that the plan accepts (default: 1)",
    )
    group.add_argument(
        "--opt-batch",
        type=parse_positive,
        default=None,
        metavar="N",
        help="the usual one, that it is tuned for (default: 8)",
    )
    group.add_argument(
        "--max-batch",
        type=parse_positive,
        default=None,
        metavar="N",
        help="the largest; memory grows with it (default: 32)",
    )


def _add_builder_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=("auto", "tensorrt", "rtx"), default="auto",
                       help="auto: TensorRT where it is installed, else TensorRT-RTX, which builds without a GPU " "(default: %(default)s)")  # fmt: skip
    group.add_argument("--target", dest="targets", nargs="+", action="extend", type=_capability, default=None, metavar="SM",
                       help="GPUs that a TensorRT-RTX plan is for: compute capabilities such as sm_86 or 8.9, or " "current (default: all from "
                            "Ampere on)")  # fmt: skip
    group.add_argument(
        "--workspace",
        type=parse_bytes,
        default=None,
        metavar="SIZE",
        help="scratch memory, such as 512MiB (default: 4GiB)",
    )
    group.add_argument("--optimization-level", type=int, choices=range(6), default=None, metavar="N",
                       help="0 to 5: how long TensorRT searches (default: TensorRT's own)")  # fmt: skip
    group.add_argument("--timing-cache", type=Path, metavar="FILE",
                       help="TensorRT's timings, read and updated (default: a file of this GPU and TensorRT in the " "cache folder)")  # fmt: skip
    group.add_argument(
        "--tf32",
        action="store_true",
        help="let FP32 convolutions round their inputs to TF32: faster, an error of about 1e-3",
    )
    group.add_argument("--sparse", action="store_true", help="allow 2:4 sparse weights")
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="a plan that later TensorRT of the same major version run, too",
    )
    group.add_argument(
        "--hardware-compatible", action="store_true", help="a plan that all GPUs from Ampere on run, if slower"
    )


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """The plan and the place."""
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a plan with its passport PLAN.json beside it")
    parser.add_argument("--target", metavar="KEY=VALUE,…", default=None, type=parse_target,
                        help="another place: gpu=NAME or compute capability, trt=VERSION or rtx=VERSION, " "driver=VERSION "
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
            raise argparse.ArgumentTypeError(
                f"expected gpu=…, trt=… or rtx=…, driver=…, each once and apart by commas, found {part!r}"
            )
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


_FLAGS = ("tf32", "sparse", "version_compatible", "hardware_compatible")


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: The model or an option cannot be used, or TensorRT fails.
    """
    options = read_build_options(args)
    with StageProgress() as progress:
        result = build_plan(args.model, args.out, options, force=args.force, progress=progress)
    return Output(
        data=_as_json(args, result),
        text=format_pairs(_as_pairs(args, result)),
        next_command=f"repvgg-trt check {shlex.quote(str(result.output.target))}",
    )


def read_build_options(args: argparse.Namespace) -> BuildOptions:
    """What the command line and the configuration file ask for.

    Raises:
        InputError: The configuration file cannot be used, or options contradict each other.
        ModelError: The model cannot be read.
    """
    base = load_build_config(args.config) if args.config is not None else BuildConfig()
    changes: dict[str, Any] = {name: True for name in _FLAGS if getattr(args, name)}
    given = {
        "precision": args.precision,
        "workspace_bytes": args.workspace,
        "optimization_level": args.optimization_level,
    }
    changes |= {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(base, profile=merge_profile(base.profile, args), **changes)
    options = BuildOptions(
        config,
        _asks_for_batches(args),
        args.backend,
        tuple(args.targets or ()),
        args.timing_cache,
        use_cache=not args.no_cache,
    )
    return _with_quantize(args, options)


def _asks_for_batches(args: argparse.Namespace) -> bool:
    return (args.min_batch, args.opt_batch, args.max_batch) != (None, None, None)


def merge_profile(base: ShapeProfile, args: argparse.Namespace) -> ShapeProfile:
    """The batch sizes that are given; the others stay, moved as far as they must to fit.

    Raises:
        InputError: Those that are given contradict each other.
    """
    low, usual, high = args.min_batch, args.opt_batch, args.max_batch
    smallest = low if low is not None else min(base.min_batch, usual or base.min_batch, high or base.min_batch)
    largest = high if high is not None else max(base.max_batch, usual or 1, smallest)
    return ShapeProfile(smallest, usual if usual is not None else max(smallest, min(base.opt_batch, largest)), largest)


def _with_quantize(args: argparse.Namespace, options: BuildOptions) -> BuildOptions:
    """The options with how an FP32 graph is to be typed, if it is one and that is asked for."""
    flags, precision = quantize_flags(args), options.config.precision
    if precision in ("fp16", "int8"):
        args.precision = precision
        conflict = find_build_conflict(args)
        if conflict is not None:
            raise InputError(conflict, remedy="leave one of the two out, or change precision in the configuration file")
        if flags or graph_precision(weighted_nodes(read_graph(args.model))) == "fp32":
            from .quantize import read_options  # only here, because it needs the onnx package

            return dataclasses.replace(options, quantize=read_options(args))
    elif flags:
        raise InputError(
            f"{flags[0]} is of --fp16 and --int8, and neither is asked for",
            remedy="give --fp16 or --int8, or leave it out",
        )
    return options


def _as_pairs(args: argparse.Namespace, result: BuildResult) -> list[tuple[str, str]]:
    passport = result.passport
    on = f"on {passport.gpu_name}" if passport.gpu_name else "without a GPU"
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    pairs = [
        ("model", f"{args.model} ({show_bytes(args.model.stat().st_size)})"),
        ("builder", f"{result.library}, {on}"),
    ]
    if result.origin != "built":
        where = "the cache" if result.origin == "cache" else "its place already"
        end = "another build was faster" if "build" in result.seconds else "nothing was built now"
        pairs.append(("reused", f"an identical plan is in {where}, built in {passport.build_seconds:.1f} s: {end}"))
    pairs += _typing_pairs(result)
    pairs += [
        ("precision", describe_precision(passport)),
        ("batches", describe_batches(passport.config.profile)),
        ("runs on", describe_place(passport)),
    ]
    if stages:
        pairs.append(("seconds", f"{sum(result.seconds.values()):.1f}: {stages}"))
    pairs.append((result.output.status, f"{result.output.target} ({show_bytes(result.output.target.stat().st_size)})"))
    pairs.append(("passport", f"{result.passport_output.target} ({result.passport_output.status})"))
    return pairs


def _typing_pairs(result: BuildResult) -> list[tuple[str, str]]:
    if not result.typed_from_fp32:
        return []
    checks = result.passport.certificate.checks
    last = checks[-1] if checks else None
    text = f"the graph was FP32 and became {(result.passport.config.precision or '').upper()}"
    judged = last is not None and " against fp32 " in last.name
    if judged and last is not None and "other best classes" in last.name:
        text += f": {1 - last.error:.2%} of the images keep FP32's best class"
    elif judged and last is not None:
        text += f": the outputs differ by {last.error:.1e} of their size"
    else:
        text += ": not verified, there were no images to compare it on"
    return [("typed", text)]


def _as_json(args: argparse.Namespace, result: BuildResult) -> dict[str, object]:
    report = result.report
    return {
        "model": str(args.model),
        "out": str(result.output.target),
        "status": result.output.status,
        "passport_out": str(result.passport_output.target),
        "origin": result.origin,
        "library": result.library,
        "typed_from_fp32": result.typed_from_fp32,
        "bytes": result.output.target.stat().st_size,
        "seconds": result.seconds,
        "precision_report": report,
        "passport": result.passport,
    }

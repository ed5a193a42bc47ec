"""`repvgg-trt build`: ONNX → TensorRT plan and its passport."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from ..build.build import BuildResult, build_plan
from ..build.options import BuildOptions
from ..errors import InputError
from ..files.onnx import graph_precision, read_graph, weighted_nodes
from ..specs.codec import load_build_config
from ..specs.values import BuildConfig, ShapeProfile
from .build_arguments import find_build_conflict
from .common import Output
from .quantize_arguments import quantize_flags
from .stage_progress import StageProgress
from .tables import format_pairs, show_bytes
from .trt_check import describe_batches, describe_place, describe_precision

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
    given = {"precision": args.precision, "workspace_bytes": args.workspace, "optimization_level": args.optimization_level}
    changes |= {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(base, profile=merge_profile(base.profile, args), **changes)
    options = BuildOptions(config, _asks_for_batches(args), args.backend, tuple(args.targets or ()), args.timing_cache, use_cache=not args.no_cache)
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
            from .trt_quantize import read_options  # only here, because it needs the onnx package

            return dataclasses.replace(options, quantize=read_options(args))
    elif flags:
        raise InputError(f"{flags[0]} is of --fp16 and --int8, and neither is asked for", remedy="give --fp16 or --int8, or leave it out")
    return options


def _as_pairs(args: argparse.Namespace, result: BuildResult) -> list[tuple[str, str]]:
    passport = result.passport
    on = f"on {passport.gpu_name}" if passport.gpu_name else "without a GPU"
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    pairs = [("model", f"{args.model} ({show_bytes(args.model.stat().st_size)})"), ("builder", f"{result.library}, {on}")]
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

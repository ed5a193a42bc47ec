"""`repvgg-trt bench`: latency, throughput and share of the roofline of models, beside others.

The options of `repvgg-trt bench` and `repvgg-trt advise`. Standard library only: `--help` must be quick.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError
from ..evaluate.figures import require_drawable, save_figure
from ..files.output import require_distinct, require_writable
from ..measure.roofline import LayerBound, bound_layers, total_floor_ms
from .common import Output, Progress, format_pairs, format_table

if TYPE_CHECKING:
    from ..measure.records import Benchmark, ModelResult, Point

_RIVALS = ("onnxruntime", "torch")
_PRECISIONS = ("fp32", "fp16", "int8")
BENCH_EXAMPLES = """examples:
  repvgg-trt bench a0.onnx a0-int8.onnx --batch 1,8 --out a0.json --plot a0.png
  repvgg-trt bench a0.onnx --compare torch,onnxruntime --cpu-threads 1
  repvgg-trt bench b2.plan --threads 4 --duration 10    (four clients at once)
"""
ADVISE_EXAMPLES = """examples:
  repvgg-trt advise --slo-ms 2 --min-top1 77 --gpu t4
  repvgg-trt advise --min-top1 77 --batch 1 --precision fp16 --gpu a10
  repvgg-trt advise --slo-ms 20 --measured a0.json b0.json
"""


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The models, how long, and what they are compared with."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", type=Path, help="an .onnx of ours, or a .plan with its passport beside it"
    )
    parser.add_argument(
        "--batch", type=parse_counts, default=(1, 8, 32, 128), metavar="N,…", help="batch sizes (default: 1,8,32,128)"
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="clients that call one Engine at once (default: %(default)s)",
    )
    parser.add_argument("--duration", type=_seconds, default=3.0, metavar="S",
                        help="seconds for each model, batch size and way, in up to eight turns (default: %(default)g)")  # fmt: skip
    parser.add_argument(
        "--warm-up",
        type=_seconds,
        default=0.5,
        metavar="S",
        help="seconds before, and at least three calls (default: %(default)g)",
    )
    parser.add_argument("--compare", type=_rivals, default=(), metavar="NAME,…",
                        help="in turn with torch (the deploy form in float32) and onnxruntime (a bare session on the " "same file)")  # fmt: skip
    parser.add_argument(
        "--image-size", type=_size, default=None, metavar="SIZE", help="for a model that takes any: 224 or 512x1024"
    )
    parser.add_argument("--layers", action="store_true", help="print the roofline of every layer; JSON always has it")
    place = parser.add_argument_group("where")
    place.add_argument(
        "--device", default=None, metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda for a plan, else cpu)"
    )
    place.add_argument("--backend", choices=("onnxruntime", "openvino", "fastest"), default=None,
                       help="what runs an ONNX model (default: onnxruntime)")  # fmt: skip
    place.add_argument(
        "--cpu-threads",
        type=_positive,
        default=None,
        metavar="N",
        help="CPU threads that share one batch (default: one a core)",
    )
    place.add_argument(
        "--gpu", metavar="NAME", help="which known GPU this one is, for the roofline (default: what the driver says)"
    )
    place.add_argument(
        "--no-peak",
        action="store_true",
        help="do not measure what the CPU can do at most: no roofline, some seconds less",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the results as JSON, which repvgg-trt advise reads"
    )
    files.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw latency against throughput, and the roofline, as a .png (needs matplotlib)",
    )
    files.add_argument("--force", action="store_true", help="replace files that are there")
    parser.set_defaults(usage_error=parser.error)


def add_advise_options(parser: argparse.ArgumentParser) -> None:
    """What is asked for, of which device, and what estimates rest on."""
    parser.add_argument(
        "--slo-ms", type=_milliseconds, default=None, metavar="MS", help="a batch may take so long (default: any time)"
    )
    parser.add_argument(
        "--min-top1",
        type=_percent,
        default=None,
        metavar="PERCENT",
        help="top-1 at least, on ImageNet-1k (default: any)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="estimate for this GPU what was not measured: t4, a10, rtx4090… (default: the GPU that is here)",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of repvgg-trt bench --out; they win over estimates",
    )
    parser.add_argument(
        "--batch", type=parse_counts, default=(1, 8, 32, 128), metavar="N,…", help="batch sizes (default: 1,8,32,128)"
    )
    parser.add_argument(
        "--precision",
        type=_precisions,
        default=_PRECISIONS,
        metavar="NAME,…",
        help="of fp32, fp16, int8 (default: all)",
    )
    parser.add_argument("--top", type=_positive, default=10, metavar="N", help="rows to print (default: %(default)s)")
    group = parser.add_argument_group("what estimates rest on")
    group.add_argument("--efficiency", type=_share, default=None, metavar="SHARE",
                       help="of the peak that a layer reaches (default: 0.9 in FP32, fitted to published times; 0.4 " "in FP16 and INT8, "
                            "assumed)")  # fmt: skip
    group.add_argument("--overhead-us", type=_count, default=50.0, metavar="US",
                       help="microseconds of every layer besides, once a group of its convolution (default: " "%(default)g, fitted)")  # fmt: skip
    group.add_argument("--int8-drop", type=_count, default=0.5, metavar="POINTS",
                       help="top-1 that INT8 is expected to lose, in percentage points (default: %(default)g)")  # fmt: skip
    parser.set_defaults(usage_error=parser.error)


def find_bench_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    names = [path.resolve() for path in args.models]
    if len(set(names)) < len(names):
        return "a MODEL is given twice"
    if args.out is not None and args.out == args.plot:
        return "--out and --plot must be two files"
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        return "--plot takes a name that ends in .png"
    if args.gpu is not None and args.device == "cpu":
        return "--gpu is for a GPU's roofline: it cannot hold with --device cpu"
    return None


def find_advise_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if args.slo_ms is None and args.min_top1 is None:
        return "give --slo-ms, --min-top1, or both: without them every row fits"
    return None


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers, each once, in order."""
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _positive(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal()) or not 1 <= int(text.strip()[:10]) < 1 << 20:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0.01, 3600, "seconds from 0.01 to 3600")


def _milliseconds(text: str) -> float:
    return _number(text, 1e-3, 1e6, "milliseconds from 0.001 on")


def _percent(text: str) -> float:
    return _number(text, 0, 100, "a percentage from 0 to 100")


def _share(text: str) -> float:
    return _number(text, 0.01, 1.0, "a share from 0.01 to 1")


def _count(text: str) -> float:
    return _number(text, 0, 1e4, "a number from 0 to 10000")


def _choices(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, apart by commas, found {text!r}")
    return names


def _rivals(text: str) -> tuple[str, ...]:
    return _choices(text, _RIVALS)


def _precisions(text: str) -> tuple[str, ...]:
    return _choices(text, _PRECISIONS)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    if found is None or int(found[1]) < 1 or int(found[2] or 1) < 1:
        raise argparse.ArgumentTypeError(
            f"expected an image size such as 224 or 512x1024 (height x width), found {text!r}"
        )
    return int(found[1]), int(found[2] or found[1])


_PEAK_SECONDS = 1.0


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: A model cannot be opened or run, or a file is there already.
    """
    from ..measure.bench import BenchRequest, count_steps, run_benchmark
    from ..measure.times import Pace

    _require_outputs(args)
    request = BenchRequest(
        models=tuple(args.models),
        batches=args.batch,
        pace=Pace(args.duration, args.warm_up, args.threads),
        compare=args.compare,
        device=args.device,
        backend=args.backend,
        cpu_threads=args.cpu_threads,
        image_size=args.image_size,
        gpu=args.gpu,
        peak_s=0.0 if args.no_peak else _PEAK_SECONDS,
    )
    with Progress(count_steps(request), "opening") as bar:
        result = run_benchmark(request, progress=lambda what: bar.advance(label=what))
    written, errors = _write(args, result)
    follow = _next(args.out, result) if args.out is not None and not errors else None
    return Output(
        data={"benchmark": result},
        text="\n".join([*_lines(result, layers=args.layers), *written]),
        next_command=follow,
        errors=errors,
    )


def _next(out: Path, result: Benchmark) -> str | None:
    """Advice that begins with what was measured here; None where no accuracy is published of it, as at another image size."""
    from ..measure.advice import published_accuracy

    known = {(variant.name, (size, size)) for variant, size, _ in published_accuracy()}
    usable = [model for model in result.models if model.published and (model.variant, model.image_size) in known]
    found = [point.latency.median_ms for model in usable for point in model.points if point.way == "engine"]
    return f"repvgg-trt advise --slo-ms {math.ceil(max(found))} --measured {shlex.quote(str(out))}" if found else None


def _require_outputs(args: argparse.Namespace) -> None:
    """Before the work, whatever would refuse its results after it."""
    from ..measure.records import require_free

    outputs = [path for path in (args.out, args.plot) if path is not None]
    require_distinct(outputs, args.models)
    for path in outputs:
        require_free(path, force=args.force)
        require_writable(path)
    if args.plot is not None:
        require_drawable(args.plot)


def _write(args: argparse.Namespace, result: Benchmark) -> tuple[list[str], tuple[ArtifactError, ...]]:
    """Writes the files; one that cannot be written is no reason to lose the figures."""
    from ..measure.plots import draw_benchmark
    from ..measure.records import write_benchmark

    lines: list[str] = []
    errors: list[ArtifactError] = []
    jobs: list[tuple[Path | None, Callable[[Path], str]]] = [
        (args.out, lambda path: write_benchmark(path, result, force=args.force).status),
        (args.plot, lambda path: save_figure(draw_benchmark(result), path, force=args.force)),
    ]
    for path, job in jobs:
        if path is not None:
            try:
                lines.append(f"{job(path)}  {path}")
            except ArtifactError as error:
                errors.append(error)
    return lines, tuple(errors)


def _lines(result: Benchmark, *, layers: bool) -> list[str]:
    from ..measure.times import FEW_CALLS

    lines = [
        format_pairs(_head(result)),
        "latency of one call, ms",
        format_table(_latency_rows(result), "<<" + ">" * 9),
    ]
    phases = _phase_rows(result)
    if phases:
        lines += ["parts of a call, ms, without CUDA graphs and one at a time", format_table(phases, "<>>>>>")]
    lines += _roofline_lines(result, layers=layers)
    notes = [("note", f"{model.file}: {note}") for model in result.models for note in model.notes]
    few = sum(point.latency.calls < FEW_CALLS for _, point in _points(result))
    if few:
        notes.append(
            (
                "note",
                f"p99 of fewer than {FEW_CALLS} calls is the largest of them, as in {few} of "
                f"{len(_points(result))} rows; give a longer --duration",
            )
        )
    if any(point.share is not None and point.share > 1 for _, point in _points(result)):
        notes.append(
            (
                "note",
                "more than 100 % of the roofline: the peak was measured while other programs ran, or the kernels "
                "save multiplications",
            )
        )
    return lines + ([format_pairs(notes)] if notes else []) + _unstable_lines(result)


def _head(result: Benchmark) -> list[tuple[str, str]]:
    device = result.device
    threads = (
        ""
        if device.kind == "gpu"
        else f"; CPU threads of a batch: {device.cpu_threads or 'as many as the library takes'}"
    )
    clients = f"{result.clients} client{'s' if result.clients > 1 else ''}"
    pairs = [
        ("device", f"{device.name}{threads}"),
        ("load", f"{clients}; {result.duration_s:g} s a row, all rows of a batch size in turn"),
    ]
    for backend in dict.fromkeys(f"{point.way}: {point.backend}" for model in result.models for point in model.points):
        pairs.append(("backend", backend))
    if not any(point.phases for _, point in _points(result)):
        pairs.append(
            (
                "parts",
                "copies to a device, computing and launches are not told apart: the backend runs a batch as one call",
            )
        )
    return pairs


def _latency_rows(result: Benchmark) -> list[list[str]]:
    rows = [["model", "way", "batch", "min", "median", "p90", "p95", "p99", "max", "images/s", "of roofline"]]
    for model, point in _points(result):
        found = point.latency
        times = (found.min_ms, found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms)
        share = "–" if point.share is None else f"{100 * point.share:.0f} %"
        unstable = "!" if point.warnings else ""
        rows.append(
            [
                _title(model),
                point.way + unstable,
                str(point.batch),
                *map(_show, times),
                f"{point.images_per_second:,.1f}",
                share,
            ]
        )
    return rows


def _points(result: Benchmark) -> list[tuple[ModelResult, Point]]:
    return [(model, point) for model in result.models for point in model.points]


def _phase_rows(result: Benchmark) -> list[list[str]]:
    rows = [
        [
            _title(model),
            str(point.batch),
            *map(_show, (part.to_device_ms, part.compute_ms, part.to_host_ms, part.enqueue_ms)),
        ]
        for model, point in _points(result)
        if (part := point.phases) is not None
    ]
    return [["model", "batch", "host→device", "compute", "device→host", "enqueue (CPU)"], *rows] if rows else []


def _roofline_lines(result: Benchmark, *, layers: bool) -> list[str]:
    ceiling = result.ceiling
    if ceiling is None:
        return ["roofline  none: the device's peak is not known"]
    used = {cost.precision for model in result.models for cost in model.layers}
    peaks = ", ".join(
        f"{name} {value / 1e9:,.0f} G"
        for name, value in ceiling.operations_per_second.items()
        if name in used or not used
    )
    lines = [
        f"roofline of {ceiling.device}: {peaks}op/s, memory {ceiling.bytes_per_second / 1e9:,.1f} GB/s",
        f"  {ceiling.source}",
    ]
    rows = [["model", "batch", "GMACs", "MB moved", "ops/byte", "least ms", "short of memory"]]
    tables: list[str] = []
    for model in result.models:
        for batch in sorted({point.batch for point in model.points}):
            bounds = bound_layers(model.layers, ceiling, batch) if model.layers else None
            if bounds is None:
                continue
            rows.append(_sum_row(model, batch, bounds))
            tables += [f"{model.file}, batch {batch}", format_table(_layer_rows(bounds), "<<>>>><")] if layers else []
    return [*lines, format_table(rows, "<>>>>>>"), *tables] if len(rows) > 1 else lines


def _sum_row(model: ModelResult, batch: int, bounds: Sequence[LayerBound]) -> list[str]:
    operations, moved, floor = sum(b.operations for b in bounds), sum(b.bytes for b in bounds), total_floor_ms(bounds)
    short = [bound for bound in bounds if bound.bound == "memory"]
    part = f"{len(short)} of {len(bounds)} layers, {100 * total_floor_ms(short) / floor:.0f} % of it"
    return [
        _title(model),
        str(batch),
        f"{operations / 2e9:,.2f}",
        f"{moved / 1e6:,.1f}",
        f"{operations / moved:,.0f}",
        _show(floor),
        part,
    ]


def _layer_rows(bounds: Sequence[LayerBound]) -> list[list[str]]:
    rows = [["layer", "precision", "MMACs", "kB", "ops/byte", "least µs", "short of"]]
    for bound in bounds:
        numbers = [
            f"{bound.operations / 2e6:,.1f}",
            f"{bound.bytes / 1e3:,.0f}",
            f"{bound.intensity:,.1f}",
            f"{1e3 * bound.floor_ms:,.1f}",
        ]
        rows.append([bound.name, bound.precision, *numbers, "arithmetic" if bound.bound == "compute" else "memory"])
    return rows


def _unstable_lines(result: Benchmark) -> list[str]:
    from ..measure.times import LARGEST_DRIFT, LARGEST_SPREAD

    rows = [
        [_title(model), point.way, str(point.batch), "; ".join(point.warnings)]
        for model, point in _points(result)
        if point.warnings
    ]
    if not rows:
        return []
    usual = (
        f"a spread of up to {100 * LARGEST_SPREAD:.0f} % (standard deviation by mean), halves that differ by up to "
        f"{100 * LARGEST_DRIFT:.0f} %"
    )
    return [
        f"! not stable; usual is {usual}: let nothing else run, or give a longer --duration",
        format_table(rows, "<<><"),
    ]


def _title(model: ModelResult) -> str:
    return f"{Path(model.file).stem} ({model.precision or '?'})"


def _show(milliseconds: float) -> str:
    """Three digits or more."""
    return (
        f"{milliseconds:.3f}"
        if milliseconds < 10
        else f"{milliseconds:.2f}"
        if milliseconds < 100
        else f"{milliseconds:,.1f}"
    )

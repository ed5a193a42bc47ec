"""`repvgg-trt bench`: latency, throughput and share of the roofline of models, beside others."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError
from .common import Command, Output, parse_counts, parse_names, parse_number, parse_size, parse_whole
from .terminal import Progress, format_groups, format_pairs, format_table

if TYPE_CHECKING:
    from ..measure.records import Benchmark, ModelResult, Point
    from ..measure.roofline import LayerBound

EXAMPLES = """examples:
  repvgg-trt bench a0.onnx a0-int8.onnx --batch 1,8 --out a0.json --plot a0.png
  repvgg-trt bench a0.onnx --compare torch,onnxruntime --cpu-threads 1
  repvgg-trt bench b2.plan --threads 4 --duration 10    (four clients at once)
"""
_RIVALS = ("onnxruntime", "torch")
_PEAK_SECONDS = 1.0


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The models, how long, and what they are compared with."""
    seconds = partial(parse_number, least=0.01, most=3600, what="seconds from 0.01 to 3600")
    count = partial(parse_whole, most=(1 << 20) - 1)
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path,
                        help="an .onnx of repvgg-export, fold or quantize, or a .plan with its passport beside it")
    add_batch_option(parser)
    parser.add_argument("--threads", type=count, default=1, metavar="N",
                        help="clients that call one Engine at once (default: %(default)s)")
    parser.add_argument("--duration", type=seconds, default=3.0, metavar="S",
                        help="seconds for each row of the table, in up to eight turns (default: %(default)g)")
    parser.add_argument("--warm-up", type=seconds, default=0.5, metavar="S",
                        help="seconds of warm-up before each row, at least three calls (default: %(default)g)")
    parser.add_argument("--compare", type=partial(parse_names, known=_RIVALS), default=(), metavar="NAME,…",
                        help="also measure, in turn, torch (the deploy form in float32) or onnxruntime (a bare session "
                             "on the same file)")
    parser.add_argument("--image-size", type=parse_size, metavar="SIZE",
                        help="height and width for a model that takes any, such as 224 or 512x1024")
    parser.add_argument("--layers", action="store_true", help="print the roofline of every layer; JSON always has it")
    place = parser.add_argument_group("where")
    place.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda for a plan, else cpu)")
    place.add_argument("--backend", choices=("onnxruntime", "openvino", "fastest"),
                       help="what runs an ONNX model (default: onnxruntime)")
    place.add_argument("--bfloat16", action="store_true",
                       help="with --backend openvino on a CPU with AMX or AVX512-BF16: compute in bfloat16 what is not "
                            "INT8, faster and less exact")
    place.add_argument("--cpu-threads", type=count, metavar="N",
                       help="CPU threads that share one batch (default: one a core)")
    place.add_argument("--gpu", metavar="NAME",
                       help="which known GPU this one is, for the roofline (default: what the driver says)")
    place.add_argument("--no-peak", action="store_true",
                       help="do not measure the peak of the CPU: some seconds less, and no roofline")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="FILE",
                       help="also write the results as JSON, which repvgg-trt advise reads")
    files.add_argument("--plot", type=Path, metavar="FILE",
                       help="also draw latency against throughput, and the roofline, as a .png (needs matplotlib)")
    files.add_argument("--force", action="store_true", help="replace files that are there")


def add_batch_option(parser: argparse.ArgumentParser) -> None:
    """The batch sizes, as `advise` takes them, too."""
    parser.add_argument("--batch", type=parse_counts, default=(1, 8, 32, 128), metavar="N,…",
                        help="batch sizes (default: 1,8,32,128)")
# fmt: on


def find_conflict(args: argparse.Namespace) -> str | None:
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


def execute(args: argparse.Namespace) -> Output:
    """Measures the models, writes the files that are asked for, and prints the tables."""
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
        bfloat16=args.bfloat16,
        cpu_threads=args.cpu_threads,
        image_size=args.image_size,
        gpu=args.gpu,
        peak_s=0.0 if args.no_peak else _PEAK_SECONDS,
    )
    with Progress(count_steps(request), "opening") as bar:
        result = run_benchmark(request, progress=lambda what: bar.advance(label=what))
    written, errors = _write(args, result)
    points = [(model, point) for model in result.models for point in model.points]
    lines = [format_pairs(_head(result)), *_time_lines(points), *_roofline_lines(result, layers=args.layers)]
    lines += [*_remark_lines(result, points), *written]
    follow = _next(args.out, result) if args.out is not None and not errors else None
    return Output(data={"benchmark": result}, text="\n".join(lines), next_command=follow, errors=errors)


def _require_outputs(args: argparse.Namespace) -> None:
    """Before the work, whatever would refuse its results after it."""
    from ..evaluate.figures import require_drawable
    from ..files.output import require_distinct, require_writable
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
    from ..evaluate.figures import save_figure
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


def _next(out: Path, result: Benchmark) -> str | None:
    """Advice that begins with what was measured here; None where no accuracy was published for this image size."""
    from ..measure.advice import published_accuracy

    known = {(variant.name, (size, size)) for variant, size, _ in published_accuracy()}
    usable = [model for model in result.models if model.published and (model.variant, model.image_size) in known]
    found = [point.latency.median_ms for model in usable for point in model.points if point.way == "engine"]
    return f"repvgg-trt advise --slo-ms {math.ceil(max(found))} --measured {shlex.quote(str(out))}" if found else None


def _head(result: Benchmark) -> list[tuple[str, str]]:
    device = result.device
    threads = f"; CPU threads of a batch: {device.cpu_threads or 'as many as the library takes'}"
    clients = f"{result.clients} client{'s' if result.clients > 1 else ''}"
    pairs = [
        ("device", device.name + ("" if device.kind == "gpu" else threads)),
        ("load", f"{clients}; {result.duration_s:g} s a row, all rows of a batch size in turn"),
    ]
    points = [point for model in result.models for point in model.points]
    pairs += [("backend", text) for text in dict.fromkeys(f"{point.way}: {point.backend}" for point in points)]
    if not any(point.phases for point in points):
        whole = "copies to a device, computing and launches are not told apart: the backend runs a batch as one call"
        pairs.append(("parts", whole))
    return pairs


def _time_lines(points: list[tuple[ModelResult, Point]]) -> list[str]:
    calls = [["model", "way", "batch", "min", "median", "p90", "p99", "max", "img/s", "roofline"]]
    parts = [["model", "batch", "host→device", "compute", "device→host", "enqueue (CPU)"]]
    for model, point in points:
        found, phases = point.latency, point.phases
        times = (found.min_ms, found.median_ms, found.p90_ms, found.p99_ms, found.max_ms)
        way = point.way + ("!" if point.warnings else "")
        share = "–" if point.share is None else f"{100 * point.share:.0f} %"
        speed = f"{point.images_per_second:,.1f}"
        calls.append([_title(model), way, str(point.batch), *map(_show, times), speed, share])
        if phases is not None:
            spent = (phases.to_device_ms, phases.compute_ms, phases.to_host_ms, phases.enqueue_ms)
            parts.append([_title(model), str(point.batch), *map(_show, spent)])
    lines = ["latency of one call, ms", format_groups(calls, "<" + ">" * 8)]
    if len(parts) > 1:
        lines += ["parts of a call, ms, without CUDA graphs and one at a time", format_groups(parts, ">>>>>")]
    return lines


def _roofline_lines(result: Benchmark, *, layers: bool) -> list[str]:
    from ..measure.roofline import bound_layers, total_floor_ms

    ceiling = result.ceiling
    if ceiling is None:
        return ["roofline  none: the device's peak is not known"]
    used = {cost.precision for model in result.models for cost in model.layers}
    known = ceiling.operations_per_second.items()
    peaks = ", ".join(f"{name} {value / 1e9:,.0f} G" for name, value in known if name in used or not used)
    memory = f"memory {ceiling.bytes_per_second / 1e9:,.1f} GB/s"
    lines = [f"roofline of {ceiling.device}: {peaks}op/s, {memory}", f"  {ceiling.source}"]
    rows = [["model", "batch", "GMACs", "MB moved", "ops/byte", "least ms", "short of memory"]]
    tables: list[str] = []
    for model in result.models:
        for batch in sorted({point.batch for point in model.points}):
            bounds = bound_layers(model.layers, ceiling, batch) if model.layers else None
            if bounds is None:
                continue
            operations, moved = sum(bound.operations for bound in bounds), sum(bound.bytes for bound in bounds)
            short = [bound for bound in bounds if bound.bound == "memory"]
            floor = total_floor_ms(bounds)
            part = f"{len(short)} of {len(bounds)} layers, {100 * total_floor_ms(short) / floor:.0f} % of it"
            sums = [f"{operations / 2e9:,.2f}", f"{moved / 1e6:,.1f}", f"{operations / moved:,.0f}"]
            rows.append([_title(model), str(batch), *sums, _show(floor), part])
            tables += [f"{model.file}, batch {batch}", _layer_table(bounds)] if layers else []
    return [*lines, format_groups(rows, ">>>>>>"), *tables] if len(rows) > 1 else lines


def _layer_table(bounds: tuple[LayerBound, ...]) -> str:
    rows = [["layer", "precision", "MMACs", "kB", "ops/byte", "least µs", "short of"]]
    for bound in bounds:
        amounts = [f"{bound.operations / 2e6:,.1f}", f"{bound.bytes / 1e3:,.0f}", f"{bound.intensity:,.1f}"]
        short_of = "arithmetic" if bound.bound == "compute" else "memory"
        rows.append([bound.name, bound.precision, *amounts, f"{1e3 * bound.floor_ms:,.1f}", short_of])
    return format_table(rows, "<<>>>><")


def _remark_lines(result: Benchmark, points: list[tuple[ModelResult, Point]]) -> list[str]:
    from ..measure.times import FEW_CALLS, LARGEST_DRIFT, LARGEST_SPREAD

    notes = [f"{model.file}: {note}" for model in result.models for note in model.notes]
    few = sum(point.latency.calls < FEW_CALLS for _, point in points)
    if few:
        rows = f"{few} of {len(points)} rows; give a longer --duration"
        notes.append(f"p99 of fewer than {FEW_CALLS} calls is the largest of them, as in {rows}")
    if any(point.share is not None and point.share > 1 for _, point in points):
        notes.append(
            "more than 100 % of the roofline: the peak was measured while other programs ran, or the kernels save "
            "multiplications"
        )
    lines = [format_pairs([("note", note) for note in notes])] if notes else []
    unstable = [(model, point) for model, point in points if point.warnings]
    if unstable:
        spread = f"a spread of up to {100 * LARGEST_SPREAD:.0f} % (standard deviation by mean)"
        usual = f"{spread}, halves that differ by up to {100 * LARGEST_DRIFT:.0f} %"
        lines.append(f"! not stable; usual is {usual}: let nothing else run, or give a longer --duration")
        lines += [
            f"  {_title(model)}, {point.way}, batch {point.batch}: {'; '.join(point.warnings)}"
            for model, point in unstable
        ]
    return lines


def _title(model: ModelResult) -> str:
    return f"{Path(model.file).stem} ({model.precision or '?'})"


def _show(milliseconds: float) -> str:
    """Four digits or more."""
    return f"{milliseconds:,.{sum(milliseconds < limit for limit in (10, 100, 1000))}f}"


COMMAND = Command(
    "bench",
    "measure latency, throughput and the share of the roofline",
    "Measures models in turn within one run: latency, throughput, and on a GPU the copies, computing and launch apart; "
    "says when the times were not stable; and what share of the device's limits that is, layer by layer.",
    add_options,
    execute,
    find_conflict,
    EXAMPLES,
)

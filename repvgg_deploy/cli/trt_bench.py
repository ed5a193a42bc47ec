"""`repvgg-trt bench`: latency, throughput and share of the roofline of models, beside others."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ArtifactError
from ..evaluate.figures import require_drawable, save_figure
from ..files.output import require_distinct, require_writable
from ..measure.advise import published_accuracy
from ..measure.bench import BenchRequest, count_steps, run_benchmark
from ..measure.plots import draw_benchmark
from ..measure.records import Benchmark, ModelResult, Point, require_free, write_benchmark
from ..measure.roofline import LayerBound, bound_layers, total_floor_ms
from ..measure.times import FEW_CALLS, LARGEST_DRIFT, LARGEST_SPREAD, Pace
from .common import Output, Progress
from .tables import format_pairs, format_table

_PEAK_SECONDS = 1.0


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: A model cannot be opened or run, or a file is there already.
    """
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
    return Output(data={"benchmark": result}, text="\n".join([*_lines(result, layers=args.layers), *written]), next_command=follow, errors=errors)


def _next(out: Path, result: Benchmark) -> str | None:
    """Advice that begins with what was measured here; None where no accuracy is published of it, as at another image size."""
    known = {(variant.name, (size, size)) for variant, size, _ in published_accuracy()}
    usable = [model for model in result.models if model.published and (model.variant, model.image_size) in known]
    found = [point.latency.median_ms for model in usable for point in model.points if point.way == "engine"]
    return f"repvgg-trt advise --slo-ms {math.ceil(max(found))} --measured {shlex.quote(str(out))}" if found else None


def _require_outputs(args: argparse.Namespace) -> None:
    """Before the work, whatever would refuse its results after it."""
    outputs = [path for path in (args.out, args.plot) if path is not None]
    require_distinct(outputs, args.models)
    for path in outputs:
        require_free(path, force=args.force)
        require_writable(path)
    if args.plot is not None:
        require_drawable(args.plot)


def _write(args: argparse.Namespace, result: Benchmark) -> tuple[list[str], tuple[ArtifactError, ...]]:
    """Writes the files; one that cannot be written is no reason to lose the figures."""
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
    lines = [format_pairs(_head(result)), "latency of one call, ms", format_table(_latency_rows(result), "<<" + ">" * 9)]
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
                f"p99 of fewer than {FEW_CALLS} calls is the largest of them, as in {few} of {len(_points(result))} rows; give a longer --duration",
            )
        )
    if any(point.share is not None and point.share > 1 for _, point in _points(result)):
        notes.append(("note", "more than 100 % of the roofline: the peak was measured while other programs ran, or the kernels save multiplications"))
    return lines + ([format_pairs(notes)] if notes else []) + _unstable_lines(result)


def _head(result: Benchmark) -> list[tuple[str, str]]:
    device = result.device
    threads = "" if device.kind == "gpu" else f"; CPU threads of a batch: {device.cpu_threads or 'as many as the library takes'}"
    clients = f"{result.clients} client{'s' if result.clients > 1 else ''}"
    pairs = [("device", f"{device.name}{threads}"), ("load", f"{clients}; {result.duration_s:g} s a row, all rows of a batch size in turn")]
    for backend in dict.fromkeys(f"{point.way}: {point.backend}" for model in result.models for point in model.points):
        pairs.append(("backend", backend))
    if not any(point.phases for _, point in _points(result)):
        pairs.append(("parts", "copies to a device, computing and launches are not told apart: the backend runs a batch as one call"))
    return pairs


def _latency_rows(result: Benchmark) -> list[list[str]]:
    rows = [["model", "way", "batch", "min", "median", "p90", "p95", "p99", "max", "images/s", "of roofline"]]
    for model, point in _points(result):
        found = point.latency
        times = (found.min_ms, found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms)
        share = "–" if point.share is None else f"{100 * point.share:.0f} %"
        unstable = "!" if point.warnings else ""
        rows.append([_title(model), point.way + unstable, str(point.batch), *map(_show, times), f"{point.images_per_second:,.1f}", share])
    return rows


def _points(result: Benchmark) -> list[tuple[ModelResult, Point]]:
    return [(model, point) for model in result.models for point in model.points]


def _phase_rows(result: Benchmark) -> list[list[str]]:
    rows = [
        [_title(model), str(point.batch), *map(_show, (part.to_device_ms, part.compute_ms, part.to_host_ms, part.enqueue_ms))]
        for model, point in _points(result)
        if (part := point.phases) is not None
    ]
    return [["model", "batch", "host→device", "compute", "device→host", "enqueue (CPU)"], *rows] if rows else []


def _roofline_lines(result: Benchmark, *, layers: bool) -> list[str]:
    ceiling = result.ceiling
    if ceiling is None:
        return ["roofline  none: the device's peak is not known"]
    used = {cost.precision for model in result.models for cost in model.layers}
    peaks = ", ".join(f"{name} {value / 1e9:,.0f} G" for name, value in ceiling.operations_per_second.items() if name in used or not used)
    lines = [f"roofline of {ceiling.device}: {peaks}op/s, memory {ceiling.bytes_per_second / 1e9:,.1f} GB/s", f"  {ceiling.source}"]
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
    return [_title(model), str(batch), f"{operations / 2e9:,.2f}", f"{moved / 1e6:,.1f}", f"{operations / moved:,.0f}", _show(floor), part]


def _layer_rows(bounds: Sequence[LayerBound]) -> list[list[str]]:
    rows = [["layer", "precision", "MMACs", "kB", "ops/byte", "least µs", "short of"]]
    for bound in bounds:
        numbers = [f"{bound.operations / 2e6:,.1f}", f"{bound.bytes / 1e3:,.0f}", f"{bound.intensity:,.1f}", f"{1e3 * bound.floor_ms:,.1f}"]
        rows.append([bound.name, bound.precision, *numbers, "arithmetic" if bound.bound == "compute" else "memory"])
    return rows


def _unstable_lines(result: Benchmark) -> list[str]:
    rows = [[_title(model), point.way, str(point.batch), "; ".join(point.warnings)] for model, point in _points(result) if point.warnings]
    if not rows:
        return []
    usual = f"a spread of up to {100 * LARGEST_SPREAD:.0f} % (standard deviation by mean), halves that differ by up to {100 * LARGEST_DRIFT:.0f} %"
    return [f"! not stable; usual is {usual}: let nothing else run, or give a longer --duration", format_table(rows, "<<><")]


def _title(model: ModelResult) -> str:
    return f"{Path(model.file).stem} ({model.precision or '?'})"


def _show(milliseconds: float) -> str:
    """Three digits or more."""
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:,.1f}"

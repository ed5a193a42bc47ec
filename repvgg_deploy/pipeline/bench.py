"""`repvgg-trt bench`: models → how fast they are, beside others, and what share of the roofline that is."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..files.versions import installed_versions
from ..measure.bare import BareSession
from ..measure.cpu_peaks import combine, count_cores, measure_cpu
from ..measure.records import BENCHMARK_SCHEMA, Benchmark, ModelResult, Phases, Point
from ..measure.roofline import Ceiling, bound_layers, total_floor_ms
from ..measure.timing import Turns, count_images_per_second, find_instability, summarize
from ..measure.turns import MOST_TURNS, Call, Pace, measure_in_turns
from ..runtime.engine import Engine
from ..runtime.options import BackendName, EngineOptions
from ..specs.values import VariantSpec
from ..specs.variants import name_variant
from .bench_device import choose_ceiling, describe_device
from .bench_subjects import Rival, Subject, TorchRival, describe_subject

logger = logging.getLogger(__name__)

Way = Literal["engine", "onnxruntime", "torch"]
_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "torch")
_PHASE_CALLS = 50
_LARGEST_DIFFERENCE = 0.1


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to measure.

    Attributes:
        models: ONNX files of ours, and plans.
        batches: Batch sizes.
        pace: How long, and how many clients.
        compare: What the Engine is compared with.
        device: As Engine takes it.
        backend: As Engine takes it.
        cpu_threads: That share one batch on a CPU; None for the default.
        image_size: (height, width) for models that accept any.
        gpu: Which known GPU this one is; None for what the driver says.
        peak_s: Seconds for each part of a CPU's peak, before and after; 0 leaves it out.
    """

    models: tuple[Path, ...]
    batches: tuple[int, ...] = (1, 8, 32, 128)
    pace: Pace = field(default_factory=Pace)
    compare: tuple[Rival, ...] = ()
    device: str | None = None
    backend: BackendName | None = None
    cpu_threads: int | None = None
    image_size: tuple[int, int] | None = None
    gpu: str | None = None
    peak_s: float = 1.0


@dataclass(frozen=True, slots=True)
class _Lane:
    """One way of running one subject."""

    subject: int
    way: Way
    backend: str
    make_call: Callable[[int], Call]


def count_steps(request: BenchRequest) -> int:
    """About how often `run_benchmark` reports progress."""
    return len(request.models) * (1 + len(request.compare)) * len(request.batches) * (MOST_TURNS + 1)


def run_benchmark(request: BenchRequest, *, progress: Callable[[str], None] = lambda _: None) -> Benchmark:
    """Measures all models in turn within one run.

    Args:
        request: What.
        progress: Told what was just measured.

    Raises:
        RepVGGDeployError: A model cannot be opened or run.
        MissingDependencyError: What it is to be compared with is not installed.
    """
    options = EngineOptions(intra_op_threads=request.cpu_threads)
    with contextlib.ExitStack() as stack:
        subjects = []
        for path in request.models:
            engine = stack.enter_context(Engine(path, device=request.device, backend=request.backend, options=options))
            subjects.append(describe_subject(path, engine, request.image_size))
        device = describe_device([subject.engine for subject in subjects], threads=request.cpu_threads)
        notes: list[list[str]] = [[] for _ in subjects]
        lanes = list(_open_lanes(request, subjects, notes, stack))
        # What was asked for in vain is said before the measuring, not after it.
        ceiling = choose_ceiling(device, request.gpu, tf32=any(subject.tf32 for subject in subjects))
        ceiling = ceiling or _measure_peak(request, device.kind, progress)
        found = [
            (batch, lane, turns) for batch in request.batches for lane, turns in _measure(request, subjects, lanes, batch=batch, report=progress)
        ]
        phases = {
            (index, batch): _measure_phases(subject, batch, notes[index]) for index, subject in enumerate(subjects) for batch in request.batches
        }
        ceiling = _combine_peaks(ceiling, _measure_peak(request, device.kind, progress))
        points: list[list[Point]] = [[] for _ in subjects]
        for batch, lane, turns in found:
            part = phases[lane.subject, batch] if lane.way == "engine" else None
            points[lane.subject].append(_point(subjects[lane.subject], lane, batch, turns=turns, context=(request.pace.clients, part, ceiling)))
        models = tuple(_result(subject, points[index], notes[index]) for index, subject in enumerate(subjects))
    return Benchmark(BENCHMARK_SCHEMA, device, installed_versions(_PACKAGES), request.pace.duration_s, request.pace.clients, ceiling, models)


def _measure_peak(request: BenchRequest, kind: str, progress: Callable[[str], None]) -> Ceiling | None:
    if kind != "cpu" or request.peak_s <= 0:
        return None
    progress("the CPU's peak")
    return measure_cpu(threads=_threads_at_work(request), seconds=request.peak_s)


def _threads_at_work(request: BenchRequest) -> int | None:
    """CPU threads of all clients' batches together, no more than there are cores; None for the library's default, which is a core each."""
    if request.cpu_threads is None:
        return None
    return max(request.cpu_threads, min(request.cpu_threads * request.pace.clients, count_cores()))


def _combine_peaks(before: Ceiling | None, after: Ceiling | None) -> Ceiling | None:
    """The higher of two measurements; says so where they are far apart."""
    if before is not None and after is not None:
        rates = [found.operations_per_second["fp32"] for found in (before, after)]
        if max(rates) > (1 + _LARGEST_DIFFERENCE) * min(rates):
            shown = " and ".join(f"{rate / 1e9:,.0f}" for rate in rates)
            logger.warning(
                "the CPU's peak was %s Gop/s in fp32 before and after: other programs run here; the higher counts, and may be too low", shown
            )
    return combine(before, after)


def _open_lanes(request: BenchRequest, subjects: list[Subject], notes: list[list[str]], stack: contextlib.ExitStack) -> Iterator[_Lane]:
    done: set[tuple[VariantSpec, tuple[int, int]]] = set()  # PyTorch runs float32 whatever the file is typed as: once is enough
    for index, subject in enumerate(subjects):
        yield _Lane(index, "engine", subject.engine.backend_name, _engine_call(subject))
        if "onnxruntime" in request.compare:
            if subject.plan:
                notes[index].append("not compared with onnxruntime: it does not run plans")
            else:
                session = BareSession(subject.path, device="cpu" if subject.engine.device == "cpu" else "cuda", threads=request.cpu_threads)
                yield _Lane(index, "onnxruntime", session.name, _session_call(session, subject))
        if "torch" in request.compare:
            if subject.variant is None:
                notes[index].append("not compared with torch: its architecture is not known")
            elif (subject.variant, subject.size) not in done:
                done.add((subject.variant, subject.size))
                rival = TorchRival(subject.variant, device=subject.engine.device, threads=request.cpu_threads)
                stack.callback(rival.close)
                yield _Lane(index, "torch", rival.name, _torch_call(rival, subject))


def _engine_call(subject: Subject) -> Callable[[int], Call]:
    def make(count: int) -> Call:
        batch = subject.make_batch(count)
        subject.engine.warm_up(batch.shape)
        return lambda: subject.engine.infer(batch)

    return make


def _session_call(session: BareSession, subject: Subject) -> Callable[[int], Call]:
    return lambda count: session.make_call(subject.make_batch(count))


def _torch_call(rival: TorchRival, subject: Subject) -> Callable[[int], Call]:
    return lambda count: rival.make_call(count, subject.size)


def _measure(
    request: BenchRequest, subjects: list[Subject], lanes: list[_Lane], *, batch: int, report: Callable[[str], None]
) -> Iterator[tuple[_Lane, Turns]]:
    names = {f"{number}": lane for number, lane in enumerate(lanes)}
    calls = {name: lane.make_call(batch) for name, lane in names.items()}

    def say(name: str) -> None:
        report(f"{subjects[names[name].subject].path.name}, {names[name].way}, batch {batch}")

    for name, turns in measure_in_turns(calls, request.pace, progress=say).items():
        yield names[name], turns


def _measure_phases(subject: Subject, batch: int, notes: list[str]) -> Phases | None:
    """Medians of the parts of a call, where the backend has them."""
    largest = subject.engine.largest_batch
    if largest < batch:
        parts = "; its parts are not told apart" if subject.plan else ""
        notes.append(
            f"batch {batch} runs in pieces of {largest}, the largest {'of the plan' if subject.plan else 'that an Engine runs at once'}{parts}"
        )
        return None
    times = subject.engine.time_phases(subject.make_batch(batch), _PHASE_CALLS)
    if times is None:
        return None
    names = ("to_device_ms", "compute_ms", "to_host_ms", "enqueue_ms")
    medians = [statistics.median(getattr(one, name) for one in times) for name in names]
    return Phases(medians[0], medians[1], medians[2], medians[3], len(times))


def _point(subject: Subject, lane: _Lane, batch: int, *, turns: Turns, context: tuple[int, Phases | None, Ceiling | None]) -> Point:
    clients, phases, ceiling = context
    latency, rate = summarize(turns), count_images_per_second(turns, batch)
    # PyTorch runs float32 whatever the file is typed as, so its roofline is another one.
    bounds = None if ceiling is None or not subject.costs or lane.way == "torch" else bound_layers(subject.costs, ceiling, batch)
    floor = None if bounds is None else total_floor_ms(bounds)
    alone = latency.median_ms if clients == 1 else 1e3 * batch / rate
    took = phases.compute_ms if phases is not None else alone
    share = None if floor is None or took <= 0 else floor / took
    return Point(lane.way, lane.backend, batch, clients, latency, rate, phases, floor, share, find_instability(turns))


def _result(subject: Subject, points: list[Point], notes: list[str]) -> ModelResult:
    if not subject.costs:
        notes.append("no roofline: its architecture or precision is not known; a plan's passport says both when repvgg-trt build wrote it anew")
    variant = subject.variant
    return ModelResult(
        subject.path.name,
        subject.sha256,
        subject.variant_name,
        variant is not None and name_variant(variant) is not None,
        None if variant is None else variant.num_classes,
        subject.precision,
        subject.size,
        tuple(points),
        subject.costs,
        tuple(notes),
    )

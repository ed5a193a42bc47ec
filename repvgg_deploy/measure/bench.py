"""`repvgg-trt bench`: models → how fast they are, beside others, and what share of the roofline that is."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..build.library import look_for_gpu
from ..errors import InputError
from ..files.onnx import graph_precision, precision_of, read_graph, weighted_nodes
from ..files.output import sha256_file
from ..files.passport import read_passport
from ..files.versions import installed_versions
from ..images.ahead import count_cores
from ..runtime.engine import Engine
from ..runtime.opening import is_plan
from ..runtime.options import BackendName, EngineOptions
from ..specs.values import Precision, VariantSpec
from ..specs.variants import name_variant
from .peaks import combine, cpu_name, find_gpu_peaks, look_up_gpu, measure_cpu
from .records import BENCHMARK_SCHEMA, Benchmark, Device, ModelResult, Phases, Point, Way
from .roofline import ITEM_BYTES, Ceiling, LayerCost, bound_layers, count_costs, total_floor_ms
from .times import (
    MOST_TURNS,
    BareSession,
    Call,
    Pace,
    TorchRival,
    Turns,
    count_images_per_second,
    find_instability,
    measure_in_turns,
    summarize,
)

logger = logging.getLogger(__name__)
_PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "torch",
)  # fmt: skip
_PHASE_CALLS = 50


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
        bfloat16: As EngineOptions takes it.
        cpu_threads: CPU threads that share one batch; None for the default.
        image_size: (height, width) for models that accept any.
        gpu: Which known GPU this one is; None for what the driver says.
        peak_s: Seconds for each part of a CPU's peak, before and after; 0 leaves it out.
    """

    models: tuple[Path, ...]
    batches: tuple[int, ...] = (1, 8, 32, 128)
    pace: Pace = field(default_factory=Pace)
    compare: tuple[Literal["onnxruntime", "torch"], ...] = ()
    device: str | None = None
    backend: BackendName | None = None
    bfloat16: bool = False
    cpu_threads: int | None = None
    image_size: tuple[int, int] | None = None
    gpu: str | None = None
    peak_s: float = 1.0


def count_steps(request: BenchRequest) -> int:
    """About how often `run_benchmark` reports progress."""
    return len(request.models) * (1 + len(request.compare)) * len(request.batches) * (MOST_TURNS + 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """One model that was opened.

    `variant` and `precision` (the lowest of its layers) are None where they are not known, and `costs` is empty then.
    `size` is (height, width) of the images, `tf32` whether a plan may round the inputs of FP32 convolutions to TF32.
    """

    path: Path
    sha256: str
    engine: Engine
    is_plan: bool
    variant: VariantSpec | None
    precision: Precision | None
    size: tuple[int, int]
    costs: tuple[LayerCost, ...]
    tf32: bool
    notes: list[str] = field(default_factory=list)

    def make_batch(self, count: int) -> NDArray[Any]:
        """Drawn images of the input's kind."""
        source, generator = self.engine.spec.input, np.random.default_rng(0)
        shape = (count, *self.size, 3) if source.layout == "NHWC" else (count, 3, *self.size)
        if source.dtype == "uint8":
            return generator.integers(0, 256, shape, np.uint8)
        return generator.standard_normal(shape, np.float32).astype(source.dtype)

    def make_engine_call(self, count: int) -> Call:
        """Runs so many images with the Engine, which is warmed up for them."""
        batch = self.make_batch(count)
        self.engine.warm_up(batch.shape)
        return lambda: self.engine.infer(batch)


@dataclass(frozen=True, slots=True, eq=False)
class _Lane:
    """One way of running one subject; `make_call` takes a batch size."""

    subject: _Subject
    way: Way
    backend: str
    make_call: Callable[[int], Call]


def run_benchmark(request: BenchRequest, *, progress: Callable[[str], None] = lambda _: None) -> Benchmark:
    """Measures all models in turn within one run.

    Args:
        request: What to measure.
        progress: Told what was just measured.

    Raises:
        RepVGGDeployError: A model cannot be opened or run.
        MissingDependencyError: What it is to be compared with is not installed.
    """
    with contextlib.ExitStack() as stack:
        subjects = [_open_subject(path, request, stack) for path in request.models]
        device = _describe_device(subjects, request.cpu_threads)
        lanes = list(_open_lanes(request, subjects, stack))
        # What was asked for in vain is said before the measuring, not after it.
        ceiling = _look_up_ceiling(device, request.gpu, tf32=any(subject.tf32 for subject in subjects))
        ceiling = ceiling or _measure_peak(request, device, progress)
        measured = [
            (lane, batch, turns)
            for batch in request.batches
            for lane, turns in _measure(request, lanes, batch, progress).items()
        ]
        phases = {
            (subject, batch): _measure_phases(subject, batch) for subject in subjects for batch in request.batches
        }
        ceiling = combine(ceiling, _measure_peak(request, device, progress))
    points: dict[_Subject, list[Point]] = {subject: [] for subject in subjects}
    for lane, batch, turns in measured:
        parts = phases[lane.subject, batch] if lane.way == "engine" else None
        point = _make_point((lane, batch, turns), clients=request.pace.clients, phases=parts, ceiling=ceiling)
        points[lane.subject].append(point)
    models = tuple(_make_result(subject, found) for subject, found in points.items())
    pace, versions = request.pace, installed_versions(_PACKAGES)
    return Benchmark(BENCHMARK_SCHEMA, device, versions, pace.duration_s, pace.clients, ceiling, models)


def _open_subject(path: Path, request: BenchRequest, stack: contextlib.ExitStack) -> _Subject:
    """Opens a model and finds out what is known of it."""
    options = EngineOptions(intra_op_threads=request.cpu_threads, bfloat16=request.bfloat16)
    engine = stack.enter_context(Engine(path, device=request.device, backend=request.backend, options=options))
    spec, variant, plan = engine.spec, engine.metadata.variant, is_plan(path)
    passport = read_passport(path) if plan else None
    usual = None if passport is None else passport.config.profile.opt_size
    size = request.image_size or usual or spec.image_size
    if size is None or spec.input.layout not in ("NCHW", "NHWC"):
        raise InputError(
            f"{path}: takes images of any size, and which is usual is not known",
            remedy="give --image-size, such as 224",
        )
    nodes = () if plan else weighted_nodes(read_graph(path))
    precision = None if plan else graph_precision(nodes)
    if passport is not None:
        precision = passport.config.precision if passport.precision == "not_inspected" else passport.precision

    def find_precision(layer: str) -> Precision:
        if plan and precision is not None:
            return precision
        parts = (precision_of(layer, nodes) or "").split("+")
        known: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "fp8": "fp8", "int8": "int8"}
        return next((known[part] for part in parts if part in ITEM_BYTES), "fp32")

    costs: tuple[LayerCost, ...] = ()
    if variant is not None and precision is not None and spec.kind != "module":
        costs = count_costs(variant, size, find_precision, input_dtype=spec.input.dtype)  # type: ignore[arg-type]
        costs = costs[:-1] if spec.kind == "features" else costs  # a backbone has no classifier
    tf32 = passport is not None and passport.config.tf32
    notes = []
    if request.bfloat16:
        costs, notes = (), ["no roofline: the processor's peak in bfloat16 is not measured"]
    return _Subject(path, sha256_file(path), engine, plan, variant, precision, size, costs, tf32, notes)


def _describe_device(subjects: Sequence[_Subject], threads: int | None) -> Device:
    """The device that all models run on."""
    places = sorted({subject.engine.device for subject in subjects})
    if len(places) > 1:
        raise InputError(
            f"the models run on {' and '.join(places)}, expected one device: their figures would stand in one table",
            remedy="give --device, or run repvgg-trt bench once for each device",
        )
    if places[0] == "cpu":
        return Device("cpu", cpu_name(), threads)
    found = look_for_gpu(int(places[0].partition(":")[2] or 0))
    if found.gpu is None:
        logger.warning("the name of the GPU is not known: %s", found.reason)
        return Device("gpu", "GPU")
    return Device("gpu", found.gpu.name, None, found.gpu.driver_version)


def _open_lanes(request: BenchRequest, subjects: Sequence[_Subject], stack: contextlib.ExitStack) -> Iterator[_Lane]:
    done: set[tuple[VariantSpec, tuple[int, int]]] = set()
    for subject in subjects:
        engine, variant = subject.engine, subject.variant
        yield _Lane(subject, "engine", engine.backend_name, subject.make_engine_call)
        if "onnxruntime" in request.compare:
            if subject.is_plan:
                subject.notes.append("not compared with onnxruntime: it does not run plans")
            else:
                place: Literal["cpu", "cuda"] = "cpu" if engine.device == "cpu" else "cuda"
                session = BareSession(subject.path, subject.make_batch, device=place, threads=request.cpu_threads)
                yield _Lane(subject, "onnxruntime", session.name, session.make_call)
        if "torch" in request.compare:
            if variant is None:
                subject.notes.append("not compared with torch: its architecture is not known")
            elif (variant, subject.size) not in done:  # it runs float32 whatever the file is typed as: once is enough
                done.add((variant, subject.size))
                rival = TorchRival(variant, subject.size, device=engine.device, threads=request.cpu_threads)
                stack.callback(rival.close)
                yield _Lane(subject, "torch", rival.name, rival.make_call)


def _look_up_ceiling(device: Device, name: str | None, *, tf32: bool) -> Ceiling | None:
    """The peaks of a GPU, or of the one that the user names; None for a CPU, which is measured, and an unknown GPU."""
    if device.kind == "cpu":
        if name is not None:
            raise InputError(
                f"--gpu {name} is for the roofline of a GPU, and the models run on the CPU",
                remedy="leave out --gpu, or give --device cuda",
            )
        return None
    gpu = find_gpu_peaks(name) if name is not None else look_up_gpu(device.name)
    if gpu is None:
        logger.warning(
            "the peaks of %s are not in the table: no roofline; --gpu says which known GPU it is", device.name
        )
        return None
    return gpu.ceiling(tf32=tf32)


def _measure_peak(request: BenchRequest, device: Device, progress: Callable[[str], None]) -> Ceiling | None:
    """The peak of the CPU for as many threads as compute at once: those of all clients' batches, at most one a core."""
    if device.kind != "cpu" or request.peak_s <= 0:
        return None
    progress("the CPU's peak")
    threads = request.cpu_threads  # None for the library's default, which is a core each
    if threads is not None:
        threads = max(threads, min(threads * request.pace.clients, count_cores()))
    return measure_cpu(threads=threads, seconds=request.peak_s)


def _measure(
    request: BenchRequest, lanes: Sequence[_Lane], batch: int, progress: Callable[[str], None]
) -> dict[_Lane, Turns]:
    calls = {lane: lane.make_call(batch) for lane in lanes}
    return measure_in_turns(
        calls, request.pace, progress=lambda lane: progress(f"{lane.subject.path.name}, {lane.way}, batch {batch}")
    )


def _measure_phases(subject: _Subject, batch: int) -> Phases | None:
    """Medians of the parts of a call, where the backend tells them apart."""
    largest = subject.engine.largest_batch
    if largest < batch:
        parts = "; its parts are not told apart" if subject.is_plan else ""
        subject.notes.append(
            f"batch {batch} runs in pieces of {largest}, the largest "
            f"{'of the plan' if subject.is_plan else 'that an Engine runs at once'}{parts}"
        )
        return None
    times = subject.engine.time_phases(subject.make_batch(batch), _PHASE_CALLS)
    if times is None:
        return None
    names = ("to_device_ms", "compute_ms", "to_host_ms", "enqueue_ms")
    medians = {name: statistics.median(getattr(one, name) for one in times) for name in names}
    return Phases(**medians, calls=len(times))


def _make_point(
    measured: tuple[_Lane, int, Turns], *, clients: int, phases: Phases | None, ceiling: Ceiling | None
) -> Point:
    lane, batch, turns = measured
    latency, rate, costs = summarize(turns), count_images_per_second(turns, batch), lane.subject.costs
    bounds = None
    if ceiling is not None and costs and lane.way != "torch":  # which runs float32, whatever the file is typed as
        bounds = bound_layers(costs, ceiling, batch)
    floor_ms = None if bounds is None else total_floor_ms(bounds)
    alone_ms = latency.median_ms if clients == 1 else 1e3 * batch / rate
    took_ms = phases.compute_ms if phases is not None else alone_ms
    share = None if floor_ms is None or took_ms <= 0 else floor_ms / took_ms
    unstable = find_instability(turns)
    return Point(lane.way, lane.backend, batch, clients, latency, rate, phases, floor_ms, share, unstable)


def _make_result(subject: _Subject, points: Sequence[Point]) -> ModelResult:
    if not subject.costs and not any(note.startswith("no roofline") for note in subject.notes):
        subject.notes.append(
            "no roofline: its architecture or precision is not known; a plan's passport says both when "
            "repvgg-trt build wrote it anew"
        )
    variant = subject.variant
    published = None if variant is None else name_variant(variant)
    return ModelResult(
        file=subject.path.name,
        sha256=subject.sha256,
        variant=None if variant is None else published or variant.name,
        published=published is not None,
        classes=None if variant is None else variant.num_classes,
        precision=subject.precision,
        image_size=subject.size,
        points=tuple(points),
        layers=subject.costs,
        notes=tuple(subject.notes),
    )

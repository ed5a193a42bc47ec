"""`repvgg-trt bench`: models → how fast they are, beside others, and what share of the roofline that is.

What a benchmark runs on, and what that can do at most.

A model file → what is to be measured of it: an Engine, its layers' costs, and what it is compared with.
"""

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
from ..errors import InputError, MissingDependencyError
from ..files.onnx import WeightedNode, graph_precision, precision_of, read_graph, weighted_nodes
from ..files.output import sha256_file
from ..files.passport import read_passport
from ..files.versions import installed_versions
from ..runtime.engine import Engine
from ..runtime.opening import is_plan
from ..runtime.options import BackendName, EngineOptions
from ..specs.values import PlanPassport, Precision, VariantSpec
from ..specs.variants import image_size, name_variant
from .peaks import combine, count_cores, cpu_name, find_gpu_peaks, look_up_gpu, measure_cpu
from .records import BENCHMARK_SCHEMA, Benchmark, Device, ModelResult, Phases, Point
from .roofline import ITEM_BYTES, Ceiling, LayerCost, bound_layers, count_costs, total_floor_ms
from .times import (
    MOST_TURNS,
    BareSession,
    Call,
    Pace,
    Turns,
    count_images_per_second,
    find_instability,
    measure_in_turns,
    summarize,
)

logger = logging.getLogger(__name__)


def describe_device(engines: Sequence[Engine], *, threads: int | None) -> Device:
    """The device that all engines run on.

    Args:
        engines: At least one.
        threads: That share one batch on a CPU.

    Raises:
        InputError: They run on several.
    """
    places = sorted({engine.device for engine in engines})
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


def choose_ceiling(device: Device, name: str | None, *, tf32: bool) -> Ceiling | None:
    """The peaks of a GPU from the table; None for a CPU, which is measured, and for a GPU that is not in it.

    Args:
        device: As the driver names it.
        name: In its place, where the user says which one it is.
        tf32: Whether FP32 convolutions may run in TF32.

    Raises:
        InputError: The user's name is not in the table, or the models run on a CPU.
    """
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


Rival = Literal["onnxruntime", "torch"]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        engine: Open.
        plan: Whether it is a TensorRT plan.
        variant: Its architecture; None where it is not known.
        precision: The lowest of its layers; None where it is not known.
        size: (height, width) of the images.
        costs: Of the layers; empty where architecture or precision are not known.
        tf32: Whether a plan was built to round the inputs of FP32 convolutions to TF32.
    """

    path: Path
    sha256: str
    engine: Engine
    plan: bool
    variant: VariantSpec | None
    precision: Precision | None
    size: tuple[int, int]
    costs: tuple[LayerCost, ...]
    tf32: bool = False

    @property
    def variant_name(self) -> str | None:
        """The published name of the architecture, or its own."""
        return None if self.variant is None else name_variant(self.variant) or self.variant.name

    def make_batch(self, count: int) -> NDArray[Any]:
        """Drawn images of the input's kind."""
        source, generator = self.engine.spec.input, np.random.default_rng(0)
        shape = (count, *self.size, 3) if source.layout == "NHWC" else (count, 3, *self.size)
        if source.dtype == "uint8":
            return generator.integers(0, 256, shape, np.uint8)
        return generator.standard_normal(shape, np.float32).astype(source.dtype)


def describe_subject(path: Path, engine: Engine, size: tuple[int, int] | None) -> Subject:
    """What is known of an opened model.

    Args:
        path: The file.
        engine: Of it.
        size: (height, width) in place of the model's own, for one that accepts any.

    Raises:
        InputError: The image size is not known, or not one that the model accepts.
    """
    found = size or image_size(engine.spec)
    if found is None or engine.spec.input.layout not in ("NCHW", "NHWC"):
        raise InputError(
            f"{path}: takes images of any size, and which is usual is not known",
            remedy="give --image-size, such as 224",
        )
    plan, variant = is_plan(path), engine.metadata.variant
    nodes = () if plan else weighted_nodes(read_graph(path))
    passport = read_passport(path) if plan else None
    precision = _plan_precision(passport) if plan else graph_precision(nodes)
    costs: tuple[LayerCost, ...] = ()
    if variant is not None and precision is not None and engine.spec.kind != "module":
        choose = (lambda _: precision) if plan else _layer_precision(nodes)
        costs = count_costs(variant, found, choose, input_dtype=engine.spec.input.dtype)  # type: ignore[arg-type]
        costs = costs[:-1] if engine.spec.kind == "features" else costs  # a backbone has no classifier
    tf32 = passport is not None and passport.config.tf32
    return Subject(path, sha256_file(path), engine, plan, variant, precision, found, costs, tf32)


def _plan_precision(passport: PlanPassport | None) -> Precision | None:
    if passport is None:
        return None
    return passport.config.precision if passport.precision == "not_inspected" else passport.precision


def _layer_precision(nodes: tuple[WeightedNode, ...]) -> Callable[[str], Precision]:
    known: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}

    def find(name: str) -> Precision:
        parts = (precision_of(name, nodes) or "").split("+")
        return next((known[part] for part in parts if part in ITEM_BYTES), "fp32")

    return find


class TorchRival:
    """The deploy form of the same variant in PyTorch, float32, with weights of a seed: speed does not depend on them.

    Args:
        variant: The architecture.
        device: `cpu`, `cuda` or `cuda:1`.
        threads: That share one batch on the CPU; None for PyTorch's default.

    Raises:
        MissingDependencyError: torch is not installed.
    """

    def __init__(self, variant: VariantSpec, *, device: str, threads: int | None) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                "--compare torch needs PyTorch, which is not installed", remedy="pip install 'repvgg-deploy[export]'"
            ) from error
        from ..model.network import RepVGG

        self._torch: Any = torch
        self._threads = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._device = device
        self._model = RepVGG(variant, "deploy").eval().to(device)
        self.name = f"PyTorch {torch.__version__}, {device}, float32"

    def make_call(self, count: int, size: tuple[int, int]) -> Callable[[], object]:
        """What runs so many images of a size, from host memory to host memory."""
        torch, model, device = self._torch, self._model, self._device
        images = torch.randn(count, 3, *size)

        def call() -> object:
            with torch.inference_mode():
                return model(images.to(device)).cpu()

        return call

    def close(self) -> None:
        """Gives PyTorch the threads that it had."""
        self._torch.set_num_threads(self._threads)


Way = Literal["engine", "onnxruntime", "torch"]
_PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "torch",
)
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
            (batch, lane, turns)
            for batch in request.batches
            for lane, turns in _measure(request, subjects, lanes, batch=batch, report=progress)
        ]
        phases = {
            (index, batch): _measure_phases(subject, batch, notes[index])
            for index, subject in enumerate(subjects)
            for batch in request.batches
        }
        ceiling = _combine_peaks(ceiling, _measure_peak(request, device.kind, progress))
        points: list[list[Point]] = [[] for _ in subjects]
        for batch, lane, turns in found:
            part = phases[lane.subject, batch] if lane.way == "engine" else None
            points[lane.subject].append(
                _point(subjects[lane.subject], lane, batch, turns=turns, context=(request.pace.clients, part, ceiling))
            )
        models = tuple(_result(subject, points[index], notes[index]) for index, subject in enumerate(subjects))
    return Benchmark(
        BENCHMARK_SCHEMA,
        device,
        installed_versions(_PACKAGES),
        request.pace.duration_s,
        request.pace.clients,
        ceiling,
        models,
    )


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
                "the CPU's peak was %s Gop/s in fp32 before and after: other programs run here; the higher "
                "counts, and may be too low",
                shown,
            )
    return combine(before, after)


def _open_lanes(
    request: BenchRequest, subjects: list[Subject], notes: list[list[str]], stack: contextlib.ExitStack
) -> Iterator[_Lane]:
    done: set[tuple[VariantSpec, tuple[int, int]]] = (
        set()
    )  # PyTorch runs float32 whatever the file is typed as: once is enough
    for index, subject in enumerate(subjects):
        yield _Lane(index, "engine", subject.engine.backend_name, _engine_call(subject))
        if "onnxruntime" in request.compare:
            if subject.plan:
                notes[index].append("not compared with onnxruntime: it does not run plans")
            else:
                session = BareSession(
                    subject.path,
                    device="cpu" if subject.engine.device == "cpu" else "cuda",
                    threads=request.cpu_threads,
                )
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
            f"batch {batch} runs in pieces of {largest}, the largest "
            f"{'of the plan' if subject.plan else 'that an Engine runs at once'}{parts}"
        )
        return None
    times = subject.engine.time_phases(subject.make_batch(batch), _PHASE_CALLS)
    if times is None:
        return None
    names = ("to_device_ms", "compute_ms", "to_host_ms", "enqueue_ms")
    medians = [statistics.median(getattr(one, name) for one in times) for name in names]
    return Phases(medians[0], medians[1], medians[2], medians[3], len(times))


def _point(
    subject: Subject, lane: _Lane, batch: int, *, turns: Turns, context: tuple[int, Phases | None, Ceiling | None]
) -> Point:
    clients, phases, ceiling = context
    latency, rate = summarize(turns), count_images_per_second(turns, batch)
    # PyTorch runs float32 whatever the file is typed as, so its roofline is another one.
    bounds = (
        None
        if ceiling is None or not subject.costs or lane.way == "torch"
        else bound_layers(subject.costs, ceiling, batch)
    )
    floor = None if bounds is None else total_floor_ms(bounds)
    alone = latency.median_ms if clients == 1 else 1e3 * batch / rate
    took = phases.compute_ms if phases is not None else alone
    share = None if floor is None or took <= 0 else floor / took
    return Point(lane.way, lane.backend, batch, clients, latency, rate, phases, floor, share, find_instability(turns))


def _result(subject: Subject, points: list[Point], notes: list[str]) -> ModelResult:
    if not subject.costs:
        notes.append(
            "no roofline: its architecture or precision is not known; a plan's passport says both when "
            "repvgg-trt build wrote it anew"
        )
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

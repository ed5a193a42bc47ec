"""One build: typed ONNX bytes → plan, inspected where a GPU is there to do so.

TensorRT's timing cache as a file: one for each GPU and version, replaced whole, and merged when two builds end at once.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, BuildError, CudaError, InputError
from ..files.onnx import GraphSummary, weighted_nodes
from ..files.output import atomic_output, locked
from ..files.plan_place import quote
from ..specs.values import BuildConfig, ModelSpec
from .cache import cache_folder
from .inspect import PrecisionReport, WeightedLayer, measure, read_layers, require_honest
from .library import BuildLog, Gpu, Library, find_nodes
from .monitor import Position, make_monitor, run_cancellable
from .network import add_profile, output_types, parse, require_expected_tensors, tensor_shapes
from .recipes import Typing, configure, constrain_layers, create_network, require_options, require_typing

logger = logging.getLogger(__name__)


def choose_timing_file(library: Library, gpu: tuple[str, str] | None, given: Path | None) -> Path | None:
    """The file of one build's timings; None for none.

    Args:
        library: Which TensorRT.
        gpu: Name and compute capability.
        given: That the user names; None: one of this GPU and TensorRT in the cache folder.
    """
    if library.is_rtx:  # it times nothing before it runs
        if given is not None:
            logger.warning("%s keeps no timings: --timing-cache has no effect", library.name)
        return None
    if given is not None or gpu is None:
        return given
    try:
        folder = cache_folder() / "timing"
        folder.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        logger.warning("timings are not kept: %s", error)
        return None
    name = re.sub(r"[^a-z0-9]+", "-", gpu[0].lower()).strip("-")
    return folder / f"{library.flavour}-{library.version}-{name}-sm{gpu[1].replace('.', '')}.timing"


@dataclass(slots=True)
class TimingFile:
    """The timings of one build.

    Attributes:
        path: The file.
        usable: False where the file is of another GPU or TensorRT: then it is neither used nor replaced.
        bytes_before: Its size when the build began; 0 where there was none.
    """

    path: Path
    usable: bool = True
    bytes_before: int = 0

    def load(self, settings: Any) -> None:
        """Gives TensorRT the timings in the file, or none."""
        data = self._read()
        known = settings.create_timing_cache(data) if data else None  # may be None, too, of bytes that are no timings
        if known is not None and settings.set_timing_cache(known, False):
            self.bytes_before = len(data)
            return
        if data:
            self.usable = False
            logger.warning(
                "%s: the timings are damaged, or of another GPU or TensorRT: they are not used, and the file is "
                "left as it is",
                self.path,
            )
        settings.set_timing_cache(settings.create_timing_cache(b""), False)

    def store(self, settings: Any) -> None:
        """Writes what TensorRT has measured, with what another build has written meanwhile. Where that fails it is logged: no plan is lost."""
        measured = settings.get_timing_cache()
        if not self.usable or measured is None:
            return
        try:
            with locked(self.path):
                self._merge(settings, measured)
        except ArtifactError as error:
            logger.warning("the timings are not kept: %s", error.message)

    def _merge(self, settings: Any, measured: Any) -> None:
        latest = self._read()
        known = settings.create_timing_cache(latest) if latest else None
        if latest and (known is None or not measured.combine(known, False)):
            logger.warning(
                "%s: was replaced by what is damaged, or of another GPU or TensorRT, and is left as it is", self.path
            )
            return
        with atomic_output(self.path, force=True) as output:
            output.partial.write_bytes(bytes(measured.serialize()))

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            logger.warning("%s: cannot be read: %s", self.path, error.strerror)
            return b""


_REMEDIES = (
    (
        ("out of memory", "outofmemory", "alloc", "insufficient memory"),
        "give a smaller --max-batch or --workspace, or free memory of the GPU",
    ),
    (("insufficient workspace", "workspace"), "give a larger --workspace, such as 8GiB"),
    (
        ("cuda initialization", "cuinit", "no cuda-capable", "driver"),
        "look at nvidia-smi: a GPU and a driver new enough for this TensorRT are needed",
    ),
    (
        ("unsupported sm", "compute capability", "target gpu"),
        "use a TensorRT that supports this GPU, or another --target",
    ),
)


@dataclass(frozen=True, slots=True, eq=False)
class BuildJob:
    """What to build.

    Attributes:
        data: The typed ONNX.
        graph: Of it.
        spec: Of it.
        typing: Of it.
        config: What is asked for; its profile suits the graph.
        targets: Compute capabilities that the plan is for; see `recipes.resolve_targets`.
        gpu: None where there is none.
        timing: File of the timing cache, or None for no cache.
    """

    data: bytes
    graph: GraphSummary
    spec: ModelSpec
    typing: Typing
    config: BuildConfig
    targets: tuple[str, ...]
    gpu: Gpu | None = None
    timing: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BuiltPlan:
    """A plan in memory.

    Attributes:
        data: Its bytes, as a buffer that TensorRT owns.
        output_types: Number type of each output.
        report: What it computes in; None where there was no GPU to ask.
        seconds: By stage.
        timing_bytes: Size of the timing cache that was used; 0 for none.
        weighted: The layers that `report` is about.
    """

    data: Any
    output_types: dict[str, str]
    report: PrecisionReport | None
    seconds: dict[str, float]
    timing_bytes: int
    weighted: tuple[WeightedLayer, ...]


@dataclass(slots=True)
class _Work:
    library: Library
    job: BuildJob
    position: Position = field(default_factory=Position)
    cancelled: threading.Event = field(default_factory=threading.Event)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def mark(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self.started = now - self.started, now


def require_gpu(library: Library, gpu: Gpu | None, reason: str = "") -> None:
    """TensorRT builds on a GPU; TensorRT-RTX does without.

    Raises:
        CudaError: There is none; `reason` says why.
    """
    if gpu is None and not library.is_rtx:
        raise CudaError(
            f"{library.name} builds on the GPU that the plan is for, and there is none "
            f"here{': ' if reason else ''}{reason}",
            remedy="build on that machine; or build with --backend rtx, which needs no GPU, for TensorRT-RTX",
        )


def build(library: Library, job: BuildJob, *, report: Callable[[float], None] | None = None) -> BuiltPlan:
    """Builds a plan. Ctrl-C stops it; nothing is written but the timing cache.

    Args:
        library: Which TensorRT.
        job: See `BuildJob`.
        report: Called with the share that is done, 0 to 1.

    Raises:
        BuildError: TensorRT refuses the graph or an option, fails, or has built a plan that computes in a wider type
            than the graph says.
        CudaError: TensorRT needs a GPU, and there is none.
    """
    require_options(library, job.config, job.targets if library.is_rtx else ())
    require_typing(library, job.typing, job.graph.opset)
    require_gpu(library, job.gpu)
    work = _Work(library, job)
    tell = report if report is not None else lambda _: None
    return run_cancellable(library, lambda: _build(work), work.cancelled, poll=lambda: tell(work.position.share))


def _build(work: _Work) -> BuiltPlan:
    library, job = work.library, work.job
    log = BuildLog(library.trt)
    builder = _create_builder(library, log)
    network = create_network(library, builder)
    parser = parse(library, network, log=log, data=job.data, graph=job.graph)
    require_expected_tensors(network, job.spec)
    weighted = _weigh(job.graph, tensor_shapes(network))
    settings = builder.create_builder_config()
    configure(library, settings, job.config, job.typing, targets=job.targets)
    constrain_layers(library, network, job.typing)
    add_profile(builder, settings, job.spec, job.config.profile)
    timing = TimingFile(job.timing) if job.timing is not None else None
    if timing is not None:
        timing.load(settings)
    monitor = make_monitor(library.trt, work.position, work.cancelled)
    if monitor is not None:
        settings.progress_monitor = monitor
    work.mark("parse")
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise _failure(work, log.errors)
    work.mark("build")
    if timing is not None:
        timing.store(settings)
    types = output_types(library, network)
    del parser  # it owns the weights that the network refers to, until here
    found = _inspect(work, log, plan, weighted)
    return BuiltPlan(plan, types, found, work.seconds, timing.bytes_before if timing is not None else 0, weighted)


def _create_builder(library: Library, log: BuildLog) -> Any:
    try:
        builder = library.trt.Builder(log.trt_logger)
    except (TypeError, RuntimeError) as error:  # how the bindings say that C++ gave no object
        raise _no_builder(library, log) from error
    if builder is None:
        raise _no_builder(library, log)
    return builder


def _no_builder(library: Library, log: BuildLog) -> CudaError:
    return CudaError(
        f"{library.name} cannot start its builder:{quote(log.errors)}",
        remedy="look at nvidia-smi: TensorRT builds on a GPU, with a driver new enough for it; --backend rtx builds "
        "without one",
    )


def _failure(work: _Work, errors: list[str]) -> BuildError:
    if work.cancelled.is_set():
        return BuildError("the build was stopped", remedy="start it again")
    nodes = find_nodes(errors, [node.name for node in work.job.graph.nodes])
    where = f" at {', '.join(nodes[:3])}" if nodes else ""
    text = " ".join(errors).lower()
    remedy = next(
        (remedy for words, remedy in _REMEDIES if any(word in text for word in words)),
        "run it again with -vv for TensorRT's whole log",
    )
    return BuildError(f"{work.library.name} could not build the plan{where}:{quote(errors)}", remedy=remedy)


def _weigh(graph: GraphSummary, shapes: dict[str, tuple[int, ...]]) -> tuple[WeightedLayer, ...]:
    outputs = {node.name or node.outputs[0]: node.outputs[0] for node in graph.nodes}
    result = []
    for node in weighted_nodes(graph):
        macs = 1
        for size in node.weight_shape or ():
            macs *= size
        place = shapes.get(outputs[node.name], ())[2:] if node.op_type == "Conv" else ()
        for size in place:
            macs *= max(size, 1)
        result.append(WeightedLayer(node.name, node.precision, macs))
    return tuple(result)


def _inspect(work: _Work, log: BuildLog, plan: Any, weighted: tuple[WeightedLayer, ...]) -> PrecisionReport | None:
    library, job = work.library, work.job
    if job.gpu is None or (library.is_rtx and job.gpu.compute_capability not in job.targets):
        return None
    trt = library.trt
    runtime = trt.Runtime(log.trt_logger)
    if job.config.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(
            f"{library.name} cannot load the plan that it has just built:{quote(log.errors)}", remedy=_REMEDIES[0][1]
        )
    try:
        report = measure(read_layers(_describe(trt, engine, job)), weighted)
    except BuildError as error:  # the plan is good all the same
        logger.warning("the precision is not judged: %s", error.message)
        return None
    if not report.inspected:
        logger.warning(
            "the layer inspector gave the precision of %.0f %% of the multiply-accumulates only: it is not judged",
            100 * report.seen,
        )
        return None
    require_honest(report, library.name)
    work.mark("inspect")
    return report


def _describe(trt: Any, engine: Any, job: BuildJob) -> str:
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:  # with it the inspector knows formats that depend on the batch
        context.set_input_shape(job.spec.input.name, (job.config.profile.opt_batch, *job.spec.input.shape[1:]))
        inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

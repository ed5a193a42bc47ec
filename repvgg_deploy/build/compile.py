"""One build: typed ONNX → plan in memory, inspected where a GPU is there to do so; and TensorRT's timings in a file.

Timings are kept in one file for each GPU, CUDA and TensorRT. It is replaced whole, and merged when two builds end at
once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, BuildError, CudaError, InputError
from ..files.cache import cache_folder
from ..files.onnx import GraphSummary
from ..files.output import atomic_output, locked
from ..files.plan_place import Library, name_driver, quote, start_tensorrt
from .inspect import PrecisionReport, WeightedLayer, measure, read_layers, require_honest, weigh_layers
from .library import BuildLog
from .monitor import BuildState, make_monitor, run_cancellable
from .network import add_profiles, output_types, parse, tensor_shapes
from .options import BuildRequest
from .recipes import configure, create_network, require_typing
from .source import Source, find_dense_layers

logger = logging.getLogger(__name__)
_LARGEST_TIMINGS = 1 << 30
_REMEDIES = (
    (("out of memory", "could not be allocated"), "free memory of the GPU, or give a smaller --max-batch"),
    (
        ("outofmemory", "insufficient memory", "workspace"),
        "give a larger --workspace, such as 8GiB, or a smaller --max-batch",
    ),
    (
        ("cuda initialization", "cuinit", "no cuda-capable", "driver"),
        "look at nvidia-smi: a GPU and a driver new enough for this TensorRT are needed",
    ),
    (
        ("unsupported sm", "compute capability", "target gpu"),
        "use a TensorRT that supports this GPU, or another --target",
    ),
)
"""What helps, by words in TensorRT's errors; the first that fits.

`OutOfMemory (Requested size was …)` alone is the limit of the workspace, also on a machine without a GPU. Where memory
of the GPU runs out, there is a line of CUDA's besides.
"""


@dataclass(frozen=True, slots=True, eq=False)
class BuiltPlan:
    """A plan in memory.

    Attributes:
        data: Its bytes, as a buffer that TensorRT owns.
        output_types: Number type of each output by name, in NumPy's names.
        report: What it computes in; None where there was no GPU to ask.
        seconds: By stage.
    """

    data: Any
    output_types: dict[str, str]
    report: PrecisionReport | None
    seconds: dict[str, float]


def compile_plan(request: BuildRequest, *, report: Callable[[float], None] = lambda _: None) -> BuiltPlan:
    """Builds a plan. Ctrl-C stops it; nothing is written but the timings.

    Args:
        request: Its source is typed.
        report: Called with the share that is done, 0 to 1.

    Raises:
        BuildError: TensorRT refuses the graph, fails, or has built a plan that computes in a wider type than the graph
            says.
        CudaError: TensorRT cannot start.
    """
    require_typing(request.library, request.source)
    if request.config.sparse:
        _say_sparsity(request.source)
    state = BuildState()
    return run_cancellable(request.library, lambda: _compile(request, state), state, poll=lambda: report(state.share))


def _say_sparsity(source: Source) -> None:
    """--sparse allows kernels for 2:4 sparse weights, and prunes none: it says where there are no such weights."""
    dense, count = find_dense_layers(source)
    if len(dense) == count:
        logger.warning(
            "--sparse has no effect: the weights of none of the %d layers are 2:4 sparse (two zeros of each four input "
            "channels); prune the reparameterized network so and fine-tune it first",
            count,
        )
    elif dense:
        shown = ", ".join(dense[:3]) + (", …" if len(dense) > 3 else "")
        logger.warning("--sparse: %d of %d layers have no 2:4 sparse weights: %s", len(dense), count, shown)


def _compile(request: BuildRequest, state: BuildState) -> BuiltPlan:
    library, source = request.library, request.source
    begun, log = time.monotonic(), BuildLog(library.trt)
    gpu = request.gpu
    driver = "no NVIDIA driver" if gpu is None else name_driver(gpu.driver_version, gpu.cuda_version)
    trt = library.trt
    builder = start_tensorrt(
        library, "builder", lambda: trt.Builder(log.trt_logger), lines=lambda: log.errors, on=driver
    )
    network = create_network(library, builder)
    parser = parse(library, network, log=log, source=source)
    weighted = weigh_layers(source.graph, tensor_shapes(network))
    settings = builder.create_builder_config()
    configure(request, network, settings)
    add_profiles(builder, settings, source.spec, request.config.profile)
    file = choose_timing_file(request)
    timing = None if file is None else TimingFile(file, settings, is_ours=request.timing_cache is None)
    monitor = make_monitor(library.trt, state)
    if monitor is not None:
        settings.progress_monitor = monitor
    parsed = time.monotonic()
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        if state.cancelled.is_set():
            raise BuildError("the build was stopped", remedy="start it again")
        raise _failure(library, source.graph, log.errors)
    built = time.monotonic()
    if timing is not None:
        timing.store()
    types = output_types(library, network)
    del parser  # it owns the weights that the network refers to, until here
    seconds = {"parse": parsed - begun, "build": built - parsed}
    report = _inspect(request, log, plan, weighted)
    if report is not None:
        seconds["inspect"] = time.monotonic() - built
    return BuiltPlan(plan, types, report, seconds)


def _failure(library: Library, graph: GraphSummary, errors: Sequence[str]) -> BuildError:
    """Why there is no plan: the nodes that TensorRT's errors name, the errors, and what helps."""
    text = "\n".join(errors)
    names = [node.name for node in graph.nodes if node.name]
    nodes = [name for name in names if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", text)]
    where = f" at {', '.join(nodes[:3])}" if nodes else ""
    remedy = next(
        (remedy for words, remedy in _REMEDIES if any(word in text.lower() for word in words)),
        "run it again with -vv for TensorRT's whole log",
    )
    return BuildError(f"{library.name} could not build the plan{where}:{quote(list(errors))}", remedy=remedy)


def _inspect(
    request: BuildRequest, log: BuildLog, plan: Any, weighted: tuple[WeightedLayer, ...]
) -> PrecisionReport | None:
    library, gpu, trt = request.library, request.gpu, request.library.trt
    if gpu is None or (library.is_rtx and gpu.compute_capability not in request.targets):
        return None
    heard, driver = len(log.errors), name_driver(gpu.driver_version, gpu.cuda_version)
    try:
        runtime = start_tensorrt(
            library, "runtime", lambda: trt.Runtime(log.trt_logger), lines=lambda: log.errors[heard:], on=driver
        )
    except CudaError as error:  # TensorRT-RTX, which has built the plan without a GPU
        logger.warning("the precision is not judged: %s", error.message)
        return None
    if request.config.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(
            f"{library.name} cannot load the plan that it has just built:{quote(log.errors)}", remedy=_REMEDIES[0][1]
        )
    try:
        found = read_layers(*_ask_inspector(request, engine))
    except BuildError as error:  # the plan is good all the same
        logger.warning("the precision is not judged: %s", error.message)
        return None
    report = measure(found, weighted)
    if not report.inspected:
        logger.warning(
            "the layer inspector gave the precision of %.0f %% of the multiply-accumulates only: it is not judged",
            100 * report.seen,
        )
        return None
    require_honest(report, library.name)
    return report


def _ask_inspector(request: BuildRequest, engine: Any) -> Iterator[str]:
    """What the layer inspector says of the kernels of each optimization profile."""
    source, kind = request.source.spec.input, request.library.trt.LayerInformationFormat.JSON
    inspector, context = engine.create_engine_inspector(), engine.create_execution_context()
    for index, profile in enumerate(request.config.profile.split()):
        if context is not None:  # with it the inspector knows formats that depend on the batch
            if index and not context.set_optimization_profile_async(index, 0):
                return
            context.set_input_shape(source.name, profile.shapes(source)[1])
            inspector.execution_context = context
        elif index:
            return
        yield str(inspector.get_engine_information(kind))


def choose_timing_file(request: BuildRequest) -> Path | None:
    """The file of a build's timings: the caller's, or one of GPU, CUDA and TensorRT in the cache folder; or None.

    Timings are of one CUDA, too. Source: NVIDIA, TensorRT developer guide, "Timing Cache".
    """
    library, gpu, given = request.library, request.gpu, request.timing_cache
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
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    cuda, capability = gpu.cuda_version or "", gpu.compute_capability.replace(".", "")
    return folder / f"{library.flavour}-{library.version}-cuda{cuda}-{name}-sm{capability}.timing"


class TimingFile:
    """The timings of one build. Those in the file are given to TensorRT at once.

    A file that TensorRT cannot use is replaced. Only what a caller names and what holds no timings at all is left as it
    is: it may be anything.

    Args:
        path: The file; it need not exist.
        settings: The IBuilderConfig.
        is_ours: Whether it lies in the cache folder, and not where a caller says.
    """

    def __init__(self, path: Path, settings: Any, *, is_ours: bool) -> None:
        self._path, self._settings, self._is_ours, self._usable = path, settings, is_ours, True
        data = self._read()
        known = settings.create_timing_cache(data) if data else None  # may be None, too, of bytes that are no timings
        if known is not None and settings.set_timing_cache(known, False):
            return
        if data:
            self._usable = is_ours or known is not None
            if known is not None:
                problem = "the timings are of another GPU, CUDA or TensorRT"
            else:
                problem = "the timings are damaged" if is_ours else "holds no timings of this TensorRT"
            remedy = "they are measured again" if self._usable else "it is left as it is: delete it, or name another"
            logger.warning("%s: %s: %s", path, problem, remedy)
        settings.set_timing_cache(settings.create_timing_cache(b""), False)

    def store(self) -> None:
        """Writes what TensorRT has measured, with what another build has written meanwhile. Failures are logged."""
        settings = self._settings
        measured = settings.get_timing_cache()
        if not self._usable or measured is None:
            return
        try:
            with locked(self._path):
                latest = self._read()
                known = settings.create_timing_cache(latest) if latest else None
                merged = known is not None and measured.combine(known, False)
                if latest and not merged and known is None and not self._is_ours:
                    logger.warning("%s: was replaced by what holds no timings, and is left as it is", self._path)
                    return
                with atomic_output(self._path, force=True) as output:
                    output.partial.write_bytes(bytes(measured.serialize()))
        except ArtifactError as error:
            logger.warning("the timings are not kept: %s", error.message)

    def _read(self) -> bytes:
        try:
            if self._path.stat().st_size <= _LARGEST_TIMINGS:
                return self._path.read_bytes()
            problem = "larger than any timings"
        except FileNotFoundError:
            return b""
        except OSError as error:
            problem = str(error.strerror)
        logger.warning("%s: cannot be read: %s", self._path, problem)
        self._usable = False
        return b""

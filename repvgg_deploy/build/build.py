"""The steps of a build: an FP32 ONNX typed in a temporary folder, the plan built or found, its passport made, both delivered.

The GPU of this machine, if there is one that can be used.

Exported or typed ONNX → TensorRT plan and its passport. Needs no torch; the onnx package only where an FP32 ONNX
becomes FP16 or INT8.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import CudaError, InputError, MissingDependencyError, ModelError
from ..files.output import PendingOutput, require_distinct, require_writable
from ..files.passport import passport_path
from ..specs.values import BuildConfig, PlanPassport
from .cache import CachedPlan, PlanCache, PlanRequest, cache_folder, quantize_key
from .compile import BuildJob, build, choose_timing_file, require_gpu
from .deliver import (
    Fill,
    Standing,
    choose_output,
    complete_passport,
    deliver,
    look_at,
    make_passport,
    refresh_passport,
    require_room,
    require_same,
)
from .inspect import PrecisionReport
from .library import Gpu, Library, TacticLibraries, find_tactic_libraries, open_library
from .options import BuildOptions, choose_profile, must_type
from .recipes import Typing, is_strongly_typed, require_options, resolve_targets, tensor_types
from .source import Source, read_source

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions
    from ..precision.quantization import QuantizeResult


@dataclass(frozen=True, slots=True)
class GpuSearch:
    """What was found.

    Attributes:
        gpu: None where there is none.
        reason: Why there is none; empty where there is one.
        remedy: What helps.
    """

    gpu: Gpu | None
    reason: str = ""
    remedy: str = "use a machine with an NVIDIA GPU and its driver"


def look_for_gpu(index: int = 0) -> GpuSearch:
    """Asks the driver for one GPU."""
    from ..runtime.cuda.opening import open_cuda

    try:
        info = open_cuda(None).describe_device(index)
    except (CudaError, MissingDependencyError) as error:
        return GpuSearch(None, error.message, error.remedy)
    return GpuSearch(Gpu(info.name, info.compute_capability, info.driver_version or None))


logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, steps done and steps in all."""
Origin = Literal["built", "cache", "output"]
_PERCENT = 100


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did.

    Attributes:
        output: The plan, and whether it was written or stood there already.
        passport_output: Likewise.
        passport: What is known of the plan.
        library: Such as `TensorRT-RTX 1.7.1.116`.
        typed_from_fp32: Whether the graph was FP32 and became typed first.
        quantized: What that gave; None where it was not done now.
        origin: `built`, `cache` (an identical plan had been built before) or `output` (it stands there already).
        report: What the layer inspector saw; None where it was not asked now.
        seconds: By stage, of this call.
    """

    output: PendingOutput
    passport_output: PendingOutput
    passport: PlanPassport
    library: str
    typed_from_fp32: bool
    quantized: QuantizeResult | None
    origin: Origin
    report: PrecisionReport | None
    seconds: dict[str, float]


@dataclass(slots=True)
class Task:
    """One call of `build_plan`, as it goes on.

    Attributes:
        options: What is asked for.
        library: Which TensorRT.
        gpu: None where there is none.
        capabilities: That the plan is for.
        standing: What stands at the output.
        force: Replace it.
        progress: Who is told.
        cache: None without one.
        typed_from_fp32: Whether the graph was FP32 and becomes typed first.
        quantized: What that gave.
        tactic_libraries: That TensorRT 8 takes kernels from; empty for the others.
        seconds: By stage.
    """

    options: BuildOptions
    library: Library
    gpu: Gpu | None
    capabilities: tuple[str, ...]
    standing: Standing
    force: bool
    progress: Progress
    cache: PlanCache | None
    typed_from_fp32: bool = False
    quantized: QuantizeResult | None = None
    tactic_libraries: TacticLibraries = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def request(self, onnx_sha256: str, config: BuildConfig) -> PlanRequest:
        """What the plan of a typed ONNX depends on."""
        return PlanRequest(onnx_sha256, config, self.capabilities, self.library, self.gpu, self.tactic_libraries)


def type_and_build(task: Task, source: Source, config: BuildConfig) -> BuildResult:
    """Quantizes an FP32 ONNX in a temporary folder and builds what comes of it; see `build.build_plan` for what it raises.

    Args:
        task: The call.
        source: The FP32 ONNX.
        config: With the precision that it is to have.
    """
    from ..precision.quantization import quantize

    options = _quantize_options(task, config)
    key = (
        quantize_key(source.sha256, source.path, options, task.request("", config)) if task.cache is not None else None
    )
    plan_key = task.cache.find_request(key) if task.cache is not None and key is not None else None
    cached = task.cache.find(plan_key) if task.cache is not None and plan_key is not None else None
    if cached is not None:
        return _deliver_cached(task, cached, task.request(cached.passport.onnx_sha256, config), source)
    with tempfile.TemporaryDirectory(prefix="repvgg-build-") as folder:
        started = time.monotonic()
        typed = Path(folder) / f"{source.path.stem}-{options.precision}.onnx"
        task.quantized = quantize(source.path, typed, options, progress=task.progress)
        task.seconds["quantize"] = time.monotonic() - started
        made = read_source(typed)
        if made.metadata.history[-1].parent_sha256 != source.sha256:
            raise ModelError(f"{source.path}: was replaced while it was quantized", remedy="build it again")
        return build_typed(task, made, config, key)


def _quantize_options(task: Task, config: BuildConfig) -> QuantizeOptions:
    from ..precision.options import QuantizeOptions

    precision = config.precision
    assert precision in ("fp16", "int8"), "what must be typed was FP32"
    options = task.options.quantize or QuantizeOptions(precision)
    if precision == "fp16":
        return options
    # TensorRT 8 wants FP32 scales and opset 17; strong typing lets the rest be FP16.
    target: Literal["trt8", "trt10"] = "trt10" if is_strongly_typed(task.library) else "trt8"
    return dataclasses.replace(options, int8=dataclasses.replace(options.int8, target=target))


def build_typed(task: Task, source: Source, config: BuildConfig, request_key: str | None) -> BuildResult:
    """Builds a graph as it is typed, or takes the plan of an identical build; see `build.build_plan` for what it raises.

    Args:
        task: The call.
        source: The typed ONNX.
        config: With its precision.
        request_key: Under which a build from FP32 is to be found again.
    """
    request = task.request(source.sha256, config)
    cached = task.cache.find(request.key()) if task.cache is not None else None
    if cached is not None:
        _remember(task, request_key, request)
        return _deliver_cached(task, cached, request, source)
    # Without the cache the plan is built even where it stands already, to see that it comes out the same.
    if require_same(task.standing, request, force=task.force) and task.cache is not None:
        _remember(task, request_key, request)
        return _up_to_date(task, source)
    started = time.monotonic()
    built = build(
        task.library,
        _job(task, source, config),
        report=lambda share: task.progress("build", int(_PERCENT * share), _PERCENT),
    )
    task.seconds |= built.seconds
    passport = make_passport(source, request, built, time.monotonic() - started)

    def fill(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(memoryview(built.data))

    task.standing = look_at(task.standing.plan)  # an identical build may have ended before this one
    if task.cache is not None and not task.force and require_same(task.standing, request, force=False):
        return _up_to_date(task, source)
    result = _deliver(task, passport, fill, origin="built", report=built.report)
    if task.cache is not None:
        task.cache.store(request.key(), memoryview(built.data), result.passport)
    _remember(task, request_key, request)
    return result


def _job(task: Task, source: Source, config: BuildConfig) -> BuildJob:
    spec = source.metadata.spec
    types = tensor_types(source.graph, spec)
    typing = Typing(source.precision, "float16" in types.values(), types)
    gpu = None if task.gpu is None else (task.gpu.name, task.gpu.compute_capability)
    timing = choose_timing_file(task.library, gpu, task.options.timing_cache)
    return BuildJob(source.data, source.graph, spec, typing, config, task.capabilities, task.gpu, timing)


def _remember(task: Task, request_key: str | None, request: PlanRequest) -> None:
    if task.cache is not None and request_key is not None:
        task.cache.store_request(request_key, request.key())


def _deliver_cached(task: Task, cached: CachedPlan, request: PlanRequest, source: Source) -> BuildResult:
    if require_same(task.standing, request, force=task.force):
        return _up_to_date(task, source)

    def fill(partial: Path) -> None:
        partial.write_bytes(cached.data)

    return _deliver(task, complete_passport(cached.passport, source), fill, origin="cache")


def _up_to_date(task: Task, source: Source) -> BuildResult:
    plan, passport = task.standing.plan, task.standing.passport
    assert passport is not None, "what stands there was compared with its passport"
    output, paper = (PendingOutput(path, path, "up to date") for path in (plan, passport_path(plan)))
    complete = complete_passport(passport, source)
    if complete != passport:
        paper = refresh_passport(plan, complete)
    return BuildResult(
        output, paper, complete, task.library.name, task.typed_from_fp32, task.quantized, "output", None, task.seconds
    )


def _deliver(
    task: Task, passport: PlanPassport, fill: Fill, *, origin: Origin, report: PrecisionReport | None = None
) -> BuildResult:
    output, paper, written = deliver(task.standing.plan, passport, fill, force=task.force)
    return BuildResult(
        output, paper, written, task.library.name, task.typed_from_fp32, task.quantized, origin, report, task.seconds
    )


def build_plan(
    model: Path | str,
    out: Path | str | None = None,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Builds a plan and writes it with its passport, both or neither.

    Args:
        model: An `.onnx` that repvgg-export or quantize wrote.
        out: The plan; None: beside `model`, with the suffix `.plan`.
        options: See `BuildOptions`; None: the graph as it is typed, with the installed TensorRT.
        force: Replace different files.
        progress: Called with the name of the stage, steps done and steps in all.

    Raises:
        BuildError: TensorRT refuses the graph or an option, the graph contradicts the options, or the plan fell back to
            a wider type.
        ModelError: The ONNX is missing, damaged or not one of ours.
        CalibrationError: An FP32 ONNX cannot be quantized.
        ParityError: A quantized graph does not agree with the FP32 graph.
        CudaError: TensorRT needs a GPU, and there is none.
        MissingDependencyError: No TensorRT is installed.
        ArtifactError: A file cannot be written, or exists and differs.
        InputError: Two outputs are one file, or an output is an input.
    """
    path, options = Path(model), options if options is not None else BuildOptions()
    target = choose_output(path, out)
    require_distinct([target, passport_path(target)], [path, *_inputs(options)])
    source = read_source(path)
    profile = choose_profile(source.metadata.spec, options, path)
    typing = must_type(source.precision, options, path)
    library = open_library(options.backend)
    require_options(library, options.config, options.targets)
    search = look_for_gpu()
    require_gpu(library, search.gpu, search.reason)
    capabilities = resolve_targets(
        library, options.targets, None if search.gpu is None else search.gpu.compute_capability
    )
    if options.timing_cache is not None and not library.is_rtx:
        require_writable(options.timing_cache)
    standing = look_at(target)
    require_room(standing, source.sha256, force=force)
    tell = progress if progress is not None else _tell_nobody
    task = Task(options, library, search.gpu, capabilities, standing, force, tell, _open_cache(options), typing)
    task.tactic_libraries = {} if is_strongly_typed(library) else find_tactic_libraries()
    config = dataclasses.replace(
        options.config, profile=profile, precision=options.config.precision if typing else source.precision
    )
    if typing:
        return type_and_build(task, source, config)
    return build_typed(task, source, config, None)


def _tell_nobody(stage: str, done: int, total: int) -> None:
    """Of a caller who did not ask."""


def _inputs(options: BuildOptions) -> list[Path]:
    found = [options.timing_cache] if options.timing_cache is not None else []
    quantize = options.quantize
    if quantize is not None:
        found += [] if quantize.scales is None else [quantize.scales]
        found += [] if quantize.calibration is None or quantize.from_statistics else [Path(quantize.calibration)]
    return found


def _open_cache(options: BuildOptions) -> PlanCache | None:
    if not options.use_cache:
        return None
    try:
        return PlanCache(cache_folder())
    except InputError as error:
        logger.warning("%s", error.message)
        return None

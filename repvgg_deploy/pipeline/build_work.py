"""The steps of a build: an FP32 ONNX typed in a temporary folder, the plan built or found, its passport made, both delivered."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..builder.build import BuildJob, Gpu, build
from ..builder.graph_types import tensor_types
from ..builder.library import Library
from ..builder.plan_cache import CachedPlan, PlanCache
from ..builder.precision_check import PrecisionReport
from ..builder.recipes import Typing, is_strongly_typed
from ..builder.tactic_sources import TacticLibraries
from ..builder.timing_cache import choose_timing_file
from ..errors import ModelError
from ..files.output import PendingOutput
from ..files.passport import passport_path
from ..specs.values import BuildConfig, PlanPassport
from .build_files import Fill, Standing, deliver, look_at, refresh_passport, require_same
from .build_options import BuildOptions
from .build_passport import complete_passport, make_passport
from .build_request import PlanRequest, quantize_key
from .build_source import Source, read_source

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions
    from ..precision.quantization import QuantizeResult

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
    key = quantize_key(source.sha256, source.path, options, task.request("", config)) if task.cache is not None else None
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
    built = build(task.library, _job(task, source, config), report=lambda share: task.progress("build", int(_PERCENT * share), _PERCENT))
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
    return BuildResult(output, paper, complete, task.library.name, task.typed_from_fp32, task.quantized, "output", None, task.seconds)


def _deliver(task: Task, passport: PlanPassport, fill: Fill, *, origin: Origin, report: PrecisionReport | None = None) -> BuildResult:
    output, paper, written = deliver(task.standing.plan, passport, fill, force=task.force)
    return BuildResult(output, paper, written, task.library.name, task.typed_from_fp32, task.quantized, origin, report, task.seconds)

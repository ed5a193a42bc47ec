"""`repvgg-trt build`: exported or typed ONNX → TensorRT plan and its passport.

Needs no torch, and the onnx package only where an FP32 ONNX becomes FP16, FP8 or INT8.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import InputError, ModelError
from ..files.cache import cache_folder
from ..files.output import PendingOutput, require_distinct, require_writable
from ..files.passport import passport_path
from ..files.plan_place import SLOW_INT8, Library, warn_of_int8
from ..specs.values import PlanPassport
from .cache import PlanCache, plan_key
from .compile import compile_plan
from .deliver import (
    Delivered,
    Standing,
    choose_output,
    deliver,
    is_standing,
    leave,
    look_at,
    make_passport,
    require_room,
)
from .inspect import PrecisionReport
from .library import find_tactic_libraries, is_strongly_typed, look_for_gpu, open_library
from .options import BuildOptions, BuildRequest, choose_profile, must_type
from .recipes import require_fp8, require_gpu, require_int8, require_options, resolve_targets
from .source import Source, read_source

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions
    from ..precision.quantization import QuantizeResult

logger = logging.getLogger(__name__)
Origin = Literal["built", "cache", "output"]
_PERCENT = 100


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did.

    Attributes:
        output: The plan, and whether it was written or stood there already.
        passport_output: The same for its passport.
        passport: What is known of the plan.
        library: Such as `TensorRT-RTX 1.7.1.116`.
        typed_from_fp32: Whether the graph was FP32 and became typed first.
        quantized: The result of that; None where it was not done now.
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


def build_plan(
    model: Path | str,
    out: Path | str | None = None,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
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
    request = _make_request(source, options)
    standing = look_at(target)
    require_room(standing, source.sha256, force=force)
    tell = progress if progress is not None else lambda stage, done, total: None
    return _find_or_build(request, standing, _open_cache(options), force=force, tell=tell)


def _inputs(options: BuildOptions) -> list[Path]:
    found = [options.timing_cache] if options.timing_cache is not None else []
    quantize = options.quantize
    if quantize is not None:
        found += [] if quantize.scales is None else [quantize.scales]
        found += [] if quantize.calibration is None or quantize.from_statistics else [Path(quantize.calibration)]
    return found


def _make_request(source: Source, options: BuildOptions) -> BuildRequest:
    """What is to be built, after all that can be refused beforehand."""
    profile = choose_profile(source, options)
    typing = must_type(source, options)
    library = open_library(options.backend)
    require_options(library, options.config, options.targets)
    search = look_for_gpu()
    require_gpu(library, search.gpu, search.reason)
    targets = resolve_targets(library, options.targets, None if search.gpu is None else search.gpu.compute_capability)
    precision = options.config.precision or source.precision
    if precision == "fp8":
        targets = require_fp8(library, search.gpu, targets, named=bool(options.targets))
    if precision == "int8":
        require_int8(library)
        for target in (name for name in targets if name in SLOW_INT8):
            logger.warning("%s", warn_of_int8(target))
    if options.timing_cache is not None and not library.is_rtx:
        require_writable(options.timing_cache)
    return BuildRequest(
        source,
        dataclasses.replace(options.config, profile=profile, precision=precision),
        library,
        search.gpu,
        targets,
        tactic_libraries={} if is_strongly_typed(library) else find_tactic_libraries(),
        quantize=_choose_typing(library, options) if typing else None,
        timing_cache=options.timing_cache,
    )


def _choose_typing(library: Library, options: BuildOptions) -> QuantizeOptions:
    from ..precision import QuantizeOptions  # its face says what to install where onnx is missing

    precision = options.config.precision
    assert precision in ("fp16", "fp8", "int8"), "what must be typed was FP32"
    chosen = options.quantize or QuantizeOptions(precision)
    if precision != "int8":
        return chosen
    # TensorRT 8 wants FP32 scales and opset 17; strong typing lets the rest be FP16.
    target: Literal["trt8", "trt10"] = "trt10" if is_strongly_typed(library) else "trt8"
    return dataclasses.replace(chosen, int8=dataclasses.replace(chosen.int8, target=target))


def _open_cache(options: BuildOptions) -> PlanCache:
    try:
        return PlanCache(cache_folder() if options.use_cache else None)
    except InputError as error:
        logger.warning("%s", error.message)
        return PlanCache(None)


def _find_or_build(
    request: BuildRequest, standing: Standing, cache: PlanCache, *, force: bool, tell: Callable[[str, int, int], None]
) -> BuildResult:
    """Leaves the plan that stands, or delivers a cached one, or quantizes and builds."""
    typed_from_fp32, quantized, seconds = request.quantize is not None, None, dict[str, float]()
    key = plan_key(request) if cache.folder is not None else None
    found = cache.find(key)
    if found is None and request.quantize is not None:
        started = time.monotonic()
        request, quantized = _type_source(request, request.quantize, tell)
        seconds["quantize"] = time.monotonic() - started
        if key is None and cache.folder is not None:
            key = plan_key(request)
            found = cache.find(key)

    def result(files: Delivered, origin: Origin, report: PrecisionReport | None = None) -> BuildResult:
        return BuildResult(*files, request.library.name, typed_from_fp32, quantized, origin, report, seconds)

    onnx_sha256 = request.source.sha256 if found is None else found[1].onnx_sha256
    # Without the cache a plan is built even where it stands already, to see that it comes out the same.
    if is_standing(standing, request, onnx_sha256, force=force) and cache.folder is not None:
        return result(leave(standing), "output")
    if found is not None:
        return result(deliver(standing.plan, *found, force=force), "cache")
    built = compile_plan(request, report=lambda share: tell("build", int(_PERCENT * share), _PERCENT))
    seconds |= built.seconds
    if cache.folder is not None and not force:
        standing = look_at(standing.plan, standing)
        if is_standing(standing, request, onnx_sha256, force=False):  # an identical build has ended before this one
            return result(leave(standing), "output")
    data = memoryview(built.data)
    delivered = deliver(standing.plan, data, make_passport(request, built), force=force)
    cache.store(key, data, delivered[-1])
    return result(delivered, "built", built.report)


def _type_source(
    request: BuildRequest, options: QuantizeOptions, tell: Callable[[str, int, int], None]
) -> tuple[BuildRequest, QuantizeResult]:
    """Quantizes an FP32 ONNX in a temporary folder: the request with the typed ONNX in its place."""
    from ..precision import quantize

    source = request.source
    with tempfile.TemporaryDirectory(prefix="repvgg-build-") as folder:
        typed = Path(folder) / f"{source.path.stem}-{options.precision}.onnx"
        quantized = quantize(source.path, typed, options, progress=tell)
        made = read_source(typed)
    if made.metadata.history[-1].parent_sha256 != source.sha256:
        raise ModelError(f"{source.path}: was replaced while it was quantized", remedy="build it again")
    return dataclasses.replace(request, source=made, quantize=None), quantized

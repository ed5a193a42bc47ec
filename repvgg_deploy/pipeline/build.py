"""Exported or typed ONNX → TensorRT plan and its passport. Needs no torch; the onnx package only where an FP32 ONNX becomes FP16 or INT8."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from ..builder.build import require_gpu
from ..builder.library import open_library
from ..builder.plan_cache import PlanCache, cache_folder
from ..builder.recipes import is_strongly_typed, require_options, resolve_targets
from ..builder.tactic_sources import find_tactic_libraries
from ..errors import InputError
from ..files.output import require_distinct, require_writable
from ..files.passport import passport_path
from .build_files import choose_output, default_plan_output, look_at, require_room
from .build_options import BuildOptions, choose_profile, must_type
from .build_source import read_source
from .build_work import BuildResult, Progress, Task, build_typed, type_and_build
from .gpu_here import look_for_gpu

__all__ = ["BuildOptions", "BuildResult", "build_plan", "default_plan_output"]

logger = logging.getLogger(__name__)


def build_plan(
    model: Path | str, out: Path | str | None = None, options: BuildOptions | None = None, *, force: bool = False, progress: Progress | None = None
) -> BuildResult:
    """Builds a plan and writes it with its passport, both or neither.

    Args:
        model: An `.onnx` that repvgg-export or quantize wrote.
        out: The plan; None: beside `model`, with the suffix `.plan`.
        options: See `BuildOptions`; None: the graph as it is typed, with the installed TensorRT.
        force: Replace different files.
        progress: Called with the name of the stage, steps done and steps in all.

    Raises:
        BuildError: TensorRT refuses the graph or an option, the graph contradicts the options, or the plan fell back to a wider type.
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
    capabilities = resolve_targets(library, options.targets, None if search.gpu is None else search.gpu.compute_capability)
    if options.timing_cache is not None and not library.is_rtx:
        require_writable(options.timing_cache)
    standing = look_at(target)
    require_room(standing, source.sha256, force=force)
    tell = progress if progress is not None else _tell_nobody
    task = Task(options, library, search.gpu, capabilities, standing, force, tell, _open_cache(options), typing)
    task.tactic_libraries = {} if is_strongly_typed(library) else find_tactic_libraries()
    config = dataclasses.replace(options.config, profile=profile, precision=options.config.precision if typing else source.precision)
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

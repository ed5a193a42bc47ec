"""All that differs between TensorRT versions when the same typed graph is built; the precision is the graph's in each.

| TensorRT | network | builder flags for FP16 | for INT8 with Q/DQ pairs |
|---|---|---|---|
| 8.5, 8.6 | EXPLICIT_BATCH | FP16, OBEY_PRECISION_CONSTRAINTS, and each layer gets the type of its tensor | INT8 |
| 10.x | STRONGLY_TYPED | none | none |
| 11.x, TensorRT-RTX | none: always strongly typed | none | none |

TF32 is on by default in all of them, and switched off unless it is asked for.
"""

from __future__ import annotations

from typing import Any

from ..errors import BuildError, CudaError
from ..files.plan_place import Library
from ..specs.values import BuildConfig
from .library import Gpu, choose_tactic_sources, is_strongly_typed
from .options import BuildRequest
from .source import Source, tensor_types

_CURRENT = "current"  # as a target: the GPU of this machine, whatever it is
_TURING = "7.5"
_FIRST_FP8 = (8, 9)
_FIRST_INT8_RTX = (1, 7)
_NEWEST_OPSET_8 = 17
_FLOATS = {"float32": "FLOAT", "float16": "HALF"}
_NEEDS_8_6 = {
    "optimization_level": "--optimization-level",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
}


def require_options(library: Library, config: BuildConfig, targets: tuple[str, ...]) -> None:
    """Refuses what this TensorRT cannot do, before anything is built.

    Raises:
        BuildError: The flavour or version does not have an option.
    """
    if library.is_rtx:
        if config.version_compatible:
            raise BuildError(
                f"{library.name} runs plans of its own release only, so --version-compatible cannot be had",
                remedy="leave it out and build again with each release; or build with --backend tensorrt",
            )
        if config.hardware_compatible:
            raise BuildError(
                f"{library.name} has no --hardware-compatible: its plans name the GPUs that they run on",
                remedy="leave it out: without --target they run on every GPU from Ampere on that this release knows",
            )
        return
    if targets:
        raise BuildError(
            f"{library.name} builds for the GPU that it runs on: --target is of TensorRT-RTX",
            remedy="leave --target out and build on such a GPU; or give --backend rtx; or --hardware-compatible for "
            "all GPUs from Ampere on",
        )
    if library.number < (8, 6):
        given = [flag for name, flag in _NEEDS_8_6.items() if getattr(config, name) not in (None, False)]
        if given:
            raise BuildError(
                f"{library.name} has no {given[0]}: it came with 8.6",
                remedy=f"leave {given[0]} out, or install a later TensorRT",
            )


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


def resolve_targets(library: Library, targets: tuple[str, ...], gpu: str | None) -> tuple[str, ...]:
    """The compute capabilities that a plan is built for, such as `8.6`.

    TensorRT-RTX is always told them: a plan does not say what it chose by itself. Turing (7.5) is left out unless it
    is asked for, as NVIDIA advises: it would slow down the others. `gpu` is the compute capability that is here.

    Raises:
        BuildError: TensorRT-RTX cannot build for one of them.
        CudaError: `current` is one of them, and there is no GPU.
    """
    if not library.is_rtx:
        return (gpu,) if gpu is not None else ()
    names = [name[2:] for name in dir(library.trt.ComputeCapability) if name.startswith("SM") and name[2:].isdecimal()]
    known = [f"{int(number) // 10}.{int(number) % 10}" for number in sorted(names, key=int)]
    for target in targets:
        if target == _CURRENT and gpu is None:
            raise CudaError(
                "the target is the current GPU, and there is none that can be used",
                remedy="name it, such as --target sm_86",
            )
        if target not in (_CURRENT, *known):
            raise BuildError(
                f"{library.name} builds for compute capability {', '.join(known)}, not for {target}",
                remedy="leave the target out; or build on such a GPU, with --target current or with --backend tensorrt",
            )
    named = [gpu if target == _CURRENT and gpu is not None else target for target in targets]
    return tuple(dict.fromkeys(named)) or tuple(name for name in known if name != _TURING)


def require_int8(library: Library) -> None:
    """Refuses an INT8 graph where TensorRT-RTX is too old for it.

    Source: builds of one INT8 graph with TensorRT-RTX 1.4 to 1.7: the older ones know Float, Half, BF16 and FP8 only.

    Raises:
        BuildError: TensorRT-RTX before 1.7.
    """
    if library.is_rtx and library.number < _FIRST_INT8_RTX:
        raise BuildError(
            f"{library.name} builds no INT8: it came with 1.7",
            remedy="install 1.7 or later (the package tensorrt-rtx-cu13), or build --fp16",
        )


def require_fp8(library: Library, gpu: Gpu | None, targets: tuple[str, ...], *, named: bool) -> tuple[str, ...]:
    """The targets of an FP8 graph: those that have FP8; all must, where they were `named`.

    Source: builds of one FP8 graph with TensorRT-RTX 1.5 to 1.7 for every target; NVIDIA, TensorRT support matrix.

    Raises:
        BuildError: This TensorRT or a GPU knows no FP8.
    """
    remedy = "build --int8 or --fp16; FP8 needs Ada (8.9), Hopper (9.0) or Blackwell"
    if library.number < ((1, 5) if library.is_rtx else (10, 0)):
        later = "1.5" if library.is_rtx else "10"
        raise BuildError(f"{library.name} knows no FP8: it came with {later}", remedy=f"{remedy}, and a later TensorRT")
    if not library.is_rtx:
        if gpu is not None and _number(gpu.compute_capability) < _FIRST_FP8:
            raise BuildError(f"{gpu.name} ({gpu.compute_capability}) has no FP8", remedy=remedy)
        return targets
    last = (99, 0) if library.number >= (1, 7) else _FIRST_FP8
    fit = tuple(name for name in targets if _FIRST_FP8 <= _number(name) <= last)
    if not fit or (named and fit != targets):
        wrong = ", ".join(name for name in targets if name not in fit)
        known = "8.9 only" if last == _FIRST_FP8 else "8.9 and later"
        raise BuildError(
            f"{library.name} builds FP8 for compute capability {known}, not for {wrong}",
            remedy="give --target 8.9, or build --int8 or --fp16",
        )
    return fit


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def require_typing(library: Library, source: Source) -> None:
    """Refuses a typed graph that this TensorRT cannot take, with what makes one that it can.

    Raises:
        BuildError: TensorRT 8 is given FP16 scales, or an operator set that it does not know.
    """
    if is_strongly_typed(library):
        return
    opset, is_int8 = source.graph.opset, source.precision == "int8"
    remedy = (
        "make the INT8 graph with repvgg-trt quantize --int8 --target trt8; or give --int8 and the FP32 ONNX, and "
        "build chooses it"
    )
    if is_int8 and "float16" in tensor_types(source.graph, source.spec).values():
        raise BuildError(f"{library.name} needs FP32 beside INT8, and the graph has FP16", remedy=remedy)
    if opset > _NEWEST_OPSET_8:
        raise BuildError(
            f"{library.name} knows operator sets up to {_NEWEST_OPSET_8}, and the graph is of {opset}",
            remedy=remedy if is_int8 else f"export it with repvgg-export --opset {_NEWEST_OPSET_8}",
        )


def create_network(library: Library, builder: Any) -> Any:
    """An empty network of the kind in the table."""
    flags = library.trt.NetworkDefinitionCreationFlag
    if library.is_rtx or library.number >= (11, 0):
        return builder.create_network(0)
    flag = flags.STRONGLY_TYPED if library.number >= (10, 0) else flags.EXPLICIT_BATCH
    return builder.create_network(1 << int(flag))


def configure(request: BuildRequest, network: Any, settings: Any) -> None:
    """Sets the options of an IBuilderConfig, and for TensorRT 8 the types of the network's layers."""
    library, config, trt = request.library, request.config, request.library.trt
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the layer inspector has nothing to say
    if config.tf32:
        settings.set_flag(trt.BuilderFlag.TF32)
    else:
        settings.clear_flag(trt.BuilderFlag.TF32)
    if config.sparse:
        settings.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if library.is_rtx:
        if hasattr(
            trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"
        ):  # from 1.2 on: without it a CUDA graph may be impossible
            settings.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        settings.num_compute_capabilities = len(request.targets)
        for index, target in enumerate(request.targets):
            known = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", trt.ComputeCapability.CURRENT)
            settings.set_compute_capability(known, index)
    if not is_strongly_typed(library):
        choose_tactic_sources(trt, settings, request.tactic_libraries)
        _set_types(request, network, settings)


def _set_types(request: BuildRequest, network: Any, settings: Any) -> None:
    """Tells TensorRT 8 the graph's types. The layers of INT8 graphs are left alone: there the Q/DQ pairs decide."""
    source, trt = request.source, request.library.trt
    types = tensor_types(source.graph, source.spec)
    if source.precision == "int8":  # and FP32 beside it: `require_typing` has seen to that
        settings.set_flag(trt.BuilderFlag.INT8)
        return
    if "float16" not in types.values():
        return
    settings.set_flag(trt.BuilderFlag.FP16)
    settings.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    free = {getattr(trt.LayerType, name) for name in ("CONSTANT", "SHAPE", "CAST") if hasattr(trt.LayerType, name)}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds = [types.get(layer.get_output(place).name) for place in range(layer.num_outputs)]
        if kinds and kinds[0] is None and layer.num_inputs and layer.get_input(0) is not None:
            kinds[0] = types.get(layer.get_input(0).name)  # a part of a node that TensorRT made several layers of
        if layer.type in free or not kinds or kinds[0] not in _FLOATS:
            continue
        layer.precision = getattr(trt.DataType, _FLOATS[kinds[0]])
        for place, kind in enumerate(kinds):
            if kind in _FLOATS:
                layer.set_output_type(place, getattr(trt.DataType, _FLOATS[kind]))

"""All that differs between TensorRT versions when the same typed graph is built; the precision is the graph's in each.

| TensorRT | network | builder flags, for FP16 | for INT8 with Q/DQ pairs |
|---|---|---|---|
| 8.5, 8.6 | EXPLICIT_BATCH | FP16, OBEY_PRECISION_CONSTRAINTS, and to each layer the type of its tensor: constraints
bind only those | INT8 | | 10.x | STRONGLY_TYPED | none | none | | 11.x, TensorRT-RTX | none: always strongly typed |
none | none |

TF32 is on by default in all of them, and switched off unless it is asked for.

Number types of the tensors of a typed graph, read without the onnx package, for a TensorRT that does not take them from
the graph itself (8.x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BuildError, CudaError
from ..files.onnx import GraphSummary, NodeSummary
from ..specs.values import BuildConfig, ModelSpec, Precision
from .library import Library, choose_tactic_sources, find_tactic_libraries

_CAST = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}
# Operators whose result has the type of another input than the first, or one of its own.
_OF_SCALE = 1
_FIXED = {"Shape": "int64", "Size": "int64", "ArgMax": "int64", "Equal": "bool", "Greater": "bool", "Less": "bool"}


def tensor_types(graph: GraphSummary, spec: ModelSpec) -> dict[str, str]:
    """Number type of every tensor by name, in NumPy's names; one that cannot be known is left out."""
    types = {**graph.types, spec.input.name: spec.input.dtype}
    for node in graph.nodes:
        found = _result_type(node, types)
        for index, output in enumerate(node.outputs):
            kind = "int64" if node.op_type == "TopK" and index == 1 else found
            if kind is not None and output:
                types[output] = kind
    return types


def _result_type(node: NodeSummary, types: dict[str, str]) -> str | None:
    if node.op_type == "Cast":
        return _CAST.get(node.integers.get("to", 0))
    if node.op_type in _FIXED:
        return _FIXED[node.op_type]
    if node.op_type == "QuantizeLinear":
        return types.get(node.inputs[2], "int8") if len(node.inputs) > 2 else "uint8"
    source = _OF_SCALE if node.op_type == "DequantizeLinear" else 0
    return types.get(node.inputs[source]) if len(node.inputs) > source else None


CURRENT = "current"
"""As a target: the GPU of this machine, whatever it is."""
_TURING = "7.5"
_NEWEST_OPSET_8 = 17
_FLOATS = {"float32": "FLOAT", "float16": "HALF"}
_NEEDS_8_6 = {
    "optimization_level": "--optimization-level",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
}


@dataclass(frozen=True, slots=True)
class Typing:
    """What the graph is typed as.

    Attributes:
        precision: The lowest that its convolutions compute in.
        has_halves: Whether any tensor is float16.
        types: Number type of its tensors by name.
    """

    precision: Precision
    has_halves: bool
    types: dict[str, str]


def is_strongly_typed(library: Library) -> bool:
    """Whether TensorRT takes every type from the graph."""
    return library.is_rtx or library.number >= (10, 0)


def require_options(library: Library, config: BuildConfig, targets: tuple[str, ...]) -> None:
    """Refuses what this TensorRT cannot do, before anything is built; of targets see `resolve_targets`.

    Raises:
        BuildError: An option is not of this flavour or version.
    """
    if library.is_rtx:
        _require_rtx_options(library, config)
        return
    if targets:
        raise BuildError(
            f"{library.name} builds for the GPU that it runs on: --target is of TensorRT-RTX",
            remedy="leave --target out and build on such a GPU; or give --backend rtx; or --hardware-compatible for "
            "all "
            "GPUs from Ampere on",
        )
    if library.number < (8, 6):
        given = [flag for name, flag in _NEEDS_8_6.items() if getattr(config, name) not in (None, False)]
        if given:
            raise BuildError(
                f"{library.name} has no {given[0]}: it came with 8.6",
                remedy=f"leave {given[0]} out, or install a later TensorRT",
            )


def _require_rtx_options(library: Library, config: BuildConfig) -> None:
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


def resolve_targets(library: Library, targets: tuple[str, ...], gpu: str | None) -> tuple[str, ...]:
    """The compute capabilities that a plan is built for, such as `8.6`.

    Those of TensorRT-RTX are always told to it: what it takes for itself where it is told nothing, a plan does not say.
    Turing (7.5) is left out unless it is asked for, as NVIDIA advises: it would slow down the others.

    Args:
        library: Which TensorRT.
        targets: That are asked for; empty for the default.
        gpu: Compute capability of the GPU that is here.

    Raises:
        BuildError: TensorRT-RTX cannot build for one of them.
        CudaError: `current` is one of them, and there is no GPU.
    """
    if not library.is_rtx:
        return (gpu,) if gpu is not None else ()
    known = _rtx_capabilities(library)
    for target in targets:
        if target == CURRENT and gpu is None:
            raise CudaError(
                "the target is the current GPU, and there is none that can be used",
                remedy="name it, such as --target sm_86",
            )
        if target not in (CURRENT, *known):
            raise BuildError(
                f"{library.name} builds for compute capability {', '.join(known)}, not for {target}",
                remedy="leave the target out; or build on such a GPU, with --target current or with --backend tensorrt",
            )
    named = [gpu if target == CURRENT and gpu is not None else target for target in targets]
    return tuple(dict.fromkeys(named)) or tuple(name for name in known if name != _TURING)


def _rtx_capabilities(library: Library) -> list[str]:
    names = [name[2:] for name in dir(library.trt.ComputeCapability) if name.startswith("SM") and name[2:].isdecimal()]
    return [f"{int(number) // 10}.{int(number) % 10}" for number in sorted(names, key=int)]


def create_network(library: Library, builder: Any) -> Any:
    """An empty network of the kind in the table."""
    flags = library.trt.NetworkDefinitionCreationFlag
    if library.is_rtx or library.number >= (11, 0):
        return builder.create_network(0)
    flag = flags.STRONGLY_TYPED if library.number >= (10, 0) else flags.EXPLICIT_BATCH
    return builder.create_network(1 << int(flag))


def configure(
    library: Library, settings: Any, config: BuildConfig, typing: Typing, *, targets: tuple[str, ...]
) -> None:
    """Sets the builder's flags.

    Args:
        library: Which TensorRT.
        settings: Its IBuilderConfig.
        config: What is asked for; `require_options` has passed it.
        typing: Of the graph.
        targets: Compute capabilities that `resolve_targets` gave.
    """
    trt = library.trt
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the layer inspector has nothing to say
    _set_flag(settings, trt.BuilderFlag.TF32, config.tf32)
    if config.sparse:
        settings.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if library.is_rtx:
        settings.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            known = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", trt.ComputeCapability.CURRENT)
            settings.set_compute_capability(known, index)
    if not is_strongly_typed(library):
        _allow_precisions(trt, settings, typing)
        choose_tactic_sources(trt, settings, find_tactic_libraries())


def _set_flag(settings: Any, flag: Any, on: bool) -> None:
    if on:
        settings.set_flag(flag)
    else:
        settings.clear_flag(flag)


def _allow_precisions(trt: Any, settings: Any, typing: Typing) -> None:
    if typing.precision == "int8":
        settings.set_flag(trt.BuilderFlag.INT8)
    if typing.has_halves:
        settings.set_flag(trt.BuilderFlag.FP16)
        settings.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def constrain_layers(library: Library, network: Any, typing: Typing) -> int:
    """Gives each layer the type that its tensors have in the graph, where TensorRT does not do so itself.

    Layers of Q/DQ pairs are left alone: there the pairs decide.

    Returns:
        How many layers were bound.
    """
    if is_strongly_typed(library) or not typing.has_halves or typing.precision == "int8":
        return 0
    trt, bound = library.trt, 0
    free = {getattr(trt.LayerType, name) for name in ("CONSTANT", "SHAPE", "CAST") if hasattr(trt.LayerType, name)}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds = [typing.types.get(layer.get_output(place).name) for place in range(layer.num_outputs)]
        if kinds and kinds[0] is None and layer.num_inputs and layer.get_input(0) is not None:
            kinds[0] = typing.types.get(
                layer.get_input(0).name
            )  # a part of a node that TensorRT made several layers of
        if layer.type in free or not kinds or kinds[0] not in _FLOATS:
            continue
        layer.precision = getattr(trt.DataType, _FLOATS[kinds[0]])
        for place, kind in enumerate(kinds):
            if kind in _FLOATS:
                layer.set_output_type(place, getattr(trt.DataType, _FLOATS[kind]))
        bound += 1
    return bound


def require_typing(library: Library, typing: Typing, opset: int) -> None:
    """Refuses a typed graph that this TensorRT cannot take, with what makes one that it can.

    Raises:
        BuildError: TensorRT 8 is given FP16 scales, or an operator set that it does not know.
    """
    if is_strongly_typed(library):
        return
    remedy = (
        "make the INT8 graph with repvgg-trt quantize --int8 --target trt8; or give --int8 and the FP32 ONNX, and "
        "build chooses it"
    )
    if typing.precision == "int8" and typing.has_halves:
        raise BuildError(f"{library.name} needs FP32 beside INT8, and the graph has FP16", remedy=remedy)
    if opset > _NEWEST_OPSET_8:
        raise BuildError(
            f"{library.name} knows operator sets up to {_NEWEST_OPSET_8}, and the graph is of {opset}",
            remedy=remedy if typing.precision == "int8" else f"export it with repvgg-export --opset {_NEWEST_OPSET_8}",
        )

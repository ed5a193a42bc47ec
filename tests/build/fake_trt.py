"""A TensorRT of any version without TensorRT.

It has the names that this version has and no others, and records what the builder is told.

Names by version follow the real modules: 8.5.3.1 as introspected; 8.6.1, 10.0.1, 10.9.0.34 and 11.4.0.106 by the names
that their bindings hold.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repvgg_deploy.files.onnx import GraphSummary, read_graph

PLAN = b"ftrt a plan"


def _enum(name: str, members: str) -> Any:
    return enum.IntEnum(name, {member: index for index, member in enumerate(members.split())})


@dataclass
class Tensor:
    name: str
    dtype: Any
    shape: tuple[int, ...]


@dataclass
class Layer:
    name: str
    type: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    precision: Any = None
    output_types: dict[int, Any] = field(default_factory=dict)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def set_output_type(self, index: int, kind: Any) -> None:
        self.output_types[index] = kind


class StrictLayer(Layer):
    """Of a TensorRT that is always strongly typed: nobody sets a precision."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "precision" and value is not None:
            raise AttributeError("precision")
        super().__setattr__(name, value)


class Timings:
    """A timing cache: which GPU it is of, and a set of measurements, as text."""

    def __init__(self, data: bytes) -> None:
        gpu, _, rest = data.decode().partition("|")
        self.gpu, self.items = gpu, set(filter(None, rest.split(",")))

    def combine(self, other: Timings, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if not isinstance(other, Timings):
            raise TypeError("combine(): incompatible function arguments")
        if other.gpu and other.gpu != self.gpu:
            return False
        self.items |= other.items
        return True

    def serialize(self) -> bytes:
        return f"{self.gpu}|{','.join(sorted(self.items))}".encode()


@dataclass
class Faults:
    """What is to go wrong.

    Attributes:
        parser: Errors of the parser: index of the node, and text.
        builder: Error lines of the builder, which then gives no plan.
        no_builder: Whether no builder can be made.
        no_runtime: Whether no runtime can be made.
        profile: Whether the profile is refused.
        inspector: The layer inspector's answer.
        measured: What this build times.
        during: Called while it builds.
    """

    parser: tuple[tuple[int, str], ...] = ()
    builder: tuple[str, ...] = ()
    no_builder: bool = False
    no_runtime: bool = False
    profile: bool = False
    inspector: str = '{"Layers": [], "Bindings": []}'
    measured: tuple[str, ...] = ("conv=1ms",)
    during: Callable[[], None] = lambda: None
    no_engine: bool = False


class FakeTrt(types.ModuleType):
    """See above.

    Attributes:
        calls: What was set, in order: name and values.
        layers: Of the network that was parsed last.
        gpu: That the timing cache is of.
    """

    def __init__(self, version: str, graph: Path | GraphSummary, spec: Any, faults: Faults | None = None) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.calls: list[tuple[str, Any]] = []
        self.layers: list[Any] = []
        self.gpu = "a10"
        self._graph = read_graph(graph) if isinstance(graph, Path) else graph
        self._spec, self._faults = spec, faults or Faults()
        self._number = tuple(int(part) for part in version.split(".")[:2])
        _add_enums(self)
        _add_classes(self)

    def said(self, name: str) -> list[Any]:
        """The values of one kind of call."""
        return [value for call, value in self.calls if call == name]


def _add_enums(trt: FakeTrt) -> None:
    number = trt._number
    weak = number < (11, 0)
    flags = "TF32 SPARSE_WEIGHTS" + (
        " FP16 INT8 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS" if weak else ""
    )
    trt.BuilderFlag = _enum("BuilderFlag", flags + (" VERSION_COMPATIBLE" if number >= (8, 6) else ""))
    networks = (
        ("EXPLICIT_BATCH EXPLICIT_PRECISION" if number < (10, 0) else "EXPLICIT_BATCH STRONGLY_TYPED")
        if weak
        else "STRONGLY_TYPED"
    )
    trt.NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", networks)
    trt.TacticSource = _enum("TacticSource", "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS")
    trt.MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM")
    trt.ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
    trt.DataType = _enum(
        "DataType",
        "FLOAT HALF INT8 INT32 BOOL UINT8"
        + (" FP8" if number >= (8, 6) else "")
        + (" BF16 INT64" if number >= (10, 0) else ""),
    )
    trt.LayerType = _enum("LayerType", "CONVOLUTION ACTIVATION CONSTANT SHAPE CAST TOPK")
    trt.LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")
    if number >= (8, 6):
        trt.HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS")


def _add_classes(trt: FakeTrt) -> None:
    class ILogger:
        Severity = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

        def __init__(self) -> None:
            pass

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    trt.ILogger = ILogger
    if trt._number >= (10, 0):
        trt.IProgressMonitor = IProgressMonitor
    trt.Builder = lambda logger: _make_builder(trt, logger)
    trt.OnnxParser = lambda network, logger: Parser(trt, network)
    trt.Runtime = lambda logger: _make_runtime(trt, logger)


def _make_builder(trt: FakeTrt, logger: Any) -> Builder:
    if trt._faults.no_builder:
        logger.log(logger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    return Builder(trt, logger)


def _make_runtime(trt: FakeTrt, logger: Any) -> Runtime:
    if trt._faults.no_runtime:
        logger.log(logger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    return Runtime(trt)


class Builder:
    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Network:
        names = [flag.name for flag in self.trt.NetworkDefinitionCreationFlag if flags >> int(flag) & 1]
        assert sum(1 << int(self.trt.NetworkDefinitionCreationFlag[name]) for name in names) == flags
        self.trt.calls.append(("network", tuple(names)))
        return Network(self.trt)

    def create_builder_config(self) -> Any:
        return Config(self.trt) if self.trt._number < (8, 6) else LaterConfig(self.trt)

    def create_optimization_profile(self) -> Profile:
        return Profile(self.trt)

    def build_serialized_network(self, network: Network, config: Any) -> bytes | None:
        self.trt._faults.during()
        monitor = config.__dict__.get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            if not (monitor.step_complete("Building engine", 0) and monitor.step_complete("Building engine", 1)):
                return None
            monitor.phase_finish("Building engine")
        for line in self.trt._faults.builder:
            self.logger.log(self.logger.Severity.ERROR, line)
        if config.timings is not None:
            config.timings.gpu = self.trt.gpu
            config.timings.items |= set(self.trt._faults.measured)
        return None if self.trt._faults.builder else PLAN


class Network:
    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt
        self.layers: list[Layer] = trt.layers
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class Parser:
    """Makes one layer of every node, and of a Gemm two."""

    def __init__(self, trt: FakeTrt, network: Network) -> None:
        self.trt, self.network = trt, network

    num_errors = property(lambda self: len(self.trt._faults.parser))

    def get_error(self, index: int) -> Any:
        node, text = self.trt._faults.parser[index]
        calls: dict[str, Any] = {"node": lambda: node, "desc": lambda: text}
        if self.trt._number >= (10, 0):
            summary = self.trt._graph.nodes[node]
            calls |= {"node_name": lambda: summary.name, "node_operator": lambda: summary.op_type}
        return types.SimpleNamespace(**calls)

    def parse(self, data: bytes) -> bool:
        assert data
        if self.trt._faults.parser:
            return False
        trt, network, spec = self.trt, self.network, self.trt._spec
        kind = StrictLayer if trt._number >= (11, 0) else Layer
        tensors = {spec.input.name: Tensor(spec.input.name, trt.DataType.FLOAT, (-1, 3, 16, 16))}
        network.layers.clear()
        for node in trt._graph.nodes:
            inputs = [tensors[name] for name in node.inputs if name in tensors] or [
                Tensor("(none)", trt.DataType.FLOAT, ())
            ]
            names = node.outputs if node.op_type != "Gemm" else (f"{node.name}_product",)
            outputs = [Tensor(name, trt.DataType.FLOAT, (-1, 8, 4, 4)) for name in names]
            types_of = {"Conv": trt.LayerType.CONVOLUTION, "Cast": trt.LayerType.CAST, "TopK": trt.LayerType.TOPK}
            network.layers.append(
                kind(node.name, types_of.get(node.op_type, trt.LayerType.ACTIVATION), inputs, outputs)
            )
            if node.op_type == "Gemm":
                sums = [Tensor(name, trt.DataType.FLOAT, (-1, 8)) for name in node.outputs]
                network.layers.append(kind(f"{node.name}_2", trt.LayerType.ACTIVATION, outputs, sums))
                outputs = sums
            tensors |= {tensor.name: tensor for tensor in outputs}
        network.inputs[:] = [tensors[spec.input.name]]
        for output in spec.outputs:
            if output.dtype == "int64":
                tensors[output.name].dtype = trt.DataType.INT64 if trt._number >= (10, 0) else trt.DataType.INT32
        network.outputs[:] = [tensors[output.name] for output in spec.outputs]
        return True


class Profile:
    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        self.trt.calls.append(("profile", (name, low, usual, high)))


class Config:
    """TensorRT 8.5's; assignments of unknown attributes are errors, as with the real bindings."""

    _known: tuple[str, ...] = ("profiling_verbosity",)

    def __init__(self, trt: FakeTrt) -> None:
        self.__dict__["trt"] = trt
        self.__dict__["timings"] = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._known and not (name == "progress_monitor" and self.trt._number >= (10, 0)):
            raise AttributeError(name)
        self.__dict__[name] = value
        if name != "progress_monitor":
            self.trt.calls.append((name, value))

    def set_memory_pool_limit(self, pool: Any, limit: int) -> None:
        self.trt.calls.append(("memory", (pool.name, limit)))

    def set_flag(self, flag: Any) -> None:
        assert flag in list(self.trt.BuilderFlag)
        self.trt.calls.append(("set_flag", flag.name))

    def clear_flag(self, flag: Any) -> None:
        self.trt.calls.append(("clear_flag", flag.name))

    def set_tactic_sources(self, mask: int) -> bool:
        self.trt.calls.append(("tactic_sources", mask))
        return True

    def add_optimization_profile(self, profile: Profile) -> int:
        return -1 if self.trt._faults.profile else 0

    def create_timing_cache(self, data: bytes) -> Timings | None:
        return (
            Timings(data) if not data or b"|" in data else None
        )  # a null pointer of C++, for bytes without its header

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if not isinstance(cache, Timings):
            raise TypeError("set_timing_cache(): incompatible function arguments")
        if cache.gpu not in ("", self.trt.gpu):
            return False
        self.__dict__["timings"] = cache
        return True

    def get_timing_cache(self) -> Timings | None:
        found: Timings | None = self.__dict__["timings"]
        return found


class LaterConfig(Config):
    """From 8.6 on."""

    _known = ("profiling_verbosity", "builder_optimization_level", "hardware_compatibility_level")


class Runtime:
    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        self.trt.calls.append(("host_code", self.engine_host_code_allowed))
        return None if self.trt._faults.no_engine else Engine(self.trt)


class Engine:
    def __init__(self, trt: FakeTrt) -> None:
        self.trt = trt

    def create_execution_context(self) -> Any:
        def choose_profile(index: int, stream: int) -> bool:
            self.trt.calls.append(("profile chosen", index))
            return True

        return types.SimpleNamespace(
            set_input_shape=lambda name, shape: self.trt.calls.append(("inspected", (name, tuple(shape)))),
            set_optimization_profile_async=choose_profile,
        )

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=lambda _: self.trt._faults.inspector)


def flags_of(trt: FakeTrt) -> Mapping[str, bool]:
    """Builder flags that were set (True) or cleared (False)."""
    return {value: name == "set_flag" for name, value in trt.calls if name in ("set_flag", "clear_flag")}

"""A plan on its way into TensorRT: read, judged by its passport, deserialized, and asked for its inputs and outputs.

What can be refused is refused before TensorRT sees a byte: it answers a wrong plan with None or with a crash.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ...errors import CudaMemoryError, MissingDependencyError, ModelError, PlanError, PlanIncompatibleError
from ...files.passport import passport_path, read_passport, require_unchanged
from ...files.plan_place import (
    FLAVOURS,
    INSTALL,
    LEAN,
    Environment,
    Flavour,
    Incompatible,
    Library,
    import_tensorrt,
    judge_library,
    judge_plan,
    make_trt_logger,
    name_driver,
    name_library,
    platform_here,
    quote,
    start_tensorrt,
)
from ...specs.values import METADATA_SCHEMA, Certificate, ModelMetadata, ModelSpec, PlanPassport, TensorSpec
from ..cuda.port import CAPTURE_LOCK, DeviceInfo
from .kernels import KernelCache, open_kernels

logger = logging.getLogger(__name__)
_FLAVOURS: dict[str | None, tuple[Flavour, ...]] = {
    None: ("tensorrt", "tensorrt_rtx"),
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
}
_MODULES: dict[Flavour, tuple[str, ...]] = {"tensorrt": ("tensorrt", LEAN), "tensorrt_rtx": ("tensorrt_rtx",)}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}
"""By TensorRT's names. `trt.nptype` fails with NumPy 1.24 and newer in TensorRT 8.5."""
_LOG_LEVELS = {"ERROR": logging.WARNING, "WARNING": logging.WARNING, "INFO": logging.DEBUG}
"""By TensorRT's names: an error of its own becomes one of our exceptions, or was none."""
_KEPT_LINES = 50
Shape = tuple[int, ...]


@dataclass(slots=True)
class OpenPlan:
    """A plan that TensorRT has taken.

    Attributes:
        runtime: TensorRT's IRuntime, which lives at least as long as the engine.
        engine: TensorRT's ICudaEngine.
        interface: Input, outputs and profile, outputs in the order of `spec`.
        spec: From the passport, else as far as the engine knows it.
        passport: None where there is none.
        kernels: What TensorRT-RTX compiles for it; None for TensorRT, which compiled all when the plan was built.
    """

    library: Library
    log: TrtLog
    runtime: Any
    engine: Any
    interface: PlanInterface
    spec: ModelSpec
    passport: PlanPassport | None
    kernels: KernelCache | None

    def release(self) -> None:
        """Lets TensorRT's objects go, the engine before its runtime."""
        if self.kernels is not None:
            self.kernels.release()
        with CAPTURE_LOCK:
            self.engine = None
            self.runtime = None

    def describe(self) -> ModelMetadata:
        """The passport in the form of an ONNX's metadata."""
        passport = self.passport
        return ModelMetadata(
            schema=METADATA_SCHEMA,
            spec=self.spec,
            variant=passport.variant if passport else None,
            source=None,
            certificate=passport.certificate if passport else Certificate("none: the plan has no passport", (), {}),
            statistics={},
            history=passport.history if passport else (),
        )


def open_plan(path: Path, device: DeviceInfo, *, backend: str | None, require_passport: bool) -> OpenPlan:
    """Judges, reads and deserializes a plan, in the device context that is current.

    Args:
        path: The plan.
        device: The GPU whose context is current. There is a driver: without one the lean runtime ends the process.
        backend: `tensorrt`, `rtx`, or None: what the passport says, else what is installed.
        require_passport: Whether a plan without one is refused.

    Raises:
        PlanIncompatibleError: It was built for another GPU, TensorRT or platform.
        PlanError: It is changed, truncated, without passport though one is required, or TensorRT refuses it.
        CudaError: CUDA fails, or has no memory for it.
        MissingDependencyError: The TensorRT that it needs is not installed.
    """
    passport = read_passport(path)
    if passport is None:
        name = passport_path(path).name
        if require_passport:
            raise PlanError(
                f"{path}: has no passport {name}, and one is required",
                remedy="copy it beside the plan, or leave out require_passport",
            )
        lacking = "shapes come from the plan, and how images are prepared is not known"
        logger.warning("%s: no passport %s beside it: %s", path, name, lacking)
        library = find_library(_FLAVOURS[backend])
    else:
        flavours = (passport.flavour,) if backend is None else _FLAVOURS[backend]
        here = Environment(
            flavours[0], None, device.name, device.compute_capability, device.driver_version or None, platform_here()
        )
        _judge(path, passport, here)
        library = find_library(flavours)
        found = replace(here, flavour=library.flavour, tensorrt_version=library.version, lean=library.is_lean)
        for warning in _judge(path, passport, found):
            logger.warning("%s: %s", path, warning)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read"
        ) from error
    if passport is not None:
        require_unchanged(path, hashlib.sha256(content).hexdigest(), passport)
    log = TrtLog(library.trt)
    # A version-compatible plan carries the code that reads it; it is run only where a passport vouches for its bytes.
    carries_code = passport is not None and passport.config.version_compatible
    with CAPTURE_LOCK:  # both take memory and may wait for the device
        runtime = _start_runtime(library, log, device, carries_code=carries_code)
        engine = _deserialize(library, log, runtime, content, path=path)
    interface = _read_interface(library.trt, engine, path)
    spec = _describe_interface(interface) if passport is None else passport.spec
    if passport is not None:
        interface = _order_outputs(interface, spec, path)
    kernels = open_kernels(library, device, content)
    return OpenPlan(library, log, runtime, engine, interface, spec, passport, kernels)


def _judge(path: Path, passport: PlanPassport, environment: Environment) -> tuple[str, ...]:
    """The warnings of a plan that will run."""
    verdict = judge_plan(passport, environment)
    if isinstance(verdict, Incompatible):
        raise PlanIncompatibleError(f"{path}: {verdict.reason}", remedy=verdict.remedy)
    return verdict.warnings


# TensorRT


def find_library(flavours: tuple[Flavour, ...]) -> Library:
    """Imports the first of the given flavours that is installed, which needs no driver.

    The whole TensorRT comes before its lean runtime.

    Raises:
        MissingDependencyError: None is installed, or one does not load.
        PlanError: Plans are not run with its version.
    """
    for flavour in flavours:
        for module in _MODULES[flavour]:
            is_lean = module == LEAN
            remedy = f"install it again: {INSTALL[flavour]}"
            trt = import_tensorrt(module, name_library(flavour, is_lean), remedy=remedy)
            if trt is None:
                continue
            library = Library(flavour, trt, str(trt.__version__), is_lean)
            problem = judge_library(library)
            if problem is not None:
                raise PlanError(problem.reason, remedy=f"{problem.remedy}, and build the plan with it")
            return library
    wanted = " or ".join(FLAVOURS[flavour] for flavour in flavours)
    raise MissingDependencyError(
        f"running a plan needs {wanted}, which is not installed",
        remedy=", or ".join(INSTALL[flavour] for flavour in flavours),
    )


class TrtLog:
    """The errors that TensorRT logged last, so that an exception can quote them; our own log gets everything.

    Args:
        trt: The module.

    Attributes:
        trt_logger: What TensorRT is given.
    """

    def __init__(self, trt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lock = threading.Lock()
        self.trt_logger = make_trt_logger(trt, self._hear)

    def take(self) -> list[str]:
        """The errors since the last call, without repetitions."""
        with self._lock:
            lines = list(dict.fromkeys(self._lines))
            self._lines.clear()
        return lines

    def _hear(self, severity: str, message: str) -> None:
        if severity == "ERROR":
            with self._lock:
                self._lines.append(" ".join(message.split()))
        logger.log(_LOG_LEVELS[severity], "%s", message)


def _start_runtime(library: Library, log: TrtLog, device: DeviceInfo, *, carries_code: bool) -> Any:
    trt, driver = library.trt, name_driver(device.driver_version, device.cuda_version)
    runtime = start_tensorrt(library, "runtime", lambda: trt.Runtime(log.trt_logger), lines=log.take, on=driver)
    if carries_code and not library.is_rtx:
        runtime.engine_host_code_allowed = True
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log.trt_logger, "")
    return runtime


def _deserialize(library: Library, log: TrtLog, runtime: Any, content: bytes, *, path: Path) -> Any:
    """TensorRT's engine."""
    engine = runtime.deserialize_cuda_engine(content)
    if engine is not None:
        return engine
    lines = log.take()
    if any("out of memory" in line.lower() for line in lines):
        raise CudaMemoryError(
            f"{path}: no GPU memory for it:{quote(lines)}", remedy="free GPU memory: nvidia-smi shows who has it"
        )
    remedy = "build it again on this machine with repvgg-trt build: it is truncated, or of another TensorRT or GPU"
    if library.is_lean:
        remedy = (
            "build it with --version-compatible, for a lean runtime runs no other plans; or install the whole "
            "TensorRT that built it"
        )
    raise PlanError(f"{path}: {library.name} refuses it:{quote(lines)}", remedy=remedy)


# Inputs and outputs


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """One input or output as the engine has it; −1 is a dynamic dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape

    def count_bytes(self, shape: Shape) -> int:
        """Size of the tensor in a shape."""
        size = self.dtype.itemsize
        for dimension in shape:
            size *= dimension
        return size


@dataclass(frozen=True, slots=True)
class PlanProfile:
    """An optimization profile.

    Attributes:
        index: TensorRT's number of it.
        smallest: Its minimum of the input's shape.
        usual: The shape that its kernels were chosen for.
        largest: Its maximum.
    """

    index: int
    smallest: Shape
    usual: Shape
    largest: Shape


@dataclass(frozen=True, slots=True)
class PlanInterface:
    """What goes in and out.

    Attributes:
        source: The input.
        outputs: In the order of the specification.
        profiles: Those that are used, by their largest batch: the one that takes the largest shape is the last, and all
            are for images of its sizes.
    """

    source: PlanTensor
    outputs: tuple[PlanTensor, ...]
    profiles: tuple[PlanProfile, ...]

    @property
    def smallest(self) -> Shape:
        """The smallest shape that runs as it is."""
        return (min(profile.smallest[0] for profile in self.profiles), *self.profiles[-1].smallest[1:])

    @property
    def usual(self) -> Shape:
        """The shape that the last profile is fastest at."""
        return self.profiles[-1].usual

    @property
    def largest(self) -> Shape:
        """The largest shape that runs as one piece."""
        return self.profiles[-1].largest

    def choose_profile(self, rows: int) -> PlanProfile:
        """The profile for so many rows: of those that take them, the one with the nearest usual batch; else the last.

        That is what Triton's backend does. Of the profiles of `--profiles`, whose usual batch is their largest, it is
        the smallest one that takes the batch.
        """
        fit = (profile for profile in self.profiles if profile.smallest[0] <= rows <= profile.largest[0])
        return min(fit, key=lambda profile: abs(profile.usual[0] - rows), default=self.profiles[-1])

    def fit_rows(self, count: int) -> int:
        """The fewest rows that a profile takes and that hold so many images, of which there are not too many."""
        return min(max(count, profile.smallest[0]) for profile in self.profiles if profile.largest[0] >= count)

    @property
    def has_rows(self) -> bool:
        """Whether every output has a row per image."""
        return all(tensor.shape[:1] == self.source.shape[:1] for tensor in self.outputs)

    def keep_rows(self, output_shapes: tuple[Shape, ...], count: int) -> tuple[Shape, ...]:
        """The outputs' shapes with the rows of the first images only."""
        return tuple(
            (count, *found[1:]) if tensor.shape[:1] == self.source.shape[:1] else found
            for tensor, found in zip(self.outputs, output_shapes, strict=True)
        )


def _read_interface(trt: Any, engine: Any, path: Path) -> PlanInterface:
    """Asks the engine for one input, of a kind that NumPy knows and with a batch, and its outputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if len(inputs) != 1 or len(names) < 2:
        raise PlanError(
            f"{path}: expected one input and at least one output, found {len(inputs)} of {names}",
            remedy="build a plan of one image input",
        )
    source = _read_tensor(engine, inputs[0], path)
    if not source.shape:
        raise PlanError(
            f"{path}: the input {source.name} has no dimension that counts images",
            remedy="build a plan whose input has a batch",
        )
    outputs = tuple(_read_tensor(engine, name, path) for name in names if name != inputs[0])
    if min(source.shape) > 0:
        return PlanInterface(source, outputs, (PlanProfile(0, source.shape, source.shape, source.shape),))
    profiles = [
        PlanProfile(index, *(tuple(map(int, shape)) for shape in engine.get_tensor_profile_shape(source.name, index)))
        for index in range(engine.num_optimization_profiles)
    ]
    profiles.sort(key=lambda profile: profile.largest)
    sizes = profiles[-1].smallest[1:], profiles[-1].largest[1:]
    alike = (profile for profile in profiles if (profile.smallest[1:], profile.largest[1:]) == sizes)
    return PlanInterface(source, outputs, tuple(alike))


def _read_tensor(engine: Any, name: str, path: Path) -> PlanTensor:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise PlanError(
            f"{path}: the tensor {name} is {kind}, and NumPy arrays of that kind are not supported here",
            remedy=f"build the plan with inputs and outputs of {', '.join(_DTYPES.values())}",
        )
    return PlanTensor(name, np.dtype(_DTYPES[kind]), tuple(int(size) for size in engine.get_tensor_shape(name)))


def _order_outputs(interface: PlanInterface, spec: ModelSpec, path: Path) -> PlanInterface:
    """The outputs in the order of the specification, which the engine must not contradict."""
    by_name = {tensor.name: tensor for tensor in (interface.source, *interface.outputs)}
    for tensor in (spec.input, *spec.outputs):
        found = by_name.get(tensor.name)
        if found is None or not _agree(tensor, found):
            raise PlanError(
                f"{path}: the passport and the plan disagree: expected {tensor.name} {tensor.dtype} {tensor.shape}, "
                f"found {f'{found.dtype} {found.shape}' if found else f'only {sorted(by_name)}'}",
                remedy="build the plan again with repvgg-trt build",
            )
    return replace(interface, outputs=tuple(by_name[output.name] for output in spec.outputs))


def _agree(expected: TensorSpec, found: PlanTensor) -> bool:
    """Same dtype (TensorRT 8.5 gives int32 for the int64 of class numbers) and rank, and no dimension of two sizes."""
    same_dtype = expected.dtype == found.dtype.name or (expected.dtype, found.dtype.name) == ("int64", "int32")
    sizes = (
        not isinstance(want, int) or have < 0 or want == have
        for want, have in zip(expected.shape, found.shape, strict=False)
    )
    return same_dtype and len(expected.shape) == len(found.shape) and all(sizes)


def _describe_interface(interface: PlanInterface) -> ModelSpec:
    """The specification of a plan without a passport."""
    shape, layout = interface.source.shape, "other"
    if len(shape) == 4:
        layout = "NCHW" if shape[1] == 3 or shape[3] != 3 else "NHWC"
    outputs = (_describe_tensor(output, "NC" if len(output.shape) == 2 else "other") for output in interface.outputs)
    return ModelSpec(input=_describe_tensor(interface.source, layout), outputs=tuple(outputs), kind="module")


def _describe_tensor(tensor: PlanTensor, layout: str) -> TensorSpec:
    shape = tuple(
        size if size >= 0 else "batch" if axis == 0 else f"{tensor.name}_{axis}"
        for axis, size in enumerate(tensor.shape)
    )
    return TensorSpec(
        tensor.name,
        cast('Literal["float32", "float16", "uint8", "int64", "int32"]', tensor.dtype.name),
        shape,
        cast('Literal["NCHW", "NHWC"]', layout),
    )

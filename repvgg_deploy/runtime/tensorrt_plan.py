"""A plan on its way into TensorRT: what can be refused is refused before TensorRT sees a byte, for it answers a wrong one with a crash or None."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CudaError, CudaMemoryError, ModelError, PlanError, PlanIncompatibleError
from ..files.passport import passport_path, read_passport, require_unchanged
from ..files.plan_place import Environment, Flavour, Incompatible, judge_plan, platform_here, quote
from ..specs.values import METADATA_SCHEMA, Certificate, ModelMetadata, ModelSpec, PlanPassport
from .cuda.port import DeviceInfo
from .tensorrt_library import Library, open_library
from .tensorrt_tensors import Interface, describe_interface, order_interface, read_interface

logger = logging.getLogger(__name__)

_FLAVOURS: dict[str | None, tuple[Flavour, ...]] = {
    None: ("tensorrt", "tensorrt_rtx"),
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
}


@dataclass(slots=True)
class OpenPlan:
    """A plan that TensorRT has taken.

    Attributes:
        library: TensorRT.
        runtime: Lives at least as long as the engine.
        engine: The deserialized plan.
        interface: Inputs, outputs, profile.
        spec: What a caller must know.
        passport: None where there is none.
    """

    library: Library
    runtime: Any
    engine: Any
    interface: Interface
    spec: ModelSpec
    passport: PlanPassport | None

    def release(self) -> None:
        """Lets TensorRT's objects go, the engine before its runtime."""
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
        device: The GPU whose context is current.
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
        _miss_passport(path, require_passport)
    wanted: tuple[Flavour, ...] = (passport.flavour,) if passport is not None and backend is None else _FLAVOURS[backend]
    if passport is not None:
        _judge(path, passport, Environment(wanted[0], None, device.name, device.compute_capability, device.driver_version or None, platform_here()))
    library = open_library(wanted)
    if passport is not None:
        here = Environment(
            library.flavour, library.version, device.name, device.compute_capability, device.driver_version or None, lean=library.is_lean
        )
        _judge(path, passport, here)
    content = _read(path)
    if passport is not None:
        require_unchanged(path, hashlib.sha256(content).hexdigest(), passport)
    # A version-compatible plan carries the code that reads it; it is run only where a passport vouches for its bytes.
    runtime, engine = _deserialize(library, content, path, carries_code=passport is not None and passport.config.version_compatible)
    interface = read_interface(library.trt, engine, path)
    if passport is None:
        return OpenPlan(library, runtime, engine, interface, describe_interface(interface), None)
    return OpenPlan(library, runtime, engine, order_interface(interface, passport.spec, path), passport.spec, passport)


def _miss_passport(path: Path, required: bool) -> None:
    name = passport_path(path).name
    if required:
        raise PlanError(f"{path}: has no passport {name}, and one is required", remedy="copy it beside the plan, or leave out require_passport")
    logger.warning("%s: no passport %s beside it: shapes come from the plan, and how images are prepared is not known", path, name)


def _judge(path: Path, passport: PlanPassport, environment: Environment) -> None:
    verdict = judge_plan(passport, environment)
    if isinstance(verdict, Incompatible):
        raise PlanIncompatibleError(f"{path}: {verdict.reason}", remedy=verdict.remedy)
    if environment.tensorrt_version is not None:
        for warning in verdict.warnings:
            logger.warning("%s: %s", path, warning)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read") from error


def _deserialize(library: Library, content: bytes, path: Path, *, carries_code: bool) -> tuple[Any, Any]:
    trt, log = library.trt, library.log
    log.take()
    runtime = trt.Runtime(library.trt_logger)
    lines = log.take()
    if runtime is None or any("CUDA initialization failure" in line for line in lines):  # to use such a runtime ends the process
        raise CudaError(
            f"{library.name} cannot use the GPU:{quote(lines)}", remedy="update the NVIDIA driver, or install a TensorRT made for its CUDA version"
        )
    if carries_code and library.flavour == "tensorrt":
        runtime.engine_host_code_allowed = True
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(library.trt_logger, "")
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        lines = log.take()
        if any("out of memory" in line.lower() for line in lines):
            raise CudaMemoryError(f"{path}: no GPU memory for it:{quote(lines)}", remedy="free GPU memory: nvidia-smi shows who has it")
        remedy = "build it again on this machine with repvgg-trt build: it is truncated, or of another TensorRT or GPU"
        if library.is_lean:
            remedy = "build it with --version-compatible, for a lean runtime runs no other plans; or install the whole TensorRT that built it"
        raise PlanError(f"{path}: {library.name} refuses it:{quote(lines)}", remedy=remedy)
    return runtime, engine

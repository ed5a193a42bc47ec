"""What a build finds on this machine: TensorRT and its log, a GPU, and libraries that TensorRT 8 takes kernels from.

Those libraries (cuDNN, cuBLAS, cuBLASLt) decide on the plan that TensorRT 8 builds. TensorRT 10 and later use none of
them by default.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import BuildError, CudaError, InputError, MissingDependencyError
from ..files.plan_place import (
    FLAVOURS,
    INSTALL,
    LEAN,
    Flavour,
    Library,
    import_tensorrt,
    is_installed,
    judge_library,
    make_trt_logger,
)

logger = logging.getLogger(__name__)
BackendChoice = Literal["auto", "tensorrt", "rtx"]
_MODULES: dict[str, tuple[Flavour, ...]] = {
    "auto": ("tensorrt", "tensorrt_rtx"),
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
}
_NEWEST = {"tensorrt": 11, "tensorrt_rtx": 1}
_KEPT = 200


def open_library(backend: BackendChoice) -> Library:
    """Imports TensorRT.

    Args:
        backend: `tensorrt`, `rtx`, or `auto`: TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        MissingDependencyError: It is not installed, or cannot be imported.
        BuildError: Its version is one that plans are not built with.
        InputError: No such backend.
    """
    if backend not in _MODULES:
        raise InputError(f"no backend is named {backend!r}", remedy="give --backend auto, tensorrt or rtx")
    flavours = _MODULES[backend]
    for flavour in flavours:
        other = "rtx" if flavour == "tensorrt" else "tensorrt"
        remedy = (
            f"install it again with {INSTALL[flavour]}, so that its libraries match its bindings; or build with "
            f"--backend {other}"
        )
        trt = import_tensorrt(flavour, FLAVOURS[flavour], remedy=remedy)
        if trt is not None:
            library = Library(flavour, trt, str(trt.__version__))
            refused, newest = judge_library(library), _NEWEST[flavour]
            if refused is not None:
                raise BuildError(refused.reason, remedy=refused.remedy)
            if library.number[0] > newest:
                logger.warning(
                    "%s is newer than what this version was made for: it is used as %d.x", library.name, newest
                )
            return library
    wanted = " nor ".join(FLAVOURS[flavour] for flavour in flavours)
    missing = f"neither {wanted} is installed" if backend == "auto" else f"{wanted} is not installed"
    if "tensorrt" in flavours and is_installed(LEAN):
        missing += f"; what is here of TensorRT is its lean runtime ({LEAN}), which runs plans and builds none"
    raise MissingDependencyError(
        f"no plan can be built: {missing}",
        remedy=", or ".join(f"{INSTALL[flavour]} ({FLAVOURS[flavour]})" for flavour in flavours),
    )


def is_strongly_typed(library: Library) -> bool:
    """Whether TensorRT takes every type from the graph."""
    return library.is_rtx or library.number >= (10, 0)


class BuildLog:
    """The log of one build: errors are kept, so that a message can quote them, and all goes to our own log.

    Attributes:
        errors: The first errors, as they came.
        trt_logger: What TensorRT is given.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.trt_logger = make_trt_logger(trt, self._hear)

    def _hear(self, severity: str, message: str) -> None:
        if severity == "ERROR" and len(self.errors) < _KEPT:
            self.errors.append(message)
        logger.debug("%s", message)


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that a build runs on.

    Attributes:
        driver_version: None where the system does not say.
        cuda_version: The newest CUDA that the driver knows; None where that was not asked.
    """

    name: str
    compute_capability: str
    driver_version: str | None
    cuda_version: str | None = None


@dataclass(frozen=True, slots=True)
class GpuSearch:
    """A GPU, or why there is none.

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
    return GpuSearch(Gpu(info.name, info.compute_capability, info.driver_version or None, info.cuda_version))


_LIBRARIES = {
    "CUDNN": ("cudnnGetVersion", "cudnnGetProperty", ("libcudnn.so.8", "cudnn64_8.dll")),
    "CUBLAS": ("cublasCreate_v2", "cublasGetProperty",
               ("libcublas.so.11", "libcublas.so.12", "cublas64_11.dll", "cublas64_12.dll")),
    "CUBLAS_LT": ("cublasLtCreate", "cublasLtGetProperty",
                  ("libcublasLt.so.11", "libcublasLt.so.12", "cublasLt64_11.dll", "cublasLt64_12.dll")),
}  # fmt: skip
"""By tactic source: a function that its library has, the one that tells the version, and the library's file names."""
_OTHERS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
_UNKNOWN = "unknown version"
TacticLibraries = Mapping[str, str | None]
"""By tactic source: the version of its library, or None where it is missing. Empty where TensorRT uses none of them."""


def find_tactic_libraries() -> dict[str, str | None]:
    """Which of the three libraries are here. Each is loaded, and neither CUDA nor a GPU is touched.

    Where a library is here for two versions of CUDA, both are named: TensorRT does not say which one it takes.
    """
    found = {}
    for kind, (function, version, names) in _LIBRARIES.items():
        here = [read_library_version(name, function, version) for name in names]
        found[kind] = ", ".join(text for text in here if text is not None) or None
    return found


def read_library_version(library: str, function: str, version: str) -> str | None:
    """The version of a shared library; None where it cannot be loaded or is another one.

    Where TensorRT 8 is packed small, empty libraries stand in for cuDNN and cuBLAS.

    Args:
        library: Its file name.
        function: A function that it must have.
        version: The function that tells major, minor and patch version by their index 0 to 2, as all of CUDA's
            libraries have it.
    """
    try:
        loaded = ctypes.CDLL(library)
    except OSError:
        return None
    if not hasattr(loaded, function):
        return None
    if not hasattr(loaded, version):
        return _UNKNOWN
    numbers = [ctypes.c_int(-1) for _ in range(3)]
    failed = [getattr(loaded, version)(index, ctypes.byref(number)) for index, number in enumerate(numbers)]
    return _UNKNOWN if any(failed) else ".".join(str(number.value) for number in numbers)


def choose_tactic_sources(trt: Any, settings: Any, libraries: TacticLibraries) -> None:
    """Leaves libraries that are missing out of TensorRT 8's search: it would end with an error that names no remedy."""
    missing = [kind for kind, version in libraries.items() if version is None]
    if missing:
        kept = [kind for kind in (*libraries, *_OTHERS) if kind not in missing and hasattr(trt.TacticSource, kind)]
        settings.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, kind)) for kind in kept))
        logger.warning("TensorRT chooses kernels without %s, which cannot be loaded here", ", ".join(missing))

"""Which TensorRT is installed, and whether plans can be built with it.

What TensorRT logs during a build: errors kept, so that a message can quote them, and everything passed on to our own
log.

Which of cuDNN, cuBLAS and cuBLASLt TensorRT 8 can take kernels from: what is found here decides on the plan that it
builds.

TensorRT 10 and later use none of them by default.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import BuildError, InputError, MissingDependencyError
from ..files.plan_place import (
    BROKEN_VERSION,
    FLAVOURS,
    INSTALL,
    LEAN,
    Flavour,
    import_tensorrt,
    is_installed,
    make_trt_logger,
)

logger = logging.getLogger(__name__)
_KEPT = 200


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that a build runs on; `driver_version` is None where the system does not say."""

    name: str
    compute_capability: str
    driver_version: str | None


class BuildLog:
    """The log of one build.

    Attributes:
        errors: The first errors, as they came.
        trt_logger: What TensorRT is given.

    Args:
        trt: The module.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.trt_logger = make_trt_logger(trt, self._hear)

    def _hear(self, severity: str, message: str) -> None:
        if severity == "ERROR" and len(self.errors) < _KEPT:
            self.errors.append(message)
        logger.debug("%s", message)


def find_nodes(lines: list[str], names: list[str]) -> list[str]:
    """Which of the names stand in the lines, as whole words, in order."""
    text = "\n".join(lines)
    return [name for name in names if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", text)]


BackendChoice = Literal["auto", "tensorrt", "rtx"]
_MODULES: dict[str, tuple[Flavour, ...]] = {
    "auto": ("tensorrt", "tensorrt_rtx"),
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
}
_NEWEST = {"tensorrt": 11, "tensorrt_rtx": 1}


@dataclass(frozen=True, slots=True)
class Library:
    """An imported TensorRT or TensorRT-RTX.

    Attributes:
        flavour: Which of the two.
        trt: The module.
        version: Such as `10.9.0.34`.
    """

    flavour: Flavour
    trt: Any
    version: str

    @property
    def name(self) -> str:
        """For people: `TensorRT 10.9.0.34`."""
        return f"{FLAVOURS[self.flavour]} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.flavour == "tensorrt_rtx"

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor, *_ = (*(int(part) if part.isdecimal() else 0 for part in self.version.split(".")), 0, 0)
        return major, minor


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
    for flavour in _MODULES[backend]:
        trt = _import(flavour)
        if trt is not None:
            library = Library(flavour, trt, str(trt.__version__))
            _require_version(library)
            return library
    raise MissingDependencyError(
        f"no plan can be built: {_describe_missing(backend)}",
        remedy=", or ".join(f"{INSTALL[flavour]} ({FLAVOURS[flavour]})" for flavour in _MODULES[backend]),
    )


def _describe_missing(backend: BackendChoice) -> str:
    wanted = " nor ".join(FLAVOURS[flavour] for flavour in _MODULES[backend])
    text = f"neither {wanted} is installed" if backend == "auto" else f"{wanted} is not installed"
    if "tensorrt" in _MODULES[backend] and is_installed(LEAN):
        text += f"; what is here of TensorRT is its lean runtime ({LEAN}), which runs plans and builds none"
    return text


def _import(flavour: Flavour) -> Any:
    other = "rtx" if flavour == "tensorrt" else "tensorrt"
    remedy = (
        f"install it again with {INSTALL[flavour]}, so that its libraries match its bindings; or build with "
        f"--backend {other}"
    )
    return import_tensorrt(flavour, FLAVOURS[flavour], remedy=remedy)


def _require_version(library: Library) -> None:
    number = library.number
    if library.is_rtx:
        if number < (1, 0):
            raise BuildError(
                f"{library.name} is not supported: expected TensorRT-RTX 1.x", remedy=INSTALL["tensorrt_rtx"]
            )
    elif number < (8, 5) or number[0] == 9:
        raise BuildError(
            f"{library.name} is not supported: expected 8.5, 8.6, 10.x or 11.x", remedy="install TensorRT 10.3 or later"
        )
    elif number == BROKEN_VERSION:
        raise BuildError(
            f"{library.name} is known to be broken", remedy="install TensorRT 10.3 or later, or stay with 10.1"
        )
    if number[0] > _NEWEST[library.flavour]:
        logger.warning(
            "%s is newer than what this version was made for: it is used as %d.x",
            library.name,
            _NEWEST[library.flavour],
        )


_LIBRARIES = {
    "CUDNN": ("cudnnGetVersion", "cudnnGetProperty", ("libcudnn.so.8", "cudnn64_8.dll")),
    "CUBLAS": (
        "cublasCreate_v2",
        "cublasGetProperty",
        ("libcublas.so.11", "libcublas.so.12", "cublas64_11.dll", "cublas64_12.dll"),
    ),
    "CUBLAS_LT": (
        "cublasLtCreate",
        "cublasLtGetProperty",
        ("libcublasLt.so.11", "libcublasLt.so.12", "cublasLt64_11.dll", "cublasLt64_12.dll"),
    ),
}
"""Of each tactic source: a function that its library has, the one that tells its version, and the names of the library."""
_OTHERS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
_UNKNOWN = "unknown version"
TacticLibraries = Mapping[str, str | None]
"""By the name of a tactic source: the version of its library, or None where there is none. Empty where TensorRT uses none of them."""


def find_tactic_libraries() -> dict[str, str | None]:
    """What is here of the three libraries. Each is loaded, and neither CUDA nor a GPU is touched.

    Where a library is here for two versions of CUDA, both are named: which one TensorRT takes, it does not say.
    """
    found = {}
    for kind, (function, version, names) in _LIBRARIES.items():
        here = [read_library_version(name, function, version) for name in names]
        found[kind] = ", ".join(text for text in here if text is not None) or None
    return found


def read_library_version(library: str, function: str, version: str) -> str | None:
    """The version of a shared library; None where it cannot be loaded or is none.

    Where TensorRT 8 is packed small, empty libraries stand in for cuDNN and cuBLAS.

    Args:
        library: Its file name.
        function: That it must have.
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
    """Leaves cuDNN and cuBLAS out of TensorRT 8's search where they are not installed: it would end with an error that names no remedy.

    Args:
        trt: The module.
        settings: Its IBuilderConfig.
        libraries: What `find_tactic_libraries` gave.
    """
    missing = [kind for kind, version in libraries.items() if version is None]
    if missing:
        kept = [kind for kind in (*libraries, *_OTHERS) if kind not in missing and hasattr(trt.TacticSource, kind)]
        settings.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, kind)) for kind in kept))
        logger.warning("TensorRT chooses kernels without %s, which cannot be loaded here", ", ".join(missing))

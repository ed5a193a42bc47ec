"""Which TensorRT is installed, and whether plans can be built with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import BuildError, InputError, MissingDependencyError
from ..files.plan_place import BROKEN_VERSION, FLAVOURS, INSTALL, LEAN, Flavour, import_tensorrt, is_installed

logger = logging.getLogger(__name__)

BackendChoice = Literal["auto", "tensorrt", "rtx"]
_MODULES: dict[str, tuple[Flavour, ...]] = {"auto": ("tensorrt", "tensorrt_rtx"), "tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx",)}
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
    remedy = f"install it again with {INSTALL[flavour]}, so that its libraries match its bindings; or build with --backend {other}"
    return import_tensorrt(flavour, FLAVOURS[flavour], remedy=remedy)


def _require_version(library: Library) -> None:
    number = library.number
    if library.is_rtx:
        if number < (1, 0):
            raise BuildError(f"{library.name} is not supported: expected TensorRT-RTX 1.x", remedy=INSTALL["tensorrt_rtx"])
    elif number < (8, 5) or number[0] == 9:
        raise BuildError(f"{library.name} is not supported: expected 8.5, 8.6, 10.x or 11.x", remedy="install TensorRT 10.3 or later")
    elif number == BROKEN_VERSION:
        raise BuildError(f"{library.name} is known to be broken", remedy="install TensorRT 10.3 or later, or stay with 10.1")
    if number[0] > _NEWEST[library.flavour]:
        logger.warning("%s is newer than what this version was made for: it is used as %d.x", library.name, _NEWEST[library.flavour])

"""Which TensorRT runs a plan, and what it logs. A library is imported by `open_library`."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..errors import MissingDependencyError, PlanError
from ..files.plan_place import BROKEN_VERSION, FLAVOURS, INSTALL, LEAN, Flavour, import_tensorrt, make_trt_logger, parse_version

logger = logging.getLogger(__name__)

_MODULES: dict[Flavour, tuple[str, ...]] = {"tensorrt": ("tensorrt", LEAN), "tensorrt_rtx": ("tensorrt_rtx",)}
_LEVELS = {"ERROR": logging.WARNING, "WARNING": logging.WARNING, "INFO": logging.DEBUG}  # an error of TensorRT is one of ours, or was none
_KEPT = 50


class TrtLog:
    """The errors that TensorRT logged last, so that an exception can quote them; everything is passed on to our own log."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def hear(self, severity: str, message: str) -> None:
        """Keeps an error, passes everything on."""
        if severity == "ERROR":
            with self._lock:
                self._lines.append(" ".join(message.split()))
        logger.log(_LEVELS[severity], "%s", message)

    def take(self) -> list[str]:
        """What was kept since the last call, without repetitions."""
        with self._lock:
            lines = list(dict.fromkeys(self._lines))
            self._lines.clear()
        return lines


@dataclass(frozen=True, slots=True)
class InstalledLibrary:
    """A TensorRT that was imported and not yet touched.

    Attributes:
        flavour: `tensorrt` or `tensorrt_rtx`.
        trt: The module.
        version: Such as `10.9.0.34`.
    """

    flavour: Flavour
    trt: Any
    version: str

    @property
    def name(self) -> str:
        """For people: `TensorRT 10.9.0.34`."""
        return f"{_name_of(self.trt.__name__, self.flavour)} {self.version}"

    @property
    def is_lean(self) -> bool:
        """Whether it is TensorRT's lean runtime, which runs version-compatible plans only."""
        return bool(self.trt.__name__ == LEAN)


@dataclass(frozen=True, slots=True)
class Library(InstalledLibrary):
    """An imported TensorRT that can be used.

    Attributes:
        log: What it says.
        trt_logger: The object through which it says it.
    """

    log: TrtLog
    trt_logger: Any


def open_library(flavours: tuple[Flavour, ...]) -> Library:
    """The first of the given flavours that is installed, with its log.

    The caller has made sure that there is a driver: without one the lean runtime ends the process.

    Raises:
        MissingDependencyError: As `find_library`.
        PlanError: As `find_library`.
    """
    found, log = find_library(flavours), TrtLog()
    return Library(found.flavour, found.trt, found.version, log, make_trt_logger(found.trt, log.hear))


def find_library(flavours: tuple[Flavour, ...]) -> InstalledLibrary:
    """Imports the first of the given flavours that is installed, which needs no driver; the whole TensorRT comes before its lean runtime.

    Raises:
        MissingDependencyError: None is installed, or one does not load.
        PlanError: It is too old, or a version that is known to be broken.
    """
    for flavour in flavours:
        for module in _MODULES[flavour]:
            trt = import_tensorrt(module, _name_of(module, flavour), remedy=f"install it again: {INSTALL[flavour]}")
            if trt is not None:
                return _check_version(InstalledLibrary(flavour, trt, str(trt.__version__)))
    wanted = " or ".join(FLAVOURS[flavour] for flavour in flavours)
    raise MissingDependencyError(
        f"running a plan needs {wanted}, which is not installed", remedy=", or ".join(INSTALL[flavour] for flavour in flavours)
    )


def _name_of(module: str, flavour: Flavour) -> str:
    return f"{FLAVOURS[flavour]} (lean runtime)" if module == LEAN else FLAVOURS[flavour]


def _check_version(library: InstalledLibrary) -> InstalledLibrary:
    number = parse_version(library.version)[:2]
    if library.flavour == "tensorrt" and (number < (8, 5) or number == BROKEN_VERSION):
        problem = "is known to be broken" if number == BROKEN_VERSION else "is too old: expected 8.5 or later"
        raise PlanError(f"{library.name} {problem}", remedy="install TensorRT 10.3 or later, and build the plan with it")
    return library

"""Which TensorRT runs a plan, and what it logs. A library is imported by `open_library`."""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import MissingDependencyError, PlanError

logger = logging.getLogger(__name__)

Flavour = Literal["tensorrt", "tensorrt_rtx"]
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX", "tensorrt_lean": "TensorRT (lean runtime)"}
_MODULES: dict[Flavour, tuple[str, ...]] = {"tensorrt": ("tensorrt", "tensorrt_lean"), "tensorrt_rtx": ("tensorrt_rtx",)}
_INSTALL = {"tensorrt": "pip install 'repvgg-deploy[tensorrt]'", "tensorrt_rtx": "pip install 'repvgg-deploy[rtx]'"}
_KEPT = 50
_QUOTED = 5


class TrtLog:
    """The errors that TensorRT logged last, so that an exception can quote them; everything is passed on to our own log."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def add(self, message: str) -> None:
        """Keeps an error."""
        with self._lock:
            self._lines.append(" ".join(message.split()))

    def take(self) -> list[str]:
        """What was kept since the last call, without repetitions."""
        with self._lock:
            lines = list(dict.fromkeys(self._lines))
            self._lines.clear()
        return lines


def quote(lines: list[str]) -> str:
    """The lines as they may end a message."""
    return "".join(f"\n    {line[:400]}" for line in lines[:_QUOTED]) or " (TensorRT logged no reason)"


@dataclass(frozen=True, slots=True)
class Library:
    """An imported TensorRT.

    Attributes:
        flavour: `tensorrt` or `tensorrt_rtx`.
        trt: The module.
        version: Such as `10.9.0.34`.
        log: What it says.
        trt_logger: The object through which it says it.
    """

    flavour: Flavour
    trt: Any
    version: str
    log: TrtLog
    trt_logger: Any

    @property
    def name(self) -> str:
        """For people: `TensorRT 10.9.0.34`."""
        return f"{NAMES.get(self.trt.__name__, NAMES[self.flavour])} {self.version}"


def open_library(flavours: tuple[Flavour, ...]) -> Library:
    """Imports the first of the given flavours that is installed.

    The caller has made sure that there is a driver: without one the lean runtime ends the process.

    Raises:
        MissingDependencyError: None is installed, or one does not load.
        PlanError: It is too old, or a version that is known to be broken.
    """
    for flavour in flavours:
        for module in _MODULES[flavour]:
            trt = _import(module, flavour)
            if trt is not None:
                return _check_version(_make_library(flavour, trt))
    wanted = " or ".join(NAMES[flavour] for flavour in flavours)
    raise MissingDependencyError(
        f"running a plan needs {wanted}, which is not installed", remedy=", or ".join(_INSTALL[flavour] for flavour in flavours)
    )


def _import(module: str, flavour: Flavour) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None
        raise _broken(module, flavour, error) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise _broken(module, flavour, error) from error


def _broken(module: str, flavour: Flavour, error: Exception) -> MissingDependencyError:
    text = " ".join(str(error).split())
    return MissingDependencyError(f"{NAMES[module]} is installed but cannot be imported: {text}", remedy=f"install it again: {_INSTALL[flavour]}")


def _check_version(library: Library) -> Library:
    number = tuple(int(part) if part.isdecimal() else 0 for part in library.version.split(".")[:2])
    if library.flavour == "tensorrt" and (number < (8, 5) or number == (10, 2)):
        problem = "is known to be broken" if number == (10, 2) else "is too old: expected 8.5 or later"
        raise PlanError(f"{library.name} {problem}", remedy="install TensorRT 10.3 or later, and build the plan with it")
    return library


def _make_library(flavour: Flavour, trt: Any) -> Library:
    log = TrtLog()
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            # Called from TensorRT's threads; whatever is raised here would end the process.
            found = levels.get(level)
            if found == logging.ERROR:
                log.add(message)
            if found is not None:
                logger.log(min(found, logging.WARNING), "%s", message)

    return Library(flavour, trt, str(trt.__version__), log, TrtLogger())

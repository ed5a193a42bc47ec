"""What building and running plans share of TensorRT: its flavours, its import, and what it logs.

Standard library only: TensorRT is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

from .errors import MissingDependencyError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL: dict[Flavour, str] = {"tensorrt": "pip install 'repvgg-deploy[tensorrt]'", "tensorrt_rtx": "pip install 'repvgg-deploy[rtx]'"}
BROKEN_VERSION = (10, 2)
LEAN = "tensorrt_lean"
"""The module of TensorRT's lean runtime: it runs version-compatible plans, and builds none."""
_QUOTED = 5
_QUOTED_CHARACTERS = 400


def import_tensorrt(module: str, name: str, *, remedy: str) -> Any:
    """Imports a module of TensorRT; None where it is not installed.

    Args:
        module: Such as `tensorrt_rtx`.
        name: For people.
        remedy: Where it is installed and does not load.

    Raises:
        MissingDependencyError: It is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return None
        if error.__cause__ is not None and not isinstance(error.__cause__, Exception):  # Ctrl-C, which its C++ makes an ImportError of
            raise error.__cause__ from None
        raise MissingDependencyError(f"{name} is installed but cannot be imported: {' '.join(str(error).split())}", remedy=remedy) from error


def is_installed(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    return sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None


def make_trt_logger(trt: Any, hear: Callable[[str, str], None]) -> Any:
    """An object of TensorRT's logger class.

    Args:
        trt: The module.
        hear: Called with the name of the severity (`ERROR`; internal errors too) and the message, from TensorRT's own threads; not with VERBOSE.
            What it raises would end the process.
    """
    severity = trt.ILogger.Severity
    names = {severity.INTERNAL_ERROR: "ERROR", severity.ERROR: "ERROR", severity.WARNING: "WARNING", severity.INFO: "INFO"}

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            name = names.get(level)
            if name is not None:
                hear(name, message)

    return TrtLogger()


def quote(lines: Iterable[str]) -> str:
    """The first lines as they may stand in a message: without repetitions, each on a line of its own."""
    different = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    shown = [line if len(line) <= _QUOTED_CHARACTERS else f"{line[:_QUOTED_CHARACTERS]}…" for line in different[:_QUOTED]]
    more = [f"and {len(different) - _QUOTED} more"] if len(different) > _QUOTED else []
    return "".join(f"\n    {line}" for line in [*shown, *more]) or "\n    (it logged nothing)"

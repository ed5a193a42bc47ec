"""TensorRT's own log: kept, so that an error can quote it, and passed on to ours."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

logger = logging.getLogger(__name__)

_KEPT = 200
_QUOTED = 5
_QUOTED_CHARACTERS = 400


def make_trt_logger(trt: Any) -> Any:
    """An object of TensorRT's logger class that keeps errors and warnings in the lists `errors` and `warnings`.

    Args:
        trt: The module.
    """
    severity = trt.ILogger.Severity
    is_error = (severity.ERROR, severity.INTERNAL_ERROR)

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.lock = threading.Lock()

        def log(self, level: Any, message: str) -> None:
            # Called from TensorRT's threads; whatever is raised here would end the process.
            if level == severity.VERBOSE:
                return
            with self.lock:
                kept = self.errors if level in is_error else self.warnings if level == severity.WARNING else None
                if kept is not None and len(kept) < _KEPT:
                    kept.append(message)
            logger.debug("%s", message)

    return TrtLogger()


def quote(lines: list[str]) -> str:
    """The first lines as they may stand in a message: without repetitions, each on a line of its own."""
    different = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    shown = [line if len(line) <= _QUOTED_CHARACTERS else f"{line[:_QUOTED_CHARACTERS]}…" for line in different[:_QUOTED]]
    more = [f"and {len(different) - _QUOTED} more"] if len(different) > _QUOTED else []
    return "".join(f"\n    {line}" for line in [*shown, *more]) or "\n    (it logged nothing)"


def find_nodes(lines: list[str], names: list[str]) -> list[str]:
    """Which of the names stand in the lines, as whole words, in order."""
    text = "\n".join(lines)
    return [name for name in names if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", text)]

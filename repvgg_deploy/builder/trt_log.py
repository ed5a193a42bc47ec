"""What TensorRT logs during a build: errors kept, so that a message can quote them, and everything passed on to our own log."""

from __future__ import annotations

import logging
import re
from typing import Any

from ..files.plan_place import make_trt_logger

logger = logging.getLogger(__name__)

_KEPT = 200


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

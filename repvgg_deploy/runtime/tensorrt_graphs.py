"""CUDA graphs of an engine: what is captured, and when it is given up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import CudaError
from .cuda.port import CAPTURE_LOCK, CudaPort
from .tensorrt_context import choose_buckets
from .tensorrt_plan import OpenPlan

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3


@dataclass(slots=True)
class GraphSwitch:
    """Whether CUDA graphs are used by an engine.

    A capture can fail because another thread of the process waited for the whole device just then (torch.cuda.synchronize() does), which is no
    reason to do without for good: the third failure turns them off, and is logged.
    """

    on: bool
    buckets: frozenset[int] = field(default_factory=frozenset)
    failures: int = 0

    def note_failure(self, reason: object) -> None:
        """A capture failed: its batch was run without, and another one is tried later, or none any more."""
        self.failures += 1
        text = " ".join(str(reason).split())
        if self.failures < _MOST_FAILURES:
            logger.info("a CUDA graph could not be captured, which is tried again: %s", text)
        elif self.on:
            self.on = False
            logger.warning("CUDA graphs are left out from now on, the engine runs without: %s", text)


def make_switch(plan: OpenPlan, port: CudaPort, wanted: bool) -> GraphSwitch:
    """The switch of an engine."""
    return GraphSwitch(wanted and port.has_graphs, choose_buckets(plan.interface))


def capture_graph(port: CudaPort, stream: Any, work: Callable[[], None]) -> Any:
    """The executable graph of what `work` puts on a stream.

    Raises:
        CudaError: It cannot be captured; the stream can be used again.
    """
    with CAPTURE_LOCK:
        port.begin_capture(stream)
        try:
            work()
        except BaseException:
            with contextlib.suppress(CudaError):  # of the two errors, that of the work says more
                port.destroy_graph(port.end_capture(stream))
            raise
        return port.end_capture(stream)

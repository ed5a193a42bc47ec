"""Tests wait for what happens, and decide when it does; no clock does either."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_SECONDS = 300  # until a test that hangs is given up; none waits so long, on however busy a machine


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_SECONDS} s for {what}"
        time.sleep(0.02)


class Gate:
    """A file that holds up the models that were told of it, in whatever process, for as long as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reached = Path(f"{path}.reached")

    def close(self) -> None:
        self._reached.unlink(missing_ok=True)
        self.path.touch()

    def open(self) -> None:
        self.path.unlink(missing_ok=True)

    def pass_through(self) -> None:
        """For the model, before each batch."""
        while self.path.exists():
            self._reached.touch()
            time.sleep(0.005)

    def wait_for_batch(self) -> None:
        """Until a batch is held up."""
        wait_until(self._reached.exists, "a batch to be under way")

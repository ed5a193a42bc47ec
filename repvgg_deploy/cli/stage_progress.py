"""A bar for each stage of a long job, one after the other."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from .common import Progress


class StageProgress:
    """Told of stages, steps done and steps in all; draws what `Progress` draws, anew for each stage.

    Args:
        stream: Where to draw; standard error for None.
    """

    def __init__(self, *, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bar: Progress | None = None
        self._stage, self._done, self._total = "", 0, 0

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """So many steps of a stage are done; fewer than before begin it again."""
        if self._bar is None or (stage, total) != (self._stage, self._total) or done < self._done:
            self._close()
            self._bar = Progress(total, stage, stream=self._stream)
            self._bar.__enter__()
            self._stage, self._done, self._total = stage, 0, total
        self._bar.advance(done - self._done)
        self._done = done

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

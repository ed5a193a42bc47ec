"""Batches that are handed in and run by threads of their own. The threads start with the first of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import EngineBusyError, InputError
from .results import Result


class Submissions:
    """A bounded queue before a few threads.

    Args:
        workers: Threads.
        max_pending: What may wait or run at once, beyond one a thread.
    """

    def __init__(self, workers: int, max_pending: int) -> None:
        self._workers = workers
        self._limit = workers + max_pending
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._pending = 0
        self._own = threading.local()

    @property
    def waiting(self) -> int:
        """Batches that wait for a thread."""
        return max(0, self._pending - self._workers)

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Hands in some work.

        Raises:
            EngineBusyError: Too much waits already.
            InputError: The process forked after the first submission.
        """
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, "repvgg-engine", self._begin_thread)
                self._process = os.getpid()
            if self._process != os.getpid():
                raise InputError("this Engine was used before a fork, and threads do not follow", remedy="open the Engine in each worker process")
            if self._pending >= self._limit:
                raise EngineBusyError(
                    f"{self._pending} batches are running or waiting, and no more may",
                    remedy="try again later, add Engines, or open this one with a larger EngineOptions(max_pending=…)",
                )
            self._pending += 1
            try:
                future = self._pool.submit(work)
            except RuntimeError as error:  # the interpreter is shutting down
                self._pending -= 1
                raise InputError(f"nothing can be handed in any more: {error}", remedy="hand it in before the program ends") from error
        future.add_done_callback(self._done)
        return future

    def is_own_thread(self) -> bool:
        """Whether the caller is one of the threads that run what is handed in."""
        return getattr(self._own, "yes", False)

    def close(self) -> None:
        """Ends the threads when what was handed in is done; does not wait."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown(wait=False)

    async def wait(self, future: Future[Result]) -> Result:
        """The answer, for a coroutine."""
        import asyncio  # late, as in `Batcher.infer_async`

        return await asyncio.wrap_future(future)

    def _begin_thread(self) -> None:
        self._own.yes = True

    def _done(self, future: Future[Result]) -> None:
        with self._lock:
            self._pending -= 1

"""Who may use a model and when it is freed (`Lease`), and batches that threads of an Engine run (`Submissions`)."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import EngineBusyError, InputError
from .results import Result

logger = logging.getLogger(__name__)


class Lease:
    """Counts users of a resource, and frees it once it is closed and the last of them is done.

    `close` does not wait: it may be called from any thread, also from one that is a user, without a deadlock. `wait`
    does.

    Args:
        free: Called once, by the thread that closes or by the last user.
    """

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free
        self._changed = threading.Condition()
        self._users = 0
        self._closed = False
        self._freed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def acquire(self) -> bool:
        """Counts the caller as a user, who must `release`; False when closed."""
        with self._changed:
            if self._closed:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Ends one use."""
        with self._changed:
            self._users -= 1
            last = self._closed and self._users == 0 and not self._freed
        if last:
            self._finish()

    def close(self) -> None:
        """Lets nobody else in; a second call does nothing."""
        with self._changed:
            first, self._closed = not self._closed, True
            idle = self._users == 0
        if first and idle:
            self._finish()

    def abandon(self) -> None:
        """Closes, and never frees anything.

        For a child of `fork`: the threads that freeing would end, and the owner of the lock, are not there.
        """
        self._closed = self._freed = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._free))  # or the end of the program would free it

    def wait(self) -> None:
        """Returns when the resource is freed. Call it after `close`, and not as a user, who would wait for itself."""
        with self._changed:
            self._changed.wait_for(lambda: self._freed)

    def _finish(self) -> None:
        try:
            self._free()
        finally:
            with self._changed:
                self._freed = True
                self._changed.notify_all()


class Submissions:
    """A bounded queue before a few threads, which start with the first batch.

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
                raise InputError(
                    "this Engine was used before a fork, and threads do not follow",
                    remedy="open the Engine in each worker process",
                )
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
                raise InputError(
                    f"nothing can be handed in any more: {error}", remedy="hand it in before the program ends"
                ) from error
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

    def _begin_thread(self) -> None:
        self._own.yes = True

    def _done(self, future: Future[Result]) -> None:
        with self._lock:
            self._pending -= 1


def let_go(lease: Lease, submissions: Submissions, process: int) -> None:
    """Frees the model once it is idle, and ends the threads; in a child of `fork` it leaves all to the parent."""
    if process == os.getpid():
        lease.close()
        submissions.close()
    else:
        lease.abandon()


async def wait_for(future: Future[Result]) -> Result:
    """The answer, for a coroutine."""
    import asyncio  # whoever has a coroutine has it; for others it is a fifth of the time to import an Engine's module

    return await asyncio.wrap_future(future)


def answer(future: Future[Result], make: Callable[[], Result]) -> None:
    """Sets what is made, or the error of making it: where one copy finds no memory, others still get their answers."""
    try:
        made = make()
    except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
        fail(future, error)
        return
    with _survived():
        future.set_result(made)


def fail(future: Future[Result], error: BaseException) -> None:
    """Sets an error."""
    with _survived():
        future.set_exception(error)


@contextlib.contextmanager
def _survived() -> Iterator[None]:
    """`sys.exit` in a callback would end a thread that others wait for. A Future logs other errors itself."""
    try:
        yield
    except BaseException:
        logger.exception("a callback of a future tried to end the thread that called it")

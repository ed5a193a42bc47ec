"""The slots of an engine: made when they are needed, up to a limit, and lent to one thread each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ..errors import CudaContextError, CudaError, CudaMemoryError

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """What the pool holds."""

    def close(self) -> CudaError | None:
        """Frees everything; the first error on the way."""


_S = TypeVar("_S", bound=Closable)


class SlotPool(Generic[_S]):
    """No lock is held while a slot works.

    Args:
        make: Makes a slot; called by one thread at a time.
        limit: How many there may be. Where TensorRT or the memory allows fewer, it becomes what they allow.
        stops: Errors of `make` that mean so.
    """

    def __init__(self, make: Callable[[], _S], limit: int, stops: tuple[type[CudaError], ...] = (CudaMemoryError,)) -> None:
        self._make, self._limit, self._stops = make, limit, stops
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._idle: list[_S] = []
        self._count = 0
        self._lost: CudaContextError | None = None

    def acquire(self) -> _S:
        """The slot used last of those that are idle (its caches are warm), a new one, or the next one that becomes idle.

        Raises:
            CudaContextError: The GPU's state in this process is lost.
            CudaError: The first slot cannot be made.
        """
        while True:
            found = self.acquire_idle()
            if found is not None:
                return found
            with self._changed:
                while not self._idle and self._count >= self._limit and self._lost is None:
                    self._changed.wait()

    def acquire_idle(self) -> _S | None:
        """A slot, also a new one, if it can be had without waiting for those that are lent; raises as `acquire`."""
        with self._changed:
            if self._lost is not None:
                raise _again(self._lost)
            if self._idle:
                return self._idle.pop()
            if self._count >= self._limit:
                return None
            self._count += 1
        return self._grow()

    def release(self, slot: _S) -> None:
        """Gives back a slot that is well."""
        with self._changed:
            self._idle.append(slot)
            self._changed.notify()

    def discard(self, slot: _S, error: BaseException) -> None:
        """Gives back a slot in which something failed: it is freed, and the next request gets a new one."""
        problem = slot.close()
        lost = error if isinstance(error, CudaContextError) else problem if isinstance(problem, CudaContextError) else None
        if problem is not None and lost is None:
            logger.warning("a slot could not be freed wholly: %s", problem.message)
        with self._changed:
            self._count -= 1
            self._lost = self._lost or lost
            self._changed.notify_all()

    def close(self) -> None:
        """Frees all slots; none is lent."""
        with self._changed:
            slots, self._idle = self._idle, []
            self._count -= len(slots)
        for slot in slots:
            problem = slot.close()
            if problem is not None:
                logger.warning("a slot could not be freed wholly: %s", problem.message)

    def _grow(self) -> _S | None:
        """A new slot; None where no more can be made and there are others to wait for."""
        try:
            with self._making:
                return self._make()
        except BaseException as error:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()
                if not isinstance(error, self._stops) or self._count == 0:
                    if isinstance(error, CudaContextError):
                        self._lost = self._lost or error
                    raise
                self._limit = self._count
            logger.warning("%d execution contexts is what there is: %s", self._limit, str(error).partition("\n")[0])
            return None


def _again(error: CudaContextError) -> CudaContextError:
    """The same error for another caller: an exception object is raised once only, as each raise adds to its traceback."""
    return CudaContextError(f"this Engine can no longer be used: {error.message}", remedy=error.remedy)

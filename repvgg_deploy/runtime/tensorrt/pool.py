"""The slots of an Engine: made when they are needed, up to a limit, and lent to one thread each."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from ...errors import CudaContextError, CudaMemoryError, InputError
from .slot import NoMoreContextsError, Slot

logger = logging.getLogger(__name__)


class SlotPool:
    """No lock is held while a slot works.

    Args:
        make: Makes a slot; called by one thread at a time.
        limit: How many there may be. Where TensorRT or the memory allows fewer, it becomes what they allow.
    """

    def __init__(self, make: Callable[[], Slot], limit: int) -> None:
        self._make, self._limit = make, limit
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._idle: list[Slot] = []
        self._count = 0
        self._lost: CudaContextError | None = None

    def acquire(self) -> Slot:
        """The slot used last of those that are idle (its caches are warm), a new one, or the next that becomes idle.

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

    def acquire_idle(self) -> Slot | None:
        """A slot, also a new one, if it can be had without waiting for those that are lent; raises as `acquire`."""
        with self._changed:
            if self._lost is not None:
                # A new object for each caller: each raise adds to the traceback of the one it raises.
                raise CudaContextError(
                    f"this Engine can no longer be used: {self._lost.message}", remedy=self._lost.remedy
                )
            if self._idle:
                return self._idle.pop()
            if self._count >= self._limit:
                return None
            self._count += 1
        return self._grow()

    def _grow(self) -> Slot | None:
        """A new slot; None where no more can be made and there are others to wait for."""
        try:
            with self._making:
                return self._make()
        except BaseException as error:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()
                if not isinstance(error, (CudaMemoryError, NoMoreContextsError)) or self._count == 0:
                    if isinstance(error, CudaContextError):
                        self._lost = self._lost or error
                    raise
                self._limit = self._count
            logger.warning("%d execution contexts is what there is: %s", self._limit, str(error).partition("\n")[0])
            return None

    @contextlib.contextmanager
    def use(self, slot: Slot) -> Iterator[Slot]:
        """Takes back a slot: idle again, or freed where something failed in it."""
        try:
            yield slot
        except InputError:  # refused before anything was put on a stream
            self.release(slot)
            raise
        except BaseException as error:
            self._discard(slot, error)
            raise
        else:
            self.release(slot)

    def release(self, slot: Slot) -> None:
        """Gives back a slot that is well."""
        with self._changed:
            self._idle.append(slot)
            self._changed.notify()

    def _discard(self, slot: Slot, error: BaseException) -> None:
        """The next request gets a new slot."""
        problem = slot.close()
        lost = next((one for one in (error, problem) if isinstance(one, CudaContextError)), None)
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

"""Who may use a resource, and when it may be freed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable


class Lease:
    """Counts users of a resource, and frees it once it is closed and the last of them is done.

    `close` does not wait: it may be called from any thread, also from one that is a user, without a deadlock. `wait` does.

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
        """Closes, and frees nothing for ever: in a child of `fork`, where the threads that freeing would end and the lock's owner are not."""
        self._closed = self._freed = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._free))  # or the end of the program would free it

    def wait(self) -> None:
        """Returns when the resource is freed. Not to be called by a user, who would wait for itself, nor before `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._freed)

    def _finish(self) -> None:
        try:
            self._free()
        finally:
            with self._changed:
                self._freed = True
                self._changed.notify_all()

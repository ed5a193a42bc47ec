"""Who may use a resource, and when it may be freed."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Lease:
    """Counts users of a resource, and frees it once it is closed and the last of them is done.

    `close` does not wait: it may be called from any thread, also from one that is a user, without a deadlock.

    Args:
        free: Frees the resource; called once.
    """

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def acquire(self) -> bool:
        """Counts the caller as a user, who must `release`; False when closed."""
        with self._lock:
            if self._closed:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Ends one use."""
        with self._lock:
            self._users -= 1
            last = self._closed and self._users == 0
        if last:
            self._free()

    def close(self) -> None:
        """Lets nobody else in; a second call does nothing."""
        with self._lock:
            first, self._closed = not self._closed, True
            idle = self._users == 0
        if first and idle:
            self._free()

"""Giving memory back to the operating system. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def release_freed_memory() -> None:
    """Collects reference cycles and asks the C library to return freed heap memory, where it can (glibc); does nothing elsewhere.

    glibc keeps freed blocks of up to 32 MiB for itself. Between two stages that hold the weights in turn, that would be one more copy of them.
    Source: malloc_trim(3).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

"""A part of a mapped file as the stream that `pickletools.genops` reads, without copying what is large."""

from __future__ import annotations

import mmap
import re

from .lazy_tensor import MalformedError

_LARGE_READ = 1 << 16
_MAX_LINE = 1 << 28
_ESCAPES = re.compile(rb"\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2})")
_ESCAPED = (b"S", b"c", b"i", b"P")  # opcodes whose text `genops` unescapes


class PickleStream:
    """A part of a buffer as the file that `pickletools.genops` reads: small reads are bytes, large ones views of the buffer.

    Args:
        buffer: Usually a mapped file.
        start: First byte.
        end: After the last byte.
    """

    def __init__(self, buffer: bytes | mmap.mmap, start: int, end: int) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._position = start
        self._end = end
        self._last: bytes | memoryview = b""

    def tell(self) -> int:
        """Offset in the buffer."""
        return self._position

    @property
    def exhausted(self) -> bool:
        """Whether all bytes were read."""
        return self._position >= self._end

    def read(self, size: int) -> bytes | memoryview:
        """`size` bytes, or what is left."""
        start = self._position
        self._position = end = min(start + max(size, 0), self._end)
        self._last = self._view[start:end] if end - start > _LARGE_READ else self._buffer[start:end]
        return self._last

    def readline(self) -> bytes:
        """Up to and including the next line feed.

        Raises:
            MalformedError: It is text with an escape that Python 2 never wrote, of which `genops` would warn.
        """
        start = self._position
        found = self._buffer.find(b"\n", start, min(start + _MAX_LINE, self._end))
        self._position = found + 1 if found >= 0 else self._end
        line = self._buffer[start : self._position] if found >= 0 else b""
        if self._last in _ESCAPED and b"\\" in _ESCAPES.sub(b"", line):
            raise MalformedError(f"the pickle has an invalid escape at byte {start}")
        return line

"""Device memory of results: used again and again, and never while somebody's stream may still read it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ..errors import CudaError, CudaMemoryError
from .cuda.port import CAPTURE_LOCK, CudaPort

logger = logging.getLogger(__name__)

_ALIGNMENT = 512
_MOST_IDLE = 8
UNKNOWN_STREAM = -1
"""In place of a handle: work that may touch the block is on a stream that nobody named."""


@dataclass(eq=False, slots=True)
class Block:
    """One piece of device memory.

    Attributes:
        address: Of its first byte.
        size_bytes: Of the piece.
        streams: Handles of the streams whose work may touch it, and UNKNOWN_STREAM.
    """

    address: int
    size_bytes: int
    streams: set[int] = field(default_factory=set)


class DevicePool:
    """Blocks of one device.

    Args:
        port: CUDA.
        device_id: Which GPU.
    """

    def __init__(self, port: CudaPort, device_id: int) -> None:
        self._port = port
        self.device_id = device_id
        self._lock = threading.RLock()
        self._returned: deque[Block] = deque()  # the garbage collector puts blocks here, in any thread and at any moment: it takes no lock
        self._idle: list[Block] = []
        self._closed = False

    def take(self, size_bytes: int, stream: int) -> Block:
        """A block that nothing but the stream itself may still be using. Called inside `on_device`.

        Raises:
            CudaMemoryError: There is no memory, also after all idle blocks were freed.
        """
        wanted = -(-max(size_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._idle.extend(self._drain())
            # Another stream may be gone by now, and its handle must not be touched: what it used waits until the whole device was waited for.
            fitting = next((block for block in reversed(self._idle) if block.size_bytes == wanted and block.streams <= {stream}), None)
            if fitting is not None:
                self._idle.remove(fitting)
                fitting.streams = {stream}
                return fitting
            if len(self._idle) > _MOST_IDLE:
                self._free_idle()
            try:
                address = self._port.allocate(wanted)
            except CudaMemoryError:
                if not self._idle:
                    raise
                self._free_idle()
                address = self._port.allocate(wanted)
        return Block(address, wanted, {stream})

    def give_back(self, block: Block) -> None:
        """Nobody refers to the block any more; work that reads it may still be on its streams."""
        self._returned.append(block)
        if self._closed:
            self._free_returned()

    def order(self, stream: int, *, after: int) -> None:
        """What comes next on a stream begins after what another one has now."""
        with self._port.on_device(self.device_id):
            self._order(stream, after)

    def close(self) -> None:
        """Frees what is idle; what somebody still holds is freed when it is let go."""
        self._closed = True
        self._free_returned()

    def _free_returned(self) -> None:
        try:
            # In this order: the garbage collector may bring a thread here that holds the first, in the midst of a capture.
            with self._port.on_device(self.device_id), CAPTURE_LOCK, self._lock:
                self._idle.extend(self._drain())
                self._free_idle()
        except CudaError as error:
            logger.warning("device memory could not be freed: %s", error.message)

    def _drain(self) -> list[Block]:
        found = []
        while self._returned:
            try:
                found.append(self._returned.popleft())
            except IndexError:  # another thread was faster
                break
        return found

    def _free_idle(self) -> None:
        if any(block.streams for block in self._idle):
            self._port.synchronize()
        while self._idle:
            self._port.free(self._idle.pop().address)

    def _order(self, stream: Any, user: int) -> None:
        event = self._port.create_event()
        try:
            self._port.record_event(event, user)
            self._port.wait_event(stream, event)
        finally:
            self._port.destroy_event(event)

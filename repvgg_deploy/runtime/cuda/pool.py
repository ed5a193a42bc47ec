"""Memory that is used again: of results on the GPU, and of batches that a caller fills, page-locked on the host.

A block is never lent while somebody's stream may still read it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CudaError, CudaMemoryError
from .port import CAPTURE_LOCK, CudaPort

logger = logging.getLogger(__name__)
DEFAULT_STREAMS = frozenset((0, 1, 2))
"""CUDA's handles of default streams: 0 and 1 are the legacy one, 2 is another stream in each thread.

Source: CUDA driver API, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
"""
UNKNOWN_STREAM = -1
"""In place of a stream's handle: work that may touch a block is on a stream that nobody named."""
_LEGACY, _PER_THREAD = 1, 2
_SMALLEST_BYTES = 512
_FINE_BYTES = 1 << 20  # larger blocks are of finer sizes
_MOST_IDLE, _MOST_WAITING = 128, 64
_MOST_IDLE_BYTES = 256 << 20
_FEW = 8  # so many may be of any size


def number_in_protocols(handle: int) -> int:
    """A handle as both protocols write it: there 0 is forbidden, and the legacy default stream is always 1."""
    return handle or _LEGACY


@dataclass(eq=False, slots=True)
class Block:
    """One piece of memory, with the identities of the streams whose work may touch it, and UNKNOWN_STREAM."""

    address: int
    size_bytes: int
    streams: set[int] = field(default_factory=set)


class DevicePool:
    """Blocks of device memory on one GPU, for results; a small pool of a few sizes, so that a steady load takes none.

    A block that came back is lent again to the stream that used it, whose next work comes after what it has. To other
    streams it is lent after everything on the device was waited for, which happens once in `_MOST_WAITING` such blocks:
    a stream may be gone by then, so that its handle must not be touched. The legacy default stream never goes: what it
    used is lent to others after an event on it.

    Args:
        port: CUDA.
        device_id: Which GPU.
        page_locked: Whether it is memory of the host, which no stream uses any more when it comes back.
    """

    def __init__(self, port: CudaPort, device_id: int, *, page_locked: bool = False) -> None:
        self._port = port
        self._take, self._free = (port.allocate_host, port.free_host) if page_locked else (port.allocate, port.free)
        self.device_id = device_id
        self._lock = threading.RLock()
        # The garbage collector puts blocks here, in any thread and at any moment: it takes no lock.
        self._returned: deque[Block] = deque()
        self._idle: dict[int, list[Block]] = {}  # by size, the one used last at the end
        self._closed = False
        self._thread = threading.local()
        self._numbers = itertools.count(2)

    def identify_stream(self, handle: int) -> int:
        """A number for each stream, which a handle is not: the legacy default stream has two, and a 2 is many streams.

        Those of threads are negative, and none is given twice.
        """
        if handle != _PER_THREAD:
            return number_in_protocols(handle)
        if not hasattr(self._thread, "number"):
            self._thread.number = -next(self._numbers)
        number: int = self._thread.number
        return number

    def take(self, size_bytes: int, stream: int | None = None) -> Block:
        """A block that nothing but the stream itself may still be using. Called inside `on_device`.

        Args:
            size_bytes: At least so much.
            stream: Handle of the stream that will use it, or that everything that uses it comes after; None for memory
                of the host.

        Raises:
            CudaMemoryError: There is no memory, also after all idle blocks were freed.
        """
        size = round_up_size(size_bytes)
        users = set() if stream is None else {self.identify_stream(stream)}
        with self._lock:
            self._sort_in()
            found = self._find(size, users)
            if found is None and self._make_room():
                found = self._find(size, users)
            if found is None:
                return Block(self._allocate(size), size, users)
            if stream is not None and found.streams - users:
                self.order(stream, after=_LEGACY)
            self._idle[size].remove(found)
            found.streams = users
            return found

    def give_back(self, block: Block) -> None:
        """Nobody refers to the block any more; work that reads it may still be on its streams."""
        self._returned.append(block)
        if self._closed:
            self._free_returned()

    def order(self, stream: int, *, after: int) -> None:
        """What comes next on a stream begins after what another one has now."""
        with self._port.on_device(self.device_id):
            event = self._port.create_event()
            try:
                self._port.record_event(event, after)
                self._port.wait_event(stream, event)
            finally:
                self._port.destroy_event(event)

    def wait_for_device(self) -> None:
        """Waits for all work on the GPU."""
        with self._port.on_device(self.device_id):
            self._port.synchronize()

    def close(self) -> None:
        """Frees what is idle; what somebody still holds is freed when it is let go."""
        self._closed = True
        self._free_returned()

    def _find(self, size: int, users: set[int]) -> Block | None:
        """An idle block that a stream may use; one that others may use, too, is left to them if it can be."""
        blocks = (block for block in reversed(self._idle.get(size, ())) if block.streams <= {*users, _LEGACY})
        return max(blocks, key=lambda block: (bool(users & block.streams), not block.streams), default=None)

    def _allocate(self, size: int) -> int:
        try:
            return self._take(size)
        except CudaMemoryError:
            if not any(self._idle.values()):
                raise
            self._free_idle()
            return self._take(size)

    def _make_room(self) -> bool:
        """Keeps what is idle small; whether blocks became free for all streams."""
        blocks = [block for blocks in self._idle.values() for block in blocks]
        waiting = [block for block in blocks if block.streams]
        waits = len(waiting) >= _MOST_WAITING or _are_large(waiting)
        if waits:
            self._port.synchronize()
            for block in waiting:
                block.streams.clear()
        free = [block for block in blocks if not block.streams]
        while free and (len(blocks) > _MOST_IDLE or _are_large(blocks)):
            block = free.pop()
            blocks.remove(block)
            self._idle[block.size_bytes].remove(block)
            self._free(block.address)
        return waits

    def _free_returned(self) -> None:
        try:
            # In this order: the garbage collector may bring a thread here that holds CAPTURE_LOCK, in the midst of a
            # capture.
            with self._port.on_device(self.device_id), CAPTURE_LOCK, self._lock:
                self._sort_in()
                self._free_idle()
        except CudaError as error:
            logger.warning("memory could not be freed: %s", error.message)

    def _sort_in(self) -> None:
        while self._returned:
            try:
                block = self._returned.popleft()
            except IndexError:  # another thread was faster
                break
            self._idle.setdefault(block.size_bytes, []).append(block)

    def _free_idle(self) -> None:
        if any(block.streams for blocks in self._idle.values() for block in blocks):
            self._port.synchronize()
        for blocks in self._idle.values():
            while blocks:
                self._free(blocks.pop().address)


class HostMemory:
    """Page-locked memory as NumPy takes it: `np.asarray` of it holds it, and it goes back with the last such array."""

    def __init__(self, pool: DevicePool, block: Block) -> None:
        shape = (block.size_bytes,)
        self.__array_interface__ = {"data": (block.address, False), "shape": shape, "typestr": "|u1", "version": 3}
        release = weakref.finalize(self, pool.give_back, block)
        release.atexit = False  # the process frees it, and CUDA may be gone by then


def find_host_memory(array: NDArray[Any]) -> int | None:
    """The address of an array, or of a part of one, whose bytes lie in page-locked memory one behind the other."""
    owner: object = array
    while type(owner) is np.ndarray:
        owner = owner.base
    return array.ctypes.data if isinstance(owner, HostMemory) and array.flags.c_contiguous else None


def round_up_size(size_bytes: int) -> int:
    """The size of the block for so many bytes: few sizes, so that one is found again; above 1 MiB four an octave."""
    whole = 1 << (max(size_bytes, _SMALLEST_BYTES) - 1).bit_length()
    step = whole if whole <= _FINE_BYTES else whole // 8
    return -(-max(size_bytes, 1) // step) * step


def _are_large(blocks: list[Block]) -> bool:
    return len(blocks) > _FEW and sum(block.size_bytes for block in blocks) > _MOST_IDLE_BYTES

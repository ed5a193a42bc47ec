"""Memory of one execution context: owned, grown and freed in one place.

The slots of an engine: made when they are needed, up to a limit, and lent to one thread each.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import CudaContextError, CudaError, CudaMemoryError
from ..cuda.port import CudaPort
from .plan import Interface, Shape

_ALIGNMENT = 256


def view_host(address: int, size_bytes: int) -> NDArray[np.uint8]:
    """Page-locked memory as an array, valid until it is freed."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


class Owned:
    """What was taken from CUDA and must be given back, each once, the newest first."""

    def __init__(self) -> None:
        self._frees: list[tuple[object, Callable[[], None]]] = []

    def add(self, handle: object, free: Callable[[], None]) -> None:
        """Notes how a handle is freed."""
        self._frees.append((handle, free))

    def free(self, handle: object) -> None:
        """Frees one now."""
        for index, (known, free) in enumerate(self._frees):
            if known is handle:
                del self._frees[index]
                free()
                return

    def free_all(self) -> CudaError | None:
        """Frees the rest, whatever fails on the way; the first failure."""
        first: CudaError | None = None
        while self._frees:
            _, free = self._frees.pop()
            try:
                free()
            except CudaError as error:
                first = first or error
        return first


class Buffer:
    """One tensor's memory on the device and its page-locked twin on the host.

    Args:
        port: CUDA.
        owned: Where the memory is noted.
        size_bytes: At least this much.
    """

    def __init__(self, port: CudaPort, owned: Owned, size_bytes: int) -> None:
        self._port, self._owned = port, owned
        self.size_bytes = -(-max(size_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        self.device = port.allocate(self.size_bytes)
        self._device_key = object()
        owned.add(self._device_key, lambda: port.free(self.device))
        self.host = port.allocate_host(self.size_bytes)
        self._host_key = object()
        owned.add(self._host_key, lambda: port.free_host(self.host))
        self._bytes = view_host(self.host, self.size_bytes)

    def view(self, dtype: np.dtype[Any], shape: Shape) -> NDArray[Any]:
        """The host side as an array of that kind, from its beginning."""
        count = dtype.itemsize
        for size in shape:
            count *= size
        array: NDArray[Any] = self._bytes[:count].view(dtype).reshape(shape)
        return array

    def free(self) -> None:
        """Frees both sides."""
        self._bytes = np.empty(0, np.uint8)
        self._owned.free(self._host_key)
        self._owned.free(self._device_key)


class Stage:
    """Buffers for one batch on its way through the GPU; two of them let the copies of one overlap the computing of the other.

    Args:
        port: CUDA.
        owned: Where everything is noted.
        interface: What goes in and out.
    """

    def __init__(self, port: CudaPort, owned: Owned, interface: Interface) -> None:
        self._port, self._owned, self._interface = port, owned, interface
        self._buffers: list[Buffer] = []
        self.arrived, self.computed, self.done = (self._make_event() for _ in range(3))

    def reserve(self, shape: Shape, output_shapes: tuple[Shape, ...]) -> None:
        """Makes room for a batch of a shape. No work on the buffers may be under way."""
        needed = self._count(shape, output_shapes)
        # As much as the largest batch of these images needs, so that it grows once for each image size and not for each
        # batch size.
        rows, most = shape[0], self._interface.largest[0]
        needed = [size if size % rows else size // rows * most for size in needed]
        while self._buffers:
            self._buffers.pop().free()
        for size in needed:
            self._buffers.append(Buffer(self._port, self._owned, size))

    def fits(self, shape: Shape, output_shapes: tuple[Shape, ...]) -> bool:
        """Whether there is room for a batch of a shape already."""
        needed = self._count(shape, output_shapes)
        return len(self._buffers) == len(needed) and all(
            map(lambda size, buffer: size <= buffer.size_bytes, needed, self._buffers)
        )

    def _count(self, shape: Shape, output_shapes: tuple[Shape, ...]) -> list[int]:
        tensors = (self._interface.source, *self._interface.outputs)
        return [tensor.count_bytes(found) for tensor, found in zip(tensors, (shape, *output_shapes), strict=True)]

    @property
    def source(self) -> Buffer:
        """Of the input."""
        return self._buffers[0]

    @property
    def outputs(self) -> list[Buffer]:
        """Of the outputs, in order."""
        return self._buffers[1:]

    @property
    def addresses(self) -> tuple[int, ...]:
        """On the device: input, outputs."""
        return tuple(buffer.device for buffer in self._buffers)

    def _make_event(self) -> Any:
        event = self._port.create_event()
        self._owned.add(event, lambda: self._port.destroy_event(event))
        return event


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

    def __init__(
        self, make: Callable[[], _S], limit: int, stops: tuple[type[CudaError], ...] = (CudaMemoryError,)
    ) -> None:
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
        lost = (
            error if isinstance(error, CudaContextError) else problem if isinstance(problem, CudaContextError) else None
        )
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

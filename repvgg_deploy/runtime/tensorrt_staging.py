"""Memory of one execution context: owned, grown and freed in one place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CudaError
from .cuda.port import CudaPort
from .tensorrt_tensors import Interface, Shape

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
        # As much as the largest batch of these images needs, so that it grows once for each image size and not for each batch size.
        rows, most = shape[0], self._interface.largest[0]
        needed = [size if size % rows else size // rows * most for size in needed]
        while self._buffers:
            self._buffers.pop().free()
        for size in needed:
            self._buffers.append(Buffer(self._port, self._owned, size))

    def fits(self, shape: Shape, output_shapes: tuple[Shape, ...]) -> bool:
        """Whether there is room for a batch of a shape already."""
        needed = self._count(shape, output_shapes)
        return len(self._buffers) == len(needed) and all(map(lambda size, buffer: size <= buffer.size_bytes, needed, self._buffers))

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

"""Memory of a slot, which owns it: buffers on the device with their page-locked twins, and how a batch is copied."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CudaError
from ..cuda.pool import find_host_memory, round_up_size
from ..cuda.port import CudaPort
from .plan import PlanInterface, PlanTensor, Shape

_ALIGNMENT = 256


def view_host(address: int, size_bytes: int) -> NDArray[np.uint8]:
    """Page-locked memory as an array, valid until it is freed."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


class Owned:
    """What was taken from CUDA and must be given back, each once, the newest first."""

    def __init__(self) -> None:
        self._frees: list[tuple[Any, Callable[[Any], None]]] = []

    def add(self, handle: Any, free: Callable[[Any], None]) -> Any:
        """Notes by which call a handle is freed, and gives it back."""
        self._frees.append((handle, free))
        return handle

    def free(self, handle: object) -> None:
        """Frees one now."""
        for index, (known, free) in enumerate(self._frees):
            if known is handle:
                del self._frees[index]
                free(known)
                return

    def free_all(self) -> CudaError | None:
        """Frees the rest, whatever fails on the way; the first failure."""
        first: CudaError | None = None
        while self._frees:
            handle, free = self._frees.pop()
            try:
                free(handle)
            except CudaError as error:
                first = first or error
        return first


class Stage:
    """Buffers for one batch on its way through the GPU: host to device, a run, device to host.

    Two of them let the copies of one batch overlap the computing of the other. Memory is taken in `reserve` only.

    Attributes:
        arrived: Event for a batch that was copied to the device.
        computed: Event for a run that is done.
        done: Event for results that were copied to the host.
    """

    def __init__(self, port: CudaPort, owned: Owned, interface: PlanInterface) -> None:
        self._port, self._owned, self._interface = port, owned, interface
        self._tensors = (interface.source, *interface.outputs)
        self._buffers: list[_Buffer] = []
        self._source_address = 0  # of the batch that was taken last
        self.arrived, self.computed, self.done = (owned.add(port.create_event(), port.destroy_event) for _ in range(3))

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
            self._buffers.append(_Buffer(self._port, self._owned, size))

    def fits(self, shape: Shape, output_shapes: tuple[Shape, ...]) -> bool:
        """Whether there is room for a batch of a shape already."""
        needed = self._count(shape, output_shapes)
        return len(self._buffers) == len(needed) and all(
            size <= buffer.size_bytes for size, buffer in zip(needed, self._buffers, strict=True)
        )

    def _count(self, shape: Shape, output_shapes: tuple[Shape, ...]) -> list[int]:
        return [tensor.count_bytes(found) for tensor, found in zip(self._tensors, (shape, *output_shapes), strict=True)]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Input and outputs, on the device."""
        return tuple(buffer.device for buffer in self._buffers)

    def fill(self, batch: NDArray[Any]) -> None:
        """Takes a batch: by a copy to the page-locked side of the input, or as it is where it is page-locked itself.

        That one must live, and stay as it is, until it was copied to the device.
        """
        source = self._interface.source
        address = find_host_memory(batch) if batch.dtype == source.dtype else None
        if address is None:
            np.copyto(self._buffers[0].view(source, batch.shape), batch)
            address = self._buffers[0].host
        self._source_address = address

    def copy_in(self, shape: Shape, stream: Any) -> None:
        """Puts the copy of the input to the device on a stream."""
        size = self._interface.source.count_bytes(shape)
        self._port.copy(self._buffers[0].device, self._source_address, size, stream)

    def copy_out(self, output_shapes: tuple[Shape, ...], stream: Any) -> None:
        """Puts the copies of the outputs to the host on a stream."""
        for tensor, buffer, found in zip(self._interface.outputs, self._buffers[1:], output_shapes, strict=True):
            self._port.copy(buffer.host, buffer.device, tensor.count_bytes(found), stream)

    def view_outputs(self, output_shapes: tuple[Shape, ...]) -> list[NDArray[Any]]:
        """The page-locked sides of the outputs, which the next batch overwrites."""
        return [
            buffer.view(tensor, found)
            for tensor, buffer, found in zip(self._interface.outputs, self._buffers[1:], output_shapes, strict=True)
        ]


class _Buffer:
    """One tensor's memory on the device and its page-locked twin on the host, of at least so many bytes."""

    def __init__(self, port: CudaPort, owned: Owned, size_bytes: int) -> None:
        self._owned = owned
        self.size_bytes = -(-max(size_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        self.device: int = owned.add(port.allocate(self.size_bytes), port.free)
        self.host: int = owned.add(port.allocate_host(self.size_bytes), port.free_host)
        self._bytes = view_host(self.host, self.size_bytes)

    def view(self, tensor: PlanTensor, shape: Shape) -> NDArray[Any]:
        """The host side as an array of the tensor's kind, from its beginning."""
        array: NDArray[Any] = self._bytes[: tensor.count_bytes(shape)].view(tensor.dtype).reshape(shape)
        return array

    def free(self) -> None:
        """Frees both sides."""
        self._bytes = np.empty(0, np.uint8)
        self._owned.free(self.host)
        self._owned.free(self.device)


class HostRoom:
    """Page-locked memory for the results of one call at a time, which grows and stays."""

    def __init__(self, port: CudaPort, owned: Owned) -> None:
        self._port, self._owned = port, owned
        self._address = 0
        self._bytes = np.empty(0, np.uint8)

    def view(self, sizes_bytes: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Arrays of so many bytes, which the next call overwrites. No work on those of an earlier one is under way."""
        starts = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes_bytes), initial=0))
        if starts[-1] > self._bytes.size:
            size = round_up_size(starts[-1])
            self._bytes = np.empty(0, np.uint8)
            self._owned.free(self._address)
            self._address = self._owned.add(self._port.allocate_host(size), self._port.free_host)
            self._bytes = view_host(self._address, size)
        return [self._bytes[start : start + size] for start, size in zip(starts, sizes_bytes, strict=False)]

"""Arrays that are on the GPU already, as torch, CuPy, pycuda, Numba and others hand them over; and results that stay there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..runtime import dlpack
from .device_memory import UNKNOWN_STREAM, Block, DevicePool

_LEGACY = 1  # how the protocols write the default stream, whose handle is 0
_NO_ORDER = -1  # in DLPack: nothing is read, so nothing need be waited for


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A batch on the GPU.

    Attributes:
        address: Of its first element.
        shape: Of the batch.
        dtype: NumPy's name.
        is_contiguous: Whether it is C-contiguous.
        device_id: Which GPU; None where the array does not say.
        producer: Stream that its maker writes it on and that must be waited for; None where that is done.
        keep: What keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    is_contiguous: bool
    device_id: int | None
    producer: int | None
    keep: object


def is_device_array(batch: object) -> bool:
    """Whether an object says that it lies on a GPU. A NumPy array speaks DLPack, too, of the CPU."""
    if isinstance(batch, np.ndarray):
        return False
    if hasattr(batch, "__dlpack_device__") and hasattr(batch, "__dlpack__"):
        return int(batch.__dlpack_device__()[0]) in (dlpack.CUDA, dlpack.CUDA_MANAGED)
    return _has_interface(batch)


def _has_interface(batch: object) -> bool:
    try:
        return hasattr(batch, "__cuda_array_interface__")
    except (RuntimeError, TypeError):  # torch refuses it for tensors that need a gradient
        return False


def read_shape(batch: Any) -> tuple[int, ...]:
    """Shape of an array, () of what is none. Neither protocol asks for an attribute `shape`: some have none, and DALI's is a method."""
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):
        return shape
    if _has_interface(batch):
        return tuple(batch.__cuda_array_interface__["shape"])
    return dlpack.read_capsule(_export(batch, _NO_ORDER)).shape if is_device_array(batch) else ()


def view_device_array(batch: Any, stream_handle: int) -> DeviceView:
    """Address, shape and type of an array on the GPU.

    Args:
        batch: An array with `__dlpack__` or `__cuda_array_interface__`.
        stream_handle: Where it will be read: with DLPack its maker's work is put before that.

    Raises:
        InputError: The array refuses, for one that needs a gradient.
    """
    if hasattr(batch, "__dlpack__") and hasattr(batch, "__dlpack_device__"):
        capsule = _export(batch, stream_handle or _LEGACY)
        found = dlpack.read_capsule(capsule)
        contiguous = _is_contiguous(found.shape, found.strides_bytes, found.dtype)
        return DeviceView(found.address, found.shape, found.dtype, contiguous, found.device_id, None, (batch, capsule))
    interface = batch.__cuda_array_interface__
    dtype, shape = np.dtype(interface["typestr"]).name, tuple(interface["shape"])
    contiguous = _is_contiguous(shape, interface.get("strides"), dtype) and interface.get("mask") is None
    return DeviceView(int(interface["data"][0]), shape, dtype, contiguous, None, interface.get("stream"), batch)


def _export(batch: Any, stream: int) -> object:
    try:
        return batch.__dlpack__(stream=stream)
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        raise InputError(
            f"batch: {type(batch).__name__} does not hand over its memory: {' '.join(str(error).split())}", remedy="give batch.detach()"
        ) from error


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str) -> bool:
    if strides is None:
        return True
    try:
        expected = np.dtype(dtype).itemsize
    except TypeError:
        return False
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def as_stream_handle(stream: Any) -> int:
    """The handle of a stream of torch, CuPy, pycuda or cuda-python, or a number.

    Raises:
        InputError: It is none of these.
    """
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr", "handle"):
        found = getattr(stream, name, None)
        if isinstance(found, int):
            return found
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    raise InputError(
        f"stream: expected a stream of torch, CuPy or pycuda or its handle, found {stream!r}", remedy="give torch.cuda.current_stream(), say"
    )


class DeviceArray:
    """One result on the GPU. Hand it to torch.from_dlpack, cupy.from_dlpack or cupy.asarray, which do not copy it.

    Attributes:
        shape: Of the array.
        dtype: As the plan has it: float16 stays float16, and the class numbers of TensorRT 8.5 int32.
    """

    def __init__(self, pool: DevicePool, block: Block, shape: tuple[int, ...], dtype: np.dtype[Any], *, stream: int | None) -> None:
        self.shape, self.dtype = shape, dtype
        self._pool, self._block, self._stream = pool, block, stream
        release = weakref.finalize(self, pool.give_back, block)
        release.atexit = False  # the process frees it, and CUDA may be gone by then

    def settle(self) -> None:
        """Everything that writes it was waited for: it belongs to no stream."""
        self._stream = None
        self._block.streams.clear()

    @property
    def device_id(self) -> int:
        """Which GPU."""
        return self._pool.device_id

    @property
    def address(self) -> int:
        """Of the first element."""
        return self._block.address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""
        self._block.streams.add(UNKNOWN_STREAM)  # this protocol does not say where the reader works
        stream = None if self._stream is None else self._stream or _LEGACY
        data = (self._block.address, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "strides": None, "stream": stream, "version": 3}

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._pool.device_id

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        """A capsule for the consumer's stream; newer arguments of the protocol are not needed, as it is never copied.

        None is the default stream, and −1 is a consumer who sees to the order himself.
        """
        reader = _LEGACY if stream is None else stream
        self._block.streams.add(UNKNOWN_STREAM if reader == -1 else reader)
        if reader != -1 and self._stream is not None and reader != (self._stream or _LEGACY):
            self._pool.order(reader, after=self._stream)
        return dlpack.make_capsule(self, self._block.address, self.shape, dtype=self.dtype, device_id=self._pool.device_id)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape} on GPU {self._pool.device_id}>"


@dataclass(frozen=True, slots=True)
class DeviceArrays:
    """The outputs of one batch on the GPU, by name or in order.

    Attributes:
        names: Of the outputs.
        arrays: One for each.
    """

    names: tuple[str, ...]
    arrays: tuple[DeviceArray, ...]

    def __getitem__(self, key: int | str) -> DeviceArray:
        return self.arrays[self.names.index(key) if isinstance(key, str) else key]

    def __iter__(self) -> Iterator[DeviceArray]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

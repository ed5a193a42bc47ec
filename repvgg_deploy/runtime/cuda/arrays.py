"""Arrays that are on the GPU already, as torch, CuPy, pycuda, Numba and others hand them over; and results that stay there.

DLPack capsules read and made with ctypes, so that arrays pass between libraries without torch or CuPy being imported
here.

Source: https://dmlc.github.io/dlpack/latest/c_api.html (DLManagedTensor) and .../python_spec.html.

Device memory of results: used again and again, and never while somebody's stream may still read it.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import CudaError, CudaMemoryError, InputError
from .port import CAPTURE_LOCK, CudaPort

CUDA, CUDA_HOST, CUDA_MANAGED = 2, 3, 13
_NAME = b"dltensor"
_CODES = {
    (0, 8): "int8",
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 8): "uint8",
    (2, 16): "float16",
    (2, 32): "float32",
    (2, 64): "float64",
}
_CODE_OF = {name: code for code, name in _CODES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Content:
    """What a capsule holds.

    Attributes:
        address: Of the first element.
        shape: Of the array.
        dtype: NumPy's name, or a description of a type that NumPy does not have.
        strides_bytes: None for a C-contiguous array.
        device_type: As DLPack counts them.
        device_id: Which of those.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    strides_bytes: tuple[int, ...] | None
    device_type: int
    device_id: int


def read_capsule(capsule: object) -> Content:
    """Reads a capsule and leaves it as it is: the memory lives as long as the capsule does, which frees it itself."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = ctypes.cast(get(capsule, _NAME), ctypes.POINTER(_Managed)).contents.tensor
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    dtype = _CODES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    strides = tuple(tensor.strides[axis] * tensor.bits // 8 for axis in range(tensor.ndim)) if tensor.strides else None
    name = dtype or f"type {tensor.code} of {tensor.bits} bits × {tensor.lanes}"
    return Content((tensor.data or 0) + tensor.byte_offset, shape, name, strides, tensor.device_type, tensor.device_id)


class _Holder:
    """Keeps the structure, its arrays and the array's owner alive until the consumer calls the deleter."""

    def __init__(
        self, owner: object, address: int, shape: tuple[int, ...], *, dtype: np.dtype[Any], device_id: int
    ) -> None:
        self.owner = owner
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        code, bits = _CODE_OF[dtype.name]
        self.managed = _Managed()
        tensor = self.managed.tensor
        tensor.data, tensor.device_type, tensor.device_id, tensor.ndim = address, CUDA, device_id, len(shape)
        tensor.code, tensor.bits, tensor.lanes = code, bits, 1
        tensor.shape = ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64))
        self.managed.context = id(self)
        self.managed.deleter = ctypes.cast(_delete, ctypes.c_void_p)


def make_capsule(
    owner: object, address: int, shape: tuple[int, ...], *, dtype: np.dtype[Any], device_id: int
) -> object:
    """A capsule of C-contiguous device memory; `owner` lives until the consumer is done with it."""
    holder = _Holder(owner, address, shape, dtype=dtype, device_id=device_id)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))  # given back by the deleter
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule: object = new(ctypes.addressof(holder.managed), _NAME, ctypes.cast(_destroy, ctypes.c_void_p))
    return capsule


def _release(pointer: int) -> None:
    managed = ctypes.cast(pointer, ctypes.POINTER(_Managed)).contents
    ctypes.pythonapi.Py_DecRef(ctypes.cast(managed.context, ctypes.py_object))


def _discard(capsule: int) -> None:
    """Called when a capsule goes: if nobody has consumed it, its name is still the first one, and the memory is still ours to release."""
    is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
        ("PyCapsule_IsValid", ctypes.pythonapi)
    )
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    if is_valid(capsule, _NAME):
        _release(get(capsule, _NAME))


_delete, _destroy = _Deleter(_release), _Deleter(_discard)
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
        return int(batch.__dlpack_device__()[0]) in (CUDA, CUDA_MANAGED)
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
    return read_capsule(_export(batch, _NO_ORDER)).shape if is_device_array(batch) else ()


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
        found = read_capsule(capsule)
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
            f"batch: {type(batch).__name__} does not hand over its memory: {' '.join(str(error).split())}",
            remedy="give batch.detach()",
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
        f"stream: expected a stream of torch, CuPy or pycuda or its handle, found {stream!r}",
        remedy="give torch.cuda.current_stream(), say",
    )


class DeviceArray:
    """One result on the GPU. Hand it to torch.from_dlpack, cupy.from_dlpack or cupy.asarray, which do not copy it.

    Attributes:
        shape: Of the array.
        dtype: As the plan has it: float16 stays float16, and the class numbers of TensorRT 8.5 int32.
    """

    def __init__(
        self, pool: DevicePool, block: Block, shape: tuple[int, ...], dtype: np.dtype[Any], *, stream: int | None
    ) -> None:
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
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": data,
            "strides": None,
            "stream": stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._pool.device_id

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        """A capsule for the consumer's stream; newer arguments of the protocol are not needed, as it is never copied.

        None is the default stream, and −1 is a consumer who sees to the order himself.
        """
        reader = _LEGACY if stream is None else stream
        self._block.streams.add(UNKNOWN_STREAM if reader == -1 else reader)
        if reader != -1 and self._stream is not None and reader != (self._stream or _LEGACY):
            self._pool.order(reader, after=self._stream)
        return make_capsule(self, self._block.address, self.shape, dtype=self.dtype, device_id=self._pool.device_id)

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
        self._returned: deque[Block] = (
            deque()
        )  # the garbage collector puts blocks here, in any thread and at any moment: it takes no lock
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
            # Another stream may be gone by now, and its handle must not be touched: what it used waits until the whole
            # device was waited for.
            fitting = next(
                (block for block in reversed(self._idle) if block.size_bytes == wanted and block.streams <= {stream}),
                None,
            )
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
            # In this order: the garbage collector may bring a thread here that holds the first, in the midst of a
            # capture.
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

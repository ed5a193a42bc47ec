"""Arrays on the GPU: batches of torch, CuPy, pycuda, Numba and others as they come in, and results that stay there.

Both protocols are spoken, DLPack and `__cuda_array_interface__`, without a library being imported that has them.
Results lie in blocks of a `DevicePool`.

Source: https://dmlc.github.io/dlpack/latest/c_api.html (DLManagedTensor), .../python_spec.html, and
https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html (version 3).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError
from .pool import UNKNOWN_STREAM, Block, DevicePool, number_in_protocols

CUDA, CUDA_MANAGED = 2, 13
"""DLPack's numbers of kinds of memory."""
_NO_ORDER = -1  # in DLPack: the consumer sees to the order himself, or reads nothing

# Streams


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


# Batches that come in


@dataclass(frozen=True, slots=True)
class DeviceView:
    """An array of somebody else, in most cases on a GPU.

    Attributes:
        dtype: NumPy's name, or a description of a type that NumPy does not have.
        is_contiguous: Whether it is C-contiguous.
        device_id: Which GPU; None where the array does not say.
        producer: The stream whose work must be waited for before it is read; None where that is done.
        keep: Keeps the memory alive.
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
    """The shape of an array; () of what is none.

    Neither protocol asks for an attribute `shape`: some arrays have none, and DALI's is a method.
    """
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
        stream_handle: Where it will be read. With DLPack its maker puts his own work before that.

    Raises:
        InputError: The array does not hand over its memory, say because it needs a gradient.
    """
    if hasattr(batch, "__dlpack__") and hasattr(batch, "__dlpack_device__"):
        return read_capsule(_export(batch, number_in_protocols(stream_handle)), batch)
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


def _is_contiguous(shape: tuple[int, ...], strides_bytes: tuple[int, ...] | None, dtype: str) -> bool:
    if strides_bytes is None:
        return True
    try:
        expected = np.dtype(dtype).itemsize
    except TypeError:
        return False
    for size, stride in zip(reversed(shape), reversed(strides_bytes), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# Results that stay on the GPU


class DeviceArray:
    """One result on the GPU. Hand it to torch.from_dlpack, cupy.from_dlpack or cupy.asarray, which do not copy it.

    Attributes:
        shape: Images first.
        dtype: As the plan has it: float16 stays float16, and the class numbers of TensorRT 8.5 int32.
    """

    def __init__(
        self, pool: DevicePool, block: Block, shape: tuple[int, ...], dtype: np.dtype[Any], *, stream: int | None
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._pool, self._block, self._stream = pool, block, stream
        self._identity = None if stream is None else pool.identify_stream(stream)
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
        """Version 3 of the protocol."""
        self._block.streams.add(UNKNOWN_STREAM)  # this protocol does not say where the reader works
        stream = self._find_stream()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._block.address, False),
            "strides": None,
            "stream": None if stream is None else number_in_protocols(stream),
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._pool.device_id

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        """A capsule for the consumer's stream; newer arguments of the protocol are not needed, as it is never copied.

        None is the default stream, and −1 is a consumer who sees to the order himself.
        """
        reader = number_in_protocols(0) if stream is None else stream
        identity = UNKNOWN_STREAM if reader == _NO_ORDER else self._pool.identify_stream(reader)
        self._block.streams.add(identity)
        writer = None if reader == _NO_ORDER else self._find_stream()
        if writer is not None and identity != self._identity:
            self._pool.order(reader, after=writer)
        return make_capsule(self, self._block.address, self.shape, dtype=self.dtype, device_id=self._pool.device_id)

    def _find_stream(self) -> int | None:
        """The handle, in this thread, of the stream that the array is in order on; None where it was waited for."""
        if self._stream is not None and self._pool.identify_stream(self._stream) != self._identity:
            self._pool.wait_for_device()  # it is another thread's default stream, which has no name here
            self._stream = None
        return self._stream

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape} on GPU {self._pool.device_id}>"


@dataclass(frozen=True, slots=True)
class DeviceArrays:
    """The outputs of one batch on the GPU, by name or in order.

    Attributes:
        names: The names of the outputs.
        arrays: One for each name.
    """

    names: tuple[str, ...]
    arrays: tuple[DeviceArray, ...]

    def __getitem__(self, key: int | str) -> DeviceArray:
        return self.arrays[self.names.index(key) if isinstance(key, str) else key]

    def __iter__(self) -> Iterator[DeviceArray]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


# DLPack's capsules, read and made with ctypes


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_NAME = b"dltensor"
# By the address of a capsule and its name: one that is being destroyed must get no reference.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_INT, _UINT, _FLOAT = 0, 1, 2
_CODES = {
    "int8": (_INT, 8),
    "int32": (_INT, 32),
    "int64": (_INT, 64),
    "uint8": (_UINT, 8),
    "float16": (_FLOAT, 16),
    "float32": (_FLOAT, 32),
    "float64": (_FLOAT, 64),
}


def read_capsule(capsule: object, owner: object = None) -> DeviceView:
    """What a capsule holds. The capsule stays as it is: the memory lives as long as it does, and it frees it itself."""
    tensor = ctypes.cast(_get_pointer(id(capsule), _NAME), ctypes.POINTER(_Managed)).contents.tensor
    code, axes = (tensor.code, tensor.bits), range(tensor.ndim)
    dtype = next((name for name, known in _CODES.items() if known == code and tensor.lanes == 1), None)
    dtype = dtype or f"type {tensor.code} of {tensor.bits} bits × {tensor.lanes}"
    shape = tuple(tensor.shape[axis] for axis in axes)
    strides = tuple(tensor.strides[axis] * tensor.bits // 8 for axis in axes) if tensor.strides else None
    contiguous = _is_contiguous(shape, strides, dtype)
    address = (tensor.data or 0) + tensor.byte_offset
    return DeviceView(address, shape, dtype, contiguous, tensor.device_id, None, (owner, capsule))


def make_capsule(
    owner: object, address: int, shape: tuple[int, ...], *, dtype: np.dtype[Any], device_id: int
) -> object:
    """A capsule of C-contiguous device memory; `owner` lives until the consumer is done with it."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    code, bits = _CODES[dtype.name]
    tensor = _Tensor(
        address, CUDA, device_id, len(shape), code, bits, 1, ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    )
    managed = _Managed(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
    kept = (owner, managed, sizes)
    managed.context = id(kept)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # given back in _release
    capsule: object = _new_capsule(ctypes.addressof(managed), _NAME, ctypes.cast(_destroy, ctypes.c_void_p))
    return capsule


def _release(pointer: int) -> None:
    """The consumer is done."""
    managed = ctypes.cast(pointer, ctypes.POINTER(_Managed)).contents
    ctypes.pythonapi.Py_DecRef(ctypes.cast(managed.context, ctypes.py_object))


def _discard(capsule: int) -> None:
    """A capsule goes. If nobody has consumed it, it has its first name still, and the memory is ours to release."""
    if _is_valid(capsule, _NAME):
        _release(_get_pointer(capsule, _NAME))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_delete, _destroy = _Callback(_release), _Callback(_discard)

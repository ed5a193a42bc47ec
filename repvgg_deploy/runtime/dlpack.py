"""DLPack capsules read and made with ctypes, so that arrays pass between libraries without torch or CuPy being imported here.

Source: https://dmlc.github.io/dlpack/latest/c_api.html (DLManagedTensor) and .../python_spec.html.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

CUDA, CUDA_HOST, CUDA_MANAGED = 2, 3, 13
_NAME = b"dltensor"
_CODES = {(0, 8): "int8", (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8", (2, 16): "float16", (2, 32): "float32", (2, 64): "float64"}
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

    def __init__(self, owner: object, address: int, shape: tuple[int, ...], *, dtype: np.dtype[Any], device_id: int) -> None:
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


def make_capsule(owner: object, address: int, shape: tuple[int, ...], *, dtype: np.dtype[Any], device_id: int) -> object:
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
    is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    if is_valid(capsule, _NAME):
        _release(get(capsule, _NAME))


_delete, _destroy = _Deleter(_release), _Deleter(_discard)

"""Files written by `torch.save`: the zip container of torch 1.6 and later, and the legacy stream before it.

Storages that are stored uncompressed become views of the mapped file; nothing is read before it is used.
Source: torch/serialization.py and caffe2/serialize/inline_container.cc (https://github.com/pytorch/pytorch).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from functools import partial

import torch

from .lazy_tensor import DTYPES, MalformedError, Storage, as_count, printable, read_bytes
from .pickle_stream import PickleStream
from .pickle_values import Global
from .tensor_pickle import read_pickle
from .zip_archive import Entry, ZipArchive

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, as data.

    Attributes:
        container: For people, such as `torch zip`.
        root: dicts, lists, tuples, scalars, `LazyTensor`, `ArrayObject` and `ForeignObject`.
        metadata: Text beside the tensors (safetensors).
        suspicious: Callables that ordinary loading would have imported, and perhaps called.
        numpy: Whether tensors are NumPy arrays, as PaddlePaddle writes them.
    """

    container: str
    root: object
    metadata: dict[str, str] = field(default_factory=dict)
    suspicious: frozenset[str] = frozenset()
    numpy: bool = False


def read_torch_zip(archive: ZipArchive, prefix: str) -> Content:
    """Reads `prefix/data.pkl` and the storages `prefix/data/N`.

    Raises:
        MalformedError: Something is damaged or missing.
    """
    order = archive.entries.get(f"{prefix}byteorder")
    swap = order is not None and bytes(archive.read(order, 1).tolist()) == b"big"

    def persistent(pid: object) -> object:
        dtype, key, count = _parse_persistent_id(pid)
        entry = archive.entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise MalformedError(f"the storage {printable(key)} is missing from the archive")
        if count * dtype.itemsize > entry.nbytes:
            raise MalformedError(f"the storage {printable(key)} has {entry.nbytes} bytes, expected {count * dtype.itemsize}")
        read = partial(_read_entry, archive, entry, dtype=dtype, swap=swap)
        return storages.setdefault((key, dtype), Storage(dtype, entry.nbytes // dtype.itemsize * dtype.itemsize, read))

    storages: dict[tuple[str, torch.dtype], Storage] = {}
    root, suspicious = read_pickle(archive.stream(archive.entries[f"{prefix}data.pkl"]), persistent)
    return Content("torch zip", root, suspicious=suspicious)


def _read_entry(archive: ZipArchive, entry: Entry, *, dtype: torch.dtype, swap: bool) -> torch.Tensor:
    data = archive.read(entry, dtype.itemsize)
    data = data[: data.numel() // dtype.itemsize * dtype.itemsize]
    return _swap_bytes(data, dtype.itemsize) if swap else data


def _swap_bytes(data: torch.Tensor, itemsize: int) -> torch.Tensor:
    swapped: torch.Tensor = data.reshape(-1, itemsize).flip(1).flatten()
    return swapped


def _parse_persistent_id(pid: object) -> tuple[torch.dtype, str, int]:
    """(dtype, storage key, elements) of `('storage', class, key, location, elements[, view])`."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Global) or not isinstance(pid[2], str):
        raise MalformedError("the pickle refers to something that is not a storage")
    dtype = DTYPES.get(pid[1].name)
    if dtype is None or not pid[1].module.startswith("torch"):
        raise MalformedError(f"a storage of the kind {printable(pid[1].path)} is not known")
    if len(pid) > 5 and pid[5] is not None:
        raise MalformedError("the file has storage views, which torch wrote before version 0.4 only")
    return dtype, pid[2], as_count(pid[4])


def read_torch_legacy(buffer: mmap.mmap) -> Content | None:
    """Reads a legacy stream: magic, protocol, system, object, storage keys (a pickle each), then the storages. None if it is none.

    Raises:
        MalformedError: It is one, but damaged or truncated.
    """
    stream = PickleStream(buffer, 0, len(buffer))
    try:
        magic, _ = read_pickle(stream)
    except MalformedError:
        return None
    if type(magic) is not int or magic != LEGACY_MAGIC:
        return None
    protocol, _ = read_pickle(stream)
    system, _ = read_pickle(stream)
    if protocol != _LEGACY_PROTOCOL:
        raise MalformedError("the legacy torch stream has an unknown protocol number")
    little = system.get("little_endian", True) if isinstance(system, dict) else True
    reader = _LegacyStorages(buffer, swap=not little)
    root, suspicious = read_pickle(stream, reader.persistent)
    keys, _ = read_pickle(stream)
    reader.locate(keys, stream.tell())
    return Content("torch legacy", root, suspicious=suspicious)


class _LegacyStorages:
    """Storages of a legacy stream: named by the object's pickle first, found behind it afterwards."""

    def __init__(self, buffer: mmap.mmap, *, swap: bool) -> None:
        self._buffer = buffer
        self._swap = swap
        self._sizes: dict[str, tuple[torch.dtype, int]] = {}
        self._storages: dict[str, Storage] = {}
        self._starts: dict[str, int] = {}

    def persistent(self, pid: object) -> object:
        """The object of a persistent id: a storage, or the class of a pickled module with its source text, which is dropped."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        dtype, key, count = _parse_persistent_id(pid)
        if self._sizes.setdefault(key, (dtype, count)) != (dtype, count):
            raise MalformedError(f"the storage {printable(key)} has two sizes")
        if count * dtype.itemsize > len(self._buffer):
            raise MalformedError(f"the storage {printable(key)} is larger than the file: it is truncated or damaged")
        return self._storages.setdefault(key, Storage(dtype, count * dtype.itemsize, partial(self._read, key)))

    def _read(self, key: str) -> torch.Tensor:
        dtype, count = self._sizes[key]
        data = read_bytes(self._buffer, self._starts[key], count * dtype.itemsize, alignment=dtype.itemsize)
        return _swap_bytes(data, dtype.itemsize) if self._swap else data

    def locate(self, keys: object, position: int) -> None:
        """Finds every storage behind `position`: eight bytes of length, then the elements."""
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in self._sizes:
                raise MalformedError("the list of storages names one that no tensor uses")
            dtype, count = self._sizes[key]
            header = self._buffer[position : position + 8]
            if len(header) < 8 or position + 8 + count * dtype.itemsize > len(self._buffer):
                raise MalformedError(f"the file ends within the storage {printable(key)}: it is truncated")
            if struct.unpack(">q" if self._swap else "<q", header)[0] != count:
                raise MalformedError(f"the storage {printable(key)} has another length than its tensors say")
            self._starts[key] = position + 8
            position += 8 + count * dtype.itemsize
        missing = sorted(set(self._sizes) - set(self._starts))
        if missing:
            raise MalformedError(f"the storage {printable(missing[0])} is missing: the file is truncated")

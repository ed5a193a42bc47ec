"""A file → what it holds, as data; or one sentence about what it is instead.

The content decides, never the suffix: a `.pth.tar` is usually a torch zip, and a download that failed is usually an
HTML page. `_read` tells the containers apart, in this order: the zip of torch 1.6 and later, safetensors, the legacy
stream of `torch.save` before it, and a plain pickle (`paddle.save` writes a pickled dict of NumPy arrays). Storages
that are stored uncompressed become views of the mapped file; nothing is read before it is used.
Source: torch/serialization.py and caffe2/serialize/inline_container.cc (https://github.com/pytorch/pytorch);
https://github.com/safetensors/safetensors.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import CheckpointError, MissingDependencyError, say_install
from ...files.signatures import HEAD_BYTES, ZIP_MAGICS, name_foreign
from .lazy import (
    BFLOAT16,
    BOOL,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    Dtype,
    LazyTensor,
    MalformedError,
    Range,
    Storage,
    as_count,
    gather_bytes,
    listing,
    named_dtype,
    placeholder,
    printable,
    read_bytes,
    swap_bytes,
)
from .objects import Global
from .pickle import PickleStream, read_pickle
from .places import find_index, read_index, refuse_distributed, refuse_joblib, refuse_no_file

if TYPE_CHECKING:
    import torch

_LOCAL_HEADER_BYTES = 30
_ENTRY_MAGIC = b"PK\x01\x02"
_MAX_ENTRIES = 50_000
_PIECE_BYTES = 1 << 20
_INFLATED_FLOOR = 64 << 20
_INFLATED_RATIO = 20
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, EOFError, RuntimeError, IndexError, OSError)
_MAX_TEXT = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_SAFETENSORS_HEADER = 100_000_000  # what the format allows
_MAX_HEADER = 8 << 20
_MAX_PARTS = 10  # texts' quotes, or commas, of one tensor's entry in it
_TENSOR_DTYPES = {"F64": FLOAT64, "F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16, "I64": INT64, "I32": INT32,
                  "I16": INT16, "I8": INT8, "U8": UINT8, "BOOL": BOOL}  # fmt: skip
_JOBLIB_HEAD = 1 << 16
_DOWNLOAD = "download it again and compare its size and sha256 with the publisher's"


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, as data.

    Attributes:
        container: For people, such as `torch zip`.
        root: dicts, lists, tuples, scalars, `LazyTensor`, `ArrayObject` and `ForeignObject`.
        metadata: Text beside the tensors (safetensors).
        suspicious: Callables that ordinary loading would have imported, and perhaps called.
        numpy: Whether tensors are NumPy arrays, as PaddlePaddle writes them.
        files: All files of a sharded checkpoint, its index first; empty where it is one file.
    """

    container: str
    root: object
    metadata: dict[str, str] = field(default_factory=dict)
    suspicious: frozenset[str] = frozenset()
    numpy: bool = False
    files: tuple[Path, ...] = ()


def read_file(path: Path) -> Content:
    """Reads a checkpoint file as data, with every shard beside it. No code of it is run, and weights stay on disk.

    Raises:
        CheckpointError: The file is missing, empty, damaged, or not a checkpoint; the message says what it is.
    """
    index = find_index(path)
    return _read_one(path) if index is None else _read_shards(index)


def _read_one(path: Path) -> Content:
    with open_checkpoint(path) as file:
        # A private map: tensors are writable views of it, and writing to one never reaches the file.
        try:
            return _read(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), file)
        except MalformedError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}", remedy=_DOWNLOAD) from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from error


def _read_shards(index: Path) -> Content:
    """The state dict that an index spreads over files beside it."""
    shards = [index.with_name(name) for name in read_index(index)]
    missing = [shard.name for shard in shards if not os.path.exists(shard)]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(shards)} shards are not beside it, first {printable(missing[0])}",
            remedy="put every shard into the folder of the index",
        )
    contents = [_read_one(shard) for shard in shards]
    merged: dict[object, object] = {}
    for shard, content in zip(shards, contents, strict=True):
        if not isinstance(content.root, dict):
            raise CheckpointError(f"{shard}: holds no named tensors", remedy="give the shards as they were saved")
        merged |= content.root
    return Content(
        container=f"{len(shards)} shards of {contents[0].container}",
        root=merged,
        metadata=contents[0].metadata,
        suspicious=frozenset().union(*(content.suspicious for content in contents)),
        numpy=contents[0].numpy,
        files=(index, *shards),
    )


def open_checkpoint(path: Path) -> BinaryIO:
    """Opens a file for reading; refuses what is no readable file, or empty.

    Raises:
        CheckpointError: It is missing, an address, a folder, a device or pipe, empty, or the operating system refuses.
    """
    refuse_no_file(path)
    try:
        return path.open("rb")
    except OSError as error:
        remedy = f"make it readable, for example chmod u+r {path}"
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}", remedy=remedy) from error


def _read(path: Path, buffer: mmap.mmap, file: BinaryIO) -> Content:
    """The one place where a container is recognised: a new one is a line here and a function below."""
    refuse_distributed(path)
    if buffer[:4] in ZIP_MAGICS:
        return _read_zip(_ZipArchive(buffer, file))
    if 2 <= int.from_bytes(buffer[:8], "little") <= _MAX_SAFETENSORS_HEADER and buffer[8:9] == b"{" and len(buffer) > 9:
        return _read_safetensors(path, buffer)
    foreign = name_foreign(path, buffer[:HEAD_BYTES], "checkpoint")
    if foreign is not None:
        raise CheckpointError(f"is {foreign[0]}, not a checkpoint", remedy=foreign[1])
    refuse_joblib(path, buffer[:_JOBLIB_HEAD])
    return _read_torch_legacy(buffer) or _read_plain_pickle(buffer)


class _ZipArchive:
    """A zip file over its map. `zipfile` reads the directory only; stored entries are views of the map.

    Raises:
        MalformedError: The directory is damaged or missing (a truncated file), or the entries are bigger than weights
            can be.
    """

    def __init__(self, buffer: mmap.mmap, file: BinaryIO) -> None:
        self._buffer = buffer
        _check_entries(buffer)
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            self._starts = {info.filename: self._locate(info) for info in infos}
        except MalformedError:
            raise
        except _ZIP_ERRORS as error:
            raise MalformedError(f"the zip archive is damaged or truncated ({printable(str(error))})") from error
        self.entries = {info.filename: info for info in infos}
        self._sound: set[str] = set()
        stored = sum(info.compress_size for info in self.entries.values())
        inflated = sum(info.file_size for info in self.entries.values() if info.compress_type == zipfile.ZIP_DEFLATED)
        if stored > len(buffer):
            raise MalformedError("the entries of the zip archive overlap")
        if inflated > _INFLATED_FLOOR + _INFLATED_RATIO * len(buffer):
            raise MalformedError(f"the zip archive would inflate to {inflated:,} bytes, more than weights can")

    def _locate(self, info: zipfile.ZipInfo) -> int:
        """Offset of an entry's bytes in the file."""
        header, name = info.header_offset, printable(info.filename)
        sound = 0 <= header <= len(self._buffer) - _LOCAL_HEADER_BYTES
        if not sound or self._buffer[header : header + 4] != b"PK\x03\x04":
            raise MalformedError(f"the zip entry {name} does not stand where the directory says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", self._buffer, header + 26)
        start: int = header + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise CheckpointError(
                f"has the zip entry {name} encrypted or compressed in an unusual way", remedy="unpack and zip it anew"
            )
        cut = info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size
        if start + info.compress_size > len(self._buffer) or cut:
            raise MalformedError(f"the zip entry {name} reaches past the end of the file")
        return start

    def _pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of an entry in order, inflated where they are deflated, and never more than the directory says.

        Raises:
            MalformedError: It is damaged, of another length, or of another checksum; known when all of it has come.
        """
        info, start = self.entries[name], self._starts[name]
        stored = memoryview(self._buffer)[start : start + info.compress_size]
        checksum = 0
        for piece in _inflate(stored, info.file_size, name) if info.compress_type == zipfile.ZIP_DEFLATED else [stored]:
            checksum = zlib.crc32(piece, checksum)
            yield piece
        # torch can be told to write no checksums (`set_crc32_options(False)`): the field is then 0.
        if info.CRC and checksum != info.CRC:
            raise MalformedError(
                f"the checksum of {printable(name)} is wrong: the file was damaged after it was written"
            )

    def stream(self, name: str) -> PickleStream:
        """An entry as a pickle stream."""
        info, start = self.entries[name], self._starts[name]
        if info.compress_type == zipfile.ZIP_STORED:
            return PickleStream(self._buffer, start, start + info.file_size)
        data = b"".join(_inflate(memoryview(self._buffer)[start : start + info.compress_size], info.file_size, name))
        return PickleStream(data, 0, len(data), info.compress_size)

    def text(self, name: str) -> bytes:
        """The bytes of a small entry, compared with their checksum."""
        return b"".join(bytes(piece[:_MAX_TEXT]) for piece in self._pieces(name))[:_MAX_TEXT]

    def read(self, name: str, ranges: Sequence[Range], alignment: int, *, swap: int = 1) -> list[torch.Tensor]:
        """uint8 (n,) of each range of an entry, compared with its checksum; `swap`: bytes to turn around."""
        is_stored = self.entries[name].compress_type == zipfile.ZIP_STORED
        if is_stored and name not in self._sound:
            for _ in self._pieces(name):
                pass
            self._sound.add(name)
        if is_stored and swap == 1:
            return read_bytes(self._buffer, self._starts[name], ranges, alignment=alignment)
        found = gather_bytes(self._pieces(name), ranges)
        swap_bytes(found, swap)
        return found


def _check_entries(buffer: mmap.mmap) -> None:
    """Counts what could be entries of a directory before zipfile makes ten times their bytes of them.

    Raises:
        MalformedError: There are too many.
    """
    position = buffer.find(_ENTRY_MAGIC)
    for _ in range(_MAX_ENTRIES):
        if position < 0:
            return
        position = buffer.find(_ENTRY_MAGIC, position + len(_ENTRY_MAGIC))
    raise MalformedError(f"the zip archive has more than {_MAX_ENTRIES:,} entries")


def _inflate(stored: memoryview, size: int, name: str) -> Iterator[bytes]:
    """What deflated bytes stand for, in pieces.

    Raises:
        MalformedError: They are damaged, or stand for another number of bytes than `size`.
    """
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    left, position = size, 0
    pending: bytes | memoryview = b""
    while left >= 0 and not decoder.eof:
        if not pending:
            pending = stored[position : position + _PIECE_BYTES]
            position += len(pending)
        is_last = not pending
        try:
            piece = decoder.decompress(pending, min(_PIECE_BYTES, left + 1))
        except zlib.error as error:
            raise MalformedError(f"the zip entry {printable(name)} is damaged ({error})") from error
        pending = decoder.unconsumed_tail
        left -= len(piece)
        if left >= 0 and piece:
            yield piece
        elif is_last:
            break
    if left:
        raise MalformedError(f"the zip entry {printable(name)} has another length than the directory says")


def _read_zip(archive: _ZipArchive) -> Content:
    names = list(archive.entries)
    pickles = sorted((name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), key=len)
    if not pickles:
        suffixes = (".pth", ".pt", ".tar", ".safetensors", ".pdparams", ".bin", ".ckpt")
        inside = next((name for name in names if name.lower().endswith(suffixes)), None)
        what, remedy = _name_zip(names)
        if remedy is None and inside:
            remedy = f"unpack it and give the file inside: {printable(inside)}"
        raise CheckpointError(
            f"is {what}, not a torch checkpoint (no data.pkl in it)",
            remedy=remedy or "give the file that torch.save wrote, a .safetensors or a .pdparams",
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in names or any(name.startswith(f"{prefix}code/") for name in names):
        raise CheckpointError(
            "is a TorchScript archive (torch.jit.save): a program with its weights, not a checkpoint",
            remedy="save its state dict: torch.save(torch.jit.load('FILE').state_dict(), 'model.pth')",
        )
    return _read_torch_zip(archive, prefix)


def _name_zip(names: list[str]) -> tuple[str, str | None]:
    """What a zip archive is that torch.save did not write, and what to do where that is known."""
    if not names:
        return "an empty zip archive", None
    if all(name.endswith(".npy") for name in names):
        arrays = "{k: torch.from_numpy(v) for k, v in numpy.load('FILE').items()}"
        return f"an .npz of NumPy arrays ({listing(names)})", f"save them: torch.save({arrays}, 'model.pth')"
    if "[Content_Types].xml" in names:
        return "an office document", None
    if any(name.endswith(("model.json", "serialized_exported_program.json", "archive_format")) for name in names):
        remedy = "save its state dict: torch.save(dict(torch.export.load('FILE').state_dict), 'model.pth')"
        return "an exported program (torch.export)", remedy
    return f"a zip archive of {listing(names)}", None


def _read_torch_zip(archive: _ZipArchive, prefix: str) -> Content:
    """The object in `prefix/data.pkl`, its storages in `prefix/data/N`."""
    order = f"{prefix}byteorder"
    swap = order in archive.entries and archive.text(order) == b"big"
    storages: dict[str, Storage] = {}

    def persistent(pid: object) -> object:
        dtype, key, count = _parse_persistent_id(pid)
        entry = archive.entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise MalformedError(f"the storage {printable(key)} is missing from the archive")
        held, wanted = entry.file_size, count * dtype.itemsize
        if wanted > held:
            raise MalformedError(f"the storage {printable(key)} has {held} bytes, expected {wanted}")
        read = partial(archive.read, entry.filename, swap=dtype.itemsize if swap else 1)
        storage = storages.setdefault(key, Storage(dtype, held // dtype.itemsize * dtype.itemsize, read))
        if storage.dtype != dtype:
            raise MalformedError(f"the storage {printable(key)} has two dtypes")
        return storage

    root, suspicious = read_pickle(archive.stream(f"{prefix}data.pkl"), persistent)
    return Content("torch zip", root, suspicious=suspicious)


def _parse_persistent_id(pid: object) -> tuple[Dtype, str, int]:
    """(dtype, storage key, elements) of `('storage', class, key, location, elements[, view])`."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise MalformedError("the pickle refers to something that is not a storage")
    if not isinstance(pid[1], Global) or not isinstance(pid[2], str):
        raise MalformedError("the pickle refers to something that is not a storage")
    dtype = DTYPES.get(pid[1].name)
    if dtype is None or not pid[1].module.startswith("torch"):
        remedy = "save its tensors as float32: torch.save({k: v.float() for k, v in state.items()}, 'model.pth')"
        raise CheckpointError(f"has a storage of the kind {printable(pid[1].path)}, which is not known", remedy=remedy)
    if len(pid) > 5 and pid[5] is not None:
        remedy = "load it with a torch of its time and save it again with torch.save"
        raise CheckpointError("has storage views, which torch wrote before version 0.4 only", remedy=remedy)
    if len(pid[2]) > _MAX_TEXT:
        raise MalformedError(f"the name of the storage {printable(pid[2])} is too long")
    return dtype, pid[2], as_count(pid[4])


def _read_torch_legacy(buffer: mmap.mmap) -> Content | None:
    """Pickles of magic, protocol, system, object and storage keys, then the storages; None if it is no such stream."""
    stream = PickleStream(buffer, 0, len(buffer))
    try:
        magic, _ = read_pickle(stream)
    except MalformedError:
        return None
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        return None
    protocol, _ = read_pickle(stream)
    system, _ = read_pickle(stream)
    if protocol != _LEGACY_PROTOCOL:
        raise MalformedError("the legacy torch stream has an unknown protocol number")
    little = bool(system.get("little_endian", True)) if isinstance(system, dict) else True
    storages: dict[str, Storage] = {}

    def persistent(pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # the class of a pickled module; its source text is dropped
        dtype, key, count = _parse_persistent_id(pid)
        nbytes = count * dtype.itemsize
        storage = storages.setdefault(key, Storage(dtype, nbytes, partial(read, key)))
        if (storage.dtype, storage.nbytes) != (dtype, nbytes):
            raise MalformedError(f"the storage {printable(key)} has two sizes")
        if nbytes > len(buffer):
            raise MalformedError(f"the storage {printable(key)} is larger than the file: it is truncated or damaged")
        return storage

    def read(key: str, ranges: Sequence[Range], alignment: int) -> list[torch.Tensor]:
        found = read_bytes(buffer, starts[key], ranges, alignment=alignment)
        if not little:
            found = [tensor.clone() for tensor in found]
            swap_bytes(found, storages[key].dtype.itemsize)
        return found

    root, suspicious = read_pickle(stream, persistent)
    keys, _ = read_pickle(stream)
    starts = _locate_storages(buffer, stream.tell(), keys=keys, storages=storages, little=little)
    return Content("torch legacy", root, suspicious=suspicious)


def _locate_storages(
    buffer: mmap.mmap, position: int, *, keys: object, storages: dict[str, Storage], little: bool
) -> dict[str, int]:
    """Offset of every storage behind `position`: eight bytes of length each, then the elements."""
    starts: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in storages:
            raise MalformedError("the list of storages names one that no tensor uses")
        storage, header = storages[key], buffer[position : position + 8]
        if len(header) < 8 or position + 8 + storage.nbytes > len(buffer):
            raise MalformedError(f"the file ends within the storage {printable(key)}: it is truncated")
        if struct.unpack("<q" if little else ">q", header)[0] * storage.dtype.itemsize != storage.nbytes:
            raise MalformedError(f"the storage {printable(key)} has another length than its tensors say")
        starts[key] = position + 8
        position += 8 + storage.nbytes
    missing = min(set(storages) - set(starts), default=None)
    if missing is not None:
        raise MalformedError(f"the storage {printable(missing)} is missing: the file is truncated")
    return starts


def _read_safetensors(path: Path, buffer: mmap.mmap) -> Content:
    # Its reader takes forty times the bytes of short texts. The tensors of a network with a thousand blocks need 2 MB.
    header = buffer[8 : 8 + min(int.from_bytes(buffer[:8], "little"), _MAX_HEADER + 1)]
    if len(header) > _MAX_HEADER or max(map(header.count, (b'"', b","))) > _MAX_PARTS * _MAX_ENTRIES:
        raise MalformedError("the header of the safetensors file says far more than a network's tensors need")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        remedy = f"{say_install('export')}, or pip install safetensors"
        raise MissingDependencyError("reading .safetensors needs the package safetensors", remedy=remedy) from error
    try:
        # What a file holds is told without torch, too; loading its tensors needs it.
        file: Any = safe_open(str(path), framework="pt" if importlib.util.find_spec("torch") else "np")
        names = file.keys()
        if len(names) > _MAX_ENTRIES:
            raise MalformedError(f"the safetensors file has more than {_MAX_ENTRIES:,} tensors")
        tensors = {name: _safetensor(file, name) for name in names}
        return Content("safetensors", tensors, metadata=dict(file.metadata() or {}))
    except MalformedError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise MalformedError(f"the safetensors file is damaged or truncated ({printable(str(error))})") from error


def _safetensor(file: Any, name: str) -> LazyTensor:
    described = file.get_slice(name)
    shape = tuple(described.get_shape())
    kind = described.get_dtype()
    dtype = _TENSOR_DTYPES.get(kind)
    if dtype is None:
        return placeholder(named_dtype("uint8"), shape, f"a tensor of the dtype {printable(kind)}")
    # The format itself forbids overlap, so each tensor is its own backing.
    return LazyTensor(dtype, shape, object(), math.prod(shape) * dtype.itemsize, partial(file.get_tensor, name))


def _read_plain_pickle(buffer: mmap.mmap) -> Content:
    try:
        root, suspicious = read_pickle(PickleStream(buffer, 0, len(buffer)))
    except MalformedError as error:
        if buffer[:1] == b"\x80":
            raise
        raise CheckpointError(
            f"is not a checkpoint: neither torch zip, nor safetensors, nor pickle, but {_name_bytes(buffer[:32])}",
            remedy="give the file that torch.save wrote, a .safetensors or a .pdparams",
        ) from error
    return Content("pickle", root, suspicious=suspicious, numpy=True)


def _name_bytes(head: bytes) -> str:
    if not head.strip(b"\x00"):
        return "zeros: an interrupted download or copy"
    text = head.decode("latin-1").strip().replace("\n", " ")
    readable = text.isascii() and text.isprintable()
    return f"a text that begins {text!r}" if readable else f"bytes that begin with {head[:8].hex(' ')}"

"""Any file → what it holds, as data; or one clear sentence about what it is instead.

The content decides, never the suffix: a `.pth.tar` is usually a torch zip, and a download that failed is usually an
HTML page.
Source: https://github.com/safetensors/safetensors for that format; `paddle.save` writes a pickled dict of NumPy arrays.

The directory of a zip file over its memory map: stored entries are views, deflated ones are bounded, checksums are
compared.

Files written by `torch.save`: the zip container of torch 1.6 and later, and the legacy stream before it.

Storages that are stored uncompressed become views of the mapped file; nothing is read before it is used.
Source: torch/serialization.py and caffe2/serialize/inline_container.cc (https://github.com/pytorch/pytorch).
"""

from __future__ import annotations

import math
import mmap
import shlex
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import CheckpointError, MissingDependencyError
from .lazy import DTYPES, LazyTensor, MalformedError, Storage, as_count, listing, printable, read_bytes
from .pickle import Global, PickleStream, read_pickle

_LOCAL_HEADER_BYTES = 30
_MAX_ENTRIES = 200_000
_INFLATED_FLOOR = 64 << 20
_INFLATED_RATIO = 20
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    NotImplementedError,
    OverflowError,
    EOFError,
    RuntimeError,
    IndexError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a zip archive.

    Attributes:
        name: With its folder.
        start: Offset of its bytes in the file.
        stored_bytes: As stored.
        nbytes: After inflating.
        deflated: Whether it must be inflated.
        crc: CRC-32 of the inflated bytes; 0 where the writer left it out.
    """

    name: str
    start: int
    stored_bytes: int
    nbytes: int
    deflated: bool
    crc: int


class ZipArchive:
    """The directory of a zip file over its map. `zipfile` reads the directory only; entries are views.

    Args:
        buffer: The mapped file.
        file: The same file, open for reading in binary mode.

    Raises:
        MalformedError: The directory is damaged or missing (a truncated file).
    """

    def __init__(self, buffer: mmap.mmap, file: BinaryIO) -> None:
        self.buffer = buffer
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            if len(infos) > _MAX_ENTRIES:
                raise MalformedError(f"the zip archive has {len(infos)} entries")
            self.entries = {info.filename: self._locate(info) for info in infos}
        except MalformedError:
            raise
        except _ZIP_ERRORS as error:
            raise MalformedError(f"the zip archive is damaged or truncated ({printable(str(error))})") from error
        self._check_sizes()

    def _locate(self, info: zipfile.ZipInfo) -> Entry:
        header = info.header_offset
        if (
            not 0 <= header <= len(self.buffer) - _LOCAL_HEADER_BYTES
            or self.buffer[header : header + 4] != b"PK\x03\x04"
        ):
            raise MalformedError(f"the zip entry {printable(info.filename)} does not stand where the directory says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", self.buffer, header + 26)
        start = header + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise MalformedError(
                f"the zip entry {printable(info.filename)} is encrypted or compressed in an unusual way"
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if start + info.compress_size > len(self.buffer) or (not deflated and info.compress_size != info.file_size):
            raise MalformedError(f"the zip entry {printable(info.filename)} reaches past the end of the file")
        return Entry(info.filename, start, info.compress_size, info.file_size, deflated, info.CRC)

    def _check_sizes(self) -> None:
        stored = sum(entry.stored_bytes for entry in self.entries.values())
        inflated = sum(entry.nbytes for entry in self.entries.values() if entry.deflated)
        if stored > len(self.buffer):
            raise MalformedError("the entries of the zip archive overlap")
        if inflated > _INFLATED_FLOOR + _INFLATED_RATIO * len(self.buffer):
            raise MalformedError(f"the zip archive would inflate to {inflated:,} bytes, more than weights can")

    def inflate(self, entry: Entry) -> bytes:
        """The bytes of a deflated entry.

        Raises:
            MalformedError: They are damaged, or of another length than the directory says.
        """
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = decoder.decompress(
                memoryview(self.buffer)[entry.start : entry.start + entry.stored_bytes], entry.nbytes + 1
            )
        except zlib.error as error:
            raise MalformedError(f"the zip entry {printable(entry.name)} is damaged ({error})") from error
        if len(data) != entry.nbytes:
            raise MalformedError(f"the zip entry {printable(entry.name)} has another length than the directory says")
        return data

    def stream(self, entry: Entry) -> PickleStream:
        """An entry as a pickle stream."""
        if entry.deflated:
            data = self.inflate(entry)
            return PickleStream(data, 0, len(data))
        return PickleStream(self.buffer, entry.start, entry.start + entry.nbytes)

    def read(self, entry: Entry, alignment: int) -> torch.Tensor:
        """uint8 (n,): the bytes of an entry, compared with their checksum.

        Raises:
            MalformedError: The checksum differs.
        """
        data = bytearray(self.inflate(entry)) if entry.deflated else None
        start = 0 if data is not None else entry.start
        view = memoryview(data if data is not None else self.buffer)[start : start + entry.nbytes]
        # torch can be told to write no checksums (`set_crc32_options(False)`): the field is then not one.
        if entry.crc and zlib.crc32(view) != entry.crc:
            raise MalformedError(
                f"the checksum of {printable(entry.name)} is wrong: the file was damaged after it was written"
            )
        return read_bytes(self.buffer if data is None else data, start, entry.nbytes, alignment=alignment)


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
            raise MalformedError(
                f"the storage {printable(key)} has {entry.nbytes} bytes, expected {count * dtype.itemsize}"
            )
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
    if (
        not isinstance(pid, tuple)
        or len(pid) < 5
        or pid[0] != "storage"
        or not isinstance(pid[1], Global)
        or not isinstance(pid[2], str)
    ):
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


_MAX_SAFETENSORS_HEADER = 100_000_000
_DOWNLOAD = "download it again and compare its size and sha256 with the publisher's"
_SIGNATURES = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself",
        "fetch the file itself: git lfs pull",
    ),
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file (Keras)",
        "export its weights as safetensors with the names of a known RepVGG family",
    ),
    (b"\x93NUMPY", "one NumPy array", "give the checkpoint that torch.save wrote"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip or tar -xzf"),
    (b"BZh", "a bzip2 archive", "unpack it first: bunzip2"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x"),
    (b"Rar!", "a RAR archive", "unpack it first: unrar x"),
    (b"ftrt", "a TensorRT plan", "give the checkpoint that it was built from"),
    (b"\x89PNG", "a PNG image", "give the checkpoint as --ckpt"),
    (b"\xff\xd8\xff", "a JPEG image", "give the checkpoint as --ckpt"),
    (b"GGUF", "a GGUF file", "give the checkpoint that torch.save wrote"),
)
_TENSOR_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
                  "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


def read_file(path: Path) -> Content:
    """Reads a checkpoint file as data. No code of it is run, and weights stay on disk until they are used.

    Raises:
        CheckpointError: The file is missing, empty, damaged, or not a checkpoint; the message says what it is.
    """
    check_file(path)
    with open_binary(path) as file:
        # A private map: tensors are writable views of it, and writing to one never reaches the file.
        try:
            return _read(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), file)
        except MalformedError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}", remedy=_DOWNLOAD) from error


def check_file(path: Path) -> None:
    """Refuses what is not a readable, non-empty file.

    Raises:
        CheckpointError: It is missing, a folder, something else, or empty.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file", remedy="check the path given as --ckpt")
    if path.is_dir():
        raise CheckpointError(
            f"{path}: is a folder, expected a checkpoint file",
            remedy=f"give a file in it, such as {path / 'model.pth'}",
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: is a device or pipe, expected a file",
            remedy="write it to a file first: a checkpoint is read out of order",
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes)", remedy=_DOWNLOAD)


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        CheckpointError: The operating system refuses.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}", remedy=f"make it readable, for example chmod u+r {path}"
        ) from error


def _read(path: Path, buffer: mmap.mmap, file: BinaryIO) -> Content:
    head = buffer[:512]
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _read_zip(path, ZipArchive(buffer, file))
    if _is_safetensors(buffer):
        return _read_safetensors(path)
    _refuse_known(path, head)
    return read_torch_legacy(buffer) or _read_plain_pickle(path, buffer)


def _read_zip(path: Path, archive: ZipArchive) -> Content:
    names = archive.entries
    pickles = sorted((name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), key=len)
    if pickles:
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in names or any(name.startswith(f"{prefix}code/") for name in names):
            raise CheckpointError(
                f"{path}: is a TorchScript archive (torch.jit.save): a program with its weights, not a checkpoint",
                remedy="save the state dict of the model that was scripted: torch.save(model.state_dict(), 'model.pth')",
            )
        return read_torch_zip(archive, prefix)
    raise CheckpointError(
        f"{path}: is {_name_zip(list(names))}, not a torch checkpoint (no data.pkl in it)",
        remedy=_zip_remedy(list(names)),
    )


def _name_zip(names: list[str]) -> str:
    if not names:
        return "an empty zip archive"
    if all(name.endswith(".npy") for name in names):
        return f"an .npz of NumPy arrays ({listing(names)})"
    if "[Content_Types].xml" in names:
        return "an office document"
    if any(name.endswith(("model.json", "serialized_exported_program.json")) for name in names):
        return "an exported program (torch.export)"
    return f"a zip archive of {listing(names)}"


def _zip_remedy(names: list[str]) -> str:
    inside = [
        name
        for name in names
        if name.lower().endswith((".pth", ".pt", ".tar", ".safetensors", ".pdparams", ".bin", ".ckpt"))
    ]
    if inside:
        return f"unpack it and give the file inside: {printable(inside[0])}"
    return "give the file that torch.save wrote, a .safetensors or a .pdparams"


def _is_safetensors(buffer: mmap.mmap) -> bool:
    length = int.from_bytes(buffer[:8], "little")
    return len(buffer) > 9 and 2 <= length <= _MAX_SAFETENSORS_HEADER and buffer[8:9] == b"{"


def _read_safetensors(path: Path) -> Content:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependencyError(
            "reading .safetensors needs the package safetensors",
            remedy="pip install 'repvgg-deploy[export]', or pip install safetensors",
        ) from error
    try:
        file: Any = safe_open(str(path), framework="pt")
        tensors = {name: _safetensor(file, name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return Content("safetensors", tensors, metadata=dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise MalformedError(f"the safetensors file is damaged or truncated ({printable(str(error))})") from error


def _safetensor(file: Any, name: str) -> LazyTensor:
    described = file.get_slice(name)
    shape = tuple(described.get_shape())
    dtype = _TENSOR_DTYPES.get(described.get_dtype())
    if dtype is None:
        raise MalformedError(
            f"the tensor {printable(name)} has the dtype {printable(described.get_dtype())}, which no RepVGG has"
        )
    # The format itself forbids overlap, so each tensor is its own backing.
    backing = object()
    return LazyTensor(dtype, shape, backing, math.prod(shape) * dtype.itemsize, partial(file.get_tensor, name))


def _refuse_known(path: Path, head: bytes) -> None:
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            raise CheckpointError(f"{path}: is {what}, not a checkpoint", remedy=remedy)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise CheckpointError(
            f"{path}: is an HTML or XML page, not a checkpoint: a download that met an error or login page",
            remedy=_DOWNLOAD,
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: is a tar archive, not a checkpoint (a .pth.tar of torch is none either; torch before "
            f"0.1.10 wrote real ones)",
            remedy="unpack it and give the checkpoint inside: tar -xf; or load and save it again with torch.save",
        )
    if _looks_like_onnx(head):
        raise CheckpointError(
            f"{path}: is an ONNX model, not a checkpoint",
            remedy=f"run it as it is: repvgg-trt inspect {shlex.quote(str(path))}",
        )


def _looks_like_onnx(head: bytes) -> bool:
    """ir_version (field 1, a small number), then producer name (2), an operator set (8) or the graph (7)."""
    return len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 20 and head[2] in (0x12, 0x3A, 0x42)


def _read_plain_pickle(path: Path, buffer: mmap.mmap) -> Content:
    stream = PickleStream(buffer, 0, len(buffer))
    try:
        root, suspicious = read_pickle(stream)
    except MalformedError as error:
        if buffer[:1] == b"\x80":
            raise
        raise CheckpointError(
            f"{path}: is not a checkpoint: neither torch zip, nor safetensors, nor pickle, but "
            f"{_name_bytes(buffer[:32])}",
            remedy="give the file that torch.save wrote, a .safetensors or a .pdparams",
        ) from error
    return Content("pickle", root, suspicious=suspicious, numpy=True)


def _name_bytes(head: bytes) -> str:
    if not head.strip(b"\x00"):
        return "zeros: an interrupted download or copy"
    text = head.decode("latin-1").strip().replace("\n", " ")
    readable = text.isascii() and text.isprintable()
    return f"a text that begins {text!r}" if readable else f"bytes that begin with {head[:8].hex(' ')}"

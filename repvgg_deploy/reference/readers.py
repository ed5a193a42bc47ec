"""Any file → what it holds, as data; or one clear sentence about what it is instead.

The content decides, never the suffix: a `.pth.tar` is usually a torch zip, and a download that failed is usually an HTML page.
Source: https://github.com/safetensors/safetensors for that format; `paddle.save` writes a pickled dict of NumPy arrays.
"""

from __future__ import annotations

import math
import mmap
import shlex
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, MissingDependencyError
from .lazy_tensor import LazyTensor, MalformedError, listing, printable
from .pickle_stream import PickleStream
from .tensor_pickle import read_pickle
from .torch_file import Content, read_torch_legacy, read_torch_zip
from .zip_archive import ZipArchive

_MAX_SAFETENSORS_HEADER = 100_000_000
_DOWNLOAD = "download it again and compare its size and sha256 with the publisher's"
_SIGNATURES = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "fetch the file itself: git lfs pull"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "export its weights as safetensors with the names of a known RepVGG family"),
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
        raise CheckpointError(f"{path}: is a folder, expected a checkpoint file", remedy=f"give a file in it, such as {path / 'model.pth'}")
    if not path.is_file():
        raise CheckpointError(f"{path}: is a device or pipe, expected a file", remedy="write it to a file first: a checkpoint is read out of order")
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
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}", remedy=f"make it readable, for example chmod u+r {path}") from error


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
    raise CheckpointError(f"{path}: is {_name_zip(list(names))}, not a torch checkpoint (no data.pkl in it)", remedy=_zip_remedy(list(names)))


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
    inside = [name for name in names if name.lower().endswith((".pth", ".pt", ".tar", ".safetensors", ".pdparams", ".bin", ".ckpt"))]
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
            "reading .safetensors needs the package safetensors", remedy="pip install 'repvgg-deploy[export]', or pip install safetensors"
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
        raise MalformedError(f"the tensor {printable(name)} has the dtype {printable(described.get_dtype())}, which no RepVGG has")
    # The format itself forbids overlap, so each tensor is its own backing.
    backing = object()
    return LazyTensor(dtype, shape, backing, math.prod(shape) * dtype.itemsize, partial(file.get_tensor, name))


def _refuse_known(path: Path, head: bytes) -> None:
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            raise CheckpointError(f"{path}: is {what}, not a checkpoint", remedy=remedy)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise CheckpointError(f"{path}: is an HTML or XML page, not a checkpoint: a download that met an error or login page", remedy=_DOWNLOAD)
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: is a tar archive, not a checkpoint (a .pth.tar of torch is none either; torch before 0.1.10 wrote real ones)",
            remedy="unpack it and give the checkpoint inside: tar -xf; or load and save it again with torch.save",
        )
    if _looks_like_onnx(head):
        raise CheckpointError(f"{path}: is an ONNX model, not a checkpoint", remedy=f"run it as it is: repvgg-trt inspect {shlex.quote(str(path))}")


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
            f"{path}: is not a checkpoint: neither torch zip, nor safetensors, nor pickle, but {_name_bytes(buffer[:32])}",
            remedy="give the file that torch.save wrote, a .safetensors or a .pdparams",
        ) from error
    return Content("pickle", root, suspicious=suspicious, numpy=True)


def _name_bytes(head: bytes) -> str:
    if not head.strip(b"\x00"):
        return "zeros: an interrupted download or copy"
    text = head.decode("latin-1").strip().replace("\n", " ")
    readable = text.isascii() and text.isprintable()
    return f"a text that begins {text!r}" if readable else f"bytes that begin with {head[:8].hex(' ')}"

"""What a file is that was taken for another, told from its first bytes, and what to do about it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

HEAD_BYTES = 512
PLAN_MAGICS = (b"ftrt", b"vtrt")
"""How plans of TensorRT 8 to 11 and of TensorRT-RTX 1.7 begin. It is undocumented: another beginning proves nothing."""
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
"""How zip archives begin: with their first entry, or with the end of an empty one."""
NUMPY_MAGIC = b"\x93NUMPY"
_PICKLE_MAGIC = b"\x80"
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_TAR_OFFSET, _TAR_MAGIC = 257, b"ustar"
_SIGNATURES = (
    *((magic, "a TensorRT plan", "give the {wanted} that it was built from") for magic in PLAN_MAGICS),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file itself: git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip or tar -xzf"),
    (b"BZh", "a bzip2 archive", "unpack it first: bunzip2"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x"),
    (b"Rar!", "a RAR archive", "unpack it first: unrar x"),
    (b"\x89PNG", "a PNG image", "give the {wanted} here, and images where they are asked for"),
    (b"\xff\xd8\xff", "a JPEG image", "give the {wanted} here, and images where they are asked for"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "export its weights as safetensors with a RepVGG's usual key names"),
    (NUMPY_MAGIC, "one NumPy array", "give the {wanted}"),
    (b"GGUF", "a GGUF file", "give the {wanted}"),
)


def name_foreign(path: Path, head: bytes, wanted: Literal[".onnx", "checkpoint", "image"]) -> tuple[str, str] | None:
    """What a file is that is not what was wanted, and the remedy; None where nothing is known of it.

    Args:
        path: Named in the remedy.
        head: The first HEAD_BYTES of the file, or all of a shorter one.
        wanted: What the file was taken for.
    """
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return (
            "an HTML or XML page (a download that met an error or login page)",
            "download it again, and compare its size with the publisher's",
        )
    if wanted == ".onnx" and (kind := _name_checkpoint(head)) is not None:
        return kind, f"export it first: repvgg-export --ckpt {shlex.quote(str(path))}"
    if wanted == "checkpoint" and _looks_like_onnx(head):
        return "an ONNX model", f"run it as it is: repvgg-trt inspect {shlex.quote(str(path))}"
    if head[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        old = "; load one of torch before 0.1.10 and save it again with torch.save" if wanted == "checkpoint" else ""
        return "a tar archive", f"unpack it and give the {wanted} inside: tar -xf{old}"
    found = next(((what, remedy) for magic, what, remedy in _SIGNATURES if head.startswith(magic)), None)
    return found and (found[0], found[1].format(wanted=wanted))


def _name_checkpoint(head: bytes) -> str | None:
    if head.startswith(ZIP_MAGICS):
        return "a zip archive, such as torch.save writes"
    if head.startswith(_PICKLE_MAGIC):
        return "a pickle, such as old checkpoints are"
    if head[8:10] == b'{"' and not any(head[4:8]):  # the length of its header, 64 bits, then JSON
        return "a safetensors checkpoint"
    return None


def _looks_like_onnx(head: bytes) -> bool:
    """ir_version (field 1, a small number), then producer name (2), an operator set (8) or the graph (7)."""
    return len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 20 and head[2] in (0x12, 0x3A, 0x42)

"""What a file is that was taken for an ONNX model, told from its first bytes."""

from __future__ import annotations

import shlex
from pathlib import Path

HEAD_BYTES = 64
_EXPORT = "export it first: repvgg-export --ckpt {path}"
_DOWNLOAD = "download it again, and compare its size with the publisher's"
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive, such as torch.save writes", _EXPORT),
    (b"\x80", "a pickle, such as old checkpoints are", _EXPORT),
    (b"ftrt", "a TensorRT plan", "give the .onnx that it was built from"),
    (b"vtrt", "a TensorRT plan", "give the .onnx that it was built from"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file itself: git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip or tar -xzf"),
    (b"\x89PNG", "a PNG image", "give the .onnx first, then the images"),
    (b"\xff\xd8\xff", "a JPEG image", "give the .onnx first, then the images"),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def name_foreign(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do about it; None where nothing is known of it.

    Args:
        path: Named in the remedy.
        head: The first HEAD_BYTES of the file, or all of a shorter one.
    """
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return "an HTML or XML page: a download that met an error or login page", _DOWNLOAD
    if head[8:10] == b'{"' and not any(head[4:8]):  # the length of its header, 64 bits, then JSON
        return "a safetensors checkpoint", _EXPORT.format(path=shlex.quote(str(path)))
    found = next(((what, remedy) for signature, what, remedy in _SIGNATURES if head.startswith(signature)), None)
    return found and (found[0], found[1].format(path=shlex.quote(str(path))))

"""A file is named by how it begins, with a remedy that suits what it was taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from repvgg_deploy.files.signatures import HEAD_BYTES, name_foreign

SAFETENSORS = b'\x10\x00\x00\x00\x00\x00\x00\x00{"stage0.rbr'
TAR = b"net/".ljust(257, b"\0") + b"ustar\x0000"


@pytest.mark.parametrize(
    ("head", "what", "onnx_remedy", "checkpoint_remedy"),
    [
        (b"PK\x03\x04 torch", "a zip archive, such as torch.save writes", "repvgg-export --ckpt 'my net'", None),
        (b"\x80\x02}q\x00.", "a pickle, such as old checkpoints are", "repvgg-export --ckpt 'my net'", None),
        (SAFETENSORS, "a safetensors checkpoint", "repvgg-export --ckpt 'my net'", None),
        (b"\x08\x08\x12\x07pytorch", "an ONNX model", None, "repvgg-trt inspect 'my net'"),
        (
            b"ftrt\0\0\0\0",
            "a TensorRT plan",
            "the .onnx that it was built from",
            "the checkpoint that it was built from",
        ),
        (
            b"vtrt\0\0\0\0",
            "a TensorRT plan",
            "the .onnx that it was built from",
            "the checkpoint that it was built from",
        ),
        (b"\n <!DOCTYPE html><html>", "an HTML or XML page", "download it again", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull", "git lfs pull"),
        (TAR, "a tar archive", "give the .onnx inside: tar -xf", "give the checkpoint inside: tar -xf"),
        (b"\xff\xd8\xff\xe0", "a JPEG image", "give the .onnx here", "give the checkpoint here"),
        (b"\x93NUMPY\x01\x00", "one NumPy array", "give the .onnx", "give the checkpoint"),
        (b"hello", None, None, None),
        (b"", None, None, None),
    ],
)
def test_file_is_named_by_how_it_begins(
    head: bytes, what: str | None, onnx_remedy: str | None, checkpoint_remedy: str | None
) -> None:
    for found, remedy in (
        (name_foreign(Path("my net"), (head + bytes(99))[:HEAD_BYTES], ".onnx"), onnx_remedy),
        (name_foreign(Path("my net"), (head + bytes(99))[:HEAD_BYTES], "checkpoint"), checkpoint_remedy),
    ):
        if remedy is None or what is None:
            assert found is None
        else:
            assert found is not None
            assert found[0].startswith(what)
            assert remedy in found[1]

"""Containers are recognised by content, read without copying, and anything else is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint.candidates import find_candidates
from repvgg_deploy.model.checkpoint.containers import read_file
from repvgg_deploy.model.checkpoint.objects import ForeignObject

STATE = {
    "a": torch.arange(20000, dtype=torch.float32).reshape(100, 200),
    "b": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).half(),
    "c": torch.tensor(5),
    "d": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).t(),
    "e": torch.zeros(0, 3),
    "f": torch.randn(5, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "g": torch.tensor([True, False]),
}


def assert_same_tensors(root: object) -> None:
    assert isinstance(root, dict)
    assert list(root) == list(STATE)
    for name, expected in STATE.items():
        found = root[name].load()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_torch_file_of_any_protocol_is_read(modern, protocol, tmp_path):
    torch.save(STATE, tmp_path / "m.pth", _use_new_zipfile_serialization=modern, pickle_protocol=protocol)
    content = read_file(tmp_path / "m.pth")
    assert content.container == ("torch zip" if modern else "torch legacy")
    assert content.suspicious == frozenset()
    assert_same_tensors(content.root)


def test_safetensors_file_is_read(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in STATE.items()},
        str(tmp_path / "m.safetensors"),
        metadata={"note": "x"},
    )
    content = read_file(tmp_path / "m.safetensors")
    assert content.container == "safetensors"
    assert content.metadata == {"note": "x"}
    assert_same_tensors({name: content.root[name] for name in STATE})  # type: ignore[index]


def rewrite_zip(
    folder: Path, change: Callable[[str, bytes], bytes | None], *, compression: int = zipfile.ZIP_STORED
) -> Path:
    """`z.pth`: `m.pth` with every entry changed, or left out where the change gives None."""
    with zipfile.ZipFile(folder / "m.pth") as old, zipfile.ZipFile(folder / "z.pth", "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return folder / "z.pth"


def test_deflated_torch_zip_is_read(tmp_path):
    torch.save(STATE, tmp_path / "m.pth")
    path = rewrite_zip(tmp_path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    assert_same_tensors(read_file(path).root)


def test_big_endian_torch_zip_is_read(tmp_path):
    expected = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    torch.save({"a": expected}, tmp_path / "m.pth")

    def swap(name: str, data: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        return np.frombuffer(data, "<f4").astype(">f4").tobytes() if "/data/" in name else data

    assert torch.equal(read_file(rewrite_zip(tmp_path, swap)).root["a"].load(), expected)


def test_big_endian_legacy_stream_is_read(tmp_path):
    expected = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    torch.save({"a": expected}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "m.pth").read_bytes()
    head, storage = data[: -8 - 60], data[-60:]
    flag = head.index(b"little_endian")
    flag = head.index(b"\x88", flag)  # NEWTRUE
    storage = struct.pack(">q", 15) + np.frombuffer(storage, "<f4").astype(">f4").tobytes()
    (tmp_path / "m.pth").write_bytes(head[:flag] + b"\x89" + head[flag + 1 :] + storage)
    assert torch.equal(read_file(tmp_path / "m.pth").root["a"].load(), expected)


def test_stored_tensor_is_a_view_of_the_file_that_leaves_the_file_alone(tmp_path):
    torch.save(STATE, tmp_path / "m.pth")
    before = (tmp_path / "m.pth").read_bytes()
    content = read_file(tmp_path / "m.pth")
    first, second = content.root["a"].load(), content.root["a"].load()  # type: ignore[index]
    first.fill_(7.0)
    assert torch.equal(first, second)  # the same memory: no copy was made
    assert (tmp_path / "m.pth").read_bytes() == before


def test_shared_storage_is_read_as_two_views(tmp_path):
    base = torch.arange(10.0)
    torch.save({"x": base[:6], "y": base[4:]}, tmp_path / "m.pth")
    root = read_file(tmp_path / "m.pth").root
    assert root["x"].load().tolist() == [0, 1, 2, 3, 4, 5]  # type: ignore[index]
    assert root["y"].load().tolist() == [4, 5, 6, 7, 8, 9]  # type: ignore[index]
    assert root["x"].backing is root["y"].backing  # type: ignore[index]


class _Config(dict):  # type: ignore[type-arg]
    """A class that the reader cannot import, as a yacs node is for most users."""


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_foreign_objects_beside_the_tensors_stay_inert(modern, tmp_path):
    import argparse

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    saved = {
        "model": STATE,
        "config": _Config(LR=0.1),
        "args": argparse.Namespace(arch="A0"),
        "optimizer": optimizer,
        "best": np.float64(80.5),
    }
    torch.save(saved, tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
    content = read_file(tmp_path / "m.pth")
    assert_same_tensors(content.root["model"])  # type: ignore[index]
    assert isinstance(content.root["config"], ForeignObject)  # type: ignore[index]
    assert content.root["config"].name.endswith("_Config")  # type: ignore[index]
    assert content.root["args"].state == {"arch": "A0"}  # type: ignore[index]


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_pickled_module_gives_the_names_of_its_state_dict(modern, tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(4, 2))
    module.register_buffer("scratch", torch.zeros(3), persistent=False)
    torch.save(nn.DataParallel(module), tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
    (candidate,) = find_candidates(read_file(tmp_path / "m.pth").root)
    assert candidate.modules is not None and set(candidate.modules) == {
        "",
        *(f"module{n}" for n in ("", ".0", ".1", ".1.0", ".1.1", ".2")),
    }
    expected = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    assert set(candidate.tensors) == set(expected)
    assert all(torch.equal(candidate.tensors[name].load(), tensor) for name, tensor in expected.items())


def _onnx_bytes() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    data: bytes = helper.make_model(graph, producer_name="test").SerializeToString()
    assert onnx is not None
    return data


def _tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO(b""))
    return file.getvalue()


def _zip_bytes(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML or XML page"),
        (b"\n  <html><body>404</body></html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "a gzip archive"),
        (b"ftrt\x00\x00\x00\x00", "a TensorRT plan"),
        (b"\x89HDF\r\n\x1a\nrest", "an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "one NumPy array"),
        (b"\x00" * 4096, "zeros"),
        (b"Hello, I am a text file.\n", "a text that begins 'Hello"),
        (b"\x12\x34\x56\x78\x9a", "bytes that begin with 12 34 56 78 9a"),
        (_zip_bytes(), "an empty zip archive"),
        (_zip_bytes(a_dot_npy=b"x"), "an .npz of NumPy arrays"),
        (_zip_bytes(folder__model_dot_pth=b"x"), "a zip archive of folder/model.pth"),
        (
            _zip_bytes(archive__data_dot_pkl=b"}.", archive__constants_dot_pkl=b").", archive__code__x=b""),
            "a TorchScript archive",
        ),
        (_tar_bytes(), "a tar archive"),
        (_onnx_bytes(), "an ONNX model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_file_that_is_no_checkpoint_is_named(data, expected, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="(?i)" + expected) as caught:
        read_file(path)
    assert str(path) in caught.value.message


def test_torchscript_archive_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, its archives are not gone
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_file(tmp_path / "m.pt")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_file(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_file(tmp_path)


def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device or pipe"):
        read_file(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "m.pth").write_bytes(b"x")
    (tmp_path / "m.pth").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_file(tmp_path / "m.pth")


def _write(kind: str, path: Path) -> None:
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in STATE.items()}, str(path))
    elif kind == "pdparams":
        path.write_bytes(pickle.dumps({"a": STATE["a"].numpy()}, protocol=4))
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "pdparams"])
def test_truncated_file_is_refused(kind, share, tmp_path):
    _write(kind, tmp_path / "m.pth")
    data = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"damaged|truncated|not a checkpoint"):
        read_file(tmp_path / "m.pth")


def test_truncated_pickle_says_so_and_where(tmp_path):
    _write("pdparams", tmp_path / "m.pdparams")
    (tmp_path / "m.pdparams").write_bytes((tmp_path / "m.pdparams").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"truncated.* at byte 5000"):
        read_file(tmp_path / "m.pdparams")


def _tensors_load(path: Path) -> None:
    for tensor in read_file(path).root.values():  # type: ignore[attr-defined]
        tensor.load()


def test_zip_with_a_wrong_checksum_is_refused_when_the_tensor_is_read(tmp_path):
    torch.save(STATE, tmp_path / "m.pth")
    data = bytearray((tmp_path / "m.pth").read_bytes())
    position = data.find(struct.pack("<3f", 100.0, 101.0, 102.0))
    data[position] ^= 1
    (tmp_path / "m.pth").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        _tensors_load(tmp_path / "m.pth")


def test_zip_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_tensors(read_file(tmp_path / "m.pth").root)


def test_zip_bomb_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "m.pth")
    bomb = bytes(100 << 20)
    path = rewrite_zip(
        tmp_path, lambda name, data: bomb if name.endswith("data/0") else data, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(CheckpointError, match="inflate"):
        read_file(path)


def test_storage_missing_from_the_zip_is_named(tmp_path):
    torch.save(STATE, tmp_path / "m.pth")
    path = rewrite_zip(tmp_path, lambda name, data: None if name.endswith("data/1") else data)
    with pytest.raises(CheckpointError, match="storage 1 is missing"):
        read_file(path)


def test_storage_shorter_than_its_tensor_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "m.pth")
    path = rewrite_zip(tmp_path, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="storage 0 has 79996 bytes, expected 80000"):
        read_file(path)


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        _safetensors({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\x00" * 8),
        _safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\x00" * 8),
        _safetensors({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\x00" * 8),
        _safetensors(b'{"a": '),
        _safetensors(b"{" * 5000),
        struct.pack("<Q", 90_000_000) + b"{}",
        _safetensors(b"{" + b" " * (9 << 20) + b"}"),
    ],
)
def test_damaged_safetensors_header_is_refused(content, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"safetensors|dtype"):
        read_file(tmp_path / "m.safetensors")

"""Sharded checkpoints are read; what else a path may be is named, with the line that makes a checkpoint of it."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint
from tests.model.generated import SMALL, load, outputs, random_model

MODEL = random_model(SMALL)


def write_shards(folder: Path, *, suffix: str = ".safetensors", stem: str = "model") -> Path:
    state = {name: tensor.contiguous().clone() for name, tensor in MODEL.state_dict().items()}
    places: dict[str, str] = {}
    names = list(state)
    for index in range(3):
        shard = f"{stem}-0000{index + 1}-of-00003{suffix}"
        part = {name: state[name] for name in names[index::3]}
        if suffix == ".safetensors":
            pytest.importorskip("safetensors.torch").save_file(part, str(folder / shard))
        else:
            torch.save(part, folder / shard)
        places |= dict.fromkeys(part, shard)
    path = folder / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("given", ["index", "shard"])
def test_shards_beside_their_index_are_read_as_one(given, suffix, tmp_path):
    index = write_shards(tmp_path, suffix=suffix)
    checkpoint = load(index if given == "index" else tmp_path / f"model-00002-of-00003{suffix}")
    assert torch.equal(outputs(build_model(checkpoint)), outputs(MODEL))
    assert checkpoint.container.startswith("3 shards of ")
    before = checkpoint.sha256
    index.write_text(index.read_text().replace("total_size", "total size"))
    assert load(index).sha256 != before


def test_missing_shard_is_named(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of its 3 shards are not beside it, first model-00002-of-00003"):
        load_checkpoint(index)


def test_shard_without_its_index_is_named(tmp_path):
    write_shards(tmp_path).unlink()
    with pytest.raises(CheckpointError, match=r"one shard of several, and their index model\.safetensors\.index\.json"):
        load_checkpoint(tmp_path / "model-00001-of-00003.safetensors")


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "nonsense", '{"weight_map": {"a": "../x.bin"}}', '{"weight_map": {}}']
)
def test_index_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no index of a sharded checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("ftp://host/a/b.pth", r"ftp://host/a/b\.pth: is an address \(ftp\)"),
        ("s3://bucket/b.pth", r"s3://bucket/b\.pth: is an address \(s3\)"),
        ("FTP://host/b.pth", r"FTP://host/b\.pth: is an address \(FTP\)"),
        ("sftp://user@host/b.pth", r"sftp://user@host/b\.pth: is an address \(sftp\)"),
        ("wandb:team/run/b.pth", r"wandb:team/run/b\.pth: is an address \(wandb\)"),
    ],
)
def test_address_is_named_as_one(address, shown):
    with pytest.raises(CheckpointError, match=shown) as caught:
        load_checkpoint(address)
    assert "download it first" in caught.value.remedy
    assert ("curl -LO" in caught.value.remedy) == address.lower().startswith("ftp")


def test_address_of_the_hub_in_another_form_gives_ours():
    with pytest.raises(CheckpointError, match=r"hf://timm/repvgg_a0/model\.safetensors: is an address") as caught:
        load_checkpoint("hf://timm/repvgg_a0/model.safetensors")
    assert caught.value.remedy.startswith("give hf-hub:ORG/NAME")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("file:///tmp/a.pth", "/tmp/a.pth"),
        ("FILE://localhost/tmp/a.pth", "/tmp/a.pth"),
        ("file:/tmp/my%20model.pth", "'/tmp/my model.pth'"),
        ("file:a.pth", "a.pth"),
        ("local-dir:/tmp/a.pth", "/tmp/a.pth"),
    ],
)
def test_address_of_a_file_on_this_machine_gives_its_path(address, local):
    with pytest.raises(CheckpointError, match=r"is an address") as caught:
        load_checkpoint(address)
    assert caught.value.remedy == f"give its path alone: {local}"


@pytest.mark.parametrize("path", ["run:1/b.pth", "c:/b.pth", "folder/https:/b.pth", "b.pth"])
def test_path_that_is_not_there_is_no_address(path):
    with pytest.raises(CheckpointError, match=r"there is no such file"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("names", "what", "remedy"),
    [
        ([".metadata", "__0_0.distcp"], r"torch\.distributed\.checkpoint \(DCP\)", "dcp_to_torch_save("),
        (["zero_to_fp32.py", "latest"], "DeepSpeed", "python zero_to_fp32.py . model.pth"),
        (
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            "is a folder",
            "model.safetensors.index.json",
        ),
        (["readme.txt", "best.pth"], "is a folder", "best.pth"),
        (["data.pkl"], "an unpacked torch checkpoint", "zip -0"),
    ],
)
def test_folder_is_named_as_what_it_is(names, what, remedy, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=what) as caught:
        load_checkpoint(tmp_path)
    assert remedy in caught.value.remedy


def test_dcp_shard_is_named_with_the_line_that_converts_its_folder(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"one shard of a checkpoint of torch\.distributed\.checkpoint") as caught:
        load_checkpoint(tmp_path / "__0_0.distcp")
    assert f"dcp_to_torch_save({str(tmp_path)!r}, 'model.pth')" in caught.value.remedy


def test_dump_of_joblib_is_named(tmp_path):
    # The class that joblib writes arrays with, without joblib.
    numbers = b"\x80\x04\x8c\x13joblib.numpy_pickle\x8c\x11NumpyArrayWrapper\x93)\x81."
    for content in (numbers, zlib.compress(pickle.dumps({"a": 1}))):
        (tmp_path / "m.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"joblib") as caught:
            load_checkpoint(tmp_path / "m.pkl")
        assert "torch.save(" in caught.value.remedy and "again" not in caught.value.remedy


def test_exported_program_is_named_with_the_line_that_saves_its_state_dict(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(CheckpointError, match=r"an exported program \(torch\.export\)") as caught:
        load_checkpoint(tmp_path / "m.pt2")
    assert "torch.export.load('FILE').state_dict" in caught.value.remedy


def _state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}


KERNEL = "stage2.1.rbr_dense.conv.weight"


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), r"dtype float8_e4m3fn, expected float32", "before quantization"),
        (lambda t: t.to(torch.int8), r"dtype int8, expected float32", "before quantization"),
        (lambda t: t.to(torch.complex64), r"dtype complex64, expected float32", "no RepVGG has complex weights"),
        (lambda t: t.to(torch.complex128), r"dtype complex128, expected float32", "no RepVGG has complex weights"),
        (lambda t: t.to("meta"), r"a meta tensor: a shape without values", "after its weights were loaded"),
        (lambda t: t.to_sparse(), r"a sparse tensor", "to_dense()"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"a quantized tensor", "before quantization"),
    ],
    ids=["float8", "int8", "complex64", "complex128", "meta", "sparse", "quantized"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_values_that_are_no_plain_numbers_are_named(change, what, remedy, tmp_path):
    state = _state()
    state[KERNEL] = change(state[KERNEL])
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=what) as caught:
        load_checkpoint(tmp_path / "m.pth")
    assert KERNEL in caught.value.message and remedy in caught.value.remedy
    assert "download" not in caught.value.remedy and "incomplete" not in caught.value.message


def test_float8_in_safetensors_is_named(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {name: tensor.contiguous() for name, tensor in _state().items()}
    state[KERNEL] = state[KERNEL].to(torch.float8_e4m3fn)
    save_file(state, str(tmp_path / "m.safetensors"))
    with pytest.raises(CheckpointError, match=rf"first {KERNEL}: a tensor of the dtype F8_E4M3"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_placeholders_of_zero_3_are_named(tmp_path):
    state = {name: torch.empty(0) if "running" not in name else tensor for name, tensor in _state().items()}
    torch.save({"module": state}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"placeholders of the shape \[0\].*ZeRO stage 3") as caught:
        load_checkpoint(tmp_path / "m.pt")
    assert "zero_to_fp32.py" in caught.value.remedy

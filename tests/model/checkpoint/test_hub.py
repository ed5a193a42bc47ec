"""A model by name, from a server of this file that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from repvgg_deploy.cli.export import main
from repvgg_deploy.errors import CheckpointError, InputError, MissingDependencyError
from repvgg_deploy.export import ExportOptions, GraphOptions, export_checkpoint
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.model.checkpoint.hub import default_onnx, locate, name_pretrained
from repvgg_deploy.model.checkpoint.load import load_checkpoint
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import METADATA_KEY
from tests.fakes.hub import COMMIT, Hub, serve
from tests.model.generated import random_model
from tests.model.random_blocks import small_variant

NAME = "hf-hub:org/name"
PINNED = f"{NAME}@{COMMIT}"
CONFIG = {
    "architecture": "repvgg_small",
    "num_classes": small_variant().num_classes,
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 0.8,
        "mean": [0.5, 0.25, 0.485],
        "std": [0.1, 0.2, 0.3],
    },
    "label_names": [f"n{index}" for index in range(small_variant().num_classes)],
    "label_descriptions": {f"n{index}": f"class {index}" for index in range(small_variant().num_classes)},
}


def weights() -> bytes:
    model = random_model(small_variant())
    metadata = {METADATA_KEY: json.dumps({"variant": codec.encode(model.spec)})}
    return save(dict(model.state_dict()), metadata=metadata)


WEIGHTS = weights()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub, as huggingface_hub finds it; its settings are read when it is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS, "pytorch_model.bin": b"pickle"}
    with serve(Hub(files)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        set_template(monkeypatch, served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(importlib.import_module("huggingface_hub.utils._http").time, "sleep", lambda _: None)
        yield served


def set_template(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """In constants; versions of before 1.0 have a copy of it."""
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def refused(given: str, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        locate(given)
    return caught.value.remedy


def test_weights_and_what_config_says_are_of_one_commit(hub: Hub) -> None:
    checkpoint = load_checkpoint(NAME)
    assert checkpoint.origin == PINNED and checkpoint.path.name == "model.safetensors"
    assert checkpoint.labels is not None and checkpoint.labels[:2] == ("class 0", "class 1")
    how = checkpoint.preprocessing
    assert how is not None and (how.crop, how.resize_short, how.interpolation) == ((64, 64), 80, "bicubic")
    assert how.mean == (127.5, 63.75, 123.675) and how.std == (25.5, 51, 76.5)
    model = random_model(small_variant())
    assert torch.equal(checkpoint.state["linear.weight"], model.state_dict()["linear.weight"])
    assert not any("pytorch_model.bin" in line for line in hub.asked)
    assert all(COMMIT in line for line in hub.asked if "model.safetensors" in line)


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_revision_is_asked_for_and_pinned(hub: Hub, revision: str) -> None:
    assert locate(f"hf_hub:org/name@{revision}").origin == PINNED
    assert any(f"/resolve/{revision}/config.json" in line for line in hub.asked)


def test_fetched_file_serves_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate(NAME)
    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate(NAME) == first and not hub.asked
    assert locate(PINNED) == first
    remedy = refused("hf-hub:org/other", "config.json is not in the cache, and HF_HUB_OFFLINE is set")
    assert "without HF_HUB_OFFLINE" in remedy


def test_repository_without_config_serves_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.files["config.json"]
    first = locate(NAME)
    assert first.told is None and first.origin == PINNED
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate(NAME) == first


def test_safetensors_of_another_name_come_before_a_pickle(hub: Hub) -> None:
    hub.files["weights.safetensors"] = hub.files.pop("model.safetensors")
    assert locate(NAME).path.name == "weights.safetensors"
    hub.files["more.safetensors"] = WEIGHTS
    assert "hf-hub:org/name/weights.safetensors" in refused(NAME, "expected one file of weights")
    assert locate("hf-hub:org/name/more.safetensors@v1").origin == f"hf-hub:org/name/more.safetensors@{COMMIT}"


def test_pickle_is_taken_where_there_is_nothing_else(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    assert locate(NAME).path.name == "pytorch_model.bin"
    hub.files["model.pth"] = hub.files.pop("pytorch_model.bin")
    assert locate(f"{NAME}@v1").path.name == "model.pth"


@pytest.mark.parametrize("whole", [True, False])
def test_shards_are_fetched_with_their_index(hub: Hub, whole: bool) -> None:
    state = dict(random_model(small_variant()).state_dict())
    names = list(state)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    variant = json.dumps({"variant": codec.encode(small_variant())})
    for file, inside in parts.items():
        hub.files[file] = save({name: state[name] for name in inside}, metadata={METADATA_KEY: variant})
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    del hub.files["model.safetensors"]
    if not whole:
        del hub.files["model-00002-of-00002.safetensors"]
        refused(NAME, r"has no file model-00002-of-00002\.safetensors")
        return
    checkpoint = load_checkpoint(NAME)
    assert checkpoint.container.startswith("2 shards")
    assert torch.equal(checkpoint.state["linear.weight"], state["linear.weight"])


@pytest.mark.parametrize(
    ("given", "match", "remedy"),
    [
        ("hf-hub:org/other", "there is no such repository, or it is private", "HF_TOKEN"),
        ("hf-hub:org/name@v9", "has no such revision", "leave @v9 out"),
        ("hf-hub:org/name/none.pth", r"has no file none\.pth; it has config\.json, model\.safetensors", "/FILE"),
        ("hf-hub:name", "names no repository", "hf-hub:ORG/NAME"),
        ("hf-hub:", "names no repository", "hf-hub:ORG/NAME"),
        ("hf-hub:org/name@", "names no repository", "hf-hub:ORG/NAME"),
        ("hf-hub:org/na me", "na me", "hf-hub:ORG/NAME"),
    ],
)
def test_name_of_what_is_not_there_is_one_message(hub: Hub, given: str, match: str, remedy: str) -> None:
    assert remedy in refused(given, match)


def test_gated_repository_says_how_to_get_access(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub.gated = True
    assert main(["--ckpt", NAME, "--out", str(tmp_path / "a.onnx")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "is gated: its owner decides who may read it" in said and f"ask for access at {hub.url}/org/name" in said
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert locate(NAME).origin == PINNED


def test_interrupted_download_goes_on(hub: Hub) -> None:
    hub.cut = (len(WEIGHTS) // 2, 1)
    assert locate(NAME).path.read_bytes() == WEIGHTS
    assert sum(line.startswith("GET") and "model.safetensors" in line for line in hub.asked) == 2


def test_download_that_never_ends_is_named_and_leaves_nothing_to_trust(hub: Hub, tmp_path: Path) -> None:
    hub.cut = (10_000, 1_000)
    assert "give the command again" in refused(NAME, r"model\.safetensors cannot be fetched")
    assert not any(path.stat().st_size == 10_000 for path in tmp_path.rglob("model.safetensors"))
    hub.cut = (0, 0)
    assert locate(NAME).path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("links", [True, False])
def test_file_of_another_digest_than_the_hub_says_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    hub.digests["model.safetensors"] = "0" * 64
    if not links:
        monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    remedy = refused(NAME, f"has the SHA-256 [0-9a-f]{{64}}, the hub says {'0' * 64}")
    assert remedy.startswith("rm /")
    os.unlink(remedy[3:].partition(",")[0])
    hub.digests.clear()
    assert locate(NAME).path.read_bytes() == WEIGHTS


def test_name_of_a_published_checkpoint_must_be_that_one(hub: Hub) -> None:
    hub.files["RepVGG-A0-train.pth"] = b"another"
    assert "--ckpt /" in refused("hf-hub:org/name/RepVGG-A0-train.pth", "its card says e538bfe8639d")


@pytest.mark.parametrize("status", [500, None])
def test_hub_that_cannot_be_reached_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch, status: int | None) -> None:
    if status is None:
        set_template(monkeypatch, "http://127.0.0.1:9/{repo_id}")
    else:
        hub.status = status
    said = "Connection refused" if status is None else "500"
    assert "HF_ENDPOINT" in refused(NAME, rf"not in the cache, and the hub cannot be reached \(.*{said}")


def test_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="huggingface_hub") as caught:
        locate(NAME)
    assert "[hub]" in caught.value.remedy


def test_export_takes_from_config_what_nobody_states_and_says_who_said_it(hub: Hub, tmp_path: Path) -> None:
    options = ExportOptions(mean=(1.0, 2.0, 3.0), graph=GraphOptions(image_size=(32, 32)))
    export_checkpoint(NAME, tmp_path / "a.onnx", options=options)
    metadata = read_metadata(tmp_path / "a.onnx")
    how = metadata.spec.preprocessing
    assert how is not None and (how.mean, how.std, how.crop) == ((1, 2, 3), (25.5, 51, 76.5), (32, 32))
    assert metadata.spec.labels is not None and metadata.spec.labels[1] == "class 1"
    told = f"told by config.json of org/name: {small_variant().num_classes} classes"
    assert metadata.certificate.facts[-1] == f"{told}, standard deviation (25.5, 51, 76.5), bicubic, the labels"
    assert metadata.source is not None and metadata.source.origin == PINNED
    assert metadata.source.file == "model.safetensors" and str(tmp_path) not in codec.dumps(metadata)


def test_export_of_a_name_on_the_command_line(hub: Hub, tmp_path: Path) -> None:
    """A program of its own: huggingface_hub reads its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "repvgg_deploy.cli.export", "--ckpt", NAME]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert f"fetched as {PINNED}" in " ".join(done.stdout.split())
    assert "told by config.json of org/name" in done.stdout and (tmp_path / "name.onnx").exists()
    assert list((tmp_path / "home" / "hub").glob("models--org--name/snapshots/*/model.safetensors"))


def test_describe_gives_the_command_that_pins_the_revision(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ckpt", NAME, "--describe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["origin"] == found["file"] == PINNED
    assert found["command"] == f"repvgg-export --ckpt {PINNED} --out name.onnx"


def test_config_of_other_classes_than_the_weights_is_refused(hub: Hub) -> None:
    hub.files["config.json"] = b'{"num_classes": 7}'
    with pytest.raises(CheckpointError, match=r"has 5 classes, config\.json of org/name says 7"):
        load_checkpoint(NAME)


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ("hf-hub:timm/repvgg_a0.rvgg_in1k", "repvgg_a0.rvgg_in1k.onnx"),
        ("hf-hub:timm/repvgg_a0.rvgg_in1k@v1", "repvgg_a0.rvgg_in1k.onnx"),
        ("hf-hub:org/name/folder/b.pth.tar", "b.onnx"),
        ("https://host/a/RepVGG-A0.pth?x=/1", "RepVGG-A0.onnx"),
        ("https:/host/%2e%2e", "checkpoint.onnx"),
        ("folder/b.pth", "folder/b.onnx"),
    ],
)
def test_onnx_of_a_name_is_written_here(given: str, out: str) -> None:
    assert default_onnx(given) == Path(out)


def test_pretrained_is_the_name_that_timm_gave(capsys: pytest.CaptureFixture[str]) -> None:
    assert name_pretrained("A0") == "hf-hub:timm/repvgg_a0.rvgg_in1k"
    assert name_pretrained("D2se") == "hf-hub:timm/repvgg_d2se.rvgg_in1k"
    with pytest.raises(InputError, match="timm publishes no weights of B1g2, only of A0"):
        name_pretrained("B1g2")
    with pytest.raises(SystemExit):
        main(["--pretrained"])
    assert "--pretrained needs --arch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--pretrained", "--arch", "A0", "--ckpt", "a.pth"])


def test_file_at_an_address_is_fetched_with_its_digest(hub: Hub) -> None:
    hub.files["a b.safetensors"] = WEIGHTS
    address = f"{hub.url}/files/a%20b.safetensors"
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    checkpoint = load_checkpoint(f"{address}?token=1#sha256={digest}")
    assert checkpoint.origin == f"{address}#sha256={digest}" and checkpoint.sha256 == digest
    assert locate(Path(address)).origin == checkpoint.origin  # pathlib made one slash of two
    assert "rm /" in refused(f"{address}#sha256={'0' * 64}", f"has the SHA-256 {digest}, the address says 0000")


def test_pretrained_asks_the_hub_for_timms_weights(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pretrained", "--arch", "A0"]) == 1  # this hub has another repository only
    assert "hf-hub:timm/repvgg_a0.rvgg_in1k@main: there is no such repository" in capsys.readouterr().err
    assert "HEAD /timm/repvgg_a0.rvgg_in1k/resolve/main/config.json" in hub.asked

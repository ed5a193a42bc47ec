"""A file from an address: whole, resumed, bounded, or one message."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.download import download, show_address
from tests.fakes.hub import Hub, serve

DATA = bytes(range(256)) * 40_000  # ten blocks


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(Hub({"a.pth": DATA})) as hub:
        yield hub


def fetch(server: Hub, **options: int) -> tuple[Path, str]:
    return download(f"{server.url}/files/a.pth", **options)  # type: ignore[arg-type]


def test_file_is_fetched_once_and_again_when_the_server_has_another(server: Hub) -> None:
    shown: list[tuple[int, int]] = []
    path, sha256 = download(f"{server.url}/files/a.pth", progress=lambda *done: shown.append(done))
    assert path.read_bytes() == DATA and sha256 == hashlib.sha256(DATA).hexdigest() and path.name == "a.pth"
    assert shown[-1] == (len(DATA), len(DATA)) and len(shown) > 1
    shown.clear()
    assert download(f"{server.url}/files/a.pth", progress=lambda *done: shown.append(done)) == (path, sha256)
    assert shown == []
    server.files["a.pth"], server.version = b"other", '"2"'
    assert fetch(server)[0].read_bytes() == b"other"
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.pth", "a.pth.json"]


def test_file_that_changed_on_the_disk_is_fetched_again(server: Hub) -> None:
    path, sha256 = fetch(server)
    path.write_bytes(b"damaged")
    assert fetch(server) == (path, sha256) and path.read_bytes() == DATA


def test_interrupted_download_goes_on_where_it_ended(server: Hub) -> None:
    server.cut = (3_000_000, 2)
    assert fetch(server)[0].read_bytes() == DATA
    assert [line.partition(" ")[2] for line in server.asked] == [
        "/files/a.pth",
        "/files/a.pth bytes=3000000-",
        "/files/a.pth bytes=6000000-",
    ]


def test_next_command_goes_on_where_the_last_one_ended(server: Hub) -> None:
    server.cut = (3_000_000, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repvgg_deploy.files.download._FRUITLESS", 0)
        with pytest.raises(CheckpointError, match="was interrupted after 3,000,000 bytes") as caught:
            fetch(server)
    assert "it goes on from there" in caught.value.remedy
    assert fetch(server)[0].read_bytes() == DATA
    assert server.asked[-1] == "GET /files/a.pth bytes=3000000-"


@pytest.mark.parametrize("version", ['"2"', None])
def test_rest_of_another_file_is_not_put_behind_the_first(server: Hub, version: str | None) -> None:
    server.cut = (3_000_000, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repvgg_deploy.files.download._FRUITLESS", 0)
        with pytest.raises(CheckpointError, match="was interrupted"):
            fetch(server)
    server.files["a.pth"], server.version = DATA[::-1], version
    assert fetch(server)[0].read_bytes() == DATA[::-1]


def test_server_that_always_ends_early_is_left(server: Hub) -> None:
    server.cut, server.version = (1_000_000, 1_000), None
    with pytest.raises(CheckpointError, match="was interrupted after 1,000,000 bytes"):
        fetch(server)
    assert len(server.asked) < 10


def test_file_without_a_length_is_bounded_all_the_same(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has 10,240,000 bytes or more, at most 5,000,000 are fetched"):
        fetch(server, most_bytes=5_000_000)
    server.announces = False
    with pytest.raises(CheckpointError, match="at most 5,000,000 are fetched"):
        fetch(server, most_bytes=5_000_000)
    assert not list(tmp_path.rglob("*.part"))
    assert fetch(server)[0].read_bytes() == DATA


def test_without_a_network_the_file_that_is_there_serves(server: Hub, caplog: pytest.LogCaptureFixture) -> None:
    path, sha256 = fetch(server)
    server.status = 503
    with caplog.at_level(logging.WARNING):
        assert fetch(server) == (path, sha256)
    assert "the file that was fetched before is taken" in caplog.text
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be fetched: the server says 503"):
        fetch(server)


@pytest.mark.parametrize(
    ("status", "remedy"), [(404, "compare the address"), (401, "logged in"), (403, "logged in"), (500, "https_proxy")]
)
def test_refusal_of_the_server_is_one_message(server: Hub, status: int, remedy: str) -> None:
    server.status = status
    with pytest.raises(CheckpointError, match=f"the server says {status}") as caught:
        fetch(server)
    assert remedy in caught.value.remedy


def test_web_page_is_no_checkpoint(server: Hub) -> None:
    server.kinds["a.pth"] = "text/html; charset=utf-8"
    with pytest.raises(CheckpointError, match="is a web page, expected a checkpoint") as caught:
        fetch(server)
    assert "hf-hub:ORG/NAME" in caught.value.remedy


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("http://host/a.pth", "http://host/a.pth: is not encrypted"),
        ("https://me:secret@host/a.pth", "https://host/a.pth: has a name or password in its address"),
        ("https:///a.pth", "names no host"),
        ("https://[host/a.pth", "is no address"),
        ("http://127.0.0.1:9/a.pth", r"cannot be reached \(.*refused"),
    ],
)
def test_address_that_is_not_fetched_from_is_named_without_secrets(server: Hub, address: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        download(address)
    assert "secret" not in str(caught.value) + caught.value.remedy


def test_proxy_of_the_environment_is_asked(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    assert download("http://localhost:9/files/a.pth")[0].read_bytes() == DATA


def test_redirect_leads_to_secure_addresses_only(server: Hub) -> None:
    server.redirects["/moved.pth"] = f"{server.url}/files/a.pth"
    assert download(f"{server.url}/moved.pth")[0].read_bytes() == DATA
    server.redirects["/moved.pth"] = "http://host/a.pth"
    with pytest.raises(CheckpointError, match=r"http://host/a\.pth: is not encrypted"):
        download(f"{server.url}/moved.pth?again")
    assert show_address("https://a@host:1/b?c=d#e") == "https://host:1/b"

"""The load test, whose verdict on the service is only worth what it notices."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import fastapi
import prometheus_client
import pytest

from examples.service import load_test
from tests.contract.source_tree import ROOT
from tests.examples.running_service import RunningService, serve
from tests.runtime.make_model import ModelOptions, make_onnx

NEEDED = (aiohttp, fastapi, prometheus_client)  # imported, so that without one this file is left out and named
IMAGES = str(ROOT / "models/sample/images")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(make_onnx(tmp_path_factory.mktemp("load") / "tiny.onnx", ModelOptions())) as running:
        yield running


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Its seconds are steps: however busy the machine, clients look at the clock so many times."""
    steps = itertools.count()
    monkeypatch.setattr(load_test, "time", SimpleNamespace(perf_counter=lambda: next(steps) / 1000))
    monkeypatch.setattr("sys.argv", ["load_test", "--clients", "4", "--seconds", "0.3", *arguments])
    return load_test.main()


@pytest.mark.parametrize("tensor", [(), ("--tensor",)], ids=["images", "tensors"])
def test_every_answer_is_counted_by_both_sides(
    service: RunningService,
    tensor: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        run(monkeypatch, "--url", f"http://127.0.0.1:{service.port}", "--name", "tiny", "--images", IMAGES, *tensor)
        == 0
    )
    printed = capsys.readouterr().out
    counted = re.search(r"the service counted +(\d+), the clients (\d+)", printed)
    assert counted and counted[1] == counted[2] != "0", printed
    assert re.search(r"wrong answers +0\n +lost +none", printed)


def test_answer_that_is_not_the_idle_services_fails_it(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = iter(range(1_000_000))
    monkeypatch.setattr(load_test, "best_class", lambda *_: next(numbers))  # never the same class twice
    assert run(monkeypatch, "--url", f"http://127.0.0.1:{service.port}", "--name", "tiny", "--images", IMAGES) == 1
    assert not re.search(r"wrong answers +0\n", capsys.readouterr().out)


def test_what_was_named_wrongly_is_said_in_a_line(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            monkeypatch,
            "--url",
            f"http://127.0.0.1:{service.port}",
            "--name",
            "tiny",
            "--images",
            str(tmp_path / "no.jpg"),
        )
        == 1
    )
    assert re.match(r"error: .*no\.jpg: cannot be read: No such file or directory\n  remedy: ", capsys.readouterr().err)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--url", "127.0.0.1:8000", "--images", IMAGES)
    assert stop.value.code == 2 and "expected one such as http://127.0.0.1:8000" in capsys.readouterr().err

"""TensorRT's timings in a file that builds share."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.build.compile import build, choose_timing_file
from repvgg_deploy.build.library import Library
from repvgg_deploy.files.output import locked
from tests.build.fake_trt import FakeTrt, Faults
from tests.build.make_typed import A10, make_job, make_typed


def run(path: Path, file: Path, faults: Faults | None = None, gpu: str = "a10") -> Any:
    trt = FakeTrt("10.9.0.34", path, make_job(path).spec, faults)
    trt.gpu = gpu
    return build(Library("tensorrt", trt, "10.9.0.34"), make_job(path, gpu=A10, timing=file))


def test_timings_are_kept_and_used_again(tmp_path: Path) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    assert run(model, file, Faults(measured=("a", "b"))).timing_bytes == 0
    assert file.read_text() == "a10|a,b"
    assert run(model, file, Faults(measured=("c",))).timing_bytes == len("a10|a,b")
    assert file.read_text() == "a10|a,b,c"


def test_timings_of_a_build_that_ended_meanwhile_are_merged(tmp_path: Path) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    run(model, file, Faults(measured=("mine",), during=lambda: file.write_text("a10|theirs") and None))
    assert file.read_text() == "a10|mine,theirs"


def test_timings_of_another_gpu_are_neither_used_nor_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    file.write_text("h100|x")
    with caplog.at_level(logging.WARNING):
        assert run(model, file).timing_bytes == 0
    assert file.read_text() == "h100|x" and "of another GPU or TensorRT" in caplog.text


def test_timings_of_another_gpu_that_come_meanwhile_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    with caplog.at_level(logging.WARNING):
        run(model, file, Faults(during=lambda: file.write_text("h100|x") and None))
    assert file.read_text() == "h100|x" and "left as it is" in caplog.text


def test_damaged_timings_are_neither_used_nor_replaced_and_cost_no_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    file.write_bytes(b"no timings")
    with caplog.at_level(logging.WARNING):
        assert run(model, file).timing_bytes == 0
    assert file.read_bytes() == b"no timings" and "the timings are damaged" in caplog.text
    file.unlink()
    assert run(model, file, Faults(during=lambda: file.write_bytes(b"no timings") and None)).data
    assert file.read_bytes() == b"no timings" and "was replaced by what is damaged" in caplog.text


def test_timings_leave_only_the_file_and_its_lock(tmp_path: Path) -> None:
    model, folder = make_typed(tmp_path, "fp32"), tmp_path / "timing"
    folder.mkdir()
    run(model, folder / "t.timing")
    assert sorted(entry.name for entry in folder.iterdir()) == ["t.timing"]


def test_timings_that_cannot_be_kept_cost_no_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_typed(tmp_path, "fp32")
    assert run(model, tmp_path / "missing" / "t.timing").data
    assert "the timings are not kept" in caplog.text
    (tmp_path / "folder").mkdir()
    assert run(model, tmp_path / "folder").data
    assert "cannot be read" in caplog.text


def test_two_builds_that_end_at_once_lose_no_timings(tmp_path: Path) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    barrier = threading.Barrier(6)
    faults = [Faults(measured=(f"m{index}",), during=lambda: barrier.wait(300) and None) for index in range(6)]
    threads = [threading.Thread(target=run, args=(model, file, fault)) for fault in faults]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert file.read_text() == "a10|m0,m1,m2,m3,m4,m5"


def test_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    counter = tmp_path / "n"
    counter.write_text("0")

    def add() -> None:
        for _ in range(50):
            with locked(counter):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert counter.read_text() == "200"


def library(flavour: str, version: str) -> Library:
    return Library(flavour, None, version)


def test_file_is_one_for_each_gpu_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path / "c"))
    found = choose_timing_file(library("tensorrt", "10.9.0.34"), ("NVIDIA RTX 4000 Ada", "8.9"), None)
    assert (
        found == tmp_path / "c" / "timing" / "tensorrt-10.9.0.34-nvidia-rtx-4000-ada-sm89.timing"
        and found.parent.is_dir()
    )
    others = {
        choose_timing_file(library("tensorrt", version), (gpu, capability), None)
        for version, gpu, capability in (("10.9.0.34", "NVIDIA L4", "8.9"), ("10.9.0.35", "NVIDIA RTX 4000 Ada", "8.9"))
    }
    assert len(others | {found}) == 3


def test_file_that_is_given_is_taken(tmp_path: Path) -> None:
    assert (
        choose_timing_file(library("tensorrt", "10.9.0.34"), ("NVIDIA L4", "8.9"), tmp_path / "mine")
        == tmp_path / "mine"
    )


def test_tensorrt_rtx_keeps_no_timings_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_timing_file(library("tensorrt_rtx", "1.7"), ("NVIDIA L4", "8.9"), None) is None
    assert caplog.text == ""
    assert choose_timing_file(library("tensorrt_rtx", "1.7"), None, tmp_path / "mine") is None
    assert "--timing-cache has no effect" in caplog.text

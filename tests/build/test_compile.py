"""TensorRT's timings in a file that builds share. What the builder is told: see test_recipes, test_rtx_builds."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.build.compile import choose_timing_file, compile_plan
from repvgg_deploy.build.library import Gpu
from repvgg_deploy.build.options import BuildRequest
from repvgg_deploy.build.source import read_source
from repvgg_deploy.files.output import locked
from repvgg_deploy.files.plan_place import Flavour, Library
from repvgg_deploy.specs.values import BuildConfig
from tests.build.fake_trt import FakeTrt, Faults
from tests.build.make_typed import A10, make_request, make_typed


def run(path: Path, file: Path | None, faults: Faults | None = None) -> Any:
    source = read_source(path)
    trt = FakeTrt("10.9.0.34", path, source.spec, faults)
    return compile_plan(make_request(Library("tensorrt", trt, "10.9.0.34"), source, gpu=A10, timing_cache=file))


def test_timings_are_kept_and_used_again(tmp_path: Path) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    run(model, file, Faults(measured=("a", "b")))
    assert file.read_text() == "a10|a,b"
    run(model, file, Faults(measured=("c",), during=file.unlink))  # what TensorRT was given before is not lost
    assert file.read_text() == "a10|a,b,c"


def test_timings_of_a_build_that_ended_meanwhile_are_merged(tmp_path: Path) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    run(model, file, Faults(measured=("mine",), during=lambda: file.write_text("a10|theirs") and None))
    assert file.read_text() == "a10|mine,theirs"


def test_timings_of_another_gpu_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "t.timing"
    file.write_text("h100|x")
    assert run(model, file).data
    assert file.read_text() == "a10|conv=1ms"
    assert "the timings are of another GPU, CUDA or TensorRT: they are measured again" in caplog.text
    run(model, file, Faults(during=lambda: file.write_text("h100|x") and None))
    assert file.read_text() == "a10|conv=1ms"


def test_what_a_caller_names_and_is_no_timings_is_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = make_typed(tmp_path, "fp32"), tmp_path / "my photo"
    file.write_bytes(b"no timings")
    assert run(model, file).data
    assert file.read_bytes() == b"no timings"
    assert "holds no timings of this TensorRT: it is left as it is: delete it, or name another" in caplog.text
    file.unlink()
    assert run(model, file, Faults(during=lambda: file.write_bytes(b"no timings") and None)).data
    assert file.read_bytes() == b"no timings" and "was replaced by what holds no timings" in caplog.text


def test_damaged_timings_in_the_cache_folder_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path / "c"))
    model = make_typed(tmp_path, "fp32")
    file = choose("10.9.0.34", A10)
    assert file is not None
    for damage in (b"no timings", b"\0"):
        file.write_bytes(damage)
        assert run(model, None).data
        assert file.read_text() == "a10|conv=1ms" and "the timings are damaged: they are measured again" in caplog.text
        caplog.clear()
    run(model, None, Faults(measured=("c",)))
    assert file.read_text() == "a10|c,conv=1ms" and "timings" not in caplog.text
    run(model, None, Faults(during=lambda: file.write_bytes(b"no timings") and None))
    assert file.read_text() == "a10|c,conv=1ms"


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


def choose(version: str, gpu: Gpu | None, given: Path | None = None, flavour: Flavour = "tensorrt") -> Path | None:
    source: Any = None
    library = Library(flavour, None, version)
    return choose_timing_file(BuildRequest(source, BuildConfig(), library, gpu, (), timing_cache=given))


L4, ADA = Gpu("NVIDIA L4", "8.9", None, "13.0"), Gpu("NVIDIA RTX 4000 Ada", "8.9", None, "13.0")


def test_file_is_one_for_each_gpu_cuda_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path / "c"))
    found = choose("10.9.0.34", ADA)
    assert found == tmp_path / "c" / "timing" / "tensorrt-10.9.0.34-cuda13.0-nvidia-rtx-4000-ada-sm89.timing"
    assert found.parent.is_dir()
    later = replace(ADA, cuda_version="13.1")
    assert len({found, choose("10.9.0.34", L4), choose("10.9.0.35", ADA), choose("10.9.0.34", later)}) == 4


def test_file_that_is_given_is_taken(tmp_path: Path) -> None:
    assert choose("10.9.0.34", L4, tmp_path / "mine") == tmp_path / "mine"


def test_tensorrt_rtx_keeps_no_timings_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose("1.7", L4, flavour="tensorrt_rtx") is None
    assert caplog.text == ""
    assert choose("1.7", None, tmp_path / "mine", "tensorrt_rtx") is None
    assert "--timing-cache has no effect" in caplog.text

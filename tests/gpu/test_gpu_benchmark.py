"""`benchmarks/gpu.py` on the fake GPU: what is measured there is meaningless, that it runs through is not."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import checks, machine, models, report, speed
from benchmarks.gpu_parts.bare import BareLoop, DeviceBatch
from benchmarks.gpu_parts.record import Record, find_peak
from repvgg_deploy.errors import CudaError, InputError
from repvgg_deploy.files.passport import read_passport
from repvgg_deploy.files.plan_place import Library
from repvgg_deploy.runtime.tensorrt.backend import TensorRtBackend
from tests.fakes.tensorrt import Faults
from tests.runtime.gpu_world import Setting, World, make_world
from tests.runtime.make_model import ModelOptions, random_batch

CHECKED_WAYS = (
    "any number of images", "16 threads", "with and without CUDA graphs", "device array",
    "device array on a stream of torch", "device array of CuPy", "micro-batching, 64 clients",
)  # fmt: skip
MACHINE: dict[str, Any] = {
    "gpu": "Fake GPU 0", "driver": "580", "cuda": "13.0", "flavour": "tensorrt",
    "versions": {"tensorrt": "10.16.1.11"}, "compute_capability": "8.6",
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 128)))


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that measure nothing, for what is done when and what is recorded."""
    part = {"overhead_us": 0.0, "images_per_second": {"bare": 1.0}, "device_share": 1.0}
    monkeypatch.setattr(checks, "check_ways", lambda plan, images: {})
    monkeypatch.setattr(speed, "measure", lambda engine, images, count, seconds: {"batch": count, **part})
    monkeypatch.setattr(speed, "measure_clients", lambda *_, **__: {"share": 1.0})
    monkeypatch.setattr(speed, "measure_matrix_peak", lambda: None)


def run_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, minutes: float = 1000.0
) -> tuple[gpu.Run, list[str]]:
    """The stages of one variant, with the fake plan in place of built ones."""
    images = random_batch(ModelOptions(), 8)
    np.savez(models.reference_of(tmp_path, "A0"), images=images, fp32=world.expect(images)[0])
    row = {"build_seconds": 1.0, "plan_bytes": 1000, "inspected": "fp32"}
    monkeypatch.setattr(gpu.Run, "_build", lambda self, variant, kind: (world.plan, dict(row)))
    monkeypatch.setattr(
        gpu.Run,
        "_bytes",
        lambda self, answers: self._record.result["plans"].__setitem__(gpu.BYTES, {**row, "done": True}),
    )
    monkeypatch.setattr(speed, "BATCHES", (1, 32))
    run = gpu.Run(
        tmp_path, tmp_path, 0.01, Record(tmp_path / "gpu-fake.json", MACHINE), end=time.monotonic() + 60 * minutes
    )
    return run, run.all(["A0"])


def read(tmp_path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((tmp_path / "gpu-fake.json").read_text())
    return result


def test_every_stage_runs_through_and_is_reported(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, left = run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert left == [] and result["failures"] == {} and report.find_problems(result) == []
    assert set(result["plans"]) == {"A0 fp32", "A0 fp16", "A0 int8", "A0 uint8"}
    for name in ("A0 fp32", "A0 fp16", "A0 int8"):
        row = result["plans"][name]
        assert row["parity"]["met"] and row["parity"]["agreement"] == 1.0
        done = {name: found for name, found in row["ways"].items() if "torch" not in name and "CuPy" not in name}
        assert len(done) == 5 and all(found["met"] for found in done.values()), done
        assert [part["batch"] for part in row["speed"]] == [1, 32]
        assert all(
            part["latency_ms"]["bare"] > 0 and part["images_per_second"]["device array"] > 0 for part in row["speed"]
        )
    shown = report.show(result)
    assert (
        "A0 fp16" in shown
        and "overhead at batch 1" in shown
        and "64 clients" in shown
        and "not judged: the share of the matrix peak" in shown
    )
    assert world.cuda.leaks() == {}


def test_run_on_tensorrt_8_has_one_context_for_each_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare loop beside the Engine needs one, too."""
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 128), version="8.5.3.1"))
    monkeypatch.setitem(MACHINE, "versions", {"tensorrt": "8.5.3.1"})
    run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert report.find_problems(result) == [] and "speed" in result["plans"]["A0 int8"]
    assert world.cuda.leaks() == {}


@pytest.mark.usefixtures("without_figures")
def test_failing_stage_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 128), faults=Faults(enqueue_all=True)))
    run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert set(result["failures"]) == {"A0 fp32", "A0 fp16", "A0 int8"}
    assert "made to fail" in result["failures"]["A0 fp32"]
    assert "WRONG    A0 fp32: " in report.show(result)


@pytest.mark.usefixtures("without_figures")
def test_plan_whose_clients_fail_costs_no_other_plan(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CudaError("made to fail", remedy="none")

    monkeypatch.setattr(speed, "measure_clients", fail)
    run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert set(result["failures"]) == {"A0 fp32", "A0 fp16", "A0 int8"} and result["plans"]["A0 uint8"]["done"]
    assert "A0 int8: overhead at batch 1, µs" in result["aims"] and "WRONG    A0 int8: " in report.show(result)


def test_client_that_fails_is_a_failure_and_no_slow_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, failed = itertools.count(), threading.Event()
    # It measures for as long as the failure takes to come.
    monkeypatch.setattr(
        speed, "time", SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: failed.wait(300))
    )

    def call() -> None:
        if next(calls) == 100:
            failed.set()
            raise CudaError("made to fail", remedy="none")
        time.sleep(0.001)

    with pytest.raises(CudaError, match="made to fail"):
        speed._rate_of_clients(call, 0.05)


def test_bare_loop_is_a_cuda_graph_without_copies(world: World) -> None:
    with world.open() as engine:
        port: Any = engine._backend._port  # type: ignore[attr-defined]
        batch = random_batch(ModelOptions(), 4)
        with port.on_device(0):
            source = DeviceBatch(port, batch)
        with BareLoop(engine, source) as bare:
            assert bare.graph_problem == ""
            runs, copies, launches = world.trt.seen.runs, world.cuda.calls["copy"], world.cuda.launches
            for _ in range(5):
                bare.enqueue()
            bare.wait()
            assert (world.trt.seen.runs, world.cuda.calls["copy"]) == (runs, copies)
            assert world.cuda.launches == launches + 5
            [address] = [bare._addresses["logits"]]
            found = world.cuda.download(address, np.float32, (4, 7))
            np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        with port.on_device(0):
            source.free()
    assert world.cuda.leaks() == {}


@pytest.mark.parametrize("how", ["capture", "tensorrt", "provider"])
def test_bare_loop_without_a_graph_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(faults=Faults(no_capture=how == "tensorrt")))
    world.cuda.has_graphs = how != "provider"
    if how == "capture":
        world.cuda.always["end_capture"] = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    with world.open(cuda_graphs=False) as engine:
        found = speed.measure(engine, random_batch(ModelOptions(), 4), 4, seconds=0.01)
    assert {"capture": "INVALIDATED", "tensorrt": "execute_async_v3", "provider": "has no CUDA graphs"}[how] in (
        found["bare_without_graph"]
    )
    row = {"speed": [found], "build_seconds": 1.0, "plan_bytes": 1, "inspected": "fp32", "driver": "580"}
    shown = report.show({"machine": MACHINE, "peak": {}, "plans": {"A0 fp32": row}, "failures": {}, "aims": {}})
    assert "left out  the bare loop of A0 fp32 at batch 4 has no CUDA graph: " in shown
    assert world.cuda.leaks() == {}


def test_bare_loop_asks_again_and_again_until_the_stream_is_done(world: World) -> None:
    results = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_NOT_READY=600)
    answers = [600, 600, 600, 0, 600, 700]
    with world.open() as engine:
        port: Any = engine._backend._port  # type: ignore[attr-defined]
        with port.on_device(0):
            source = DeviceBatch(port, random_batch(ModelOptions(), 4))
        with BareLoop(engine, source) as bare:
            port._driver = SimpleNamespace(CUresult=results, cuStreamQuery=lambda stream: (answers.pop(0),))
            waits = world.cuda.calls["synchronize_stream"]
            bare.wait()
            assert answers == [600, 700] and world.cuda.calls["synchronize_stream"] == waits
            with pytest.raises(RuntimeError, match="700"):
                bare.wait()
        with port.on_device(0):
            source.free()


def test_bare_loop_that_cannot_be_opened_gives_everything_back(world: World) -> None:
    with world.open() as engine:
        port: Any = engine._backend._port  # type: ignore[attr-defined]
        with port.on_device(0):
            source = DeviceBatch(port, random_batch(ModelOptions(), 2))
        source.shape = (1000, *source.shape[1:])  # the profile does not hold it
        with pytest.raises(RuntimeError, match="refuses the shape"), BareLoop(engine, source):
            pass
        with port.on_device(0):
            source.free()
    assert world.cuda.leaks() == {}


@pytest.mark.usefixtures("without_figures")
def test_run_without_time_goes_on_in_the_next_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, left = run_on(world, tmp_path, monkeypatch, minutes=0.0)
    assert left == ["matrix peak", "A0 fp32", "A0 fp16", "A0 int8", "A0 uint8"] and read(tmp_path)["plans"] == {}
    run_on(world, tmp_path, monkeypatch)
    first = read(tmp_path)
    built: list[str] = []
    run, left = run_on(world, tmp_path, monkeypatch)
    monkeypatch.setattr(gpu.Run, "_build", lambda self, variant, kind: built.append(kind))
    run.all(["A0"])
    assert left == [] and built == [] and read(tmp_path)["plans"] == first["plans"]


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("without_figures")
def test_plan_that_ends_the_process_is_left_for_last(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT that crashes crashes again: what can be measured is measured before."""
    check, order = checks.check_ways, list[str]()

    def crash(plan: Path, images: Any) -> Any:
        order.append("asked")
        if len(order) in (2, 4):  # A0 fp16; and again, when it is its turn
            raise Crash
        return check(plan, images)

    monkeypatch.setattr(checks, "check_ways", crash)
    with pytest.raises(Crash):
        run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert set(result["plans"]) == {"A0 fp32"} and result["broke_off"] == ["A0 fp16"]
    assert report.find_problems(result) == ["A0 fp16: the program ended in the midst of it"]
    with pytest.raises(Crash):
        run_on(world, tmp_path, monkeypatch)
    assert {name for name, row in read(tmp_path)["plans"].items() if row.get("done")} == {
        "A0 fp32",
        "A0 int8",
        "A0 uint8",
    }
    _, left = run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert (
        left == []
        and result["broke_off"] == []
        and result["plans"]["A0 fp16"]["done"]
        and report.find_problems(result) == []
    )


@pytest.mark.usefixtures("without_figures")
def test_plan_that_fails_is_tried_once_a_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*_: object) -> None:
        asked.append(1)
        raise CudaError("made to fail", remedy="none")

    monkeypatch.setattr(checks, "check_ways", fail)
    (tmp_path / "gpu-fake.json").write_text(json.dumps({"machine": MACHINE, "broke_off": ["A0 int8"]}))
    run_on(world, tmp_path, monkeypatch)
    assert len(asked) == 3 and set(read(tmp_path)["failures"]) == {"A0 fp32", "A0 fp16", "A0 int8"}


@pytest.mark.usefixtures("without_figures")
def test_plan_that_broke_off_is_measured_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    del result["plans"]["A0 fp16"]["done"], result["plans"]["A0 fp16"]["speed"]
    result["failures"] = {"A0 fp16": "broke off"}
    (tmp_path / "gpu-fake.json").write_text(json.dumps(result))
    run_on(world, tmp_path, monkeypatch)
    assert "speed" in read(tmp_path)["plans"]["A0 fp16"] and read(tmp_path)["failures"] == {}


def test_result_of_another_machine_is_not_mixed_with_this_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu-fake.json"
    path.write_text(json.dumps({"machine": {**MACHINE, "gpu": "NVIDIA A10"}, "plans": {}}))
    with pytest.raises(InputError, match="another gpu"):
        Record(path, MACHINE)
    with pytest.raises(InputError, match="another gpu"):
        Record(tmp_path / "none.json", MACHINE, copy=path)
    path.write_text(json.dumps({"machine": {**MACHINE, "versions": {"tensorrt": "8.5.3.1"}}, "plans": {}}))
    with pytest.raises(InputError, match="another TensorRT"):
        Record(path, MACHINE)
    assert Record(path, MACHINE, anew=True).result["plans"] == {}
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Record(path, MACHINE)


@pytest.mark.usefixtures("without_figures")
def test_another_driver_goes_on_and_says_what_was_measured_with_which(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    del result["plans"]["A0 int8"]["done"]
    (tmp_path / "gpu-fake.json").write_text(json.dumps(result))
    monkeypatch.setitem(MACHINE, "driver", "590")
    run_on(world, tmp_path, monkeypatch)
    result = read(tmp_path)
    assert {name: row["driver"] for name, row in result["plans"].items() if name != gpu.BYTES} == {
        "A0 fp32": "580", "A0 fp16": "580", "A0 int8": "590",
    }  # fmt: skip
    assert result["machine"]["driver"] == "590" and "driver 580 and 590, tensorrt" in report.show(result)


def test_copy_of_the_results_is_kept_where_git_looks_for_nothing(tmp_path: Path) -> None:
    """The folder of the results may be that of a fresh copy of the working tree."""
    path, copy = tmp_path / "results" / "gpu-a.json", tmp_path / "ignored" / "results" / "gpu-a.json"
    record = Record(path, MACHINE, copy=copy)
    record.end("A0 fp32", 12.0)
    record.save()
    assert path.read_bytes() == copy.read_bytes()
    path.unlink()
    again = Record(path, MACHINE, copy=copy)
    assert again.longest_seconds() == 12.0
    again.end("A0 fp16", 30.0, "made to fail")
    path.write_text(json.dumps({"machine": MACHINE, "seconds": {"A0 fp32": 5.0}}))  # as it was committed
    copy.write_text(json.dumps(again.result))
    assert Record(path, MACHINE, copy=copy).result["failures"] == {"A0 fp16": "made to fail"}
    ignores = subprocess.run(
        ["git", "check-ignore", "-q", gpu.KEPT / "results" / "gpu-a.json"], check=False, cwd=gpu.KEPT.parent
    )
    assert ignores.returncode != 1  # 128: a copy that is no working tree


@pytest.mark.usefixtures("without_figures")
def test_what_failed_before_comes_after_what_is_new(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    begin = Record.begin

    def note(record: Record, name: str) -> None:
        order.append(name)
        begin(record, name)

    monkeypatch.setattr(Record, "begin", note)
    failures = {"A0 fp32": "CudaError: it failed", "matrix peak": "RuntimeError: no memory"}
    before = {"machine": MACHINE, "failures": failures, "broke_off": ["A0 fp16"]}
    (tmp_path / "gpu-fake.json").write_text(json.dumps(before))
    _, left = run_on(world, tmp_path, monkeypatch, minutes=0.0)
    assert left == ["A0 int8", "A0 uint8", "matrix peak", "A0 fp32", "A0 fp16"]
    assert read(tmp_path)["failures"] == failures, "they were forgotten"
    run_on(world, tmp_path, monkeypatch)
    assert order == left and read(tmp_path)["failures"] == {}


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("minutes", "done"), [(10.0, 2), (60.0, 5)])
def test_stage_that_would_not_end_in_time_does_not_begin(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, done: int
) -> None:
    """The first stage takes seconds, each further one six minutes."""
    now = [1000.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def take_long(*_: object) -> dict[str, Any]:
        now[0] += 360.0
        return {}

    monkeypatch.setattr(checks, "check_ways", take_long)
    _, left = run_on(world, tmp_path, monkeypatch, minutes=minutes)
    assert left == ["matrix peak", "A0 fp32", "A0 fp16", "A0 int8", "A0 uint8"][done:]
    assert now[0] <= 1000.0 + 60 * minutes
    _, left = run_on(world, tmp_path, monkeypatch, minutes=2.0)  # less than a stage takes: one begins all the same
    assert len(left) == max(0, 5 - done - 1)


def test_matrix_peak_is_taken_from_another_result_of_the_same_gpu(tmp_path: Path) -> None:
    assert find_peak(tmp_path, "NVIDIA A10") is None
    (tmp_path / "gpu-broken.json").write_text("{")
    for name, gpu_name, peak in (("a", "NVIDIA L4", 100.0), ("b", "NVIDIA A10", None), ("c", "NVIDIA A10", 110.0)):
        found = {"machine": {"gpu": gpu_name}, "peak": {"fp16_tflops": peak, "source": "torch 2"}}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(found))
    assert find_peak(tmp_path, "NVIDIA A10") == {"fp16_tflops": 110.0, "source": "torch 2, in gpu-c.json"}


def test_package_that_does_not_load_ends_no_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(
        'raise OSError("libcudart.so.13: cannot open shared object file")\n', encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(machine, "open_cuda", lambda: world.cuda)
    monkeypatch.setattr(machine, "open_library", lambda _: Library("tensorrt", world.trt, "10.16.1.11"))
    found = machine.describe_machine()
    assert "torch" not in found["versions"] and found["versions"]["tensorrt"] == "10.16.1.11"


def test_nvidia_smi_that_hangs_or_is_missing_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    assert machine.ask_smi("no-such-program") == ""
    monkeypatch.setattr(subprocess, "run", hang)
    assert machine.ask_smi() == ""


def test_models_are_built_by_a_real_builder(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The way from the models to plans, with TensorRT-RTX, which builds without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    folder: Path = request.getfixturevalue("models")
    here = {**MACHINE, "flavour": "tensorrt_rtx", "versions": {"tensorrt": "1.7.1.116"}}
    run = gpu.Run(folder, tmp_path, 0.01, Record(tmp_path / "gpu-fake.json", here), targets=("8.6",))
    for kind in ("fp32", "fp16", "int8"):
        plan, row = run._build(models.SAMPLE, kind)
        assert (
            row["plan_bytes"] == plan.stat().st_size > 0
            and row["build_seconds"] > 0
            and row["inspected"] == "not_inspected"
        )
    one = plan.read_bytes()
    run.profile = gpu.PROFILED
    plan, _ = run._build(models.SAMPLE, kind)
    passport = read_passport(plan)
    assert passport is not None and passport.config.profile.batches == (1, 8, 32, 128) and plan.read_bytes() != one
    with np.load(models.reference_of(folder, models.SAMPLE)) as stored:
        images, logits = stored["images"], {name: stored[name] for name in ("fp32", "int8", "int8-trt8")}
    assert images.shape[0] == 64 and all(len(found) == 64 for found in logits.values())
    assert checks.decibels(logits["fp32"], logits["int8"]) > 10 and not np.array_equal(logits["fp32"], logits["int8"])
    written = models.reference_of(folder, models.SAMPLE).stat().st_mtime_ns
    models.make(folder, models.SAMPLE)
    assert models.reference_of(folder, models.SAMPLE).stat().st_mtime_ns == written


def test_models_that_cannot_be_made_are_a_recorded_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_missing", lambda: ["onnxsim"])
    run = gpu.Run(tmp_path, tmp_path, 0.01, Record(tmp_path / "gpu-fake.json", MACHINE))
    run.all(["A0"])
    problems = report.find_problems(read(tmp_path))
    assert "without onnxsim" in problems[0] and problems[1] == "nothing was measured"


def test_wrong_answers_are_seen(world: World) -> None:
    images = random_batch(ModelOptions(), 8)
    logits = world.expect(images)[0]
    with world.open() as engine:
        assert checks.check_parity(engine, images, logits, "fp32")["met"]
        for precision in ("fp32", "fp16", "int8"):
            assert not checks.check_parity(engine, images, logits[::-1].copy(), precision)["met"]


def test_row_of_another_image_is_wrong_however_small_the_difference_is() -> None:
    """Beside what the logits of an untrained network have in common, it is a rounding error."""
    random = np.random.default_rng(0)
    truth = (random.standard_normal(1000) + 1e-3 * random.standard_normal((8, 1000))).astype(np.float32)
    rounded = truth.astype(np.float16).astype(np.float32)
    many = checks.repeat(truth, 300)
    assert checks.find_difference(rounded + np.float32(1e-3), truth) < 2e-3  # of all alike, as other kernels are
    assert checks.find_difference(checks.repeat(rounded, 300), many) < 1e-3
    for wrong in (np.roll(truth, 1, axis=0), truth[[1, 0, 2, 3, 4, 5, 6, 7]]):
        assert np.abs(wrong - truth).max() / np.abs(truth).max() < 3e-3  # no more than rounding in FP16 may be
        assert checks.find_difference(wrong, truth) == float("inf")
    for start in range(0, 296, 8):  # any two rows of 300
        wrong = many.copy()
        wrong[[start, start + 1]] = wrong[[start + 1, start]]
        assert checks.find_difference(wrong, many) == float("inf")
    for size in (8, 16, 32, 64, 128):  # pieces that changed places
        wrong = np.concatenate([many[size : 2 * size], many[:size], many[2 * size :]])
        assert checks.find_difference(wrong, many) == float("inf")


@pytest.mark.parametrize("way", ["any number of images", "16 threads", "device array", "micro-batching, 64 clients"])
def test_way_whose_rows_come_in_the_wrong_order_fails(world: World, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """With answers that differ little between images, as those of the seeded networks do."""
    images = random_batch(ModelOptions(), 8)
    wrong = [False]
    run, run_device = TensorRtBackend.run, TensorRtBackend.run_device

    def answer(outputs: Any) -> list[np.ndarray]:
        found = [1000 + np.asarray(output) for output in outputs]
        return [np.concatenate([one[1:], one[:1]]) for one in found] if wrong[0] else found

    monkeypatch.setattr(TensorRtBackend, "run", lambda self, batch: answer(run(self, batch)))
    monkeypatch.setattr(TensorRtBackend, "run_device", lambda *given, **more: answer(run_device(*given, **more)))
    checks_of_ways, attempt = dict[str, bool](), checks.attempt
    names = iter(CHECKED_WAYS)

    def attempt_wrongly(call: Any) -> dict[str, Any]:
        name = next(names)
        wrong[0] = name == way
        found = attempt(call)
        wrong[0] = False
        checks_of_ways[name] = found.get("met", True)
        return found

    monkeypatch.setattr(checks, "attempt", attempt_wrongly)
    found = checks.check_ways(world.plan, images)
    assert tuple(found) == CHECKED_WAYS
    assert [name for name, met in checks_of_ways.items() if not met] == [way]


def test_answer_that_is_no_number_is_wrong_in_whatever_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_batch(ModelOptions(), 8)
    truth = world.expect(images)[0]
    with world.open() as engine:
        infer = engine.infer
        monkeypatch.setattr(
            engine, "infer", lambda batch: np.asarray(infer(batch)) * (np.nan if len(batch) == 33 else 1.0)
        )
        found = checks.attempt(lambda: checks._any_number(engine, images, truth))
    assert not found["met"] and found["error"] == float("inf")


def test_large_numpy_batches_are_measured_against_the_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModelOptions(uint8=True)
    world = make_world(tmp_path, monkeypatch, Setting(model=options, profile=(1, 4, 8)))
    with world.open() as engine:
        found = speed.measure_numpy(engine, random_batch(options, 8), 8, seconds=0.01)
    assert found["share"] > 0 and set(found["images_per_second"]) == {"bare", "numpy"}
    assert world.cuda.leaks() == {}


def test_aims_are_judged_by_their_figures() -> None:
    part = {"batch": 128, "device_share": 0.97, "images_per_second": {"bare": 1000.0}, "overhead_us": 0.0}
    first = {"batch": 1, "overhead_us": 30.0, "images_per_second": {"bare": 10.0}, "device_share": 1.0}
    row = {"speed": [first, part], "clients": {"share": 0.9}}
    faster = {"speed": [first, {**part, "images_per_second": {"bare": 1700.0}}], "clients": {"share": 0.5}}
    found = report.judge({"plans": {"B2 fp16": row, "B2 int8": faster}, "peak": {"fp16_tflops": 100.0}})
    assert not found["B2 fp16: overhead at batch 1, µs"]["met"]
    assert not found["B2 fp16: device arrays at batch 128, share of the bare loop"]["met"]
    assert found["B2: INT8 against FP16 at batch 128"] == {"value": 1.7, "met": True}
    assert (
        found["B2 fp16: 64 clients, share of full batches"]["met"]
        and not found["B2 int8: 64 clients, share of full batches"]["met"]
    )
    share = found["B2 FP16 at batch 128, share of the matrix peak"]
    assert share["tflops"] == pytest.approx(2 * 18.4e9 * 1000 / 1e12, rel=0.02) and not share["met"]


def test_machine_without_a_gpu_is_refused_with_a_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> None:
        raise CudaError("no NVIDIA driver was found", remedy="install the NVIDIA driver")

    monkeypatch.setattr(machine, "open_cuda", no_gpu)
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == "error: no NVIDIA driver was found\n  remedy: install the NVIDIA driver\n"

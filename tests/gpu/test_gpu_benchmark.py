"""`benchmarks/gpu.py` on the fake GPU: what is measured there is meaningless, that it runs through is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import checks, speed
from repvgg_deploy.errors import CudaError
from tests.fakes.tensorrt import Faults
from tests.runtime.gpu_world import Setting, World, make_world
from tests.runtime.make_model import ModelOptions, random_batch

MACHINE: dict[str, Any] = {
    "gpu": "Fake GPU 0", "driver": "580", "flavour": "tensorrt", "versions": {"tensorrt": "10.16.1.11"}, "compute_capability": "8.6",
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 128)))


def run_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stages of one variant, with the fake plan in place of built ones."""
    images = random_batch(ModelOptions(), 8)
    np.savez(tmp_path / "a0-reference.npz", images=images, fp32=world.expect(images)[0])
    row = {"build_seconds": 1.0, "plan_bytes": 1000, "inspected": "fp32"}
    monkeypatch.setattr(gpu.Run, "_build", lambda self, variant, kind: (world.plan, dict(row)))
    monkeypatch.setattr(gpu.Run, "_bytes", lambda self, variant: None)
    monkeypatch.setattr(speed, "BATCHES", (1, 32))
    run = gpu.Run(tmp_path, tmp_path, 0.01, MACHINE)
    run.variant("A0")
    return run.finish()


def test_every_stage_runs_through_and_is_reported(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_matrix_peak", lambda: None)
    result = run_on(world, tmp_path, monkeypatch)
    assert result["failures"] == {} and set(result["plans"]) == {"A0 fp32", "A0 fp16", "A0 int8"}
    for row in result["plans"].values():
        assert row["parity"]["met"] and row["parity"]["agreement"] == 1.0
        done = {name: found for name, found in row["ways"].items() if "torch" not in name and "CuPy" not in name}
        assert len(done) == 5 and all(found["met"] for found in done.values()), done
        assert [part["batch"] for part in row["speed"]] == [1, 32]
        assert all(part["latency_ms"]["bare"] > 0 and part["images_per_second"]["device array"] > 0 for part in row["speed"])
    shown = gpu.show(result)
    assert "A0 fp16" in shown and "overhead at batch 1" in shown and "64 clients" in shown
    json.dumps(result)
    assert world.cuda.leaks() == {}


def test_failing_stage_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 128), faults=Faults(enqueue_all=True)))
    monkeypatch.setattr(speed, "measure_matrix_peak", lambda: None)
    result = run_on(world, tmp_path, monkeypatch)
    assert set(result["failures"]) == {"A0 fp32", "A0 fp16", "A0 int8"}
    assert "made to fail" in result["failures"]["A0 fp32"] and "FAILED" in gpu.show(result)


def test_wrong_answers_are_seen(world: World) -> None:
    images = random_batch(ModelOptions(), 8)
    logits = world.expect(images)[0]
    with world.open() as engine:
        assert checks.check_parity(engine, images, logits, "fp32")["met"]
        for precision in ("fp32", "fp16", "int8"):
            assert not checks.check_parity(engine, images, logits[::-1].copy(), precision)["met"]


def test_large_numpy_batches_are_measured_against_the_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    found = gpu.judge({"plans": {"B2 fp16": row, "B2 int8": faster}}, 100.0)
    assert not found["B2 fp16: overhead at batch 1, µs"]["met"]
    assert not found["B2 fp16: device arrays at batch 128, share of the bare loop"]["met"]
    assert found["B2: INT8 against FP16 at batch 128"] == {"value": 1.7, "met": True}
    assert found["B2 fp16: 64 clients, share of full batches"]["met"] and not found["B2 int8: 64 clients, share of full batches"]["met"]
    share = found["B2 FP16 at batch 128, share of the matrix peak"]
    assert share["tflops"] == pytest.approx(2 * 18.4e9 * 1000 / 1e12, rel=0.02) and not share["met"]


def test_machine_without_a_gpu_is_refused_with_a_remedy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise CudaError("no NVIDIA driver was found", remedy="install the NVIDIA driver")

    monkeypatch.setattr(gpu, "open_cuda", no_gpu)
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == "error: no NVIDIA driver was found\n  remedy: install the NVIDIA driver\n"

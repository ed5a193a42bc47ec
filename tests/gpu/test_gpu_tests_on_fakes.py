"""The tests that wait for a GPU, on the fake one: that they run, and that they can fail."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu import test_plans_on_gpu
from tests.gpu.reference import Reference
from tests.runtime.gpu_world import Setting, World, make_world
from tests.runtime.make_model import ModelOptions, random_batch

NEEDS_A_GPU = {
    "test_device_arrays_of_torch": "torch must have CUDA",
    "test_device_arrays_of_cupy": "CuPy must be installed",
    "test_pycuda_runs_the_same_plan": "pycuda must be installed",
    "test_layer_inspector_shows_the_precision": "the fake plan was not inspected",
    "test_bare_loop_gives_the_same_and_memory_is_given_back": "asks the driver how much memory is free",
}
TESTS = {name: test for name, test in vars(test_plans_on_gpu).items() if name.startswith("test_")}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 8)))


def make_reference(world: World) -> Reference:
    images = random_batch(ModelOptions(), 64)
    return Reference(images, world.expect(images)[0])


def call(name: str, world: World, reference: Reference, tmp_path: Path, **more: Any) -> None:
    given = {"plan": ("fp32", world.plan), "reference": reference, "gpu": world.cuda, "tmp_path": tmp_path, **more}
    TESTS[name](**{key: given[key] for key in inspect.signature(TESTS[name]).parameters})


def test_list_of_what_needs_a_real_gpu_is_true() -> None:
    assert set(NEEDS_A_GPU) < set(TESTS)


@pytest.mark.parametrize("name", sorted(set(TESTS) - set(NEEDS_A_GPU)))
def test_test_runs_on_the_fake_gpu(name: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    call(name, world, make_reference(world), tmp_path / "more", graphs=True)
    assert world.cuda.leaks() == {}


def test_plan_that_was_not_inspected_costs_one_test(world: World, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        call("test_layer_inspector_shows_the_precision", world, make_reference(world), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "test_any_number_of_images_is_what_onnx_runtime_gives",
        "test_threads_batcher_and_submit",
        "test_two_engines_of_plans_run_at_once_and_a_closed_one_says_so",
        "test_device_array_of_our_own",
    ],
)
def test_test_fails_where_the_answers_are_others(name: str, world: World, tmp_path: Path) -> None:
    reference = make_reference(world)
    wrong = dataclasses.replace(reference, logits=np.roll(reference.logits, 1, axis=0))
    with pytest.raises(AssertionError):
        call(name, world, wrong, tmp_path, graphs=True)


def test_kernels_that_tensorrt_rtx_runs_at_first_are_no_fault_of_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 8), rtx=True))
    with world.open(cuda_graphs=False) as engine:
        runs = [np.asarray(engine.infer(random_batch(ModelOptions(), 3))) for _ in range(4)]
    assert not np.array_equal(runs[0], runs[-1])  # else this test shows nothing
    call("test_cuda_graphs_change_no_bit", world, make_reference(world), tmp_path)


@pytest.mark.parametrize("rtx", [False, True])
def test_graphs_that_replay_what_was_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rtx: bool) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 4, 8), rtx=rtx))
    monkeypatch.setattr(world.cuda, "launch_graph", lambda graph, stream: None)
    with pytest.raises(AssertionError, match="inf"):
        call("test_cuda_graphs_change_no_bit", world, make_reference(world), tmp_path)


def test_warning_of_another_package_fails_no_test_that_waits_for_a_gpu(tmp_path: Path) -> None:
    """torch and CuPy warn of what they find on a machine; in this project warnings are errors."""
    root = Path(__file__).resolve().parents[2]
    text = (
        "import warnings, pytest\n{marks}\n"
        "def test_warning(): warnings.warn('CUDA path could not be detected', UserWarning)\n"
    )
    marks = {"with": "from tests.gpu.test_plans_on_gpu import pytestmark", "without": "pytestmark = pytest.mark.gpu"}
    for name, line in marks.items():
        (tmp_path / f"test_{name}.py").write_text(text.format(marks=line), encoding="utf-8")
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED" in done.stdout and "test_without.py" in done.stdout.split("FAILED")[1]

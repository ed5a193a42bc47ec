"""The parts of a run, timed on the fake GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repvgg_deploy.errors import CudaError, InputError
from repvgg_deploy.runtime.engine import Engine
from tests.fakes.tensorrt import Faults
from tests.runtime.gpu_world import Setting, assert_answers, make_world
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch

PLAIN = ModelOptions()
MACHINES = [Setting(version="8.5.3.1"), Setting(version="10.16.1.11"), Setting(version="1.7.1.116", rtx=True)]


def test_warm_up_does_not_wait_for_a_second_context_that_tensorrt_8_never_makes(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(version="8.5.3.1"))
    with world.open(contexts=2) as engine:
        engine.warm_up((4, 3, 16, 16))
        assert_answers(world, engine, random_batch(PLAIN, 4))
    assert world.cuda.leaks() == {}


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("setting", MACHINES, ids=lambda setting: setting.version)
def test_parts_are_timed_and_the_engine_answers_as_before(
    tmp_path: Path, monkeypatch, setting: Setting, eager: bool
) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, eager=eager, profile=(2, 4, 8)))
    with world.open() as engine:
        engine.warm_up((4, 3, 16, 16))  # a CUDA graph of another size is there
        before = world.trt.seen.runs
        for count in (1, 4, 8):
            found = engine.time_phases(random_batch(PLAIN, count), 5)
            assert found is not None and len(found) == 5
            for one in found:
                assert min(one.to_device_ms, one.compute_ms, one.to_host_ms) >= 0 and one.enqueue_ms > 0
                if not eager:
                    assert one.compute_ms > 0  # the fake computes with ONNX Runtime when it is waited for
            assert_answers(world, engine, random_batch(PLAIN, count, seed=count))
        assert world.trt.seen.runs - before >= 3 * 6  # five that are timed and one before, of each size
        assert engine.largest_batch == 8
    assert world.cuda.leaks() == {}


def test_batch_above_the_profile_cannot_be_told_apart(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    with world.open() as engine:
        with pytest.raises(InputError, match="the parts of 9 images cannot be timed: the plan takes 8 at a time"):
            engine.time_phases(random_batch(PLAIN, 9), 1)
        assert_answers(world, engine, random_batch(PLAIN, 9))
    with pytest.raises(InputError, match="is closed"):
        engine.time_phases(random_batch(PLAIN, 1), 1)


@pytest.mark.parametrize("call", ["create_event", "record_event", "copy", "synchronize_stream", "elapsed_ms"])
def test_failure_on_the_way_gives_everything_back(tmp_path: Path, monkeypatch, call: str) -> None:
    world = make_world(tmp_path, monkeypatch)
    with world.open() as engine:
        engine.infer(random_batch(PLAIN, 2))
        world.cuda.fail(call, nth=2)
        with pytest.raises(CudaError, match="made to fail"):
            engine.time_phases(random_batch(PLAIN, 2), 3)
        assert_answers(world, engine, random_batch(PLAIN, 2))
    assert world.cuda.leaks() == {}


def test_refusal_of_tensorrt_is_quoted(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(faults=Faults(enqueue={3})))
    with world.open() as engine:
        with pytest.raises(CudaError, match="made to fail"):
            engine.time_phases(random_batch(PLAIN, 2), 5)
        assert_answers(world, engine, random_batch(PLAIN, 2))
    assert world.cuda.leaks() == {}


def test_onnx_has_no_parts(tmp_path: Path) -> None:
    with Engine(make_onnx(tmp_path / "m.onnx")) as engine:
        assert engine.time_phases(random_batch(PLAIN, 2)) is None
        assert engine.largest_batch == 64
        with pytest.raises(InputError, match="batch"):
            engine.time_phases(np.zeros((1, 3)))

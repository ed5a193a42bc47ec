"""Which batches run as CUDA graphs, that padded rows are never seen, and that no work of TensorRT breaks a capture."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy import Engine
from repvgg_deploy.runtime.tensorrt.plan import PlanInterface, PlanProfile, PlanTensor, _read_interface
from repvgg_deploy.runtime.tensorrt.slot import choose_sizes
from tests.fakes.tensorrt import DataType, Faults, TensorIOMode
from tests.runtime.cuda.test_arrays import Interface, free
from tests.runtime.gpu_world import Setting, World, assert_answers, make_world
from tests.runtime.make_model import ModelOptions
from tests.runtime.tensorrt.machines import MACHINES, PATIENCE, batch_of, name_of
from tests.runtime.tensorrt.test_backend import ANY_SIZE, _in_order


def graphs_of(world: World, **options: object):
    engine = world.open(**options)
    return engine, engine._backend._graphs


@pytest.mark.parametrize("profile", [(1, 8, 128), (1, 32, 100), (2, 3, 20), (5, 5, 5)])
def test_usual_sizes_and_the_profiles_own_get_graphs(profile: tuple[int, int, int]) -> None:
    tensor = PlanTensor("images", np.dtype("uint8"), (-1, 4))
    shapes = [(batch, 4) for batch in profile]
    found = choose_sizes(PlanInterface(tensor, (tensor,), (PlanProfile(0, *shapes),)))
    usual = [size for size in (1, 2, 4, 8, 16, 24, 32, 64, 128) if profile[0] <= size <= profile[2]]
    assert found == tuple(sorted({*usual, *profile}))


def test_few_rows_are_added_and_many_are_not(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(1, 8, 128)))
    engine, graphs = graphs_of(world)
    with engine:
        wanted = {1: 1, 3: 4, 5: 8, 9: 16, 17: 24, 25: 32, 32: 32, 33: 33, 55: 55, 56: 64, 111: 111, 112: 128, 128: 128}
        assert {count: graphs.choose_rows(count) for count in wanted} == wanted
        with engine.batcher(max_batch=50), engine.batcher(max_batch=1000):  # the plan does not take the other one
            assert 50 in graphs.sizes and max(graphs.sizes) == 128 and graphs.choose_rows(44) == 50


@pytest.mark.parametrize("setting", MACHINES, ids=name_of)
@pytest.mark.parametrize(
    "options", [ModelOptions(), ModelOptions(uint8=True, kind="top5"), ModelOptions(kind="features")], ids=str
)
def test_padded_rows_change_no_bit_of_the_others_and_are_never_seen(
    tmp_path, monkeypatch, setting: Setting, options: ModelOptions
) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, model=options, profile=(1, 4, 8)))
    answers: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for graphs in answers:
        world.trt.seen.shapes.clear()
        with world.open(contexts=1, cuda_graphs=graphs) as engine:
            engine.warm_up()
            before = world.cuda.launches
            for seed in range(3):
                for count in (1, 3, 5, 6, 7, 8, 11):
                    batch = batch_of(count, options, seed=seed)
                    array = Interface(world, batch)
                    for result in (engine.infer(batch), engine.infer(array)):
                        answers[graphs] += _in_order(result)
                        assert {len(part) for part in _in_order(result)} == {count}
                    free(world, array)
            statistics = engine.statistics()
            assert set(statistics.batch_sizes) == {1, 3, 5, 6, 7, 8, 11} and statistics.images == 2 * 3 * 41
            assert not graphs or setting.version.startswith("8.") or world.cuda.launches - before == 3 * (6 * 2 + 2)
        rows = {shape[0] for shape in world.trt.seen.shapes}
        assert rows == ({1, 2, 4, 8} if graphs else {1, 3, 5, 6, 7, 8})
    for one, two in zip(answers[True], answers[False], strict=True):
        if setting.rtx:  # it runs other kernels until those of a shape are compiled, which graphs wait for
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, two)
    assert world.cuda.leaks() == {}


def test_module_of_a_callers_own_is_not_padded(tmp_path, monkeypatch) -> None:
    """What its rows have to do with each other, nobody knows."""
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    with world.open() as engine:
        for count in (3, 3, 3, 8):
            assert_answers(world, engine, batch_of(count))
    assert {shape[0] for shape in world.trt.seen.shapes} == {3, 8}


@pytest.mark.parametrize("setting", MACHINES, ids=name_of)
def test_other_image_sizes_than_the_warm_one_are_padded_too(tmp_path, monkeypatch, setting: Setting) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, **ANY_SIZE))
    random = np.random.default_rng(0)
    with world.open(contexts=1) as engine:
        engine.warm_up()
        for size in ((16, 32), (64, 48), (8, 16)):
            for count in (3, 5, 3, 3, 13):
                assert_answers(world, engine, random.standard_normal((count, 3, *size), np.float32))
    assert world.cuda.leaks() == {}


def open_plan(world: World, other: Engine) -> None:
    world.open(cuda_graphs=False).close()


def make_context(world: World, other: Engine) -> None:
    with world.cuda.on_device(0):
        pool = other._backend._pool
        first, second = pool.acquire_idle(), pool.acquire_idle()
        pool.release(first)
        pool.release(second)


def run_new_shape(world: World, other: Engine) -> None:
    assert_answers(world, other, batch_of(3))


@pytest.mark.parametrize("action", [open_plan, make_context, run_new_shape])
def test_nothing_that_tensorrt_sets_up_breaks_a_capture_of_another_engine(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, action: Callable[..., None]
) -> None:
    """The fakes end every capture on the device then."""
    begin, started, done = world.cuda.begin_capture, threading.Event(), threading.Event()
    with caplog.at_level("INFO"), world.open(contexts=1) as engine, world.open(cuda_graphs=False) as other:

        def act() -> None:
            started.set()
            action(world, other)
            done.set()

        thread = threading.Thread(target=act)

        def begin_capture(stream: object) -> None:
            begin(stream)
            if not started.is_set():
                thread.start()
                assert started.wait(PATIENCE) and not done.wait(0.2)

        monkeypatch.setattr(world.cuda, "begin_capture", begin_capture)
        for seed in range(3):
            assert_answers(world, engine, batch_of(8, seed=seed))
        assert done.wait(PATIENCE)
        thread.join()
    assert "could not be captured" not in caplog.text and world.cuda.leaks() == {}


# several optimization profiles

SEVERAL: tuple[tuple[str, Any], ...] = (("profiles", [[1, 8, 8], [1, 1, 1], [1, 32, 32], [1, 4, 4]]),)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("setting", MACHINES, ids=name_of)
def test_each_batch_runs_in_the_profile_that_is_for_it(tmp_path, monkeypatch, setting: Setting, graphs: bool) -> None:
    """They are in no order in the plan; with TensorRT 8 one context at a time uses each of them."""
    world = make_world(tmp_path, monkeypatch, replace(setting, header=SEVERAL))
    with world.open(cuda_graphs=graphs) as engine:
        assert engine.largest_batch == 32
        engine.warm_up()
        contexts = world.trt.seen.contexts
        for _ in range(3):
            for count in (1, 2, 4, 5, 8, 9, 20, 32, 33, 45):
                assert_answers(world, engine, batch_of(count, seed=count))
                array = Interface(world, batch_of(count))
                np.testing.assert_allclose(engine.infer(array), world.expect(batch_of(count))[0], rtol=1e-5, atol=1e-5)
                free(world, array)
        assert world.trt.seen.contexts == contexts, "a request made a context"
        assert engine.time_phases(batch_of(3), 1) is not None
    largest = {1: 1, 3: 4, 0: 8, 2: 32}
    order = list(largest.items())
    assert {profile for profile, _ in world.trt.seen.profiles} == set(largest)
    for profile, rows in world.trt.seen.profiles:
        assert profile == next(index for index, most in order if rows <= most)
    assert world.cuda.leaks() == {}


def test_profile_whose_context_cannot_be_had_gives_way_to_the_largest(tmp_path, monkeypatch) -> None:
    faults = Faults(context=set(range(2, 100)))
    world = make_world(tmp_path, monkeypatch, Setting(header=SEVERAL, faults=faults))
    with world.open(contexts=1) as engine:
        for count in (1, 3, 8, 40):
            assert_answers(world, engine, batch_of(count))
    assert {profile for profile, _ in world.trt.seen.profiles} == {2} and world.cuda.leaks() == {}


def test_foreign_profiles_with_gaps_and_like_ranges_are_used_too(tmp_path, monkeypatch) -> None:
    """The nearest usual batch decides, as in Triton; a batch between two ranges is padded to the next one."""
    profiles = [[1, 1, 8], [1, 8, 8], [16, 16, 32]]
    world = make_world(tmp_path, monkeypatch, Setting(header=(("profiles", profiles),), passport=False))
    with world.open(cuda_graphs=False) as engine:
        for count in (1, 4, 5, 8, 9, 16, 40):
            assert_answers(world, engine, batch_of(count))
    assert set(world.trt.seen.profiles) == {(0, 1), (0, 4), (1, 5), (1, 8), (2, 16), (2, 32)}


def test_profiles_for_other_image_sizes_than_the_largest_are_left_alone() -> None:
    tensor = PlanTensor("images", np.dtype("uint8"), (-1, -1))

    class Engine:
        num_optimization_profiles, num_io_tensors = 3, 2
        get_tensor_name = staticmethod(("images", "out").__getitem__)
        get_tensor_mode = staticmethod({"images": TensorIOMode.INPUT, "out": TensorIOMode.OUTPUT}.__getitem__)
        get_tensor_dtype = staticmethod(lambda name: DataType["UINT8"])
        get_tensor_shape = staticmethod(lambda name: tensor.shape)

        @staticmethod
        def get_tensor_profile_shape(name: str, index: int) -> list[tuple[int, int]]:
            return [[(1, 4), (8, 4), (8, 9)], [(1, 4), (2, 4), (2, 9)], [(1, 4), (4, 4), (4, 4)]][index]

    found = _read_interface(types.SimpleNamespace(TensorIOMode=TensorIOMode), Engine(), Path("x"))
    assert [profile.index for profile in found.profiles] == [1, 0]
    assert (found.smallest, found.usual, found.largest) == ((1, 4), (8, 4), (8, 9))

"""Engine on plans, on the fake GPU, which computes with ONNX Runtime: answers, threads, failures, timed parts."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repvgg_deploy import Engine
from repvgg_deploy.errors import CudaContextError, CudaError, CudaMemoryError, InputError
from repvgg_deploy.runtime.results import TopK
from tests.fakes.tensorrt import Faults
from tests.runtime.gpu_world import Setting, World, assert_answers, make_world
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.runtime.tensorrt.machines import MACHINES, PATIENCE, PLAIN, batch_of, name_of


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("setting", MACHINES, ids=name_of)
def test_any_number_of_images_is_answered_and_everything_is_given_back(
    tmp_path, monkeypatch, setting: Setting, eager: bool
) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, profile=(2, 4, 8), eager=eager))
    with world.open() as engine:
        for count in (1, 2, 3, 8, 9, 16, 17, 24, 25, 40, 1):
            for _ in range(3):  # as it is, captured, replayed
                assert_answers(world, engine, batch_of(count, seed=count))
        assert (
            min(shape[0] for shape in world.trt.seen.shapes) == 2
            and max(shape[0] for shape in world.trt.seen.shapes) == 8
        )
        assert name_of(setting).split("-")[1] in engine.backend_name and "Fake GPU 0" in engine.backend_name
        assert engine.device == "cuda"
    assert world.cuda.leaks() == {}


ANY_SIZE = {
    "model": ModelOptions(size=("height", "width"), preprocessing=False),
    "header": (("sizes", ((8, 16), (16, 32), (64, 48))),),
}


@pytest.mark.parametrize("setting", MACHINES, ids=name_of)
def test_plan_of_several_image_sizes_answers_each_and_refuses_those_outside(
    tmp_path, monkeypatch, setting: Setting
) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, **ANY_SIZE))
    random = np.random.default_rng(0)
    with world.open() as engine:
        engine.warm_up()  # of the size that it is tuned for
        assert {shape[1:] for shape in world.trt.seen.shapes} == {(3, 16, 32)}
        for height, width in ((8, 16), (64, 48), (16, 32), (33, 17), (8, 48)):
            for count in (1, 8, 11):
                for _ in range(3):  # as it is, captured, replayed
                    batch = random.standard_normal((count, 3, height, width), np.float32)
                    assert_answers(world, engine, batch)
        for height, width in ((7, 16), (8, 15), (65, 48), (64, 49)):
            with pytest.raises(InputError, match=r"the plan takes images from .* to .*, found") as caught:
                engine.infer(np.zeros((1, 3, height, width), np.float32))
            assert "--max-size" in caught.value.remedy
    assert world.cuda.leaks() == {}


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(uint8=True),
        ModelOptions(batch=4),
        ModelOptions(uint8=True, batch=3),
        ModelOptions(kind="probabilities"),
        ModelOptions(kind="top5"),
        ModelOptions(kind="features"),
        ModelOptions(half=True),
    ],
    ids=str,
)
def test_every_kind_of_model_answers_as_its_onnx_does(tmp_path, monkeypatch, options: ModelOptions) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(model=options))
    with world.open() as engine:
        for count in (1, 4, 11):
            batch = batch_of(count, options)
            found = engine.infer(batch)
            parts = _in_order(found)
            size = options.batch if isinstance(options.batch, int) else None
            expected = _expect(world, batch, size)
            assert len(parts) == len(expected)
            for part, wanted in zip(parts, expected, strict=True):
                np.testing.assert_allclose(
                    part, wanted, rtol=1e-3 if options.half else 1e-5, atol=1e-3 if options.half else 1e-5
                )
    assert world.cuda.leaks() == {}


def _in_order(found) -> list[np.ndarray]:
    if isinstance(found, TopK):
        return [found.scores, found.classes]
    return list(found.values()) if isinstance(found, dict) else [found]


def _expect(world: World, batch: np.ndarray, size: int | None) -> list[np.ndarray]:
    if size is None:
        return world.expect(batch)
    padded = np.concatenate([batch, np.zeros((-len(batch) % size, *batch.shape[1:]), batch.dtype)])
    parts = [world.expect(padded[start : start + size]) for start in range(0, len(padded), size)]
    return [np.concatenate(column)[: len(batch)] for column in zip(*parts, strict=True)]


def test_class_numbers_of_tensorrt_8_become_int64(tmp_path, monkeypatch) -> None:
    options = ModelOptions(kind="top5")
    world = make_world(
        tmp_path, monkeypatch, Setting(model=options, version="8.5.3.1", header=(("dtypes", {"classes": "INT32"}),))
    )
    with world.open() as engine:
        batch = batch_of(3, options)
        found = engine.infer(batch)
        assert isinstance(found, TopK) and found.classes.dtype == np.int64
        np.testing.assert_array_equal(found.classes, world.expect(batch)[1])


def test_memory_order_and_answers_of_a_callers_own(world: World) -> None:
    with world.open() as engine:
        batch = batch_of(4)
        turned = np.asfortranarray(batch)
        first = engine.infer(turned)
        kept = first.copy()
        second = engine.infer(batch_of(4, seed=1))
        first_again = engine.infer(batch)
        np.testing.assert_array_equal(first, kept)  # nothing wrote to it
        np.testing.assert_array_equal(first_again, kept)
        first.fill(0)
        np.testing.assert_array_equal(engine.infer(batch), kept)
        assert not np.shares_memory(first, second)


def test_bad_batches_are_refused_as_on_a_cpu(world: World) -> None:
    with world.open() as engine:
        nan = batch_of(2)
        nan[1, 0, 0, 0] = np.nan
        for wrong in (batch_of(1)[0], batch_of(2)[:, :2], batch_of(1).astype(np.float64), batch_of(1)[:0], nan, "text"):
            with pytest.raises(InputError):
                engine.infer(wrong)
        assert_answers(world, engine, batch_of(2))
    with pytest.raises(InputError, match="closed"):
        engine.infer(batch_of(1))


# threads, devices, failures


def test_64_threads_run_at_once_and_each_gets_its_answer(world: World) -> None:
    with world.open(contexts=4) as engine, ThreadPoolExecutor(64) as pool:
        batches = [batch_of(1 + index % 19, seed=index) for index in range(256)]
        expected = [world.expect(batch)[0] for batch in batches]
        for found, wanted in zip(pool.map(engine.infer, batches), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert engine.statistics().requests == 256
    assert world.cuda.leaks() == {}


def test_two_gpus_and_two_engines_in_one_process(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(devices=2))
    with world.open(0) as first, world.open("cuda:1") as second, ThreadPoolExecutor(8) as pool:
        assert (first.device, second.device) == ("cuda:0", "cuda:1")
        used = world.cuda.used_bytes(1)
        assert used > 0
        futures = [
            pool.submit(engine.infer, batch_of(5, seed=index)) for index in range(40) for engine in (first, second)
        ]
        for index, future in enumerate(futures):
            np.testing.assert_allclose(
                future.result(PATIENCE), world.expect(batch_of(5, seed=index // 2))[0], rtol=1e-5, atol=1e-5
            )
    assert world.cuda.leaks() == {}


def test_fewer_contexts_than_wanted_are_enough(tmp_path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(faults=Faults(context={2, 3, 4, 5, 6, 7, 8, 9})))
    with caplog.at_level(logging.WARNING), world.open(contexts=4) as engine, ThreadPoolExecutor(8) as pool:
        for found in pool.map(engine.infer, [batch_of(3)] * 32):
            np.testing.assert_allclose(found, world.expect(batch_of(3))[0], rtol=1e-5, atol=1e-5)
    assert world.cuda.leaks() == {}


@pytest.mark.parametrize(
    "setting",
    [Setting(faults=Faults(context={3, 4, 5, 6, 7, 8, 9})), Setting(version="8.5.3.1")],
    ids=["faults", "TensorRT 8"],
)
def test_warm_up_ends_where_there_are_fewer_contexts_than_wanted(tmp_path, monkeypatch, setting: Setting) -> None:
    """It holds all that there are, so that waiting for another would never end."""
    world = make_world(tmp_path, monkeypatch, setting)
    with world.open(contexts=4) as engine:
        engine.warm_up()
        assert_answers(world, engine, batch_of(3))
    assert world.cuda.leaks() == {}


def test_refused_run_is_an_error_with_tensorrts_words_and_the_engine_goes_on(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(faults=Faults(enqueue={1})))
    with world.open() as engine:
        with pytest.raises(CudaError, match="made to fail"):
            engine.infer(batch_of(2))
        assert_answers(world, engine, batch_of(2))
        assert engine.statistics().failures == 1
    assert world.cuda.leaks() == {}


def test_out_of_memory_is_told_apart_and_the_engine_goes_on(world: World) -> None:
    with world.open() as engine:
        world.cuda.fail("allocate", name="CUDA_ERROR_OUT_OF_MEMORY")
        with pytest.raises(CudaMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            engine.infer(batch_of(2))
        assert_answers(world, engine, batch_of(2))
    assert world.cuda.leaks() == {}


def test_lost_context_is_said_at_every_further_call(world: World) -> None:
    engine = world.open()
    assert_answers(world, engine, batch_of(2))
    world.cuda.fail("synchronize_stream", name="CUDA_ERROR_ILLEGAL_ADDRESS")
    for _ in range(3):
        with pytest.raises(CudaContextError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            engine.infer(batch_of(2))
    engine.close()
    assert world.cuda.leaks() == {}


def test_warm_up_does_not_wait_for_a_second_context_that_tensorrt_8_never_makes(tmp_path: Path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(version="8.5.3.1"))
    with world.open(contexts=2) as engine:
        engine.warm_up((4, 3, 16, 16))
        assert_answers(world, engine, random_batch(PLAIN, 4))
    assert world.cuda.leaks() == {}


def test_batcher_and_submit_run_on_plans(world: World) -> None:
    with world.open() as engine, engine.batcher(max_batch=8, max_delay_ms=1) as batcher, ThreadPoolExecutor(16) as pool:
        assert batcher.options.concurrency == 2
        batches = [batch_of(1, seed=index) for index in range(64)]
        for batch, found in zip(batches, pool.map(batcher.infer, batches), strict=True):
            np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            engine.submit(batches[0]).result(PATIENCE), world.expect(batches[0])[0], rtol=1e-5, atol=1e-5
        )
    assert world.cuda.leaks() == {}


def test_batcher_of_a_plan_with_one_context_runs_a_batch_at_a_time(world: World) -> None:
    with (
        world.open(contexts=1) as engine,
        engine.batcher() as batcher,
        Engine(world.onnx) as on_cpu,
        on_cpu.batcher() as other,
    ):
        assert batcher.options.concurrency == other.options.concurrency == 1
        with engine.batcher(concurrency=3) as asked:
            assert asked.options.concurrency == 3


# the parts of a run

TIMED = [Setting(version="8.5.3.1"), Setting(version="10.16.1.11"), Setting(version="1.7.1.116", rtx=True)]


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("setting", TIMED, ids=lambda setting: setting.version)
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

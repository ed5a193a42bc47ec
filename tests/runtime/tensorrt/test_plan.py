"""Engine on plans: answers of every kind of model and TensorRT, on the fake GPU, which computes with ONNX Runtime."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repvgg_deploy.errors import (
    CudaContextError,
    CudaError,
    CudaMemoryError,
    InputError,
    MissingDependencyError,
    ModelError,
    PlanError,
    PlanIncompatibleError,
)
from repvgg_deploy.runtime.results import TopK
from tests.fakes.cuda import FakeCuda
from tests.fakes.tensorrt import Faults
from tests.files.make_passport import make_passport
from tests.runtime.gpu_world import Setting, World, assert_answers, make_world, write_passport
from tests.runtime.make_model import ModelOptions, random_batch

PATIENCE = 300
VERSIONS = [Setting(version=version) for version in ("8.5.3.1", "8.6.1", "10.0.1", "10.16.1.11", "11.4.0.106")]
MACHINES = [*VERSIONS, Setting(version="1.7.1.116", rtx=True)]


def name_of(setting: Setting) -> str:
    return f"{'rtx' if setting.rtx else 'trt'}-{setting.version}"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch)


PLAIN = ModelOptions()


def batch_of(count: int, options: ModelOptions = PLAIN, seed: int = 0) -> np.ndarray:
    return random_batch(options, count, seed=seed)


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


# CUDA graphs


def test_usual_batch_sizes_run_as_graphs_from_the_second_time_on(world: World) -> None:
    with world.open() as engine:
        for round_ in range(4):
            for count in (1, 4, 8):
                assert_answers(world, engine, batch_of(count, seed=round_))
        assert world.cuda.launches >= 9
    with world.open(cuda_graphs=False) as engine:
        before = world.cuda.launches
        for _ in range(4):
            assert_answers(world, engine, batch_of(4))
        assert world.cuda.launches == before


def test_failed_capture_falls_back_and_is_logged_once(tmp_path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(faults=Faults(no_capture=True)))
    with caplog.at_level(logging.WARNING), world.open() as engine:
        for count in (1, 1, 1, 4, 4, 4):
            assert_answers(world, engine, batch_of(count))
    assert world.cuda.launches == 0 and world.cuda.leaks() == {}
    assert len([record for record in caplog.records if "CUDA graphs are left out" in record.message]) == 1


def test_capture_that_somebody_elses_wait_for_the_device_broke_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """torch.cuda.synchronize() in another thread, in the midst of a capture."""
    begin = world.cuda.begin_capture
    waits: list[bool] = []

    def interfere(stream: object) -> None:
        begin(stream)
        if not waits:
            with world.cuda.on_device(0), pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
                waits.append(True)
                world.cuda.device_wait()

    monkeypatch.setattr(world.cuda, "begin_capture", interfere)
    with caplog.at_level(logging.INFO), world.open(contexts=1) as engine:
        for seed in range(4):
            assert_answers(world, engine, batch_of(4, seed=seed))
        assert waits and world.cuda.launches >= 1
    assert "tried again" in caplog.text and "left out" not in caplog.text
    assert world.cuda.leaks() == {}


def test_own_wait_for_the_device_breaks_no_capture(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device memory that unnamed streams used is freed after such a wait, by whichever thread: it has to wait for the capture's end."""
    begin, waited = world.cuda.begin_capture, threading.Event()

    def wait_for_device() -> None:
        with world.cuda.on_device(0):
            world.cuda.synchronize()
        waited.set()

    thread = threading.Thread(target=wait_for_device)

    def begin_capture(stream: object) -> None:
        begin(stream)
        thread.start()
        assert not waited.wait(0.2)

    monkeypatch.setattr(world.cuda, "begin_capture", begin_capture)
    with world.open(contexts=1) as engine:
        assert_answers(world, engine, batch_of(4))
        assert_answers(world, engine, batch_of(4, seed=1))
        assert world.cuda.launches == 1 and waited.wait(PATIENCE)
    thread.join()
    assert world.cuda.leaks() == {}


def test_graphs_of_tensorrt_rtx_hold_the_kernels_of_their_shape(tmp_path, monkeypatch) -> None:
    """It compiles those in the background and runs slower ones meanwhile, which a graph would keep for good; the fake refuses to capture them."""
    world = make_world(tmp_path, monkeypatch, Setting(version="1.7.1.116", rtx=True))
    with world.open(contexts=1) as engine:
        for _ in range(3):
            assert_answers(world, engine, batch_of(4))
        assert world.cuda.launches == 2
        slot = engine._backend._pool.acquire_idle()
        slot._has_contexts, slot._lanes = (
            False,
            {},
        )  # where there is no further context, the one for all shapes is not captured
        engine._backend._pool.release(slot)
        for _ in range(3):
            assert_answers(world, engine, batch_of(4))
        assert world.cuda.launches == 2
    assert world.cuda.leaks() == {}


def test_warm_up_makes_every_context_and_graph(world: World) -> None:
    with world.open(contexts=3) as engine:
        engine.warm_up()
        launches, contexts = world.cuda.launches, world.trt.seen.contexts
        assert launches >= 3
        assert_answers(world, engine, batch_of(1))
        assert world.cuda.launches == launches + 1 and world.trt.seen.contexts == contexts


def test_nothing_is_captured_after_every_size_was_warmed_up(world: World) -> None:
    """So that a caller may wait for the whole device from then on."""
    with world.open(contexts=2) as engine:
        for size in range(1, 9):
            engine.warm_up((size, *engine.spec.input.shape[1:]))
        captures = world.cuda.calls["begin_capture"]
        assert captures == 2 * 8
        for index in range(40):
            assert_answers(world, engine, batch_of(1 + index % 8, seed=index))
            with world.cuda.on_device(0):
                world.cuda.device_wait()
        assert world.cuda.calls["begin_capture"] == captures


# passports and refusals


def test_plan_without_passport_runs_with_a_warning_or_is_refused(tmp_path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    with caplog.at_level(logging.WARNING), world.open() as engine:
        assert engine.spec.kind == "module" and engine.spec.preprocessing is None
        assert_answers(world, engine, batch_of(3))
    assert any("no passport m.plan.json" in record.message for record in caplog.records)
    with pytest.raises(PlanError, match="has no passport"):
        world.open(require_passport=True)
    assert world.cuda.leaks() == {}


def test_changed_plan_is_refused_before_tensorrt_sees_it(world: World) -> None:
    world.plan.write_bytes(world.plan.read_bytes()[:-1] + b"!")
    with pytest.raises(PlanError, match="is not the plan of its passport"):
        world.open()
    assert world.trt.seen.deserialized == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compute_capabilities": ("8.9",)}, "8.9"),
        ({"tensorrt_version": "10.9.0.34"}, "10.9"),
        ({"flavour": "tensorrt_rtx"}, "RTX"),
    ],
)
def test_plan_of_another_gpu_or_tensorrt_is_refused_before_it_is_loaded(
    world: World, changes: dict[str, object], match: str
) -> None:
    write_passport(world.plan, world.onnx, **{"flavour": "tensorrt", "tensorrt_version": "10.16.1.11", **changes})
    with pytest.raises((PlanIncompatibleError, MissingDependencyError), match=match):
        world.open()
    assert world.trt.seen.deserialized == 0 and world.cuda.leaks() == {}


def put_lean(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has TensorRT's lean runtime only, which has no plugins either."""
    world.trt.__name__ = "tensorrt_lean"
    del world.trt.init_libnvinfer_plugins
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", world.trt)


def test_lean_runtime_gets_version_compatible_plans_and_no_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_lean(world, monkeypatch)
    with pytest.raises(PlanIncompatibleError, match=r"only the lean runtime of TensorRT 10\.16\.1\.11") as caught:
        world.open()
    assert "--version-compatible" in caught.value.remedy and world.trt.seen.deserialized == 0
    flexible = make_passport(version_compatible=True).config
    write_passport(world.plan, world.onnx, tensorrt_version="10.16.1.11", config=flexible)
    with world.open() as engine:
        assert_answers(world, engine, batch_of(3))
        assert "TensorRT (lean runtime) 10.16.1.11" in engine.backend_name


def test_plan_without_passport_that_a_lean_runtime_refuses_says_what_it_runs(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    put_lean(world, monkeypatch)
    world.plan.write_bytes(world.plan.read_bytes()[:200])
    with pytest.raises(PlanError, match=r"TensorRT \(lean runtime\) 10\.16\.1\.11 refuses it") as caught:
        world.open()
    assert "--version-compatible" in caught.value.remedy


def test_truncated_plan_without_passport_quotes_tensorrt(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    world.plan.write_bytes(world.plan.read_bytes()[:200])
    with pytest.raises(PlanError, match="Serialization assertion failed"):
        world.open()
    assert world.cuda.leaks() == {}


def test_runtime_that_finds_no_gpu_is_never_used(tmp_path, monkeypatch) -> None:
    world = make_world(
        tmp_path, monkeypatch, Setting(faults=Faults(runtime_error="CUDA initialization failure with error: 35"))
    )
    with pytest.raises(CudaError, match="CUDA initialization failure with error: 35"):
        world.open()
    assert world.trt.seen.deserialized == 0


def test_passport_and_plan_that_disagree_are_refused(world: World) -> None:
    other = make_onnx_with(world, classes=9)
    write_passport(world.plan, other, flavour="tensorrt", tensorrt_version="10.16.1.11")
    with pytest.raises(PlanError, match="passport and the plan disagree"):
        world.open()


def make_onnx_with(world: World, *, classes: int) -> Path:
    from tests.runtime.make_model import make_onnx

    return make_onnx(world.plan.with_name("other.onnx"), ModelOptions(classes=classes))


@pytest.mark.parametrize(
    ("device", "backend", "error"),
    [
        ("cpu", None, InputError),
        ("cuda:1", None, CudaError),
        (3, None, CudaError),
        (None, "openvino", InputError),
        ("tpu", None, InputError),
    ],
)
def test_places_where_a_plan_cannot_run_are_refused(
    world: World, device: object, backend: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        world.open(device, backend)
    assert world.cuda.leaks() == {}


def test_onnx_is_not_run_by_tensorrt(world: World) -> None:
    from repvgg_deploy import Engine

    with pytest.raises(InputError, match="runs plans"):
        Engine(world.onnx, backend="tensorrt")
    with pytest.raises(ModelError):
        Engine(world.plan.with_name("none.plan"))


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


CALLS = ("allocate", "allocate_host", "copy", "create_stream", "create_event", "synchronize_stream", "begin_capture", "end_capture", "launch_graph",
         "record_event", "wait_event", "synchronize_event")  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_any_call_may_fail_at_any_time_and_nothing_leaks(tmp_path, monkeypatch, call: str) -> None:
    """The nth call fails, for every n until nothing fails any more: a typed error or a right answer, and an engine that goes on."""
    reached = 0
    for nth in range(1, 60):
        world = make_world(tmp_path, monkeypatch)
        world.cuda.fail(call, nth=nth)
        try:
            engine = world.open()
        except CudaError:
            pass
        else:
            failures = 0
            for count in (3, 3, 3, 20, 2, 2):
                try:
                    assert_answers(world, engine, batch_of(count, seed=count))
                except CudaError:
                    failures += 1
            assert failures <= 1
            missed = bool(world.cuda.faults)
            world.cuda.faults.clear()
            assert_answers(world, engine, batch_of(3))
            engine.close()
            if missed:
                break
        assert world.cuda.leaks() == {}, (call, nth)
        reached = nth
    assert reached >= 1, "the call was never made"


def test_close_waits_for_running_work_and_frees_everything(world: World) -> None:
    engine = world.open(contexts=2)
    gate, started = threading.Event(), threading.Event()
    real = FakeCuda.synchronize_stream

    def slow(stream: object) -> None:
        started.set()
        assert gate.wait(PATIENCE)
        real(world.cuda, stream)

    world.cuda.synchronize_stream = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.infer, batch_of(3))
        assert started.wait(PATIENCE)
        engine.close(wait=False)
        assert world.cuda.leaks() != {}
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive() and world.cuda.leaks() != {}
        gate.set()
        closing.join(PATIENCE)
        assert not closing.is_alive() and world.cuda.leaks() == {}
        np.testing.assert_allclose(running.result(PATIENCE), world.expect(batch_of(3))[0], rtol=1e-5, atol=1e-5)
    assert world.cuda.leaks() == {}


def test_engine_that_is_dropped_gives_memory_and_threads_back(world: World) -> None:
    threads = threading.active_count()
    engine = world.open()
    answers = [engine.submit(random_batch(PLAIN, count)) for count in (3, 8, 20)]
    batcher = engine.batcher()
    answers.append(batcher.submit(random_batch(PLAIN, 2)))
    batcher.close()
    del engine, batcher
    assert [len(answer.result(PATIENCE)) for answer in answers] == [3, 8, 20, 2]
    del answers
    end = time.monotonic() + PATIENCE
    while (world.cuda.leaks() or threading.active_count() > threads) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)  # until the threads that ran them have let go of the Engine, too
    assert world.cuda.leaks() == {} and threading.active_count() <= threads


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
    from repvgg_deploy import Engine

    with (
        world.open(contexts=1) as engine,
        engine.batcher() as batcher,
        Engine(world.onnx) as on_cpu,
        on_cpu.batcher() as other,
    ):
        assert batcher.options.concurrency == other.options.concurrency == 1
        with engine.batcher(concurrency=3) as asked:
            assert asked.options.concurrency == 3


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from(["ok", "enqueue", "copy", "allocate"])), min_size=1, max_size=12
    ),
    contexts=st.integers(1, 3),
    graphs=st.booleans(),
    eager=st.booleans(),
    setting=st.sampled_from(MACHINES),
)
def test_any_sequence_of_requests_and_failures(
    tmp_path, monkeypatch, requests, contexts, graphs, eager, setting
) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, profile=(2, 4, 8), eager=eager))
    with world.open(contexts=contexts, cuda_graphs=graphs) as engine:
        for count, fate in requests:
            if fate == "enqueue":
                world.trt.faults.enqueue.add(world.trt.seen.runs + 1)
            elif fate != "ok":
                world.cuda.fail(fate)
            batch = batch_of(count, seed=count)
            try:
                assert_answers(world, engine, batch)
            except CudaError:
                assert fate != "ok"
            world.cuda.faults.clear()
            world.trt.faults.enqueue.clear()
            assert_answers(world, engine, batch)
    assert world.cuda.leaks() == {}


def soak(world: World, count: int) -> None:
    with world.open(contexts=2) as engine, ThreadPoolExecutor(4) as pool:
        batches = [batch_of(1 + index % 11, seed=index) for index in range(33)]
        expected = [world.expect(batch)[0] for batch in batches]
        for found, wanted in zip(pool.map(engine.infer, batches), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        for size in range(1, 12):  # every context meets every size, which threads alone would leave to chance
            engine.warm_up((size, *engine.spec.input.shape[1:]))
        taken = {
            name: world.cuda.calls[name] for name in ("allocate", "allocate_host", "create_stream", "create_event")
        }
        held = world.cuda.leaks()
        for index, found in enumerate(pool.map(engine.infer, (batches[index % 33] for index in range(count)))):
            assert found.shape == expected[index % 33].shape
        assert {name: world.cuda.calls[name] for name in taken} == taken, "memory is taken anew in the steady state"
        assert {name: number for name, number in world.cuda.leaks().items() if name != "graphs"} == {
            n: v for n, v in held.items() if n != "graphs"
        }
    assert world.cuda.leaks() == {}


def test_steady_state_takes_no_memory(world: World) -> None:
    soak(world, 500)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_steady_state_takes_no_memory_in_100_000_inferences(world: World) -> None:
    soak(world, 100_000)

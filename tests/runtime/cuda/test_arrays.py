"""Batches that are on the GPU already, and results that stay there; on the fake GPU."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from repvgg_deploy import Engine
from repvgg_deploy.errors import CudaError, InputError
from repvgg_deploy.runtime.cuda import arrays
from repvgg_deploy.runtime.cuda.arrays import as_stream_handle, is_device_array, view_device_array
from repvgg_deploy.runtime.cuda.pool import DevicePool
from tests.runtime.gpu_world import Setting, World, make_world
from tests.runtime.make_model import ModelOptions, random_batch

PLAIN = ModelOptions()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch)


class Interface:
    """An array on the fake GPU that speaks `__cuda_array_interface__`, as CuPy's, Numba's and pycuda's do."""

    def __init__(
        self, world: World, array: np.ndarray, *, device: int = 0, stream: int | None = None, **changes: Any
    ) -> None:
        self.address = world.cuda.upload(array, device)
        self.shape, self.ndim = array.shape, array.ndim
        text = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": stream,
            "version": 3,
        }
        self.__cuda_array_interface__ = {**text, **changes}


class Dlpack:
    """An array on the fake GPU that speaks DLPack, as torch's do."""

    def __init__(self, world: World, array: np.ndarray, *, device: int = 0) -> None:
        self.address, self.shape, self.dtype, self.device = (
            world.cuda.upload(array, device),
            array.shape,
            array.dtype,
            device,
        )
        self.asked: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return arrays.CUDA, self.device

    def __dlpack__(self, *, stream: int | None = None) -> object:
        self.asked.append(stream)
        return arrays.make_capsule(self, self.address, self.shape, dtype=self.dtype, device_id=self.device)


def free(world: World, *arrays: Any) -> None:
    with world.cuda.on_device(0):
        for array in arrays:
            world.cuda.free(array.address)


@pytest.mark.parametrize("kind", [Interface, Dlpack])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("count", [1, 4, 8, 11, 20])
def test_device_batch_is_answered_without_a_way_to_the_host(world: World, kind: type, count: int, graphs: bool) -> None:
    """In place, or by a CUDA graph between copies on the device: one in and one out for each piece."""
    batch = random_batch(PLAIN, count)
    array = kind(world, batch)
    with world.open(cuda_graphs=graphs) as engine:
        engine.warm_up()
        copied, launches = world.cuda.calls["copy"], world.cuda.launches
        results = engine.infer_device(array)
        pieces = -(-count // 8)
        assert world.cuda.calls["copy"] - copied == (2 * pieces if graphs else 0)
        assert world.cuda.launches - launches == (pieces if graphs else 0)
        found = world.cuda.download(results[0].address, results[0].dtype, results[0].shape)
        np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(engine.infer(array), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        assert (len(results), results["logits"] is results[0], results[0].device_id) == (1, True, 0)
        del results
    free(world, array)
    assert world.cuda.leaks() == {}


class Bare:
    """An array that speaks one protocol and has no attribute besides."""

    def __init__(self, array: Interface | Dlpack) -> None:
        self._array = array

    def __getattr__(self, name: str) -> Any:
        if name in ("__cuda_array_interface__", "__dlpack__", "__dlpack_device__"):
            return getattr(self._array, name)
        raise AttributeError(name)


class MethodShape(Bare):
    """As DALI's."""

    def shape(self) -> list[int]:
        return list(self._array.shape)


@pytest.mark.parametrize("kind", [Interface, Dlpack])
@pytest.mark.parametrize("wrapped", [Bare, MethodShape])
@pytest.mark.parametrize("count", [3, 11])
def test_arrays_need_no_attribute_shape(tmp_path, monkeypatch, kind: type, wrapped: type, count: int) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(2, 4, 8)))
    batch = random_batch(PLAIN, count)
    array = kind(world, batch)
    with world.open() as engine:
        np.testing.assert_allclose(engine.infer(wrapped(array)), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        assert engine.infer_device(wrapped(array))[0].shape == (count, 7)
        assert engine.statistics().images == 2 * count
    free(world, array)
    gc.collect()
    assert world.cuda.leaks() == {}


def test_fewer_images_than_the_profile_are_padded_on_the_device(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(profile=(4, 4, 8)))
    batch = random_batch(PLAIN, 10)
    array, small = Interface(world, batch), Interface(world, batch[:2].copy())
    with world.open() as engine:
        for one, images in ((array, batch), (small, batch[:2])):
            np.testing.assert_allclose(engine.infer(one), world.expect(images)[0], rtol=1e-5, atol=1e-5)
    free(world, array, small)
    assert world.cuda.leaks() == {}


def test_results_are_in_order_on_the_callers_stream_and_not_waited_for(world: World) -> None:
    stream = world.cuda.foreign_stream()
    batch = random_batch(PLAIN, 5)
    array = Interface(world, np.zeros_like(batch))
    with world.cuda.on_device(0):  # the caller's own work, not done yet: the images arrive on its stream
        source = Interface(world, batch)
        world.cuda.copy(array.address, source.address, batch.nbytes, stream)
    with world.open() as engine:
        results = engine.infer_device(array, stream=SimpleNamespace(cuda_stream=stream))
        early = world.cuda.download(results[0].address, np.float32, results[0].shape)
        assert np.isnan(early).all(), "it was waited for"
        with world.cuda.on_device(0):
            world.cuda.synchronize_stream(stream)
        found = world.cuda.download(results[0].address, np.float32, results[0].shape)
        np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        assert results[0].__cuda_array_interface__["stream"] == stream
        assert results[0].__cuda_array_interface__["typestr"] == "<f4"
        # The next request comes after what was left on the caller's stream, though it uses another one.
        np.testing.assert_allclose(engine.infer(batch), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        del results
        gc.collect()
    free(world, array, source)
    assert world.cuda.leaks() == {}


# default streams: handles 0 (of an ordinary torch program), 1 and 2


@pytest.mark.parametrize("handle", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_default_stream_orders_the_work_and_never_reaches_tensorrt(world: World, handle: int, count: int) -> None:
    batches = [random_batch(PLAIN, count, seed=seed) for seed in range(3)]
    sources = [Interface(world, batch) for batch in batches]
    array = Interface(world, np.zeros_like(batches[0]))
    size = batches[0].nbytes
    with world.open(contexts=2) as engine:
        engine.warm_up()  # before a capture it would be waited for
        held = []
        for source in sources:  # the same memory for each batch: the copy of the next one waits for its reader
            with world.cuda.on_device(0):
                world.cuda.copy(array.address, source.address, size, handle)
            held.append(engine.infer_device(array, stream=handle)[0])
        found = [world.cuda.download(one.address, one.dtype, one.shape) for one in held]
        assert all(np.isnan(one).all() for one in found), "it was waited for"
        with world.cuda.on_device(0):
            world.cuda.synchronize_stream(handle)
        for one, batch in zip(held, batches, strict=True):
            answer = world.cuda.download(one.address, one.dtype, one.shape)
            np.testing.assert_allclose(answer, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
            assert one.__cuda_array_interface__["stream"] == max(handle, 1)
        with world.cuda.on_device(0):
            world.cuda.copy(array.address, sources[1].address, size, handle)
        np.testing.assert_allclose(
            engine.infer(array, stream=handle), world.expect(batches[1])[0], rtol=1e-5, atol=1e-5
        )
        assert world.trt.seen.default_streams == world.cuda.calls["synchronize"] == 0
        del held, one
    free(world, array, *sources)
    gc.collect()
    assert world.cuda.leaks() == {}


def test_default_stream_breaks_no_capture_of_another_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, batch = world.cuda.begin_capture, random_batch(PLAIN, 4)
    array = Interface(world, batch)
    answers: list[np.ndarray] = []
    with world.open(contexts=2) as engine, world.open(cuda_graphs=False) as other:
        other.infer(array)  # the first run, in which TensorRT sets itself up, would wait for the end of the capture

        def interfere(stream: object) -> None:
            begin(stream)
            with ThreadPoolExecutor(1) as pool:
                answers.append(pool.submit(other.infer, array, stream=0).result(300))

        monkeypatch.setattr(world.cuda, "begin_capture", interfere)
        for _ in range(3):
            np.testing.assert_allclose(engine.infer(batch), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        assert len(answers) == 1 and world.cuda.calls["end_capture"] == 1 and world.cuda.launches == 2
        np.testing.assert_allclose(answers[0], world.expect(batch)[0], rtol=1e-5, atol=1e-5)
    free(world, array)


def test_fakes_wait_for_the_device_on_a_default_stream_and_fail_a_capture(world: World) -> None:
    """What the two tests above rest on."""
    with world.open(contexts=1) as engine:
        engine.infer(random_batch(PLAIN, 4))
        slot = engine._backend._pool.acquire_idle()
        lane, stage = next(iter(slot._lanes.values())), slot.stage
        with world.cuda.on_device(0):
            lane.enqueue(stage.addresses, 0)
            assert (world.trt.seen.default_streams, world.cuda.calls["synchronize"]) == (1, 1)
            world.cuda.begin_capture(slot.stream)
            with pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
                lane.enqueue(stage.addresses, 0)
            with pytest.raises(CudaError, match="CAPTURE_INVALIDATED"):
                world.cuda.end_capture(slot.stream)
        engine._backend._pool.release(slot)


def run_in_thread(call: Any, *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result(300)


READS_IN_ANOTHER_THREAD = {
    "cuda array interface": lambda result: result.__cuda_array_interface__["stream"],
    "dlpack": lambda result: result.__dlpack__(stream=2),
}


@pytest.mark.parametrize("read", READS_IN_ANOTHER_THREAD)
def test_result_on_a_threads_default_stream_is_ready_before_another_thread_reads_it(world: World, read: str) -> None:
    """Its handle names another stream there."""
    batch = random_batch(PLAIN, 3)
    array = Interface(world, batch)
    with world.open() as engine:
        result = engine.infer_device(array, stream=2)[0]
        assert result.__cuda_array_interface__["stream"] == 2 and world.cuda.calls["synchronize"] == 0
        named = run_in_thread(READS_IN_ANOTHER_THREAD[read], result)
        found = world.cuda.download(result.address, result.dtype, result.shape)
        np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        assert read == "dlpack" or named is None
        del result, named
    free(world, array)


def test_memory_on_a_threads_default_stream_is_not_used_again_in_another_thread(world: World) -> None:
    array = Interface(world, random_batch(PLAIN, 3))
    with world.open() as engine:

        def run() -> int:
            address: int = engine.infer_device(array, stream=2)[0].address
            gc.collect()
            return address

        first = run()
        assert run() == first, "in the same thread it may be"
        assert run_in_thread(run) != first
    free(world, array)
    gc.collect()
    assert world.cuda.leaks() == {}


def test_memory_given_back_early_is_not_written_by_two_slots(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is let go, while the slot that writes it is still at work, and a second slot takes its memory."""
    first, second = random_batch(PLAIN, 3, seed=1), random_batch(PLAIN, 3, seed=2)
    arrays_ = Interface(world, first), Interface(world, second)
    take, entered = DevicePool.take, []
    with world.open(contexts=2) as engine:

        def take_late(pool: DevicePool, size: int, stream: int) -> Any:
            entered.append(stream)
            if len(entered) == 1:  # the second request has its slot, when the first one comes and goes
                address = engine.infer_device(arrays_[0], stream=0)[0].address
                gc.collect()
                block = take(pool, size, stream)
                assert block.address == address
                return block
            return take(pool, size, stream)

        monkeypatch.setattr(DevicePool, "take", take_late)
        result = engine.infer_device(arrays_[1], stream=0)[0]
        with world.cuda.on_device(0):
            world.cuda.device_wait()  # does the second slot's work first, where nothing orders it
        found = world.cuda.download(result.address, result.dtype, result.shape)
        np.testing.assert_allclose(found, world.expect(second)[0], rtol=1e-5, atol=1e-5)
        assert len(entered) == 2
        del result
    free(world, *arrays_)


def test_producers_stream_is_waited_for(world: World) -> None:
    stream = world.cuda.foreign_stream()
    batch = random_batch(PLAIN, 3)
    array, source = Interface(world, np.zeros_like(batch), stream=stream), Interface(world, batch)
    with world.cuda.on_device(0):
        world.cuda.copy(array.address, source.address, batch.nbytes, stream)
    with world.open() as engine:
        np.testing.assert_allclose(engine.infer(array), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
    free(world, array, source)


def test_dlpack_is_asked_for_the_stream_that_reads(world: World) -> None:
    array = Dlpack(world, random_batch(PLAIN, 3))
    with world.open() as engine:
        engine.infer_device(array, stream=world.cuda.foreign_stream())
        assert array.asked == [10]
        engine.infer_device(array)
        assert array.asked[1] not in (None, 10)
    free(world, array)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda batch: batch.astype(np.float64), "expected float32, found float64"),
        (lambda batch: batch[:, :2].copy(), "expected NCHW"),
        (lambda batch: batch[0], "expected shape"),
        (lambda batch: batch[:, :, :, :8].copy(), "expected NCHW"),
    ],
)
def test_wrong_device_batches_are_refused(world: World, change: Any, match: str) -> None:
    array = Interface(world, change(random_batch(PLAIN, 3)))
    with world.open() as engine, pytest.raises(InputError, match=match):
        engine.infer(array)
    free(world, array)
    assert world.cuda.leaks() == {}


def test_gaps_and_other_gpus_are_refused(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(devices=2))
    batch = random_batch(PLAIN, 3)
    strides = (batch.strides[0], batch.strides[1], batch.strides[3], batch.strides[2])
    turned, far, far_too = (
        Interface(world, batch, strides=strides),
        Interface(world, batch, device=1),
        Dlpack(world, batch, device=1),
    )
    with world.open() as engine:
        with pytest.raises(InputError, match="found gaps or another order"):
            engine.infer(turned)
        for array in (far, far_too):
            with pytest.raises(InputError, match="found one on GPU 1"):
                engine.infer_device(array)
        with pytest.raises(InputError, match="does not lie on a GPU"):
            engine.infer_device(batch)
        with pytest.raises(InputError, match="stream"):
            engine.infer(turned, stream="the first one")


def test_array_of_another_context_is_refused_before_a_kernel_reads_it(world: World) -> None:
    """As pycuda.autoinit makes one."""
    array = Interface(world, random_batch(PLAIN, 3))
    world.cuda.foreign.add(array.address)
    with world.open() as engine:
        runs = world.trt.seen.runs
        with pytest.raises(InputError, match="a CUDA context of its own") as caught:
            engine.infer(array)
        assert "autoprimaryctx" in caught.value.remedy and world.trt.seen.runs == runs


def test_arrays_on_a_gpu_need_a_plan(world: World) -> None:
    array = Interface(world, random_batch(PLAIN, 1))
    with Engine(world.onnx) as engine:
        with pytest.raises(InputError, match="TensorRT plan only"):
            engine.infer_device(array)
        with pytest.raises(InputError):
            engine.infer(array)


def test_results_outlive_the_engine_and_free_themselves(world: World) -> None:
    batch = random_batch(PLAIN, 3)
    array = Interface(world, batch)
    engine = world.open()
    results = engine.infer_device(array)
    engine.close()
    found = world.cuda.download(results[0].address, np.float32, results[0].shape)
    np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
    free(world, array)
    assert world.cuda.leaks() == {"device memory": 1}
    del results
    gc.collect()
    assert world.cuda.leaks() == {}


def test_dlpack_without_a_stream_means_the_default_stream(world: World) -> None:
    stream = world.cuda.foreign_stream()
    batch = random_batch(PLAIN, 3)
    array = Interface(world, batch)
    with world.open() as engine:
        results = engine.infer_device(array, stream=stream)
        capsule = results[0].__dlpack__()
        with world.cuda.on_device(0):
            world.cuda.synchronize_stream(1)
        found = world.cuda.download(results[0].address, np.float32, results[0].shape)
        np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        del results, capsule
    free(world, array)
    assert world.cuda.leaks() == {}


@pytest.mark.parametrize(
    "call",
    [
        "allocate",
        "allocate_host",
        "copy",
        "record_event",
        "wait_event",
        "synchronize_stream",
        "create_event",
        "find_device",
        "is_reachable",
    ],
)
def test_failures_leave_no_memory_behind(world: World, call: str) -> None:
    batch = random_batch(PLAIN, 20)
    array = Interface(world, batch)
    for nth in range(1, 12):
        engine = world.open()
        world.cuda.fail(call, nth=nth)
        for stream in (None, world.cuda.foreign_stream(), 0):
            for run in (engine.infer_device, engine.infer):
                try:
                    run(array, stream=stream)
                except CudaError as error:
                    text = str(error)  # whether it fails depends on nth
                    assert "made to fail" in text or "out of memory" in text
            with world.cuda.on_device(0):
                world.cuda.device_wait()  # what is left on a stream finds its memory
        world.cuda.faults.clear()
        np.testing.assert_allclose(engine.infer(array), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        engine.close()
        gc.collect()
        assert world.cuda.leaks() == {"device memory": 1}, (call, nth)  # the array itself
    free(world, array)


def test_many_threads_with_device_batches(world: World) -> None:
    batches = [random_batch(PLAIN, 1 + index % 12, seed=index) for index in range(24)]
    arrays = [Interface(world, batch) for batch in batches]
    with world.open(contexts=3) as engine, ThreadPoolExecutor(16) as pool:
        for index, found in enumerate(pool.map(engine.infer, arrays * 4)):
            np.testing.assert_allclose(found, world.expect(batches[index % 24])[0], rtol=1e-5, atol=1e-5)
    free(world, *arrays)
    gc.collect()
    assert world.cuda.leaks() == {}


# the protocols themselves


def test_capsules_of_numpy_are_read_right() -> None:
    for array in (
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2],
        np.ones(3, np.float16),
    ):
        found = arrays.read_capsule(array.__dlpack__())
        assert (found.address, found.shape, found.dtype) == (array.ctypes.data, array.shape, array.dtype.name)
        assert found.is_contiguous == array.flags.c_contiguous


def test_capsule_keeps_its_owner_alive_and_lets_it_go() -> None:
    class Owner:
        pass

    owner = Owner()
    reference, before = weakref.ref(owner), sys.getrefcount(owner)
    capsule = arrays.make_capsule(owner, 4096, (2, 5), dtype=np.dtype(np.float16), device_id=3)
    found = arrays.read_capsule(capsule)
    assert (found.address, found.shape, found.dtype) == (4096, (2, 5), "float16")
    assert found.is_contiguous and found.device_id == 3
    assert sys.getrefcount(owner) > before
    del owner
    gc.collect()
    assert reference() is not None
    del capsule, found  # what was read of it keeps it, too
    gc.collect()
    assert reference() is None


def test_streams_of_every_library_are_understood() -> None:
    for stream in (
        7,
        SimpleNamespace(cuda_stream=7),
        SimpleNamespace(ptr=7),
        SimpleNamespace(handle=7),
        SimpleNamespace(__cuda_stream__=lambda: (0, 7)),
    ):
        assert as_stream_handle(stream) == 7
    for wrong in ("7", -1, True, None, 7.0):
        with pytest.raises(InputError, match="stream"):
            as_stream_handle(wrong)


def test_numpy_and_other_objects_are_no_device_arrays() -> None:
    class Shy:
        @property
        def __cuda_array_interface__(self) -> object:
            raise TypeError("this tensor requires grad")

    assert not any(map(is_device_array, (np.zeros(3), [1], "text", Shy(), None)))
    assert is_device_array(SimpleNamespace(__cuda_array_interface__={}))


def test_tensor_that_does_not_hand_over_its_memory_says_what_to_do() -> None:
    class Grad:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, *, stream: int | None = None) -> object:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    with pytest.raises(InputError, match="require gradient"):
        view_device_array(Grad(), 1)

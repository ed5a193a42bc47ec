"""Memory of results on the fake GPU: used again, never while somebody may read it, and no more than a load needs."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.errors import CudaError, CudaMemoryError
from repvgg_deploy.runtime.cuda import pool as pool_module
from repvgg_deploy.runtime.cuda.pool import UNKNOWN_STREAM, DevicePool, round_up_size
from repvgg_deploy.runtime.cuda.port import CAPTURE_LOCK
from repvgg_deploy.runtime.engine import Engine
from tests.fakes.cuda import FakeCuda
from tests.runtime.cuda.test_arrays import Dlpack, Interface, free
from tests.runtime.gpu_world import Setting, World, make_world
from tests.runtime.make_model import ModelOptions, random_batch

PLAIN = ModelOptions()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, monkeypatch)


def taken(world: World) -> Counter[str]:
    names = ("allocate", "allocate_host", "free", "free_host", "synchronize", "synchronize_stream", "synchronize_event")
    return Counter({name: world.cuda.calls[name] for name in names})


@pytest.mark.parametrize("kind", [Interface, Dlpack])
@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_150_mixed_calls_take_no_memory_and_wait_once_each(tmp_path, monkeypatch, kind: type, eager: bool) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(eager=eager))
    counts = (1, 2, 3, 4, 5, 7, 8)
    batches = {count: random_batch(PLAIN, count, seed=count) for count in (*counts, 11, 20)}
    arrays = {count: kind(world, batch) for count, batch in batches.items()}
    streams = (None, world.cuda.foreign_stream(), 0, world.cuda.foreign_stream(), 2)
    ways: list[tuple[int, Callable[[Engine, int, Any], Any]]] = [
        (1, lambda engine, count, stream: engine.infer(batches[count])),
        (1, lambda engine, count, stream: engine.infer(arrays[count], stream=stream)),
        (0, lambda engine, count, stream: engine.infer_device(arrays[count], stream=stream)),
        (0, lambda engine, count, stream: engine.infer_device(arrays[count], stream=stream)[0].__dlpack__(stream=1)),
    ]
    calls = [
        (way, stream, counts[index % len(counts)])
        for index, (way, stream) in enumerate(itertools.product(range(len(ways)), streams))
    ]
    calls += [(way, stream, count) for way in (1, 2, 3) for stream in streams for count in (11, 20)]  # several pieces
    expected = {count: world.expect(batch)[0] for count, batch in batches.items()}
    order = np.random.default_rng(0)
    with world.open(contexts=2) as engine:

        def run(number: int) -> None:
            for _ in range(-(-number // len(calls))):
                for way, stream, count in order.permutation(np.array(calls, dtype=object)):
                    before = taken(world)
                    waits, call = ways[way]
                    found = call(engine, count, stream)
                    if isinstance(found, np.ndarray):
                        np.testing.assert_allclose(found, expected[count], rtol=1e-5, atol=1e-5)
                    del found
                    seen = taken(world) - before
                    most = max(waits, int(stream is None))
                    assert seen["synchronize_stream"] + seen["synchronize_event"] <= most, (way, stream, count, seen)

        for count in counts:
            for _ in range(3):  # as it is, captured, replayed
                engine.infer(batches[count])
        run(3 * len(calls))
        before = taken(world)
        run(150)
        seen = taken(world) - before
        assert {seen[name] for name in ("allocate", "allocate_host", "free", "free_host", "synchronize")} == {0}, seen
    free(world, *arrays.values())
    gc.collect()
    assert world.cuda.leaks() == {}


def test_waits_of_more_images_than_the_plan_takes(world: World) -> None:
    """From host memory each piece is waited for, as its buffers are used again; never more than that."""
    batch = random_batch(PLAIN, 20)
    with world.open() as engine:
        engine.infer(batch)
        before = taken(world)
        engine.infer(batch)
        assert taken(world) - before == Counter({"synchronize_event": 3})


def test_answers_for_the_host_are_a_callers_own_also_of_several_outputs(tmp_path, monkeypatch) -> None:
    options = ModelOptions(kind="features")
    world = make_world(tmp_path, monkeypatch, Setting(model=options))
    first, second = random_batch(options, 3, seed=1), random_batch(options, 11, seed=2)
    arrays = Interface(world, first), Interface(world, second)
    with world.open(contexts=1) as engine:
        found = [engine.infer(array) for array in (*arrays, arrays[0])]
        for one, batch in zip(found, (first, second, first), strict=True):
            assert isinstance(one, dict) and len(one) > 1
            for part, wanted in zip(one.values(), world.expect(batch), strict=True):
                np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-5)
    free(world, *arrays)
    assert world.cuda.leaks() == {}


def test_sizes_of_blocks_are_few_and_hold_what_is_asked_for() -> None:
    sizes = [0, 1, 511, 512, 513, 4000, 512_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20, 77_000_000, 3 << 30]
    for size in sizes:
        found = round_up_size(size)
        most = 2.0 if size <= 1 << 20 else 1.25
        assert max(size, 512) <= found <= max(most * size, 512) and round_up_size(found) == found
    assert len({round_up_size(4000 * count) for count in range(1, 257)}) == 9
    assert len({round_up_size(size) for size in range(1 << 20, 1 << 24, 4096)}) == 17


# who may use a block next


def test_block_goes_to_its_own_stream_at_once_and_to_another_when_the_device_was_waited_for() -> None:
    cuda = FakeCuda()
    pool, one, other = DevicePool(cuda, 0), cuda.foreign_stream(), cuda.foreign_stream()
    with cuda.on_device(0):
        block = pool.take(100, one)
        pool.give_back(block)
        assert pool.take(512, one) is block
        pool.give_back(block)
        another = pool.take(100, other)
        assert another is not block and cuda.calls["synchronize"] == 0
        held = [pool.take(100, one) for _ in range(pool_module._MOST_WAITING)]
        assert held[0] is block
        addresses = {one.address for one in held}
        for one_block in held:
            pool.give_back(one_block)
        before = cuda.calls["allocate"]
        assert pool.take(100, other).address in addresses
        assert (cuda.calls["synchronize"], cuda.calls["allocate"] - before) == (1, 0)
        pool.close()


def test_block_of_the_legacy_default_stream_goes_to_another_after_an_event(world: World) -> None:
    """A reader in an ordinary torch program: what it still reads is not overwritten, and nobody waits."""
    cuda = world.cuda
    batch = random_batch(PLAIN, 3)
    array, target = Interface(world, batch), Interface(world, np.zeros((3, 7), np.float32))
    with world.open() as engine:
        result = engine.infer_device(array)[0]
        address = result.address
        capsule = result.__dlpack__(stream=1)
        with cuda.on_device(0):
            cuda.copy(target.address, address, 84, 1)  # the reader's work, which is not done when it lets the array go
        del result, capsule
        gc.collect()
        other = Interface(world, np.zeros_like(batch))
        assert engine.infer_device(other)[0].address == address
        assert cuda.calls["synchronize"] == 0
        with cuda.on_device(0):
            cuda.synchronize_stream(1)
        found = cuda.download(target.address, np.float32, (3, 7))
        np.testing.assert_allclose(found, world.expect(batch)[0], rtol=1e-5, atol=1e-5)
    free(world, array, target, other)


READERS = {
    "cuda array interface": lambda result: result.__cuda_array_interface__,
    "dlpack without order": lambda result: result.__dlpack__(stream=-1),
}


@pytest.mark.parametrize("reader", READERS)
def test_memory_that_an_unknown_stream_may_still_read_is_not_used_again_at_once(world: World, reader: str) -> None:
    array = Interface(world, random_batch(PLAIN, 2))
    with world.open() as engine:
        results = engine.infer_device(array)
        first = results[0].address
        READERS[reader](results[0])  # its reader's work may be on any stream when the array is let go
        del results
        gc.collect()
        assert engine.infer_device(array)[0].address != first
        for _ in range(100):  # once the whole device was waited for, it may be
            assert engine.infer_device(array)[0].__cuda_array_interface__["version"] == 3
        blocks = world.cuda.calls["allocate"]
        for _ in range(100):
            assert engine.infer_device(array)[0].__cuda_array_interface__["version"] == 3
        assert 1 <= world.cuda.calls["synchronize"] <= 4 and world.cuda.calls["allocate"] == blocks
    free(world, array)
    assert world.cuda.leaks() == {}


def test_results_memory_is_used_again(world: World) -> None:
    array = Interface(world, random_batch(PLAIN, 3))
    with world.open() as engine:
        engine.infer_device(array)
        taken = world.cuda.calls["allocate"]
        for _ in range(50):
            engine.infer_device(array)
        assert world.cuda.calls["allocate"] <= taken + 1
        held = [engine.infer_device(array) for _ in range(5)]
        assert len({result[0].address for result in held}) == 5
        del held
    free(world, array)
    gc.collect()
    assert world.cuda.leaks() == {}


# how much there is


def test_what_is_idle_is_bounded_in_number_and_bytes() -> None:
    cuda = FakeCuda(memory_bytes=1 << 50)
    cuda._new = lambda size, device, make=cuda._new: make(512, device)  # type: ignore[method-assign]
    sizes: dict[int, int] = {}
    pool = DevicePool(cuda, 0)
    stream = cuda.foreign_stream()
    with cuda.on_device(0):
        for round_, size in enumerate((4096, 64 << 20, 3 << 20, 200 << 20, 512)):
            blocks = [pool.take(size, stream) for _ in range(300 if round_ in (0, 4) else 20)]
            sizes.update({block.address: block.size_bytes for block in blocks})
            for block in blocks:
                block.streams.clear()  # all was waited for
                pool.give_back(block)
            pool.take(100 << 20, stream)  # there is none of this size: before it is made, room is
            kept = [block for blocks in pool._idle.values() for block in blocks]
            assert len(kept) <= pool_module._MOST_IDLE
            assert len(kept) <= 8 or sum(block.size_bytes for block in kept) <= pool_module._MOST_IDLE_BYTES


def test_memory_that_is_short_is_taken_from_what_is_idle() -> None:
    cuda = FakeCuda(memory_bytes=4096)
    pool = DevicePool(cuda, 0)
    with cuda.on_device(0):
        blocks = [pool.take(1024, 7) for _ in range(4)]
        for block in blocks[:3]:
            pool.give_back(block)
        large = pool.take(2048, 7)
        assert large.size_bytes == 2048 and cuda.used_bytes(0) == 3072
        with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
            pool.take(2048, 7)
        pool.give_back(large)
        pool.give_back(blocks[3])
        pool.close()
    assert cuda.leaks() == {}


def test_memory_that_comes_back_in_the_midst_of_a_capture_waits_for_nobody_who_waits_for_the_capture() -> None:
    """The garbage collector may free an array of a closed Engine in a thread that captures a graph of another one."""
    cuda = FakeCuda()
    pool = DevicePool(cuda, 0)
    with cuda.on_device(0):
        blocks = [pool.take(64, 7) for _ in range(2)]
    for block in blocks:
        block.streams.add(UNKNOWN_STREAM)  # so that freeing it waits for the whole device
    pool.give_back(blocks[0])
    done = threading.Event()

    def capture() -> None:
        with CAPTURE_LOCK:
            closing.start()
            closing.join(0.2)  # by now it waits for the capture's end
            pool.give_back(blocks[1])
        done.set()

    closing = threading.Thread(target=pool.close, daemon=True)
    threading.Thread(target=capture, daemon=True).start()
    assert done.wait(300)
    closing.join(300)
    assert cuda.leaks() == {}


# batches that a caller fills


def test_pinned_batch_is_page_locked_and_its_memory_is_used_again(world: World) -> None:
    with world.open() as engine:
        batch = engine.pinned_batch(8)
        assert batch.shape == (8, 3, 16, 16) and batch.dtype == np.float32 and batch.flags.c_contiguous
        [found] = [one for one in world.cuda.memory.values() if one.address == batch.ctypes.data]
        assert found.device == -1 and found.data.nbytes == round_up_size(batch.nbytes)
        part, address, taken_before = batch[2:4], batch.ctypes.data, taken(world)
        del batch
        gc.collect()
        assert engine.pinned_batch(8).ctypes.data != address, "a part of it is still held"
        del part
        gc.collect()
        assert address in {engine.pinned_batch(count).ctypes.data for count in (7, 8)}
        assert taken(world) - taken_before == Counter(allocate_host=1)
    assert world.cuda.leaks() == {}


def test_pinned_batch_outlives_its_engine_and_frees_itself(world: World) -> None:
    images = random_batch(PLAIN, 4)
    with world.open() as engine:
        batch = engine.pinned_batch(4)
        batch[:] = images
        idle = engine.pinned_batch(2)
        del idle
    np.testing.assert_array_equal(batch, images)
    assert world.cuda.leaks() == {"host memory": 1}
    with world.open() as other:  # another Engine reads it, too
        np.testing.assert_allclose(other.infer(batch), world.expect(images)[0], rtol=1e-5, atol=1e-5)
    del batch
    gc.collect()
    assert world.cuda.leaks() == {}


def test_pinned_batch_without_memory_is_an_error_and_the_engine_goes_on(world: World) -> None:
    with world.open() as engine:
        world.cuda.fail("allocate_host", name="CUDA_ERROR_OUT_OF_MEMORY")
        with pytest.raises(CudaMemoryError):
            engine.pinned_batch(8)
        batch = engine.pinned_batch(8)
        batch[:] = 0
        np.testing.assert_allclose(engine.infer(batch), world.expect(batch.copy())[0], rtol=1e-5, atol=1e-5)
        del batch
    assert world.cuda.leaks() == {}


def test_threads_that_fill_and_run_their_own_batches(world: World) -> None:
    """Arrays come and go in all threads, while requests run."""

    def work(seed: int) -> None:
        for turn in range(8):
            images = random_batch(PLAIN, 1 + (seed + turn) % 20, seed=seed)
            batch = engine.pinned_batch(len(images))
            batch[:] = images
            found = engine.infer(batch)
            np.testing.assert_allclose(found, world.expect(images)[0], rtol=1e-5, atol=1e-5)

    with world.open(contexts=3) as engine, ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(32)))
    gc.collect()
    assert world.cuda.leaks() == {}


def test_batcher_puts_requests_into_page_locked_memory_that_stays(world: World) -> None:
    batches = [random_batch(PLAIN, 1, seed=seed) for seed in range(8)]
    expected = [world.expect(batch)[0] for batch in batches]
    with world.open() as engine, engine.batcher(max_batch=4, max_delay_ms=60_000, max_queue=100) as batcher:
        engine.warm_up(batches[0].shape)

        def run() -> None:
            for future, wanted in zip([batcher.submit(batch) for batch in batches], expected, strict=True):
                np.testing.assert_allclose(future.result(300), wanted, rtol=1e-5, atol=1e-5)

        for _ in range(20):
            run()
        most = world.cuda.calls["allocate_host"]
        for _ in range(20):
            run()
        assert world.cuda.calls["allocate_host"] <= most + 1  # a second thread may have had no batch until now
    gc.collect()
    assert world.cuda.leaks() == {}


@pytest.fixture
def sources(world: World, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each copy so far: where from, and how many bytes."""
    found: list[tuple[int, int]] = []
    copy = world.cuda.copy

    def note(target: int, source: int, size: int, stream: Any) -> None:
        found.append((source, size))
        copy(target, source, size, stream)

    monkeypatch.setattr(world.cuda, "copy", note)
    return found


@pytest.mark.parametrize("part", [slice(0, 20), slice(0, 4), slice(3, 8), slice(5, 6), slice(1, 20)], ids=str)
def test_pinned_batch_is_copied_to_the_gpu_from_where_it_is(
    world: World, sources: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, part: slice
) -> None:
    images = random_batch(PLAIN, 20)
    row = images[0].nbytes
    with world.open() as engine:
        batch = engine.pinned_batch(20)
        batch[:] = images
        engine.infer(images[part])  # buffers are there
        monkeypatch.setattr(np, "copyto", None)  # what the copy on the host would be made with
        for _ in range(4):  # as it is, captured, replayed
            del sources[:]
            found = engine.infer(batch[part])
            np.testing.assert_allclose(found, world.expect(images[part])[0], rtol=1e-5, atol=1e-5)
            pieces = [min(8, part.stop - start) for start in range(part.start, part.stop, 8)]
            starts = [batch.ctypes.data + start * row for start in range(part.start, part.stop, 8)]
            expected = list(zip(starts, (row * size for size in pieces), strict=True))
            assert [one for one in sources if one[0] in starts] == expected
        np.testing.assert_allclose(engine.submit(batch[part]).result(300), found, rtol=1e-6)
    del batch
    gc.collect()
    assert world.cuda.leaks() == {}


def test_batcher_copies_requests_once(world: World, sources: list[tuple[int, int]], monkeypatch) -> None:
    batches = [random_batch(PLAIN, 1, seed=seed) for seed in range(4)]
    with world.open() as engine, engine.batcher(max_batch=4, max_delay_ms=60_000) as batcher:
        engine.warm_up((4, 3, 16, 16))
        del sources[:]
        monkeypatch.setattr(np, "copyto", None)
        for future, batch in zip([batcher.submit(batch) for batch in batches], batches, strict=True):
            np.testing.assert_allclose(future.result(300), world.expect(batch)[0], rtol=1e-5, atol=1e-5)
        inward = [source for source, size in sources if size == 4 * batches[0].nbytes]
        held = {one.address for one in world.cuda.memory.values() if one.device == -1}
        assert len(inward) == 1 and inward[0] in held


@pytest.mark.parametrize("turned", [True, False])
def test_pinned_memory_that_is_not_in_order_is_copied_first(world: World, turned: bool) -> None:
    images = random_batch(PLAIN, 8)
    with world.open() as engine:
        memory = engine.pinned_batch(8)
        memory[:] = images.transpose(0, 1, 3, 2) if turned else images
        batch, expected = (memory.transpose(0, 1, 3, 2), images) if turned else (memory[::2], images[::2])
        np.testing.assert_allclose(engine.infer(batch), world.expect(expected)[0], rtol=1e-5, atol=1e-5)


def test_pinned_batch_is_filled_again_when_the_answer_is_there(world: World) -> None:
    """Nothing reads it any more then, though the fake GPU copies as late as it may."""
    with world.open(contexts=2) as engine, ThreadPoolExecutor(2) as pool:
        batch = engine.pinned_batch(20)

        def work(start: int) -> None:
            for seed in range(10):
                images = random_batch(PLAIN, 10, seed=seed)
                mine = batch[start : start + 10]
                mine[:] = images
                found = engine.infer(mine)
                mine[:] = 0
                np.testing.assert_allclose(found, world.expect(images)[0], rtol=1e-5, atol=1e-5)

        list(pool.map(work, (0, 10)))


def test_close_waits_for_a_pinned_batch_that_runs(world: World) -> None:
    images = random_batch(PLAIN, 8)
    engine = world.open()
    batch = engine.pinned_batch(8)
    batch[:] = images
    futures = [engine.submit(batch) for _ in range(4)]
    del batch  # the requests hold it
    engine.close()
    for future in futures:
        np.testing.assert_allclose(future.result(0), world.expect(images)[0], rtol=1e-5, atol=1e-5)
    del futures, future
    gc.collect()
    assert world.cuda.leaks() == {}


def test_failure_with_a_pinned_batch_leaves_nothing_that_reads_it(world: World) -> None:
    images = random_batch(PLAIN, 20)
    with world.open() as engine:
        for call in ("record_event", "wait_event", "copy", "synchronize_event"):
            batch = engine.pinned_batch(20)
            batch[:] = images
            world.cuda.fail(call, nth=3)
            with pytest.raises(CudaError, match="made to fail"):
                engine.infer(batch)
            del batch
            gc.collect()
            np.testing.assert_allclose(engine.infer(images), world.expect(images)[0], rtol=1e-5, atol=1e-5)
    assert world.cuda.leaks() == {}

"""How fast one plan is, beside the bare loop, in turn within one run."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.runtime.engine import Engine

from .bare import BareLoop, DeviceBatch

BATCHES = (1, 8, 32, 128)
CLIENTS = 64


def measure(engine: Engine, images: NDArray[Any], count: int, *, seconds: float) -> dict[str, Any]:
    """One batch size: latency of the bare loop, of device arrays and of NumPy arrays, and throughput without waiting.

    Args:
        engine: Of the plan.
        images: Some; repeated to `count`.
        count: Batch size, within the profile.
        seconds: For each of the two parts.
    """
    batch = np.ascontiguousarray(np.concatenate([images] * -(-count // len(images)))[:count])
    backend: Any = engine._backend
    port = backend._port
    with port.on_device(backend._device_id):
        source = DeviceBatch(port, batch)
    try:
        with BareLoop(engine, source) as bare:
            engine.warm_up(batch.shape)
            engine.infer_device(source)

            def bare_call() -> None:
                bare.enqueue()
                bare.wait()

            calls: dict[str, Callable[[], object]] = {
                "bare": bare_call,
                "device array": lambda: engine.infer_device(source),
                "numpy": lambda: engine.infer(batch),
            }
            single = in_turn(calls, seconds)
            streams: dict[str, Callable[[int], None]] = {
                "bare": lambda number: _run_many(bare, number),
                "device array": lambda number: _infer_many(engine, source, bare, number),
            }
            many = throughput(streams, count, seconds)
            problem = bare.graph_problem
    finally:
        with port.on_device(backend._device_id):
            source.free()
    medians = {name: 1e3 * statistics.median(times) for name, times in single.items()}
    return {
        "batch": count,
        "bare_without_graph": problem,
        "latency_ms": medians,
        "p99_ms": {
            name: 1e3 * sorted(times)[min(len(times) - 1, len(times) * 99 // 100)] for name, times in single.items()
        },
        "overhead_us": 1e3 * (medians["device array"] - medians["bare"]),
        "images_per_second": {**many, "numpy": count / (medians["numpy"] / 1e3)},
        "device_share": many["device array"] / many["bare"],
    }


def in_turn(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call; every way once a round, in an order drawn anew."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    generator, end = np.random.default_rng(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name in generator.permutation(list(calls)).tolist():
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def throughput(ways: dict[str, Callable[[int], None]], count: int, seconds: float) -> dict[str, float]:
    """Images a second where nobody waits for a single batch: median of rounds of some ten batches."""
    number, rates = 10, {name: list[float]() for name in ways}
    generator, end = np.random.default_rng(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates[next(iter(ways))]) < 5:
        for name in generator.permutation(list(ways)).tolist():
            start = time.perf_counter()
            ways[name](number)
            rates[name].append(number * count / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def _run_many(bare: BareLoop, number: int) -> None:
    for _ in range(number):
        bare.enqueue()
    bare.wait()


def _infer_many(engine: Engine, source: DeviceBatch, bare: BareLoop, number: int) -> None:
    for _ in range(number):
        engine.infer_device(source, stream=bare.handle)
    bare.wait()


def measure_numpy(engine: Engine, images: NDArray[Any], count: int, *, seconds: float) -> dict[str, Any]:
    """Large batches of bytes from NumPy, which are split and overlapped, against the bare loop.

    Args:
        engine: Of a plan that takes uint8.
        images: Some; repeated.
        count: The profile's maximum; eight of them are one call.
        seconds: To measure.
    """
    large = np.ascontiguousarray(np.concatenate([images] * -(-8 * count // len(images)))[: 8 * count])
    backend: Any = engine._backend
    port = backend._port
    with port.on_device(backend._device_id):
        source = DeviceBatch(port, large[:count].copy())
    try:
        with BareLoop(engine, source) as bare:
            engine.infer(large)
            times = in_turn({"bare": lambda: _run_many(bare, 8), "numpy": lambda: engine.infer(large)}, seconds)
    finally:
        with port.on_device(backend._device_id):
            source.free()
    rates = {name: len(large) / statistics.median(values) for name, values in times.items()}
    return {"batch": count, "images_per_second": rates, "share": rates["numpy"] / rates["bare"]}


def measure_clients(engine: Engine, images: NDArray[Any], count: int, *, seconds: float) -> dict[str, Any]:
    """64 clients with one image each through the batcher, against full batches of NumPy arrays."""
    full = np.ascontiguousarray(np.concatenate([images] * -(-count // len(images)))[:count])
    one = images[:1]
    rates: dict[str, list[float]] = {"full": [], "clients": []}
    for _ in range(3):
        rates["full"].append(_rate(lambda: engine.infer(full), count, seconds))
        with engine.batcher(max_batch=count, max_delay_ms=2, max_queue=4 * count + CLIENTS) as batcher:
            rates["clients"].append(_rate_of_clients(lambda: batcher.infer(one), seconds))
    found = {name: statistics.median(values) for name, values in rates.items()}
    return {"batch": count, "clients": CLIENTS, "images_per_second": found, "share": found["clients"] / found["full"]}


def _rate(call: Callable[[], object], count: int, seconds: float) -> float:
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or done == 0:
        call()
        done += count
    return done / (time.perf_counter() - start)


def _rate_of_clients(call: Callable[[], object], seconds: float) -> float:
    stop, counts = threading.Event(), [0] * CLIENTS
    problems: list[Exception] = []

    def work(index: int) -> None:
        try:
            while not stop.is_set():
                call()
                counts[index] += 1
        except Exception as error:  # noqa: BLE001 - raised again below: a rate of those that are left would be none
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    begin, before = time.perf_counter(), sum(counts)
    time.sleep(seconds)
    done, end = sum(counts) - before, time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return done / (end - begin)


def measure_matrix_peak() -> dict[str, Any] | None:
    """What a large FP16 matrix product reaches in torch, as `fp16_tflops` with its `source`; None without a GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    size, number, best = 8192, 10, 0.0
    one, two = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(number):
            torch.mm(one, two)
        torch.cuda.synchronize()
        best = max(best, 2 * size**3 * number / (time.perf_counter() - start) / 1e12)
    return {"fp16_tflops": best, "source": f"torch {torch.__version__}, products of {size} × {size} matrices"}

"""Whether a plan answers rightly in every way that the Engine offers.

Each check is recorded with its error; none ends the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.runtime.tensorrt.context import changes_kernels
from repvgg_deploy.runtime.tensorrt.slot import split

from .bare import DeviceBatch

TOLERANCES = {"fp32": 2e-3, "fp16": 3e-2, "int8": None}
"""Share of the logits' largest value.

FP32: another order of sums over 28 layers. FP16: 5e-4 an operation, and as many. INT8: see `LEAST_DB`.
"""
LEAST_DB = 15.0
"""SQNR of an INT8 plan against its own graph in ONNX Runtime.

What is exactly between two integers goes either way, and layers of an untrained network carry that on. How accurate
INT8 is, `benchmarks/int8.py` says.
"""
LEAST_DIFFERENCES_DB = 6.0
"""SQNR of what differs between the images, which is little beside what all have in common."""
MOST_ROW_NOISE = 0.25
"""Squared error of a row as a share of what rows differ from their mean: FP16 of A0 has 4e-4, another row 0.7."""
SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 100, 300)


def decibels(truth: NDArray[Any], found: NDArray[Any]) -> float:
    """SQNR as the project defines it."""
    one, two = truth.astype(np.float64), found.astype(np.float64)
    noise = float(np.square(one - two).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(one).sum() / noise))


def check_parity(engine: Engine, images: NDArray[Any], logits: NDArray[Any], precision: str) -> dict[str, Any]:
    """Against what ONNX Runtime gives: of the FP32 graph, or of the INT8 graph for an INT8 plan."""
    found: Any = engine.infer(images)
    error, quality = float(np.abs(found - logits).max() / np.abs(logits).max()), decibels(logits, found)
    agreement = float((found.argmax(axis=1) == logits.argmax(axis=1)).mean())
    differences = decibels(logits - logits.mean(axis=0), found - found.mean(axis=0))
    limit = TOLERANCES[precision]
    met = (quality >= LEAST_DB if limit is None else error <= limit) and differences >= LEAST_DIFFERENCES_DB
    return {"met": met, "error": error, "sqnr_db": quality, "differences_db": differences, "agreement": agreement}


def check_ways(plan: Path, images: NDArray[Any], options: EngineOptions | None = None) -> dict[str, dict[str, Any]]:
    """Every way to run, against the same plan, an image at a time."""
    results: dict[str, dict[str, Any]] = {}
    options = options if options is not None else EngineOptions()
    with Engine(plan, options=options) as engine:
        truth: Any = np.concatenate(
            [np.asarray(engine.infer(images[index : index + 1])) for index in range(len(images))]
        )
        ways: dict[str, Callable[[], float]] = {
            "any number of images": lambda: _any_number(engine, images, truth),
            "16 threads": lambda: _threads(engine, images, truth),
            "with and without CUDA graphs": lambda: compare_graphs(plan, images, options),
            "device array": lambda: _device(engine, images, truth),
            "device array on a stream of torch": lambda: _torch(engine, images, truth),
            "device array of CuPy": lambda: _cupy(engine, images, truth),
            "micro-batching, 64 clients": lambda: _batching(engine, images, truth),
        }
        for name, way in ways.items():
            results[name] = attempt(way)
    return results


def attempt(way: Callable[[], float]) -> dict[str, Any]:
    """The error of a way, or why there is none."""
    try:
        error = way()
    except ModuleNotFoundError as missing:
        return {"left_out": str(missing)}
    except Exception as problem:  # noqa: BLE001 - the run goes on, and says what failed
        return {"met": False, "problem": f"{type(problem).__name__}: {problem}"}
    return {"met": bool(error <= 2e-2), "error": error}


def find_difference(found: Any, truth: NDArray[Any]) -> float:
    """The largest error as a share of the largest number; infinity where a row is not the one of its image.

    Rows are compared after the mean over them is taken out: beside what all images have in common, another image's row
    is hardly wrong. Other batch sizes choose other kernels, and in FP16 and INT8 those round differently: the
    tolerance of `attempt`.
    """
    found = np.asarray(found, np.float32)
    error = float(np.abs(found - truth).max() / np.abs(truth).max())
    if math.isnan(error):  # or the largest of several would be one of the others
        return float("inf")
    one, two = truth - truth.mean(axis=0), found - found.mean(axis=0)
    noise, spread = np.square(two - one).sum(axis=1), np.square(one).sum(axis=1).mean()
    return float("inf") if noise.max() > MOST_ROW_NOISE * spread and len(truth) > 1 else error


def repeat(values: NDArray[Any], count: int) -> NDArray[Any]:
    """So many rows, each round of them in an order of its own: pieces of a batch that change places are seen."""
    generator = np.random.default_rng(0)
    rounds = [generator.permutation(len(values)) for _ in range(-(-count // len(values)))]
    return values[np.concatenate(rounds)[:count]]


def _any_number(engine: Engine, images: NDArray[Any], truth: NDArray[Any]) -> float:
    found = [np.asarray(engine.infer(repeat(images, count))) for count in SIZES]
    return find_difference(np.concatenate(found), np.concatenate([repeat(truth, count) for count in SIZES]))


def _threads(engine: Engine, images: NDArray[Any], truth: NDArray[Any]) -> float:
    counts = SIZES * 8
    with ThreadPoolExecutor(16) as pool:
        found: list[Any] = list(pool.map(engine.infer, (repeat(images, count) for count in counts)))
    return find_difference(np.concatenate(found), np.concatenate([repeat(truth, count) for count in counts]))


def compare_graphs(plan: Path, images: NDArray[Any], options: EngineOptions, sizes: Sequence[int] = SIZES) -> float:
    """The largest difference between answers with and without CUDA graphs; infinity where bits differ that must not.

    Two batches take turns, so that an answer which was not computed anew is that of the other one. With graphs they run
    as they are, captured, replayed, replayed: the same kernels in the same order. So does the engine without graphs,
    but for TensorRT-RTX, which runs others until those of a shape are compiled, and waits for them in the contexts of
    graphs only. A batch that is padded to the size of a graph may round otherwise than without graphs.
    """
    found: dict[bool, list[tuple[tuple[int, ...], bool, NDArray[Any], NDArray[Any]]]] = {True: [], False: []}
    stale = False
    for on, runs in found.items():
        with Engine(plan, options=replace(options, cuda_graphs=on)) as engine:
            backend: Any = engine._backend
            lazily, graphs = changes_kernels(backend._plan), backend._graphs
            for count in sizes:
                pieces = split(count, backend._plan.interface)
                rows = tuple(graphs.choose_rows(piece.stop - piece.start) for piece in pieces)
                exact = not lazily or all(map(graphs.covers, rows))
                pair = repeat(images, count), repeat(images[::-1], count)
                first, other, *later = (np.asarray(engine.infer(batch)) for batch in pair * 2)
                runs += [(rows, exact, first, later[0]), (rows, exact, other, later[1])]
                stale = stale or np.array_equal(first, other)
    same = all(np.array_equal(one, two) for runs in found.values() for _, exact, one, two in runs if exact)
    pairs = [(one, two) for runs in found.values() for _, _, one, two in runs]
    for (rows, _, _, one), (others, exact, _, two) in zip(found[True], found[False], strict=True):
        same = same and (not exact or rows != others or np.array_equal(one, two))
        pairs.append((one, two))
    return max(find_difference(two, one) for one, two in pairs) if same and not stale else float("inf")


def _device(engine: Engine, images: NDArray[Any], truth: NDArray[Any]) -> float:
    backend: Any = engine._backend
    with backend._port.on_device(backend._device_id):
        batch = DeviceBatch(backend._port, images)
        try:
            return find_difference(engine.infer(batch), truth)
        finally:
            batch.free()


def _torch(engine: Engine, images: NDArray[Any], truth: NDArray[Any]) -> float:
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise ModuleNotFoundError("torch is installed without CUDA")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        batch = torch.from_numpy(images).cuda(non_blocking=True)
        result = torch.from_dlpack(engine.infer_device(batch, stream=stream)[0]) * 1
    stream.synchronize()
    return find_difference(result.float().cpu().numpy(), truth)


def _cupy(engine: Engine, images: NDArray[Any], truth: NDArray[Any]) -> float:
    if importlib.util.find_spec("cupy") is None:
        raise ModuleNotFoundError("cupy is not installed")
    cupy: Any = importlib.import_module("cupy")
    return find_difference(cupy.asnumpy(cupy.from_dlpack(engine.infer_device(cupy.asarray(images))[0])), truth)


def _batching(engine: Engine, images: NDArray[Any], truth: NDArray[Any]) -> float:
    with engine.batcher(max_batch=32, max_delay_ms=2, max_queue=256) as batcher, ThreadPoolExecutor(64) as pool:
        found: list[Any] = list(pool.map(batcher.infer, repeat(images, 256)[:, np.newaxis]))
    return find_difference(np.concatenate(found), repeat(truth, 256))

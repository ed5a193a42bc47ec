"""The Engine on a CPU: its own cost, INT8 against FP32, and single requests in micro-batches, side by side in one run.

Three questions, each with its bar:

- What does `Engine.infer` cost on top of a bare `InferenceSession.run` on the same session? At most 2 %.
- How much faster is the INT8 graph that TensorRT gets than FP32 on ONNX Runtime? With OpenVINO 3.3 ×; with ONNX Runtime
  2.2 × at batch 8 and 32, 1.8 × at batch 1. `as it stands` is what ONNX Runtime makes of that graph without the
  Engine's unsigned activations.
- What share of the throughput of full batches do 64 clients reach that each send one image and wait? At least 80 %.

All ways run in each round, in a new random order, so that other load on the machine slows all alike; figures are
medians over the rounds, and ratios medians of the ratios within a round.

    python benchmarks/runtime.py                       # a RepVGG-A0 with random weights, quantized here: a minute more
    python benchmarks/runtime.py a0.onnx a0-int8.onnx
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runtime_overhead import export_random_a0, make_batch
from repvgg_deploy.measure.peaks import cpu_name
from repvgg_deploy.runtime.engine import Engine

RESULTS = Path(__file__).resolve().parent / "results" / "runtime.json"
BATCHES = (1, 8, 32)
OVERHEAD_PERCENT = 2.0
BARS = {"onnxruntime": {1: 1.8, 8: 2.2, 32: 2.2}, "openvino": {1: 3.3, 8: 3.3, 32: 3.3}}
CLIENTS, MICRO_BATCH, MICRO_PERCENT = 64, 32, 80.0
_PAUSE = 0.05  # seconds
Ways = dict[str, Callable[[], object]]


def quantize_randomly(model: Path, out: Path) -> Path:
    """INT8 with FP16 for the rest, calibrated on random images: speed does not depend on the values."""
    from dataclasses import replace

    from repvgg_deploy.precision.int8 import FAST, to_int8
    from repvgg_deploy.precision.typed_model import write_typed

    with Engine(model) as engine:
        images = [make_batch(engine.spec, 4)]
    typed, _ = to_int8(model, images, replace(FAST, target="trt10"))
    write_typed(out, typed, force=True)
    return out


def open_as_it_stands(model: Path) -> Any:
    """A bare session of the file, without the one optimizer that computes it wrongly."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )


def time_rounds(ways: Ways, rounds: int, seconds: float = 0.25) -> dict[str, list[float]]:
    """Seconds of a call of each way in each round: the mean of calls in a row that fill the given time, at least one.

    The first round is left out. Before each turn there is a pause, because threads of the way before still spin, and
    then calls that are not timed, until the way's own threads and caches are warm.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    generator = np.random.default_rng(0)
    for _ in range(rounds + 1):
        for name in generator.permutation(list(ways)).tolist():
            time.sleep(_PAUSE)
            _fill(ways[name], seconds / 3)
            found[name].append(_fill(ways[name], seconds))
    return {name: values[1:] for name, values in found.items()}


def _fill(way: Callable[[], object], seconds: float) -> float:
    started, calls = time.perf_counter(), 0
    while True:
        way()
        calls += 1
        passed = time.perf_counter() - started
        if passed >= seconds:
            return passed / calls


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of the time of `one` by that of `other`."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def measure_batches(fp32: Path, int8: Path, rounds: int) -> list[dict[str, Any]]:
    """Every way at every batch size."""
    with ExitStack() as stack:
        plain = stack.enter_context(Engine(fp32))
        engines = {name: stack.enter_context(Engine(int8, backend=name)) for name in BARS}  # type: ignore[arg-type]
        bare: Any = plain._backend._session  # type: ignore[attr-defined]
        standing = open_as_it_stands(int8)
        names = {name: engine.backend_name for name, engine in engines.items()}
        return [{"backends": names} | measure_batch(count, rounds, plain, bare, standing, engines) for count in BATCHES]


def measure_batch(
    count: int, rounds: int, plain: Engine, bare: Any, standing: Any, engines: dict[str, Engine]
) -> dict[str, Any]:
    batch = make_batch(plain.spec, count)
    feed, outputs = {plain.spec.input.name: batch}, [output.name for output in plain.spec.outputs]
    ways: Ways = {
        "FP32, bare session": lambda: bare.run(outputs, feed),
        "FP32, Engine": lambda: plain.infer(batch),
        "INT8 as it stands, bare session": lambda: standing.run(outputs, feed),
        **{f"INT8, Engine, {name}": (lambda engine=engine: engine.infer(batch)) for name, engine in engines.items()},  # type: ignore[misc]
    }
    found = time_rounds(ways, rounds)
    return {
        "batch": count,
        "rounds": len(found["FP32, Engine"]),
        "images_per_second": {name: count / statistics.median(seconds) for name, seconds in found.items()},
        "overhead_percent": 100 * (ratio(found, "FP32, Engine", "FP32, bare session") - 1),
        "int8_speedup": {name: ratio(found, "FP32, bare session", f"INT8, Engine, {name}") for name in engines},
        "int8_as_it_stands_speedup": ratio(found, "FP32, bare session", "INT8 as it stands, bare session"),
    }


def serve_clients(batcher: Any, image: NDArray[Any], requests: int) -> None:
    """Runs each client in a thread, where it sends one image after the other and waits for each answer."""

    def client() -> None:
        for _ in range(requests):
            batcher.infer(image)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_batcher(model: Path, backend: Any, requests: int, rounds: int) -> dict[str, Any]:
    """Full batches from one caller and single images from many clients, in turn."""
    images = CLIENTS * requests
    with Engine(model, backend=backend) as engine, engine.batcher(MICRO_BATCH) as batcher:
        batch = make_batch(engine.spec, MICRO_BATCH)
        ways: Ways = {
            "full batches": lambda: [engine.infer(batch) for _ in range(images // MICRO_BATCH)],
            "micro-batching": lambda: serve_clients(batcher, batch[:1], requests),
        }
        found = time_rounds(ways, rounds)
        sizes = batcher.statistics().batch_sizes
        name = engine.backend_name
    return {
        "model": model.name,
        "backend": name,
        "clients": CLIENTS,
        "max_batch": MICRO_BATCH,
        "images_per_second": {way: images / statistics.median(seconds) for way, seconds in found.items()},
        "share_percent": 100 * ratio(found, "full batches", "micro-batching"),
        "mean_batch": sum(size * count for size, count in sizes.items()) / sum(sizes.values()),
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['fp32']} and {result['int8']}, {result['machine']}; images a second, medians of interleaved rounds"
    ]
    names = list(result["batches"][0]["images_per_second"])
    lines.append(f"{'':<34}" + "".join(f"{'batch ' + str(row['batch']):>12}" for row in result["batches"]))
    lines += [
        f"{name:<34}" + "".join(f"{row['images_per_second'][name]:>12.1f}" for row in result["batches"])
        for name in names
    ]
    lines.append(
        f"{'INT8 as it stands ÷ FP32':<34}"
        + "".join(f"{row['int8_as_it_stands_speedup']:>11.2f}×" for row in result["batches"])
    )
    for backend in BARS:
        lines.append(
            f"{'INT8 ÷ FP32, ' + backend:<34}"
            + "".join(f"{row['int8_speedup'][backend]:>11.2f}×" for row in result["batches"])
        )
    lines.append(
        f"{'Engine on top of the bare session':<34}"
        + "".join(f"{row['overhead_percent']:>+11.2f}%" for row in result["batches"])
    )
    for row in result["batcher"]:
        speeds = row["images_per_second"]
        lines.append(
            f"{row['clients']} clients, one image each, {row['model']}, {row['backend']}: "
            f"{speeds['micro-batching']:.1f} of "
            f"{speeds['full batches']:.1f} images/s = {row['share_percent']:.1f} %, batches of {row['mean_batch']:.1f}"
        )
    lines += [f"MISSED: {miss}" for miss in result["missed"]] or ["every bar is met"]
    return "\n".join(lines)


def find_missed(result: dict[str, Any]) -> list[str]:
    missed = []
    for row in result["batches"]:
        if row["overhead_percent"] > OVERHEAD_PERCENT:
            missed.append(
                f"overhead at batch {row['batch']}: {row['overhead_percent']:.2f} %, at most {OVERHEAD_PERCENT:g} %"
            )
        for backend, bars in BARS.items():
            if row["int8_speedup"][backend] < bars[row["batch"]]:
                missed.append(
                    f"INT8, {backend}, batch {row['batch']}: {row['int8_speedup'][backend]:.2f} ×, at least "
                    f"{bars[row['batch']]} ×"
                )
    for row in result["batcher"]:
        if row["share_percent"] < MICRO_PERCENT:
            missed.append(
                f"micro-batching, {row['backend']}: {row['share_percent']:.1f} %, at least {MICRO_PERCENT:g} %"
            )
    return missed


def main() -> int:
    """Measures, prints a table, and writes `results/runtime.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "fp32",
        nargs="?",
        type=Path,
        help="an .onnx that repvgg-export wrote (default: a RepVGG-A0 with random weights)",
    )
    parser.add_argument(
        "int8", nargs="?", type=Path, help="what repvgg-trt quantize --int8 made of it (default: quantized here)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of all ways, at each batch size (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fp32 = args.fp32 or export_random_a0(Path(folder) / "A0-random.onnx")
        int8 = args.int8 or quantize_randomly(fp32, Path(folder) / "A0-random-int8.onnx")
        result: dict[str, Any] = {
            "fp32": fp32.name,
            "int8": int8.name,
            "machine": f"{cpu_name()}, {platform.system()}, Python {platform.python_version()}",
            "batches": measure_batches(fp32, int8, args.rounds),
            "batcher": [
                measure_batcher(path, backend, 4, 5)
                for path, backend in ((fp32, None), (int8, "onnxruntime"), (int8, "openvino"))
            ],
        }
    result["missed"] = find_missed(result)
    print(report(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

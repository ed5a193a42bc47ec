"""The Engine on a CPU beside its peers, and its own cost, in one run.

- **Speed**: images a second of RepVGG-A0 in batches of 1, 8 and 32, in ONNX Runtime, OpenVINO, PyTorch and
  `torch.compile` as their users call them, and in the Engine; FP32, bfloat16 where this processor computes in it, INT8.
- **Share**: what the Engine gives of the bare backend on the same graph, with float and uint8 images; at least 98 %.
  The caller owns the outputs on both sides.
- **Clients**: what share of the throughput of full batches 64 clients get that each send one image and wait; at least
  95 %.
- **Callers**: threads that call `infer` with one image at once, where threads share an image, and where each image has
  a thread (`EngineOptions(intra_op_threads=1)`).

All ways run in each round, in a new random order, so that other load on the machine slows all alike; figures are
medians over the rounds, and ratios medians of the ratios within a round. Results are kept by processor.

    python benchmarks/runtime.py                       # a RepVGG-A0 with random weights: speed does not depend on them
    python benchmarks/runtime.py --only share
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from repvgg_deploy.errors import InputError
from repvgg_deploy.measure.peaks import cpu_name
from repvgg_deploy.runtime.cpu.processor import require_bfloat16
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import BackendName, EngineOptions
from repvgg_deploy.specs.values import InputKind, ModelSpec

RESULTS = Path(__file__).resolve().parent / "results" / "runtime.json"
BATCHES = (1, 8, 32)
SHARE_BAR, CLIENTS_BAR = 98.0, 95.0  # per cent
CLIENTS, MICRO_BATCH = 64, 32
CALLERS = (2, 16)
BACKENDS: tuple[BackendName, ...] = ("onnxruntime", "openvino")
ROUNDS = {"speed": 10, "share": 20, "clients": 5, "callers": 5}
Ways = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def export_random_a0(path: Path, dtype: InputKind) -> Path:
    """A RepVGG-A0 with random weights that takes images of this dtype."""
    import torch

    from repvgg_deploy.export.export import ExportOptions, export_checkpoint
    from repvgg_deploy.export.options import GraphOptions

    checkpoint = path.with_suffix(".pth")
    torch.save(_make_network().state_dict(), checkpoint)
    export_checkpoint(checkpoint, path, options=ExportOptions(graph=GraphOptions(input=dtype)))
    return path


def _make_network() -> Any:
    import torch

    from repvgg_deploy.model.network import RepVGG
    from repvgg_deploy.specs.variants import get_variant

    torch.manual_seed(0)
    return RepVGG(get_variant("A0")).eval()


def quantize_randomly(model: Path, out: Path) -> Path:
    """INT8 with FP16 for the rest, calibrated on random images."""
    from repvgg_deploy.precision.int8 import FAST, to_int8
    from repvgg_deploy.precision.typed_model import write_typed

    with Engine(model) as engine:
        images = [make_batch(engine.spec, 4)]
    typed, _ = to_int8(model, images, replace(FAST, target="trt10"))
    write_typed(out, typed, force=True)
    return out


def make_batch(spec: ModelSpec, count: int) -> NDArray[Any]:
    """Random images of the model's size (224 px where it accepts any)."""
    generator = np.random.default_rng(0)
    shape = (count, *(size if isinstance(size, int) else 224 for size in spec.input.shape[1:]))
    if spec.input.dtype == "uint8":
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape, dtype=np.float32)


def time_rounds(ways: Ways, rounds: int, seconds: float = 0.25, pause: float = 0.05) -> Times:
    """Seconds of a call of each way in each round: the mean of calls in a row that fill the given time, at least one.

    The first round is left out. Before each turn there is a pause, because threads of the way before still spin, and
    then calls that are not timed, until the way's own threads and caches are warm.
    """
    found: Times = {name: [] for name in ways}
    generator = np.random.default_rng(0)
    for _ in range(rounds + 1):
        for name in generator.permutation(list(ways)).tolist():
            time.sleep(pause)
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


def _per_second(found: Mapping[str, list[float]], images: int) -> dict[str, float]:
    return {name: images / statistics.median(seconds) for name, seconds in found.items()}


def _share(found: Times, ours: str, other: str) -> float:
    """Per cent of the speed of the other: the median over the rounds."""
    return 100 * statistics.median(b / a for a, b in zip(found[ours], found[other], strict=True))


def _has_bfloat16() -> bool:
    try:
        require_bfloat16()
    except InputError:
        return False
    return True


def open_openvino(model: Path, precision: str) -> Callable[[NDArray[Any]], object]:
    """OpenVINO as its users call it, whose answers the caller owns."""
    import openvino

    compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return bare_openvino(compiled)


def bare_openvino(compiled: Any) -> Callable[[NDArray[Any]], object]:
    """One infer request of a compiled model; outputs are copied, as they are by default."""
    request = compiled.create_infer_request()
    return lambda batch: request.infer([batch], share_inputs=True)


def open_onnxruntime(model: Path) -> Callable[[NDArray[Any]], object]:
    """ONNX Runtime as its users call it, but for the one optimizer that computes such INT8 graphs wrongly."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return bare_onnxruntime(
        onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
    )


def bare_onnxruntime(session: Any) -> Callable[[NDArray[Any]], object]:
    """`run` of a session with one input."""
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})


def open_torch(*, half: bool, compiled: bool) -> Callable[[NDArray[Any]], object]:
    """The deploy form in PyTorch, channels last, with FP32 images and answers."""
    import torch

    from repvgg_deploy.model.fold import reparameterize

    dtype = torch.bfloat16 if half else torch.float32
    model = reparameterize(_make_network()).to(dtype=dtype, memory_format=torch.channels_last)
    call = torch.compile(model, dynamic=False) if compiled else model

    def run(batch: NDArray[Any]) -> object:
        with torch.inference_mode():
            images = torch.from_numpy(batch).to(dtype=dtype, memory_format=torch.channels_last)
            return call(images).float().numpy()

    return run


def measure_speed(models: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Every way at every batch size, float images."""
    fp32, int8, half = models["fp32 float32"], models["int8 float32"], _has_bfloat16()
    with ExitStack() as stack:

        def engine(path: Path, **arguments: Any) -> Callable[[NDArray[Any]], object]:
            return stack.enter_context(Engine(path, **arguments)).infer

        calls: dict[str, Callable[[NDArray[Any]], object]] = {
            "PyTorch": open_torch(half=False, compiled=False),
            "torch.compile": open_torch(half=False, compiled=True),
            "ONNX Runtime": open_onnxruntime(fp32),
            "OpenVINO": open_openvino(fp32, "f32"),
            "Engine": engine(fp32),
            "Engine, OpenVINO": engine(fp32, backend="openvino"),
        }
        if half:
            calls |= {
                "PyTorch, bfloat16": open_torch(half=True, compiled=False),
                "torch.compile, bfloat16": open_torch(half=True, compiled=True),
                "OpenVINO, bfloat16": open_openvino(fp32, "bf16"),
                "Engine, OpenVINO, bfloat16": engine(fp32, backend="openvino", options=EngineOptions(bfloat16=True)),
            }
        calls |= {
            "ONNX Runtime, INT8": open_onnxruntime(int8),
            "OpenVINO, INT8": open_openvino(int8, "f32"),
            "Engine, INT8": engine(int8),
            "Engine, OpenVINO, INT8": engine(int8, backend="openvino"),
        }
        with Engine(fp32) as plain:
            batches = {count: make_batch(plain.spec, count) for count in BATCHES}
        found: list[dict[str, Any]] = []
        for count, batch in batches.items():
            ways: Ways = {name: partial(call, batch) for name, call in calls.items()}
            speeds = _per_second(time_rounds(ways, rounds), count)
            found.append({"batch": count, "images_per_second": speeds})
            _show("  " + ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()))
    return found


def measure_share(models: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """The Engine and the bare backend on the graph that the Engine runs; also without the look for NaN."""
    found = []
    for name, path in models.items():
        for backend, checks in itertools.product(BACKENDS, (True, False)):
            if not checks and name != "int8 float32":
                continue  # whole numbers are never NaN, and beside FP32 the look for it is nothing
            with Engine(path, backend=backend, options=EngineOptions(check_finite=checks)) as engine:
                opened: Any = engine._backend
                bare = bare_openvino(opened._compiled) if backend == "openvino" else bare_onnxruntime(opened._session)
                shares = {}
                for count in BATCHES:
                    batch = make_batch(engine.spec, count)
                    ways: Ways = {"bare": partial(bare, batch), "Engine": partial(engine.infer, batch)}
                    times = time_rounds(ways, max(rounds, 200 // count), seconds=0.0, pause=0.0)
                    shares[str(count)] = _share(times, "Engine", "bare")
            shown = name if checks else f"{name} unchecked"
            found.append({"model": shown, "backend": backend, "percent": shares})
            _show(f"  {shown}, {backend}: " + ", ".join(f"{share:.1f} %" for share in shares.values()))
    return found


def _in_threads(count: int, work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _repeat(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def measure_clients(models: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Full batches from one caller, and single images from many clients through a batcher, in turn."""
    fp32, int8, requests = models["fp32 float32"], models["int8 float32"], 8
    images = CLIENTS * requests
    found = []
    for path, backend in ((fp32, "onnxruntime"), (int8, "onnxruntime"), (int8, "openvino")):
        with Engine(path, backend=backend) as engine, engine.batcher(MICRO_BATCH) as batcher:  # type: ignore[arg-type]
            batch = make_batch(engine.spec, MICRO_BATCH)
            client = _repeat(partial(batcher.infer, batch[:1]), requests)
            ways: Ways = {
                "full batches": _repeat(partial(engine.infer, batch), images // MICRO_BATCH),
                "clients": partial(_in_threads, CLIENTS, client),
            }
            times = time_rounds(ways, rounds, seconds=0.0)
            sizes = batcher.statistics().batch_sizes
        found.append(
            {
                "model": "INT8" if path == int8 else "FP32",
                "backend": backend,
                "images_per_second": _per_second(times, images),
                "percent": _share(times, "clients", "full batches"),
                "mean_batch": sum(size * count for size, count in sizes.items()) / sum(sizes.values()),
            }
        )
        _show(f"  {found[-1]}")
    return found


def measure_callers(models: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Threads that call `infer` with one image each: all cores on one image, or one thread an image."""
    found = []
    for backend in BACKENDS:
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(Engine(models["int8 float32"], backend=backend, options=options))
                for name, options in (
                    ("shared", EngineOptions()),
                    ("one thread an image", EngineOptions(intra_op_threads=1)),
                )
            }
            image = make_batch(next(iter(engines.values())).spec, 1)
            for callers in CALLERS:
                ways: Ways = {
                    name: partial(_in_threads, callers, _repeat(partial(engine.infer, image), 64 // callers))
                    for name, engine in engines.items()
                }
                speeds = _per_second(time_rounds(ways, rounds), 64)
                found.append({"backend": backend, "callers": callers, "images_per_second": speeds})
                _show(f"  {found[-1]}")
    return found


def measure_wrapper(model: Path) -> float:
    """Microseconds of `Engine.infer` of one image itself, around a backend that returns at once."""

    class Instant:
        name = "instant"

        def run(self, batch: NDArray[Any]) -> list[NDArray[Any]]:
            return answers

        def close(self) -> None:
            real.close()

    with Engine(model) as engine:
        batch, real = make_batch(engine.spec, 1), engine._model.backend
        answers = list(real.run(batch))
        engine._model.backend = Instant()
        times = time_rounds({"wrapper": lambda: engine.infer(batch)}, 20, seconds=0.05)
        engine._model.backend = real
    return 1e6 * statistics.median(times["wrapper"])


PARTS: dict[str, Callable[[Mapping[str, Path], int], list[dict[str, Any]]]] = {
    "speed": measure_speed,
    "share": measure_share,
    "clients": measure_clients,
    "callers": measure_callers,
}


def find_missed(result: Mapping[str, Any]) -> list[str]:
    """The bars that were missed, in words."""
    missed = [
        f"{row['model']} in {row['backend']}, batch {count}: the Engine gives {percent:.1f} % of it, at least "
        f"{SHARE_BAR:g} %"
        for row in result.get("share", [])
        for count, percent in row["percent"].items()
        if percent < SHARE_BAR
    ]
    return missed + [
        f"{CLIENTS} clients, {row['model']} in {row['backend']}: {row['percent']:.1f} % of full batches, at least "
        f"{CLIENTS_BAR:g} %"
        for row in result.get("clients", [])
        if row["percent"] < CLIENTS_BAR
    ]


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(result: Mapping[str, Any]) -> str:
    """What a terminal shows of one processor's results."""
    lines = [f"A0, 224 px, {result['machine']}"]
    if "speed" in result:
        lines.append(f"{'images a second':<28}" + "".join(f"{'batch ' + str(b['batch']):>10}" for b in result["speed"]))
        lines += [
            f"{name:<28}" + "".join(f"{row['images_per_second'][name]:>10.0f}" for row in result["speed"])
            for name in result["speed"][0]["images_per_second"]
        ]
    for row in result.get("share", []):
        shares = " ".join(f"{share:7.1f} %" for share in row["percent"].values())
        lines.append(f"{'Engine of bare, ' + row['model'] + ', ' + row['backend']:<46}{shares}")
    for row in result.get("clients", []):
        speeds = row["images_per_second"]
        lines.append(
            f"{CLIENTS} clients, {row['model']}, {row['backend']}: {speeds['clients']:.0f} of "
            f"{speeds['full batches']:.0f} images/s = {row['percent']:.1f} %, batches of {row['mean_batch']:.1f}"
        )
    for row in result.get("callers", []):
        speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in row["images_per_second"].items())
        lines.append(f"{row['callers']} callers, one image each, INT8, {row['backend']}: {speeds} images/s")
    if "wrapper_microseconds" in result:
        lines.append(f"the Engine itself: {result['wrapper_microseconds']:.1f} µs a call")
    return "\n".join([*lines, *(f"MISSED: {miss}" for miss in find_missed(result))])


def measure(parts: Iterable[str]) -> dict[str, Any]:
    """What was asked for, on models made here."""
    found: dict[str, Any] = {
        "machine": f"{cpu_name()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {name: _version(name) for name in ("torch", "onnxruntime", "openvino")},
    }
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for dtype in get_args(InputKind):
            models[f"fp32 {dtype}"] = export_random_a0(Path(folder, f"{dtype}.onnx"), dtype)
            models[f"int8 {dtype}"] = quantize_randomly(models[f"fp32 {dtype}"], Path(folder, f"{dtype}-int8.onnx"))
        for part in parts:
            _show(f"{part} …")
            found[part] = PARTS[part](models, ROUNDS[part])
        found["wrapper_microseconds"] = measure_wrapper(models["fp32 float32"])
    return found


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> int:
    """Measures, prints, and writes this processor's part of `results/runtime.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)}; what is stored of the others stays")  # fmt: skip
    args = parser.parse_args()
    fresh = measure(args.only)
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"processors": {}}
    kept = stored["processors"].get(cpu_name(), {})
    # What another version of a library gave does not stand beside this one's.
    result = (kept if kept.get("versions") == fresh["versions"] else {}) | fresh
    stored["processors"][cpu_name()] = result
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(report(result))
    return 1 if find_missed(result) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What `Engine.infer` costs on top of a bare `InferenceSession.run`, measured in one run.

Three ways answer the same batch in turn: `bare` (`InferenceSession.run`), `engine` (`Engine.infer`) and, to see what
the machine itself does to such a comparison, `bare again`. All use one session, so that only the wrapper differs, in an
order drawn anew for each round. One thread by default: then the CPU time is that of the call, whatever else the machine
does meanwhile. Beside it the wrapper alone is timed, around a backend that returns at once: where the model takes
milliseconds, that is the figure without the noise.

    python benchmarks/runtime_overhead.py                      # a RepVGG-A0 with random weights, 224 px, batch 1
    python benchmarks/runtime_overhead.py a0.onnx --batch 8
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.measure.peaks import cpu_name
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.runtime.threads import Lease
from repvgg_deploy.specs.values import ModelSpec

RESULTS = Path(__file__).resolve().parent / "results" / "runtime_overhead.json"
AIM_PERCENT = 2.0


class InstantBackend:
    """Returns the same answer at once."""

    name = "instant"

    def __init__(self, answer: Sequence[NDArray[Any]]) -> None:
        self._answer = answer

    def run(self, batch: NDArray[Any]) -> Sequence[NDArray[Any]]:
        return self._answer

    def close(self) -> None:
        pass


def export_random_a0(path: Path) -> Path:
    """A RepVGG-A0 with random weights: speed does not depend on their values."""
    import torch

    from repvgg_deploy.export.export import export_checkpoint
    from repvgg_deploy.model.network import RepVGG
    from repvgg_deploy.specs.variants import get_variant

    torch.manual_seed(0)
    checkpoint = path.with_suffix(".pth")
    torch.save(RepVGG(get_variant("A0")).state_dict(), checkpoint)
    export_checkpoint(checkpoint, path)
    return path


def make_batch(spec: ModelSpec, count: int) -> NDArray[Any]:
    """Random images of the model's size (224 px where it accepts any)."""
    generator = np.random.default_rng(0)
    shape = (count, *(size if isinstance(size, int) else 224 for size in spec.input.shape[1:]))
    if spec.input.dtype == "uint8":
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape, dtype=np.float32)


Times = dict[str, list[float]]


def time_in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> tuple[Times, Times]:
    """Wall and CPU seconds of each call; in each round every way runs once, in random order."""
    wall: Times = {name: [] for name in ways}
    cpu: Times = {name: [] for name in ways}
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        for name in generator.permutation(list(ways)).tolist():
            started, cpu_started = time.perf_counter(), time.process_time()
            ways[name]()
            cpu[name].append(time.process_time() - cpu_started)
            wall[name].append(time.perf_counter() - started)
    return wall, cpu


def time_wrapper(engine: Engine, batch: NDArray[Any], rounds: int) -> float:
    """Median seconds of `Engine.infer` around a backend that does nothing."""
    model, lease = engine._model, engine._lease
    backend = model.backend
    instant = InstantBackend(backend.run(batch))
    model.backend, engine._lease = instant, Lease(instant.close)
    try:
        wall, _ = time_in_turn({"wrapper": lambda: engine.infer(batch)}, rounds)
    finally:
        model.backend, engine._lease = backend, lease
    return statistics.median(wall["wrapper"])


def measure(model: Path, count: int, rounds: int, threads: int) -> dict[str, Any]:
    with Engine(model, options=EngineOptions(max_batch=max(count, 1), intra_op_threads=threads)) as engine:
        spec, batch = engine.spec, make_batch(engine.spec, count)
        session: Any = engine._backend._session  # type: ignore[attr-defined]
        names, feed = [output.name for output in spec.outputs], {spec.input.name: batch}
        ways: dict[str, Callable[[], object]] = {
            "bare": lambda: session.run(names, feed),
            "engine": lambda: engine.infer(batch),
            "bare again": lambda: session.run(names, feed),
        }
        time_in_turn(ways, max(5, rounds // 10))
        wall, cpu = time_in_turn(ways, rounds)
        wrapper = time_wrapper(engine, batch, rounds)
        backend = engine.backend_name
    bare = statistics.median(wall["bare"])
    return {
        "model": model.name,
        "backend": backend,
        "batch": list(batch.shape),
        "dtype": str(batch.dtype),
        "rounds": rounds,
        "machine": f"{cpu_name()}, {platform.system()}, Python {platform.python_version()}",
        "threads": threads,
        "milliseconds": {name: _quantiles(values) for name, values in wall.items()},
        "wall_percent": _against_bare(wall),
        "cpu_percent": _against_bare(cpu),
        "wrapper_alone_microseconds": 1e6 * wrapper,
        "wrapper_alone_percent": 100 * wrapper / bare,
    }


def _against_bare(times: Times) -> dict[str, float]:
    bare = statistics.median(times["bare"])
    return {name: 100 * (statistics.median(values) / bare - 1) for name, values in times.items() if name != "bare"}


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"p{percent}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
        for percent in (5, 25, 50, 75, 95, 99)
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['dtype']} {tuple(result['batch'])}, {result['rounds']} rounds, "
        f"{result['backend']}, {result['machine']}"
    ]
    quantiles = result["milliseconds"]
    lines.append(f"{'ms':<12}" + "".join(f"{name:>9}" for name in quantiles["bare"]))
    lines += [
        f"{name:<12}" + "".join(f"{value:>9.3f}" for value in values.values()) for name, values in quantiles.items()
    ]
    for name in ("engine", "bare again"):
        lines.append(
            f"{name} against bare, medians: wall {result['wall_percent'][name]:+.2f} %, CPU "
            f"{result['cpu_percent'][name]:+.2f} %"
        )
    alone = result["wrapper_alone_microseconds"]
    verdict = "within" if result["wrapper_alone_percent"] < AIM_PERCENT else "ABOVE"
    lines.append(
        f"wrapper alone: {alone:.1f} µs = {result['wrapper_alone_percent']:.2f} % of bare, {verdict} the aim of "
        f"{AIM_PERCENT:g} %"
    )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints a table, and writes `results/runtime_overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="an .onnx that repvgg-export wrote (default: export a RepVGG-A0 with random weights)",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or export_random_a0(Path(folder) / "A0-random.onnx")
        result = measure(model, args.batch, args.rounds, args.threads)
    print(report(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["wrapper_alone_percent"] < AIM_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())

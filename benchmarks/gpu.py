"""Everything about plans that needs a GPU, in one command: builds, parity, every way to run, speed beside the bare `execute_async_v3` loop.

Models are A0, B1g4 and B2 with seeded weights at 224 px. Where torch, onnx, onnxsim and onnxruntime are installed they are made here; elsewhere
(TensorRT 8.5 has a Python of its own, without torch) they are taken from `--models`, a folder that this program wrote before. Each stage that
fails is recorded with its reason and the others go on. Aims are shown as met or not and never asserted:

- batch 1: the Engine with a device array at most 25 µs slower than the bare loop
- batch 32 and above: at least 98 % of the bare loop with device arrays, 90 % from NumPy uint8
- 64 clients with single images: at least 80 % of full batches
- FP16 B2 at batch 128: at least 60 % of the matrix peak that torch reaches; INT8 at least 1.6 × FP16

    python benchmarks/gpu.py --models /tmp/models                  # makes the models where torch is, then measures with the installed TensorRT
    python benchmarks/gpu.py --models /tmp/models --make-models    # makes the models only; needs no GPU
    python benchmarks/gpu.py --models /tmp/models --variants A0 --seconds 1
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, Python looks beside it only

from benchmarks.gpu_parts import checks, models, speed
from repvgg_deploy.builder.library import open_library
from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.pipeline.build import BuildOptions, build_plan
from repvgg_deploy.runtime.cuda.port import open_cuda
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.specs import BuildConfig, ShapeProfile
from repvgg_deploy.variants import count_macs, get_variant

RESULTS = Path(__file__).resolve().parent / "results"
PROFILE = ShapeProfile(1, 32, 128)
PRECISIONS = ("fp32", "fp16", "int8")
AIMS = {"overhead_us": 25.0, "device_share": 0.98, "numpy_share": 0.90, "clients_share": 0.80, "matrix_share": 0.60, "int8_gain": 1.6}


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for; 1 where there is no GPU or no TensorRT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=None, help="folder of the models: read, and written where they are not there (default: made anew)"
    )
    parser.add_argument("--make-models", action="store_true", help="only make the models; needs no GPU")
    parser.add_argument("--variants", nargs="+", choices=models.VARIANTS, default=list(models.VARIANTS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="the JSON (default: benchmarks/results/gpu-FLAVOUR-GPU.json)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.models or Path(scratch) / "models"
        try:
            if args.make_models:
                for variant in args.variants:
                    models.make(folder, variant)
                print(f"written: {folder}")
                return 0
            machine = describe_machine()
        except RepVGGDeployError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        run = Run(folder, Path(scratch), args.seconds, machine)
        for variant in args.variants:
            run.variant(variant)
        result = run.finish()
    target = args.out or RESULTS / f"gpu-{machine['flavour']}-{machine['gpu'].replace(' ', '-').lower()}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    print(f"{show(result)}\n\nwritten: {target}")
    return 0


def describe_machine() -> dict[str, Any]:
    """GPU, driver and versions.

    Raises:
        CudaError: There is no usable GPU.
        MissingDependencyError: No TensorRT or CUDA package.
    """
    cuda = open_cuda()
    gpu = cuda.describe_device(0)
    library = open_library("auto")
    versions = {"numpy": np.__version__, "cuda": cuda.provider, "tensorrt": library.version}
    for name in ("torch", "onnx", "onnxruntime"):
        try:
            versions[name] = str(__import__(name).__version__)
        except ImportError:
            continue
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver_version,
        "cuda": gpu.cuda_version,
        "memory_bytes": gpu.memory_bytes,
        "flavour": library.flavour,
        "python": platform.python_version(),
        "versions": versions,
        "nvidia_smi": _ask_smi(),
    }


def _ask_smi() -> str:
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


class Run:
    """One run under way.

    Args:
        folder: Of the models.
        scratch: For the plans.
        seconds: For each figure.
        machine: From `describe_machine`.
    """

    def __init__(self, folder: Path, scratch: Path, seconds: float, machine: dict[str, Any]) -> None:
        self._folder, self._scratch, self._seconds = folder, scratch, seconds
        self._result: dict[str, Any] = {"machine": machine, "plans": {}, "failures": {}}
        self._old = machine["versions"]["tensorrt"].startswith("8.") and machine["flavour"] == "tensorrt"

    def variant(self, variant: str) -> None:
        """All precisions of one variant."""
        if not models.reference_of(self._folder, variant).exists():
            if not models.can_make():
                self._result["failures"][variant] = f"its models are not in {self._folder}, and torch, onnx, onnxsim or onnxruntime is missing"
                return
            if not self._stage(f"{variant}: models", lambda: models.make(self._folder, variant)):
                return
        with np.load(models.reference_of(self._folder, variant)) as stored:
            images, answers = stored["images"], {name: stored[name] for name in stored.files}
        for precision in PRECISIONS:
            kind = "int8-trt8" if precision == "int8" and self._old else precision
            expected = answers.get(kind, answers["fp32"])
            self._stage(f"{variant} {precision}", lambda p=precision, k=kind, e=expected: self._plan(f"{variant} {p}", k, images, expected=e))  # type: ignore[misc]
        if variant == models.VARIANTS[0]:
            self._stage(f"{variant} uint8", lambda: self._bytes(variant))

    def finish(self) -> dict[str, Any]:
        """What only the whole says: shares of the matrix peak, gains, aims."""
        peak = speed.measure_matrix_peak()
        self._result["matrix_peak_tflops"] = peak
        self._result["aims"] = judge(self._result, peak)
        return self._result

    def _stage(self, name: str, work: Callable[[], object]) -> bool:
        start = time.perf_counter()
        try:
            work()
        except Exception as error:  # noqa: BLE001 - recorded, and the other stages go on
            self._result["failures"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: FAILED after {time.perf_counter() - start:.0f} s: {error}", flush=True)
            return False
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return True

    def _build(self, variant: str, kind: str) -> tuple[Path, dict[str, Any]]:
        plan = self._scratch / f"{variant.lower()}-{kind}.plan"
        options = BuildOptions(BuildConfig(profile=PROFILE), True, targets=self._targets(), use_cache=False)
        built = build_plan(models.path_of(self._folder, variant, kind), plan, options, force=True)
        passport = built.passport
        return plan, {"build_seconds": passport.build_seconds, "plan_bytes": plan.stat().st_size, "inspected": passport.precision}

    def _targets(self) -> tuple[str, ...]:
        return ("current",) if self._result["machine"]["flavour"] == "tensorrt_rtx" else ()

    def _plan(self, name: str, kind: str, images: Any, *, expected: Any) -> None:
        variant, precision = name.split()
        plan, row = self._build(variant, kind)
        self._result["plans"][name] = row
        with Engine(plan) as engine:
            row["backend"] = engine.backend_name
            row["parity"] = checks.check_parity(engine, images, expected, precision)
        row["ways"] = checks.check_ways(plan, images)
        with Engine(plan) as engine:
            row["speed"] = [speed.measure(engine, images, count, seconds=self._seconds) for count in speed.BATCHES]
            row["clients"] = speed.measure_clients(engine, images, 32, seconds=self._seconds)

    def _bytes(self, variant: str) -> None:
        plan, row = self._build(variant, "uint8-fp16")
        self._result["plans"][f"{variant} uint8"] = row
        images = np.random.default_rng(0).integers(0, 256, (32, models.SIZE, models.SIZE, 3), dtype=np.uint8)
        with Engine(plan) as engine:
            row["numpy"] = speed.measure_numpy(engine, images, PROFILE.max_batch, seconds=self._seconds)
            row["clients"] = speed.measure_clients(engine, images, 32, seconds=self._seconds)


def judge(result: dict[str, Any], peak: float | None) -> dict[str, dict[str, Any]]:
    """Every aim with its figure; None where it could not be measured."""
    plans = result["plans"]
    rows = [(name, row) for name, row in plans.items() if "speed" in row]
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows:
        for part in row["speed"]:
            if part["batch"] == 1:
                found[f"{name}: overhead at batch 1, µs"] = {"value": part["overhead_us"], "met": part["overhead_us"] <= AIMS["overhead_us"]}
            elif part["batch"] >= 32:
                found[f"{name}: device arrays at batch {part['batch']}, share of the bare loop"] = _at_least(part["device_share"], "device_share")
        found[f"{name}: 64 clients, share of full batches"] = _at_least(row["clients"]["share"], "clients_share")
    for name, row in plans.items():
        if "numpy" in row:
            found[f"{name}: NumPy, share of the bare loop"] = _at_least(row["numpy"]["share"], "numpy_share")
    for variant in models.VARIANTS:
        halves, bytes_ = (_rate(plans, f"{variant} {precision}", 128) for precision in ("fp16", "int8"))
        if halves and bytes_:
            found[f"{variant}: INT8 against FP16 at batch 128"] = _at_least(bytes_ / halves, "int8_gain")
        if halves and peak and variant == "B2":
            reached = 2 * count_macs(get_variant(variant), models.SIZE, models.SIZE) * halves / 1e12
            found["B2 FP16 at batch 128, share of the matrix peak"] = {**_at_least(reached / peak, "matrix_share"), "tflops": reached}
    return found


def _at_least(value: float, aim: str) -> dict[str, Any]:
    return {"value": value, "met": value >= AIMS[aim]}


def _rate(plans: dict[str, Any], name: str, batch: int) -> float | None:
    parts = [part for part in plans.get(name, {}).get("speed", ()) if part["batch"] == batch]
    return float(parts[0]["images_per_second"]["bare"]) if parts else None


def show(result: dict[str, Any]) -> str:
    """Tables for the terminal."""
    machine = result["machine"]
    lines = [f"\n{machine['gpu']}, driver {machine['driver']}, {machine['flavour']} {machine['versions']['tensorrt']}", ""]
    lines.append(f"{'plan':<14}{'build s':>8}{'MB':>7}  {'inspected':<14}{'parity':<24}{'images/s at batch 1, 8, 32, 128 (bare loop)'}")
    for name, row in result["plans"].items():
        parity = row.get("parity")
        text = "" if parity is None else f"{'ok' if parity['met'] else 'WRONG'}, {parity['sqnr_db']:.0f} dB, {parity['agreement']:.0%}"
        rates = " ".join(f"{part['images_per_second']['bare']:8.0f}" for part in row.get("speed", ()))
        lines.append(f"{name:<14}{row['build_seconds']:>8.1f}{row['plan_bytes'] / 1e6:>7.1f}  {row['inspected']:<14}{text:<24}{rates}")
    for name, row in result["plans"].items():
        wrong = {way: found for way, found in row.get("ways", {}).items() if found.get("met") is not True}
        for way, found in wrong.items():
            lines.append(f"{name}: {way}: {found.get('left_out') or found.get('problem') or 'WRONG, error ' + format(found['error'], '.3g')}")
    lines.append("")
    for name, aim in result["aims"].items():
        lines.append(f"{'met    ' if aim['met'] else 'NOT MET'}  {aim['value']:8.2f}  {name}")
    lines += [f"FAILED   {name}: {reason}" for name, reason in result["failures"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

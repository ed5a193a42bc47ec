"""Everything about plans that needs a GPU, in one command: builds, parity, every way to run, and speed.

Speed is measured beside the bare loop that trtexec runs by default: `execute_async_v3` as a CUDA graph, a wait that
spins, and no copies from or to the host.

Models are A0, B1g4 and B2 with seeded weights at 224 px. Where torch, onnx, onnxscript, onnxsim and onnxruntime are
installed they are made here, once, and kept in `--models`; elsewhere (TensorRT 8.5 has a Python of its own, without
torch) they are taken from there.

The result is written after every stage, and beside it a copy under `.gpu/results`, which git ignores. A stage that
fails is recorded with its reason, and the others go on. `--minutes` ends the run in time: no stage begins that would
not end, were it as long as the longest so far, but for the first. The same command goes on where it ended, also with
another driver; what failed before comes after what is new, and a stage in whose midst the program ended (TensorRT
crashed, or it was killed) comes last. Exit code 0: all was measured and every answer was right; 1: something failed,
was wrong or is left to do.

Aims are shown as met or not and change no exit code:

- batch 1: the Engine with a device array at most 25 µs slower than the bare loop
- batch 32 and above: at least 98 % of the bare loop with device arrays, 90 % from NumPy uint8
- 64 clients with single images: at least 80 % of full batches
- FP16 B2 at batch 128: at least 60 % of the matrix peak that torch reaches (where torch is not, of what another run
  reached on the same kind of GPU, from the results beside this one); INT8 at least 1.6 × FP16

    python benchmarks/gpu.py                  # makes the models where torch is, then measures
    python benchmarks/gpu.py --minutes 9      # the same in parts; again until it says that all is done
    python benchmarks/gpu.py --make-models    # makes the models only; needs no GPU

`python -m benchmarks.gpu_parts.offline` runs it, and `pytest -m gpu`, on a machine that reaches no package index.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, Python looks beside it only

from benchmarks.gpu_parts import checks, models, report, speed
from benchmarks.gpu_parts.machine import describe_machine
from benchmarks.gpu_parts.record import Record, find_peak
from repvgg_deploy.build.build import build_plan
from repvgg_deploy.build.options import BuildOptions
from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.specs.values import BuildConfig, ShapeProfile

RESULTS = Path(__file__).resolve().parent / "results"
KEPT = RESULTS.parents[1] / ".gpu"
"""Ignored by git: what is measured in a copy of the working tree stays there between two runs."""
PROFILE = ShapeProfile(1, 32, 128)
PROFILED = ShapeProfile(1, 128, 128, batches=speed.BATCHES)
"""Kernels for each batch that is measured (`--profiles`)."""
PRECISIONS = ("fp32", "fp16", "int8")
PEAK, BYTES = "matrix peak", f"{models.VARIANTS[0]} uint8"


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for and not done yet; see the module for the exit code."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if args.make_models:
                for variant in (*args.variants, models.SAMPLE):
                    models.make(args.models, variant)
                print(f"written: {args.models}")
                return 0
            machine = describe_machine()
            name = f"gpu-{machine['flavour']}-{machine['gpu'].replace(' ', '-').lower()}"
            target = args.out or RESULTS / f"{name}{'-profiles' * args.profiles}.json"
            record = Record(target, machine, copy=KEPT / "results" / target.name, anew=args.anew)
        except RepVGGDeployError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        run = Run(args.models, Path(scratch), args.seconds, record, end=time.monotonic() + 60 * args.minutes)
        run.profile = PROFILED if args.profiles else PROFILE
        left = run.all(args.variants)
    print(f"{report.show(record.result)}\n\nwritten: {target}")
    if left:
        print(f"time is up; left to do: {', '.join(left)}. The same command goes on.")
    return 1 if left or report.find_problems(record.result) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        type=Path,
        default=KEPT / "models",
        help="folder of the models: read, and written where they are not there (default: .gpu/models)",
    )
    parser.add_argument(
        "--make-models", action="store_true", help="only make the models, and those of `pytest -m gpu`; needs no GPU"
    )
    parser.add_argument("--variants", nargs="+", choices=models.VARIANTS, default=list(models.VARIANTS))
    parser.add_argument(
        "--profiles",
        action="store_true",
        help="plans with an optimization profile for each batch, in results of their own",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="in which the last stage is to end (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="the JSON (default: benchmarks/results/gpu-FLAVOUR-GPU.json, or …-profiles.json)",
    )
    parser.add_argument("--anew", action="store_true", help="measure again what the JSON already holds")
    return parser.parse_args(argv)


class Run:
    """One run under way.

    Args:
        folder: Of the models.
        scratch: For the plans.
        seconds: For each figure.
        record: Where results go.
        end: On the monotonic clock, in seconds: no stage begins that may end later.
        targets: Compute capabilities for TensorRT-RTX; the GPU that is here.

    Attributes:
        profile: Of the plans.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        seconds: float,
        record: Record,
        *,
        end: float = float("inf"),
        targets: tuple[str, ...] = ("current",),
    ) -> None:
        self._folder, self._scratch, self._seconds, self._record, self._end = folder, scratch, seconds, record, end
        machine = record.result["machine"]
        self._old = machine["versions"]["tensorrt"].startswith("8.") and machine["flavour"] == "tensorrt"
        self._targets = targets if machine["flavour"] == "tensorrt_rtx" else ()
        self.profile = PROFILE
        self._left: list[str] = []
        self._begun: set[str] = set()  # in this run: what fails is not tried again

    def all(self, variants: list[str]) -> list[str]:
        """Every stage that is not done; the names of those for which there was no time."""
        plans = [f"{variant} {precision}" for variant in variants for precision in PRECISIONS]
        plans += [BYTES] * (models.VARIANTS[0] in variants)
        plans.sort(key=lambda name: variants.index(name.split()[0]))
        for name in sorted([PEAK, *plans], key=self._rank):
            if name == PEAK:
                if not self._record.result["peak"].get("fp16_tflops"):
                    self._stage(name, self._peak)
            elif not self._record.is_done(name):
                self.plan(name)
        self._save()
        return self._left

    def _rank(self, name: str) -> int:
        return max(self._record.rank(name), self._record.rank(_models_of(name)))

    def plan(self, name: str) -> None:
        """One plan, such as `A0 fp16`, after its models."""
        variant = name.split(maxsplit=1)[0]
        if not self._have_models(variant):
            return
        with np.load(models.reference_of(self._folder, variant)) as stored:
            answers = {name: stored[name] for name in stored.files}
        self._stage(name, partial(self._bytes, answers) if name == BYTES else partial(self._plan, name, answers))

    def _have_models(self, variant: str) -> bool:
        name = _models_of(variant)
        if models.reference_of(self._folder, variant).exists():
            return True
        if name in self._begun:
            return False
        missing = models.find_missing()
        if missing:
            self._begun.add(name)
            reason = f"they are not in {self._folder}, and cannot be made without {', '.join(missing)}"
            self._record.end(name, 0.0, reason)
            self._save()
            return False
        return self._stage(name, lambda: models.make(self._folder, variant))

    def _stage(self, name: str, work: Callable[[], object]) -> bool:
        now = time.monotonic()
        if now > self._end or (self._begun and now + self._record.longest_seconds() > self._end):
            self._left += [name] * (name not in self._left)
            return False
        if name != PEAK:  # which takes seconds, and where torch is not comes first in every run
            self._begun.add(name)
        problem = ""
        self._record.begin(name)
        try:
            work()
        except Exception as error:  # noqa: BLE001 - recorded, and the other stages go on
            problem = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - now
        print(f"{name}: {f'FAILED after {seconds:.0f} s: {problem}' if problem else f'{seconds:.0f} s'}", flush=True)
        self._record.end(name, seconds, problem)
        self._save()
        return not problem

    def _save(self) -> None:
        self._record.result["aims"] = report.judge(self._record.result)
        self._record.save()

    def _peak(self) -> None:
        gpu = self._record.result["machine"]["gpu"]
        found = speed.measure_matrix_peak() or find_peak(self._record.path.parent, gpu)
        problem = "torch has no GPU here, and no result beside this one measured it on such a GPU"
        self._record.result["peak"] = found or {"fp16_tflops": None, "problem": problem}

    def _build(self, variant: str, kind: str) -> tuple[Path, dict[str, Any]]:
        plan = self._scratch / f"{variant.lower()}-{kind}.plan"
        options = BuildOptions(BuildConfig(profile=self.profile), True, targets=self._targets, use_cache=False)
        built = build_plan(models.path_of(self._folder, variant, kind), plan, options, force=True)
        passport = built.passport
        return plan, {
            "build_seconds": passport.build_seconds,
            "plan_bytes": plan.stat().st_size,
            "inspected": passport.precision,
        }

    def _plan(self, name: str, answers: dict[str, Any]) -> None:
        variant, precision = name.split()
        kind = "int8-trt8" if precision == "int8" and self._old else precision
        images, expected = answers["images"], answers.get(kind, answers["fp32"])
        plan, row = self._build(variant, kind)
        self._record.add_plan(name, row)
        with Engine(plan) as engine:
            row["backend"] = engine.backend_name
            row["parity"] = checks.check_parity(engine, images, expected, precision)
        row["ways"] = checks.check_ways(plan, images)
        with Engine(plan) as engine:
            row["speed"] = [speed.measure(engine, images, count, seconds=self._seconds) for count in speed.BATCHES]
            row["clients"] = speed.measure_clients(engine, images, 32, seconds=self._seconds)
        row["done"] = True

    def _bytes(self, answers: dict[str, Any]) -> None:
        plan, row = self._build(models.VARIANTS[0], "uint8-fp16")
        self._record.add_plan(BYTES, row)
        images = answers["bytes"]
        with Engine(plan) as engine:
            row["backend"] = engine.backend_name
            row["parity"] = checks.check_parity(engine, images, answers["bytes-fp32"], "fp16")
            row["numpy"] = speed.measure_numpy(engine, images, PROFILE.max_batch, seconds=self._seconds)
            row["clients"] = speed.measure_clients(engine, images, 32, seconds=self._seconds)
        row["done"] = True


def _models_of(name: str) -> str:
    return f"{name.split(maxsplit=1)[0]} models"


if __name__ == "__main__":
    sys.exit(main())

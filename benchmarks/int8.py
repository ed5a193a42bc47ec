"""What INT8 costs: accuracy, time and memory of every method, beside what others offer, in one run and one table.

On the trained A0 and A0g4 of `../shared/data`, where they are, and on the repository's own sample. Every method is
given the same FP32 graph and the same calibration images (256 of the training split, drawn anew for each of three
seeds) and runs in a process of its own, imports included; figures are medians. All graphs are scored in one way: in
ONNX Runtime, every Q/DQ pair computed as it stands. Settings of others are chosen by SQNR on the first half of the
evaluation images; agreement with FP32 and SQNR are reported on the second, top-1 on all.

    python benchmarks/int8.py                          # about half an hour on two cores
    python benchmarks/int8.py --quick --models sample  # a minute
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, Python looks beside it only

from benchmarks.int8_parts import places
from benchmarks.int8_parts.report import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "int8.json"
METHODS = {
    "fp32": "FP32",
    "fp16": "FP16",
    "max": "per-channel weights, max calibration",
    "onnxruntime": "ONNX Runtime quantize_static",
    "modelopt": "ModelOpt PTQ",
    "fast": "ours, --fast",
    "ours": "ours",
    "ours trt10": "ours, FP16 for the rest (trt10)",
    "fp8": "ours, FP8 (E4M3), FP16 for the rest",
    "synthetic": "ours, no images: synthetic calibration",
    "statistics": "ours, no images: statistics in closed form",
}
ONCE = ("fp32", "fp16", "ours trt10", "statistics")
"""Methods that are run with one seed: calibration images change little, or there are none."""
SETTINGS = (
    "MinMax",
    "MinMax, moving average",
    "Entropy",
    "Percentile 99.99",
    "Percentile 99.999",
    "MinMax, unsigned with zero points",
)


def main() -> None:
    """Measures, prints the tables, and writes `results/int8.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, 64 calibration and 400 evaluation images; nothing is stored without --out",
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help="; ".join(METHODS))
    parser.add_argument("--models", nargs="+", choices=places.SUBJECTS, default=list(places.SUBJECTS))
    parser.add_argument("--out", type=Path, help="the JSON (default: benchmarks/results/int8.json)")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    start = time.perf_counter()
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            found = Run(name, Path(folder), args).measure()
        if found is not None:
            results[name] = found
            print(table(name, found), flush=True)
    whole = not (args.quick or args.only or len(args.models) < len(places.SUBJECTS))
    target = args.out or (RESULTS if whole else None)
    if target is not None:
        store(target, results, time.perf_counter() - start)


def store(target: Path, results: dict[str, Any], seconds: float) -> None:
    """Writes the JSON."""
    target.parent.mkdir(exist_ok=True)
    machine = step("machine", target.parent, {})[0]
    target.write_text(
        json.dumps({"machine": machine, "seconds": seconds, "models": results}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    print(f"\nwritten: {target}, after {seconds / 60:.0f} minutes")


def step(name: str, folder: Path, arguments: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Runs a step in a process of its own; returns its answer, and the time and memory that it took."""
    start = time.perf_counter()
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.int8_parts.child"]
    command = [*program, name, str(folder.resolve()), json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE if name == "quantize" else None
        )
        log = child.stderr.read().decode("utf-8", "replace") if child.stderr else ""
        # On Linux a child's peak begins at its parent's size: this process imports nothing large.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            raise SystemExit(f"{name} {arguments} failed with status {child.returncode}\n{log[-2000:]}")
        output.seek(0)
        answer = json.loads(output.read().splitlines()[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    spent = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * unit / 1e6,
    }
    return answer, spent


class Run:
    """The measurement of one model.

    Args:
        name: The model's, see `places.SUBJECTS`.
        folder: Where the graphs are written.
        args: The command line.
    """

    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        self._name = name
        self._folder = folder
        self._quick = args.quick
        self._seeds = [0] if args.quick else [0, 1, 2]
        self._methods = [method for method in METHODS if args.only is None or method in args.only]

    def measure(self) -> dict[str, Any] | None:
        """The rows of all methods; None where the model is not there."""
        if not places.is_there(self._name):
            print(f"{self._name}: not here (../shared/data), left out", file=sys.stderr)
            return None
        counts = {"calibration": 64, "evaluation": 400} if self._quick else {"calibration": 256, "evaluation": 2000}
        facts, _ = step("prepare", self._folder, {"name": self._name, "seeds": self._seeds, **counts})
        truth = self._row("fp32", [self._score("fp32.onnx")])
        rows = [truth, *(self._rows(method) for method in self._methods if method != "fp32")]
        return {**facts, "seeds": len(self._seeds), "rows": rows}

    def _rows(self, method: str) -> dict[str, Any]:
        if method == "modelopt" and not places.has_modelopt():
            return {"key": method, "method": METHODS[method], "note": "not installed"}
        seeds = self._seeds[:1] if method in ONCE else self._seeds
        if method != "onnxruntime":
            return self._row(method, [self._try(method, seed) for seed in seeds])
        tried = {setting: self._try(method, seeds[0], setting) for setting in SETTINGS}
        # The last setting, which TensorRT refuses, stands in the results but is not compared with the others.
        best = max(SETTINGS[:-1], key=lambda setting: tried[setting]["choosing"]["sqnr_db"])
        row = self._row(method, [tried[best], *(self._try(method, seed, best) for seed in seeds[1:])])
        row["method"] = f"{row['method']}, {best}"
        return {**row, "settings": tried}

    def _try(self, method: str, seed: int, setting: str = "") -> dict[str, Any]:
        target = f"{method}.onnx".replace(" ", "-")
        (self._folder / target).unlink(missing_ok=True)
        arguments = {
            "subject": self._name,
            "method": method,
            "seed": seed,
            "setting": setting,
            "quick": self._quick,
            "target": target,
        }
        _, spent = step("quantize", self._folder, arguments)
        found = {**self._score(target), **spent, "seed": seed}
        shown = f"{method} {setting}".strip()
        print(
            f"  {self._name} {shown}, seed {seed}: {found['reported']['sqnr_db']:.1f} dB, {spent['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return found

    def _score(self, graph: str) -> dict[str, Any]:
        found: dict[str, Any] = step("score", self._folder, {"graph": graph})[0]
        return found

    def _row(self, method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Medians: top-1 on all images, the rest on the second half."""
        row: dict[str, Any] = {"key": method, "method": METHODS[method]}
        for key, part in (("top1", "all"), ("drop", "all"), ("agreement", "reported"), ("sqnr_db", "reported")):
            row[key] = statistics.median(run[part][key] for run in runs)
        for key in ("seconds", "cpu_seconds", "peak_mb"):
            if key in runs[0]:
                row[key] = statistics.median(run[key] for run in runs)
        return {**row, "runs": runs}


if __name__ == "__main__":
    main()

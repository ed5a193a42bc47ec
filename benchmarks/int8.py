"""What INT8 costs: accuracy, time and memory of every method, beside what others offer, in one run and one table.

On the trained A0 and A0g4 of `../shared/data`, where they are, on A0 under a feature pyramid, and on the repository's
own samples, classifier and detectors. Every method is given the same FP32 graph and the same calibration images (256 of
the training split, drawn anew for each of three seeds) and runs in a process of its own, imports included; figures are
medians. All graphs are scored in one way: in ONNX Runtime, every Q/DQ pair computed as it stands. Settings of others
are chosen by SQNR (of the worst output) on the first half of the evaluation images; agreement with FP32 and SQNR are
reported on the second, top-1 and mAP on all.

    python benchmarks/int8.py                                   # about an hour on two cores
    python benchmarks/int8.py --models detector detector-relu   # these anew; what is stored of the others stays
    python benchmarks/int8.py --models A0 --only ours           # this row anew
    python benchmarks/int8.py --quick --models sample           # a minute; nothing is stored
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
    "modelopt max": "ModelOpt PTQ, max",
    "modelopt entropy": "ModelOpt PTQ, entropy",
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
    target = args.out or (None if args.quick else RESULTS)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            found = Run(name, Path(folder), args).measure()
        if found is not None:
            print(table(name, found), flush=True)
            if target is not None:
                store(target, name, found)


def store(target: Path, name: str, found: dict[str, Any]) -> None:
    """Puts a model's rows into the JSON, in place of those of the same methods; all else stays as it is."""
    target.parent.mkdir(exist_ok=True)
    models = json.loads(target.read_text(encoding="utf-8"))["models"] if target.exists() else {}
    before = {row["key"]: row for row in models.get(name, {}).get("rows", [])}
    rows = before | {row["key"]: row for row in found["rows"]}
    models[name] = {**found, "rows": [rows[key] for key in METHODS if key in rows]}
    ordered = {key: models[key] for key in places.SUBJECTS if key in models}
    target.write_text(json.dumps({"models": ordered}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"stored in {target}")


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
        machine, _ = step("machine", self._folder, {})
        truth = self._row("fp32", [self._score("fp32.onnx")])
        rows = [truth, *(self._rows(method) for method in self._methods if method != "fp32")]
        return {**facts, "seeds": len(self._seeds), "machine": machine, "rows": rows}

    def _rows(self, method: str) -> dict[str, Any]:
        if method.startswith("modelopt") and not places.has_modelopt():
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
        found: dict[str, Any] = step("score", self._folder, {"graph": graph, "subject": self._name})[0]
        return found

    def _row(self, method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Medians: agreement and SQNR on the second half of the images, the rest on all."""
        row: dict[str, Any] = {"key": method, "method": METHODS[method]}
        places_of = [(key, "reported") for key in ("agreement", "sqnr_db", "median_db")]
        places_of += [(key, "all") for key in ("top1", "drop", "map", "map_drop", "drop_low", "drop_high")]
        for key, part in places_of:
            if key in runs[0][part]:
                row[key] = statistics.median(run[part][key] for run in runs)
        each = [run["reported"]["outputs"] for run in runs]
        row["outputs"] = {name: statistics.median(outputs[name] for outputs in each) for name in each[0]}
        for key in ("seconds", "cpu_seconds", "peak_mb"):
            if key in runs[0]:
                row[key] = statistics.median(run[key] for run in runs)
        return {**row, "runs": runs}


if __name__ == "__main__":
    main()

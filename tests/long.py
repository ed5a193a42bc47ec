"""What takes hours: `make long`, by hand, before what it touches is called done.

    python -m tests.long                 (all steps, about three hours)
    python -m tests.long --scale 0.05    (each for a twentieth of its time: do the steps still run?)
    python -m tests.long --only soak

Each step is a process of its own. The results, with date, processor and commit, go into benchmarks/results/long.json,
step by step: what was measured stays when a later step is interrupted. Tests say with `record_property("counted", …)`
how much they tried.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "long.json"
GUIDED_MINUTES = 60


def plan_steps(scale: float) -> dict[str, tuple[list[str], dict[str, str]]]:
    """By name, the command of each step and its environment."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "36000"]
    guided = [sys.executable, "-m", "tests.fuzz.guided"]
    minutes = ["--minutes", f"{GUIDED_MINUTES * scale:g}", "--corpus"]
    soak = {"REPVGG_SOAK_FACTOR": f"{5 * scale:g}"}
    corpus = Path(tempfile.gettempdir()) / "repvgg-corpus"
    return {
        "fuzz": ([*pytest, "-m", "", "-k", "fuzz", "tests/fuzz"], {"REPVGG_FUZZ_CASES": f"{round(20_000 * scale)}"}),
        "guided checkpoint": ([*guided, "checkpoint", *minutes, str(corpus / "checkpoint")], {}),
        "guided onnx": ([*guided, "onnx", *minutes, str(corpus / "onnx")], {}),
        **{
            f"guided {name}": ([*guided, name, "--minutes", f"{10 * scale:g}", "--corpus", str(corpus / name)], {})
            for name in ("passport", "calibration", "images", "scales", "plan cache", "timings", "labels")
        },
        "bounds": ([*pytest, "-m", "", "tests/model/checkpoint/test_bounds.py"], {}),
        "soak 64 threads": ([*pytest, "-m", "slow", "-k", "sixty_four", "tests/runtime/test_soak.py"], soak),
        "soak Engine": ([*pytest, "-m", "slow", "-k", "not sixty_four", "tests/runtime/test_soak.py"], soak),
        "soak service": ([*pytest, "-m", "slow", "-k", "not sigterm", "tests/examples/test_soak.py"], soak),
        "end of the service": ([*pytest, "-m", "slow", "-k", "sigterm", "tests/examples/test_soak.py"], soak),
        "kills": ([*pytest, "tests/serving/test_kills.py", "tests/build/test_deliver.py"], {"REPVGG_EVERY_KILL": "1"}),
        "kills and tritonserver": (
            [*pytest, "-m", "slow", "-k", "kill", "tests/serving/test_real_server.py"],
            {"REPVGG_EVERY_KILL": "1"},
        ),
        "conformance": ([*pytest, "-m", "slow", "-k", "conformance", "tests"], {}),
    }


def read_counts(report: Path) -> list[str]:
    """What the tests of a step counted, from pytest's report; nothing where there is none."""
    if not report.exists():
        return []
    return [
        f"{case.get('name')}: {one.get('value')}"
        for case in ElementTree.parse(report).iter("testcase")
        for one in case.iter("property")
        if one.get("name") == "counted"
    ]


def describe_processor() -> str:
    """The processor's name and how many of its cores this process may use."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return f"{name or platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    """Runs the steps and writes their results; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of each step's time (default: 1)")
    parser.add_argument("--only", help="a part of the name of the steps to run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results (default: benchmarks/results/long.json)")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    failed = []
    for name, (command, environment) in plan_steps(args.scale).items():
        if args.only and args.only not in name:
            continue
        print(f"== {name}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            variables = {**os.environ, "PYTEST_ADDOPTS": f"--junitxml={report}", **environment}
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
            counted = read_counts(report)
        tail = (done.stdout.strip() or done.stderr.strip()).splitlines()
        executed = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
        results[name] = {
            "passed": done.returncode == 0,
            "seconds": round(time.monotonic() - started),
            "scale": args.scale,
            "said": f"{executed[1]} inputs" if executed else tail[-1] if tail else "",
            **({"counted": counted} if counted else {}),
            "load average": round(os.getloadavg()[2], 1),
            "date": datetime.date.today().isoformat(),
            "processor": describe_processor(),
            "commit": commit.stdout.strip(),
        }
        args.out.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        print(f"   {'passed' if done.returncode == 0 else 'FAILED'}: {results[name]['said']}", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

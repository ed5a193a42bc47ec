"""GPU figures and GPU tests on a machine that reaches no package index.

Here, where an index can be reached, the packages that such a machine may lack are put into a folder; TensorRT itself is
carried in whatever way it can be (for TensorRT 8.5 with a Python of its own), and its program is named after `--`:

    python -m benchmarks.gpu_parts.offline pack wheels --python 3.12
    python -m benchmarks.gpu_parts.offline run wheels --models models --out out -- python3
    python -m benchmarks.gpu_parts.offline run wheels --models models --out out -- trt85/run python3.10

The first run, where torch is, makes the models; later ones take them from there. `run` does `pytest -m gpu` and then
`benchmarks/gpu.py`, as far as the minutes go; the same command goes on. It needs the standard library alone. Exit code
0: tests and figures are complete and right.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "onnxscript": "onnxscript", "onnx_ir": "onnx-ir", "onnxsim": "onnxsim", "onnxruntime": "onnxruntime",
    "flatbuffers": "flatbuffers", "ml_dtypes": "ml-dtypes", "safetensors": "safetensors",
    "typing_extensions": "typing-extensions", "packaging": "packaging", "pytest": "pytest", "_pytest": "pytest",
    "pytest_timeout": "pytest-timeout", "iniconfig": "iniconfig", "pluggy": "pluggy", "pygments": "pygments",
    "exceptiongroup": "exceptiongroup", "tomli": "tomli",
}  # fmt: skip
"""Modules that the runs need besides torch, onnx, NumPy and CUDA's packages, and the packages that have them."""
OLD_ONLY = ("exceptiongroup", "tomli")
"""For Python 3.10."""
_MISSING = (
    "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
)


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="download the packages")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python", default="3.12", help="version of the GPU machine's Python (default: %(default)s)")
    running = commands.add_parser("run", help="tests and figures, on the GPU machine")
    running.add_argument("folder", type=Path, help="that pack wrote")
    running.add_argument("--models", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True, help="folder of the results")
    running.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="of tests and figures, after which no new figure begins (default: %(default)s)",
    )
    running.add_argument("--no-tests", action="store_true")
    running.add_argument("--seconds", help="for each figure, as of benchmarks/gpu.py")
    running.add_argument(
        "--variants",
        nargs="+",
        help="as of benchmarks/gpu.py, which takes them in this order: where minutes are few, first what matters",
    )
    running.add_argument("program", nargs="+", help="the Python that has TensorRT, after --")
    args = parser.parse_args(argv)
    if args.command == "pack":
        return pack(args.folder, args.python)
    return run(args)


def pack(folder: Path, python: str) -> int:
    """Wheels for Linux on x86-64."""
    names = sorted({package for module, package in PACKAGES.items() if module not in OLD_ONLY or python == "3.10"})
    platforms = [
        part
        for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
        for part in ("--platform", f"{name}_x86_64")
    ]
    abis = [part for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for part in ("--abi", abi)]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation",
        "cp",
        *platforms,
        *abis,
    ]
    return subprocess.run(
        [*pip, "--python-version", python, "-d", str(folder / python), *names], check=False
    ).returncode


def run(args: argparse.Namespace) -> int:
    """Tests, then figures in the minutes that are left. 0: both are well; 1: one is not, or a signal ended it."""
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    found = subprocess.run(
        [*args.program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    )
    version = found.stdout.strip()
    environment = add_packages(args.folder / version, args.program, args.out.parent / f"packages-{version}")
    environment["REPVGG_GPU_MODELS"] = str(args.models.resolve())
    codes = []
    if not args.no_tests:
        log = args.out / f"pytest-gpu-python{version}.txt"
        tests = [
            *args.program,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "-W",
            "default",  # warnings of the machine's own packages, which nobody here chose, must not cost the figures
            "tests/gpu",
            "--junitxml",
            str(log.with_suffix(".xml").resolve()),
        ]
        with log.open("w", encoding="utf-8") as file:
            codes.append(
                subprocess.run(
                    tests, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
                ).returncode
            )
        print(*log.read_text(encoding="utf-8").splitlines()[-30:], sep="\n", flush=True)
        if count_run(log.with_suffix(".xml")) == 0:
            print("no test ran: each was skipped, for the reasons above", flush=True)
            codes.append(1)
    left = max(args.minutes - (time.monotonic() - started) / 60, 0.0)
    figures = [*args.program, "benchmarks/gpu.py", "--models", str(args.models.resolve()), "--minutes", f"{left:.2f}"]
    target = args.out.resolve() / f"gpu-python{version}.json"
    figures += [
        *(["--seconds", args.seconds] if args.seconds else []),
        *(["--variants", *args.variants] if args.variants else []),
    ]
    codes.append(subprocess.run([*figures, "--out", str(target)], cwd=ROOT, env=environment, check=False).returncode)
    return int(any(codes))  # a program that a signal ended has a negative code


def count_run(report: Path) -> int:
    """How many tests of a JUnit file were not skipped; 0 where there is none, as of a program that crashed."""
    if not report.exists():
        return 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    return sum(int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) for suite in suites)


def add_packages(wheels: Path, program: list[str], site: Path) -> dict[str, str]:
    """Unpacks the packages that the program's Python lacks, and gives the environment that finds them.

    No others: what the machine has was made for its GPU.
    """
    environment = dict(os.environ)
    before = environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(part for part in (before, str(site.resolve())) if part)
    missing = subprocess.run(
        [*program, "-c", _MISSING, *PACKAGES], capture_output=True, text=True, env=environment, check=True
    ).stdout.split()
    wanted = {PACKAGES[module].replace("-", "_") for module in missing}
    for wheel in sorted(wheels.glob("*.whl")):
        if wheel.name.split("-")[0].lower() in wanted:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            print(f"unpacked {wheel.name}", flush=True)
    return environment


if __name__ == "__main__":
    sys.exit(main())

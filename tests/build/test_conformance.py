"""Every call of the builder and the runtime on NVIDIA's own bindings of many versions; see `tests/fakes/tensorrt_stub`.

The next TensorRT is one more line in `WHEELS`. The wheels, of about 1 MB each (cuda-bindings: 15 MB), are fetched once
and kept in `build/bindings/`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build.make_typed import make_typed
from tests.fakes.tensorrt_stub import TOOLS
from tests.runtime.tensorrt.test_api_conformance import driver_calls

WHEELS = (
    "tensorrt-bindings==8.6.1",
    "tensorrt-cu12-bindings==10.0.1",
    "tensorrt-cu12-bindings==10.1.0",
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu12-bindings==10.8.0.43",
    "tensorrt-cu12-bindings==10.13.3.9",
    "tensorrt-cu13-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.0.0.114",
    "tensorrt-cu13-bindings==11.4.0.106",
    "tensorrt-lean-cu13-bindings==10.16.1.11",
    "tensorrt-lean-cu13-bindings==11.4.0.106",
    "tensorrt-rtx-cu13-bindings==1.4.0.76",
    "tensorrt-rtx-cu13-bindings==1.7.1.116",
)
CUDA = ("cuda-bindings==12.8.0", "cuda-bindings==12.9.10", "cuda-bindings==13.5.0")
PATHFINDER = "cuda-pathfinder==1.9.1"
ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "bindings"  # ignored by git
HERE = (sys.platform, platform.machine()) == ("linux", "x86_64")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE, reason="the stub library is made for Linux on x86-64"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


def fetch(wheel: str) -> Path:
    """The folder of an unpacked wheel; skips where it cannot be had for this Python."""
    folder = KEPT / f"{wheel.replace('==', '-')}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary=:all:", "--target", str(partial), wheel]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["pip said nothing"]
            pytest.skip(f"{wheel} cannot be had: {said[-1]}")
        partial.rename(folder)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wheel", WHEELS)
def test_every_call_is_one_of_the_bindings_own(tmp_path: Path, wheel: str) -> None:
    model = make_typed(tmp_path, "fp16")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = [sys.executable, "-W", "error", "-m", "tests.build.conformance_calls"]
    done = subprocess.run(
        [*program, str(fetch(wheel)), str(scratch), str(model)],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["version"].startswith(wheel.partition("==")[2].rpartition(".")[0])
    assert found["calls"] > (30 if "lean" in wheel else 100)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wheel", CUDA)
def test_every_call_of_cuda_is_in_cuda_bindings(wheel: str) -> None:
    code = "import json, cuda.bindings.driver as driver; print(json.dumps(dir(driver)))"
    folders = os.pathsep.join(str(fetch(one)) for one in (wheel, PATHFINDER))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "PYTHONPATH": folders},
    )  # fmt: skip
    assert driver_calls() <= set(json.loads(done.stdout))

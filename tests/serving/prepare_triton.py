"""Makes `.triton/`: a real tritonserver from PyPI, with ONNX Runtime behind its python backend, and HAProxy.

    python tests/serving/prepare_triton.py

About 450 MB, once. nvidia-pytriton brings the server; it needs NumPy 1: with NumPy 2 its python backend gives empty
outputs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".triton"
PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime>=1.20,<2", "numpy<2", "pillow>=10.3")
BACKEND_PACKAGES = ("numpy", "numpy.libs", "onnxruntime", "PIL", "pillow.libs", "flatbuffers", "google", "packaging")
HAPROXY_PACKAGES = ("haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1")
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
SITE = FOLDER / "venv" / "lib" / f"python{PYTHON}" / "site-packages"
BACKENDS = FOLDER / "backends"
SERVER = SITE / "pytriton" / "tritonserver" / "bin" / "tritonserver"
_STAMP = FOLDER / f"ready-{PYTHON}"


class CannotPrepareError(Exception):
    """Why there is no server to be had here."""


def prepare() -> None:
    """Makes the folder, unless it is there.

    Raises:
        CannotPrepareError: The server cannot be had here.
    """
    if _STAMP.exists():
        _place_backend()  # of another state of the tests, perhaps
        return
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise CannotPrepareError(
            f"nvidia-pytriton is for Linux on x86-64, and this is {sys.platform} on {os.uname().machine}"
        )
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        venv.create(FOLDER / "venv", with_pip=True)
        _run(FOLDER / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
    except (subprocess.SubprocessError, OSError) as error:
        raise CannotPrepareError(f"nvidia-pytriton cannot be installed: {error}") from error
    _make_backends()
    _get_haproxy()
    _STAMP.touch()


def server_environment() -> dict[str, str]:
    """What the server needs in its environment.

    Its own Python comes first on PATH: the interpreter of the python backend looks there for its packages, and an
    activated environment with NumPy 2 would be found in its place.
    """
    path = f"{FOLDER / 'venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
    return {**kept, "PATH": path, "LD_LIBRARY_PATH": str(SITE / "nvidia_pytriton.libs"), "PYTHONPATH": str(SITE)}


def find_haproxy() -> tuple[str, dict[str, str]] | None:
    """The program and its environment: that of the system, or the one that was unpacked here."""
    found = shutil.which("haproxy")
    if found:
        return found, dict(os.environ)
    unpacked = FOLDER / "haproxy/usr/sbin/haproxy"
    libraries = sorted({str(path.parent) for path in (FOLDER / "haproxy").rglob("*.so*")})
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    if (
        not unpacked.exists()
        or subprocess.run([unpacked, "-v"], env=environment, capture_output=True, check=False).returncode
    ):
        return None
    return str(unpacked), environment


def _make_backends() -> None:
    shipped = SITE / "pytriton" / "tritonserver"
    stub = shipped / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    python = BACKENDS / "python"
    python.mkdir(parents=True)
    for path in (
        *(shipped / "backends/python").glob("*.so"),
        *(shipped / "backends/python").glob("*.py"),
        *([stub] if stub.exists() else ()),
    ):
        shutil.copy(path, python)
    if not stub.exists():
        raise CannotPrepareError(f"nvidia-pytriton has no python backend for Python {PYTHON}")
    linked = subprocess.run(
        ["ldd", python / stub.name], capture_output=True, text=True, check=False, env=server_environment()
    )
    if "not found" in linked.stdout:
        raise CannotPrepareError(
            f"the python backend lacks "
            f"{[line.split()[0] for line in linked.stdout.splitlines() if 'not found' in line]}"
        )
    # The backend's interpreter takes no notice of PYTHONPATH; its own folder is on its path.
    for name in BACKEND_PACKAGES:
        if (SITE / name).exists():
            (python / name).symlink_to(SITE / name)
    (BACKENDS / "onnxruntime").mkdir()
    _place_backend()


def _place_backend() -> None:
    """In one step: another run of the tests may be loading it."""
    target = BACKENDS / "onnxruntime/model.py"
    partial = target.with_name(f"model.{os.getpid()}.partial")
    shutil.copy(Path(__file__).with_name("triton_backend.py.txt"), partial)
    partial.replace(target)


def _get_haproxy() -> None:
    """Debian's package, unpacked and not installed; where that cannot be done, its test is skipped."""
    if shutil.which("haproxy") or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    folder = FOLDER / "haproxy"
    folder.mkdir()
    for name in HAPROXY_PACKAGES:  # each by itself: a release of Debian may lack one that it does not need
        with contextlib.suppress(subprocess.TimeoutExpired):  # as apt-get does for minutes where there is no network
            subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True, check=False, timeout=60)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], capture_output=True, check=False)


def _run(*command: object) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        raise CannotPrepareError(f"{command[0]} failed: {result.stderr.strip()[-500:]}")


if __name__ == "__main__":
    prepare()
    sys.stdout.write(f"{FOLDER}: ready\n")

"""A release: the wheel holds the package and nothing else, and the source distribution passes tests of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

import repvgg_deploy
from tests.contract.source_tree import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="build, of the extra dev, is not installed"),
]
NAME = f"repvgg_deploy-{repvgg_deploy.__version__}"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees what is installed, and not this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source distribution, and of the wheel that was made of it and not of this folder."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = run(command, folder)
    if "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("setuptools, which a build installs, cannot be had here")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tracked() -> set[str]:
    """The files that the repository holds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what the repository holds is not known")
    return set(listed.stdout.rstrip("\0").split("\0"))


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        metadata = message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
        entries = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
        assert f"{NAME}.dist-info/licenses/LICENSE" in wheel.namelist()
    assert names == {name for name in tracked() if name.startswith("repvgg_deploy/")}
    assert "repvgg_deploy/py.typed" in names
    assert metadata["Version"] == repvgg_deploy.__version__
    assert set(metadata.get_all("Provides-Extra") or ()) >= {"export", "cpu", "gpu", "tensorrt", "rtx", "service"}
    assert "repvgg-export = repvgg_deploy.cli.export:main" in entries
    assert "](docs/" not in str(metadata.get_payload())  # a link that a package index cannot follow


def test_program_of_a_user_passes_type_checkers_with_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    wheel = str(built / f"{NAME}-py3-none-any.whl")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    needed = [python, "-m", "pip", "install", "-q", *constraints, wheel, "mypy", "basedpyright"]
    installed = run(needed, tmp_path)
    if "No matching distribution found" in installed.stderr:
        pytest.skip("mypy and basedpyright cannot be had here")
    assert installed.returncode == 0, installed.stderr
    shutil.copy(ROOT / "tests" / "contract" / "typed_program.py", tmp_path / "program.py")
    settings = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False, "venvPath": ".", "venv": "venv"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({**settings, "include": ["program.py"]}))
    for command in (["mypy", "--strict", "program.py"], ["basedpyright"]):
        done = run([python, "-m", *command], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_source_distribution_is_the_whole_repository(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        inside = {PurePosixPath(member.name).relative_to(NAME) for member in archive if member.isfile()}
    names = {str(path) for path in inside if path.parts[0] != "repvgg_deploy.egg-info"}
    assert names == tracked() | {"PKG-INFO", "setup.cfg"}


def test_source_distribution_passes_tests_of_its_own(built: Path, tmp_path: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    # The rest passes there, too, and takes as long as here.
    parts = ["tests/specs", "tests/files", "tests/graph", "tests/contract/test_imports.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parts]
    done = run(command, tmp_path / NAME)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr

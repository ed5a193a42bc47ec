"""docker/*.Dockerfile as texts: linted, pinned, not root, and of one mind with the rest of the repository."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dockerfile_parse", reason="dockerfile-parse, of the extra dev, is not installed")

from repvgg_deploy.serving.options import CONTAINERS
from tests.docker.dockerfiles import FOLDER, NAMES, ROOT, TOP, defaults, parse

every = pytest.mark.parametrize("name", NAMES)
RELEASE, TENSORRT = "25.06", CONTAINERS["25.06"]


def test_every_dockerfile_is_known() -> None:
    assert sorted(path.name for path in FOLDER.glob("*Dockerfile*")) == [f"{name}.Dockerfile" for name in NAMES]


@every
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: the extra dev brings it on Linux x86-64")
    done = subprocess.run(
        [hadolint, "--no-color", FOLDER / f"{name}.Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@every
def test_image_ends_as_a_numeric_user_that_is_not_root(name: str) -> None:
    last = parse(name)[-1].stage
    users = [instruction.value for instruction in parse(name) if instruction.name == "USER"]
    assert users == ["1000:1000"]  # a number, so that Kubernetes can see that it is not root
    assert [i.stage for i in parse(name) if i.name == "USER"] == [last]
    after = [i.name for i in parse(name)[[i.name for i in parse(name)].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)


@every
def test_base_images_are_pinned(name: str) -> None:
    for instruction in parse(name):
        if instruction.name == "FROM":
            assert re.fullmatch(
                r"(python:\$\{PYTHON_VERSION\}-slim-bookworm|nvcr\.io/nvidia/tritonserver:\$\{TRITON_RELEASE\}-py3)( "
                r"AS \w+)?",
                instruction.value,
            )
    assert defaults(name)["PYTHON_VERSION"] == "3.12"


@every
def test_dockerfile_names_no_address(name: str) -> None:
    text = (FOLDER / f"{name}.Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"https?://(?!127\.0\.0\.1)", text) == []


@every
def test_copied_files_are_in_git_and_reach_the_build(name: str) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = tracked.stdout.splitlines()
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line]
    for instruction in parse(name):
        if instruction.name == "COPY" and not instruction.value.startswith("--from"):
            for source in instruction.value.split()[:-1]:
                found = [
                    file
                    for file in files
                    if file == source.removeprefix("./") or file.startswith(f"{source.rstrip('/')}/")
                ]
                assert found, source
                assert not [file for file in found for pattern in ignored if fnmatch.fnmatch(file, pattern)], source


@every
def test_absolute_paths_are_those_that_the_tests_move(name: str) -> None:
    for instruction in parse(name):
        if instruction.name in ("RUN", "COPY", "ENV"):
            for path in re.findall(r"(?<![\w.})/-])/[\w/]+", instruction.value):
                assert re.match(rf"/({TOP}|tmp)\b", path), path


def test_versions_of_the_images_belong_together_and_to_the_table_of_containers() -> None:
    triton, runtime = defaults("triton"), defaults("runtime")
    assert (triton["TRITON_RELEASE"], triton["TENSORRT_VERSION"]) == (RELEASE, TENSORRT)
    assert max(CONTAINERS) == RELEASE
    assert (runtime["TENSORRT_VERSION"], runtime["CUDA_MAJOR"]) == (triton["TENSORRT_VERSION"], triton["CUDA_MAJOR"])
    assert runtime["TENSORRT"] == "tensorrt-cu${CUDA_MAJOR}==${TENSORRT_VERSION}"


def test_torch_of_the_export_image_is_that_of_the_constraints() -> None:
    pinned = next(
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("torch==")
    )
    assert [i.value.split()[-1] for i in parse("export") if i.name == "RUN" and "TORCH_INDEX" in i.value] == [pinned]


@every
def test_python_of_the_images_is_one_that_the_project_supports(name: str) -> None:
    required = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert required is not None
    assert tuple(map(int, defaults(name)["PYTHON_VERSION"].split("."))) >= tuple(map(int, required.groups()))


@pytest.mark.parametrize("name", ["runtime", "triton"])
def test_serving_images_have_neither_torch_nor_onnx(name: str) -> None:
    installs = " ".join(i.value for i in parse(name) if i.name == "RUN" and "pip" in i.value)
    assert not re.search(r"\btorch|\bonnx|\[export|\[cpu", installs)


@every
def test_programs_are_started_without_a_shell(name: str) -> None:
    """So that signals reach them."""
    for instruction in parse(name):
        if instruction.name in ("ENTRYPOINT", "CMD"):
            assert all(instruction.words)


def test_dockerignore_keeps_environments_and_models_out() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".git", ".venv*", ".triton", "models/checkpoints", "models/onnx", "engines/plans"} <= set(ignored)

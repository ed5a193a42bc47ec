"""Every RUN line of every Dockerfile in a clean environment, and every ENTRYPOINT: minutes, and package downloads.

What takes another's place, and why:

| in the Dockerfile | here | because |
|---|---|---|
| the base images | `python -m venv` | there is no Docker; the Python is that of the tests |
| `TENSORRT=tensorrt-cu12==…`, CUDA 12 | `tensorrt-rtx-cu13`, CUDA 13 | TensorRT's libraries come from NVIDIA's own
index, and need a GPU | | the container's libnvinfer | an empty file of its name | it is in NVIDIA's image only | |
/opt/nvidia/nvidia_entrypoint.sh | a script that becomes its arguments | it is in NVIDIA's image only | | tritonserver |
a script that prints its arguments | the real one is started in test_monitoring.py | | owner 1000 of folders | whoever
runs the tests | only root may give files away |
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dockerfile_parse", reason="dockerfile-parse, of the extra dev, is not installed")

from tests.docker.dockerfiles import NAMES, ROOT, Image, RunError, defaults, parse
from tests.precision.rtx import needs_rtx
from tests.runtime.make_model import make_onnx

SAMPLE = ROOT / "models" / "sample"
ENTRY = '#!/bin/sh\nexec "$@"\n'
SHOW = '#!/bin/sh\nfor word; do echo "$word"; done\n'
slow = pytest.mark.slow


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def put_nvidias(folder: Path, version: str) -> None:
    """What is only in NVIDIA's image."""
    write_script(folder / "opt/nvidia/nvidia_entrypoint.sh", ENTRY)
    write_script(folder / "usr/local/bin/tritonserver", SHOW)
    library = folder / f"usr/lib/x86_64-linux-gnu/libnvinfer.so.{version}"
    library.parent.mkdir(parents=True)
    library.touch()
    library.with_name("libnvinfer.so.10").symlink_to(library)


def installed(image: Image, *names: str) -> dict[str, bool]:
    """Which modules the image's Python finds."""
    code = f"import importlib.util as u, json; print(json.dumps({{n: u.find_spec(n) is not None for n in {names!r}}}))"
    python = shutil.which("python", path=image.environment["PATH"])
    done = subprocess.run(
        [str(python), "-c", code], env=image.environment, capture_output=True, text=True, check=True, timeout=300
    )
    found: dict[str, bool] = json.loads(done.stdout)
    return found


def lines_of(name: str) -> list[int]:
    return [instruction.line for instruction in parse(name) if instruction.name == "RUN"]


@slow
@pytest.mark.timeout(1200)
def test_export_image_exports_the_sample_and_types_it(tmp_path: Path) -> None:
    image = Image("export", tmp_path / "image")
    image.build()
    assert image.ran == lines_of("export")
    assert installed(image, "torch", "onnx", "onnxsim", "onnxruntime", "PIL", "tensorrt") == {
        "torch": True, "onnx": True, "onnxsim": True, "onnxruntime": True, "PIL": True, "tensorrt": False,
    }  # fmt: skip
    usual = image.start()
    assert (usual.returncode, "--ckpt" in usual.stdout) == (0, True)
    for path in (SAMPLE / "repvgg-sample.pth", SAMPLE / "variant.toml"):
        shutil.copy(path, image.folder / "models")
    done = image.start("--arch", "variant.toml", "--ckpt", "repvgg-sample.pth", "--out", "sample.onnx")
    assert done.returncode == 0, done.stderr
    program = shutil.which("repvgg-trt", path=image.environment["PATH"])
    typed = subprocess.run(
        [str(program), "quantize", "sample.onnx", "--fp16"],
        env=image.environment,
        cwd=image.work,
        check=False,
        timeout=300,
    )
    assert typed.returncode == 0
    assert (image.folder / "models/sample-fp16.onnx").exists()


@slow
@needs_rtx
@pytest.mark.timeout(1200)
def test_runtime_image_builds_a_plan_on_first_start_without_torch_and_onnx(tmp_path: Path) -> None:
    image = Image(
        "runtime", tmp_path / "image", TENSORRT="tensorrt-rtx-cu13", CUDA_MAJOR="13", PACKAGES="flatbuffers six"
    )
    image.build()
    assert image.ran == lines_of("runtime")
    assert installed(image, "tensorrt_rtx", "cuda", "PIL", "flatbuffers", "torch", "onnx", "onnxruntime") == {
        "tensorrt_rtx": True, "cuda": True, "PIL": True, "flatbuffers": True, "torch": False, "onnx": False,
        "onnxruntime": False,
    }  # fmt: skip
    make_onnx(image.folder / "models/net.onnx")
    # The default command opens the plan on the GPU that is here, and there is none.
    usual = image.start(REPVGG_BUILD="--target sm_86", CUDA_VISIBLE_DEVICES="")
    assert (usual.returncode, "written " in usual.stdout) == (1, True), usual.stderr
    assert (
        "error: " if (ROOT / "examples/service/__main__.py").exists() else "No module named examples.service"
    ) in usual.stderr
    (plan,) = (image.folder / "engines/plans").glob("*/net.plan")
    again = image.start(
        "repvgg-trt", "check", "{model}", "--target", "gpu=a10", REPVGG_BUILD="--target sm_86", CUDA_VISIBLE_DEVICES=""
    )
    assert (again.returncode, "nothing was built now" in again.stdout, "it will run" in again.stdout) == (
        0,
        True,
        True,
    ), again.stderr
    assert str(plan) in again.stderr
    assert (image.folder / "engines/plans/cache/repvgg-deploy").is_dir()


@slow
@pytest.mark.timeout(1200)
def test_triton_image_writes_its_repository_and_becomes_the_server(tmp_path: Path) -> None:
    version = defaults("triton")["TENSORRT_VERSION"]
    put_nvidias(tmp_path / "image", ".".join(version.split(".")[:3]))
    image = Image("triton", tmp_path / "image")
    image.build()
    assert image.ran == lines_of("triton")
    there = ("tensorrt_bindings", "tensorrt", "cuda", "PIL", "tritonclient")
    missing = ("tensorrt_libs", "torch", "onnx")
    assert installed(image, *there, *missing) == {name: name in there for name in (*there, *missing)}
    # The system's own Python, without the image's folder: that of Triton's python backend.
    code = "import numpy, PIL; assert numpy.__version__ < '2', numpy.__version__"
    subprocess.run([image.base / "bin/python", "-c", code], env={}, check=True, timeout=300)
    make_onnx(image.folder / "models/net.onnx")
    done = image.start(REPVGG_SERVE="onnx", REPVGG_TRITON="--ensemble jpeg")
    assert done.returncode == 0, done.stderr
    repository = image.folder / "engines/plans/onnx/model_repository"
    assert f"--model-repository={repository}" in done.stdout.splitlines()
    assert "--exit-timeout-secs=30" in done.stdout.splitlines()
    assert (repository / "net/1/model.onnx").exists()
    # The bindings look for the very library that is in the container, and find nothing here.
    failed = image.start(CUDA_VISIBLE_DEVICES="")
    assert failed.returncode == 1
    assert "libnvinfer.so.10" in failed.stderr
    assert "--model-repository" not in failed.stdout


def test_every_dockerfile_is_run() -> None:
    tests = [
        name
        for name, value in globals().items()
        if name.startswith("test_") and "lines_of(" in inspect.getsource(value)
    ]
    assert [name.split("_")[1] for name in tests if name != "test_every_dockerfile_is_run"] == list(NAMES)


# -- quick: what needs no package


@pytest.mark.parametrize(
    ("container", "asked", "fits"),
    [
        ("10.11.0", "10.11.0.33", True),
        ("10.7.0", "10.7.0", True),
        ("10.11.0", "10.11.1.2", False),
        ("10.1.0", "10.11.0.33", False),
        (None, "10.11.0.33", False),
    ],
)
def test_triton_image_of_another_tensorrt_is_not_built(
    container: str | None, asked: str, fits: bool, tmp_path: Path
) -> None:
    image = bare("triton", tmp_path)
    if container is not None:
        put_nvidias(tmp_path, container)
    (tmp_path / "opt").mkdir(exist_ok=True)
    (tmp_path / "usr/lib").mkdir(parents=True, exist_ok=True)
    image.variables["TENSORRT_VERSION"] = asked
    check = next(i.value for i in parse("triton") if i.name == "RUN" and "libnvinfer" in i.value)
    if fits:
        image.run(check)
    else:
        with pytest.raises(RunError, match="no TensorRT" if container is None else f"expected {asked}"):
            image.run(check)


@pytest.mark.parametrize(
    ("extras", "packages", "installed"),
    [
        ("", "", ". pillow"),
        ("service", "", ".[service] pillow"),
        ("service,cpu", "a b==1", ".[service,cpu] pillow a b==1"),
    ],
)
def test_runtime_image_installs_the_extras_and_packages_that_are_given(
    extras: str, packages: str, installed: str, tmp_path: Path
) -> None:
    image = bare("runtime", tmp_path)
    image.variables |= {"EXTRAS": extras, "PACKAGES": packages}
    write_script(tmp_path / "bin/pip", f'#!/bin/sh\necho "$@" > "{tmp_path}/told"\n')
    image.environment["PATH"] = f"{tmp_path / 'bin'}:{image.environment['PATH']}"
    image.run(next(i.value for i in parse("runtime") if i.name == "RUN" and "$PACKAGES" in i.value))
    assert (tmp_path / "told").read_text() == f"install -c constraints.txt {installed}\n"


@pytest.mark.parametrize("name", ["runtime", "triton"])
def test_folders_of_the_image_are_made_for_its_user(name: str, tmp_path: Path) -> None:
    image = bare(name, tmp_path)
    image.run(next(i.value for i in parse(name) if i.name == "RUN" and i.value.startswith("install -d")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "models"]
    user = next(i.value for i in parse(name) if i.name == "USER").partition(":")[0]
    assert f"-o {user} " in next(i.value for i in parse(name) if i.value.startswith("install -d"))


def test_bindings_get_their_usual_name(tmp_path: Path) -> None:
    (tmp_path / "tensorrt_bindings").mkdir()
    (tmp_path / "tensorrt_bindings/__init__.py").write_text(
        '__version__ = "10.11.0.33"\n_hidden = 1\n', encoding="utf-8"
    )
    code = "import tensorrt, tensorrt_bindings; assert tensorrt is tensorrt_bindings; print(tensorrt.__version__)"
    environment = {"PYTHONPATH": f"{ROOT / 'docker/triton'}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "10.11.0.33\n"), done.stderr


def test_no_module_of_the_folder_hides_a_package() -> None:
    """A program's own folder comes first on its path: `docker/tensorrt.py` would be TensorRT to programs beside it."""
    for path in (ROOT / "docker").glob("*.py"):
        assert importlib.util.find_spec(path.stem) is None or path.stem in sys.stdlib_module_names, path


def bare(name: str, folder: Path) -> Image:
    """An image of which nothing was built, without an environment."""
    return Image(name, folder, environment=False)

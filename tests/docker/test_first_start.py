"""docker/first_start.py as a container runs it: with TensorRT-RTX, which builds without a GPU, or recorded builds."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from repvgg_deploy.build import library
from repvgg_deploy.build.library import Gpu, GpuSearch
from repvgg_deploy.cli import trt
from repvgg_deploy.cli.trt import main as repvgg_trt
from tests.endless import Stage, start_endless
from tests.precision.rtx import needs_rtx
from tests.runtime.make_model import ModelOptions, make_onnx
from tests.serving.make_repository import files_below, needs_schema, write_plan
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "docker" / "first_start.py"
SHOW = [
    sys.executable,
    "-c",
    "import json, os, sys; print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k[:7] == "
    "'REPVGG_'}]))",
]

NO_TENSORRT = "no GPU can be used here" if importlib.util.find_spec("tensorrt") else "TensorRT is not installed"


class Container:
    """Folders as a container sees them, with spaces in their names, and its environment."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.models, self.engines = folder / "my models", folder / "my engines"
        self.models.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("REPVGG_")},
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "REPVGG_MODEL": str(self.models),
            "REPVGG_ENGINES": str(self.engines),
            "REPVGG_BUILD": "--backend rtx --target sm_86 --max-batch 4",
            **environment,
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs it to its end."""
        return subprocess.run(
            [sys.executable, str(PROGRAM), *(arguments or SHOW)],
            env={**self.environment, **environment}, capture_output=True, text=True, check=False,
            timeout=PATIENCE_SECONDS,
        )  # fmt: skip

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def plans(self) -> list[Path]:
        return sorted(self.engines.rglob("*.plan"))


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


# -- real builds, without a GPU


@needs_rtx
def test_first_start_builds_second_reuses_changed_onnx_builds_again(container: Container, tmp_path: Path) -> None:
    onnx = container.models / "my net.onnx"
    shutil.copy(make_onnx(tmp_path / "a.onnx", seed=1), onnx)
    first = container.start()
    assert first.returncode == 0, first.stderr
    (plan,) = container.plans()
    assert plan.name == "my net.plan"
    assert plan.parent.name.startswith("no-gpu-tensorrt-rtx-1.")
    assert json.loads(plan.with_name("my net.plan.json").read_text())["config"]["profile"]["max_batch"] == 4
    assert "written " in first.stdout
    assert json.loads(first.stdout.splitlines()[-1]) == [
        [],
        {"REPVGG_MODEL": str(plan)},
    ]  # the command's own output, with nothing but its model

    before = (plan.read_bytes(), plan.stat().st_mtime_ns)
    shutil.rmtree(tmp_path / "cache")  # so that only the plan itself can be found again
    second = container.start()
    assert second.returncode == 0, second.stderr
    assert "nothing was built now" in second.stdout
    assert (plan.read_bytes(), plan.stat().st_mtime_ns) == before

    shutil.copy(make_onnx(tmp_path / "b.onnx", seed=2), onnx)
    third = container.start()
    assert third.returncode == 0, third.stderr
    assert "nothing was built now" not in third.stdout
    assert plan.read_bytes() != before[0]
    passport = json.loads(plan.with_name("my net.plan.json").read_text())
    assert passport["onnx_sha256"] == hashlib.sha256(onnx.read_bytes()).hexdigest()
    assert passport["plan_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()

    fourth = container.start(REPVGG_BUILD="--backend rtx --target sm_86 --max-batch 8")
    assert "nothing was built now" not in fourth.stdout
    assert json.loads(plan.with_name("my net.plan.json").read_text())["config"]["profile"]["max_batch"] == 8


@needs_rtx
def test_start_with_a_damaged_plan_builds_it_again(container: Container, tmp_path: Path) -> None:
    make_onnx(container.models / "net.onnx")
    assert container.start().returncode == 0
    (plan,) = container.plans()
    whole = plan.stat().st_size
    plan.write_bytes(plan.read_bytes()[: whole // 2])
    again = container.start()
    assert again.returncode == 0, again.stderr
    assert (
        hashlib.sha256(plan.read_bytes()).hexdigest()
        == json.loads(plan.with_name("net.plan.json").read_text())["plan_sha256"]
    )


@needs_rtx
def test_every_model_of_the_folder_is_prepared_and_the_command_gets_the_first(container: Container) -> None:
    for name in ("b.onnx", "a.onnx"):
        make_onnx(container.models / name)
    (container.models / "notes.txt").write_text("no model")
    done = container.start(*SHOW, "--file={model}", "{repository}", "x{model}y")
    assert done.returncode == 0, done.stderr
    a, b = container.plans()
    assert (a.name, b.name) == ("a.plan", "b.plan")
    arguments, environment = json.loads(done.stdout.splitlines()[-1])
    assert arguments == [f"--file={a}", str(a.parent / "model_repository"), f"x{a}y"]
    assert environment == {"REPVGG_MODEL": str(a)}


@needs_rtx
def test_containers_that_start_at_once_build_once(container: Container, tmp_path: Path) -> None:
    make_onnx(container.models / "net.onnx")
    started = []
    for number in range(3):
        container.environment["XDG_CACHE_HOME"] = str(
            tmp_path / f"cache {number}"
        )  # so that it is not the cache that saves the other builds
        started.append(container.popen(*SHOW))
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert sum("nothing was built now" in out for out, _ in outputs) == 2


@needs_rtx
@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"no onnx at all", "--backend rtx --target sm_86", "error: "),
        (None, "--backend rtx --target sm_99", "error: "),
        (None, "--backend rtx --target sm_86 --int8 --calib missing.npz", "error: "),
        (None, "--backend tensorrt", NO_TENSORRT),
    ],
    ids=["damaged", "target", "calibration", "no library"],
)
def test_failed_build_ends_with_its_code_starts_nothing_and_leaves_nothing(
    content: bytes | None, options: str, said: str, container: Container
) -> None:
    make_onnx(container.models / "net.onnx")
    if content is not None:
        (container.models / "net.onnx").write_bytes(content)
    done = container.start("touch", str(container.models / "started"), REPVGG_BUILD=options)
    assert done.returncode == 1
    assert said in done.stderr
    assert "remedy: " in done.stderr
    assert not (container.models / "started").exists()
    assert [path for path in container.engines.rglob("*") if path.is_file() and path.name != ".lock"] == []


@needs_rtx
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_during_the_build_stops_it_and_leaves_nothing(number: int, code: int, container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    stage, marker = Stage("repvgg_deploy.build.build", "compile_plan"), container.models.parent / "reached"
    process = start_endless(str(PROGRAM), ["echo", "started"], stage, marker, container.environment)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code
    assert "repvgg-trt build" in err
    assert "started" not in out
    assert [path for path in container.engines.rglob("*") if path.is_file() and path.name != ".lock"] == []


@needs_rtx
def test_usage_error_in_build_options_ends_with_2(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    done = container.start(REPVGG_BUILD="--backend rtx --no-such-option")
    assert (done.returncode, "--no-such-option" in done.stderr) == (2, True)


@needs_rtx
@needs_schema
def test_triton_refuses_plans_of_rtx_and_the_server_is_not_started(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    done = container.start("--triton", "echo", "started")
    assert done.returncode == 1
    assert "TensorRT-RTX" in done.stderr
    assert "started" not in done.stdout


# -- without a build


def test_start_that_builds_nothing_writes_nothing(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    done = container.start("echo", "{model}", REPVGG_SERVE="onnx", REPVGG_ENGINES="/proc/engines")
    assert (done.returncode, done.stdout.strip()) == (0, str(container.models / "net.onnx"))


def test_command_gets_signals_itself(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    container.environment["REPVGG_SERVE"] = "onnx"
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready', "
        "flush=True)\nwhile True: time.sleep(0.05)"
    )
    with container.popen(sys.executable, "-c", code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 7


def test_command_has_default_signals_again(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    done = container.start("sh", "-c", "kill -TERM $$", REPVGG_SERVE="onnx")
    assert done.returncode == -signal.SIGTERM


def test_signal_while_another_container_builds_ends_the_waiting(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    container.environment["REPVGG_SERVE"] = "onnx"
    (container.engines / "onnx").mkdir(parents=True)
    with (container.engines / "onnx/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with container.popen("--triton", "echo", "started") as process:
            assert process.stderr is not None
            assert "waiting for it" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 143
            assert process.stdout is not None
            assert process.stdout.read() == ""


@needs_schema
def test_onnx_is_served_as_it_is_without_a_gpu(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    done = container.start(
        "--triton", *SHOW, "{repository}", REPVGG_SERVE="onnx", REPVGG_TRITON="--ensemble jpeg --max-batch 16"
    )
    assert done.returncode == 0, done.stderr
    (repository,), environment = json.loads(done.stdout.splitlines()[-1])
    assert environment == {"REPVGG_MODEL": str(container.models / "net.onnx")}
    assert Path(repository) == container.engines / "onnx" / "model_repository"
    assert (Path(repository) / "net/1/model.onnx").read_bytes() == (container.models / "net.onnx").read_bytes()
    assert "max_batch_size: 16" in (Path(repository) / "net/config.pbtxt").read_text()
    assert (Path(repository) / "net_jpeg").is_dir()
    before = files_below(Path(repository))
    assert (
        container.start(
            "--triton", *SHOW, REPVGG_SERVE="onnx", REPVGG_TRITON="--ensemble jpeg --max-batch 16"
        ).returncode
        == 0
    )
    assert files_below(Path(repository)) == before


@needs_schema
def test_model_that_was_taken_out_of_the_folder_is_no_longer_served_and_what_others_put_there_is(
    container: Container, tmp_path: Path
) -> None:
    for name in ("gone", "stays"):
        make_onnx(container.models / f"{name}.onnx")
    environment = {"REPVGG_SERVE": "onnx", "REPVGG_TRITON": "--ensemble jpeg"}
    assert container.start("--triton", *SHOW, **environment).returncode == 0
    repository = container.engines / "onnx/model_repository"
    theirs = make_onnx(tmp_path / "theirs.onnx")
    assert repvgg_trt(["triton", str(theirs), "--out", str(repository)]) == 0
    before = {path: content for path, content in files_below(repository).items() if not path.startswith("gone")}

    (container.models / "gone.onnx").unlink()
    done = container.start("--triton", *SHOW, **environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in repository.iterdir()) == ["stays", "stays_decode", "stays_jpeg", "theirs"]
    assert files_below(repository) == before
    assert all(
        f"{name} is no longer wanted: taken out of " in done.stderr for name in ("gone", "gone_decode", "gone_jpeg")
    )

    done = container.start("--triton", *SHOW, **{**environment, "REPVGG_TRITON": ""})  # no longer with an ensemble
    assert sorted(path.name for path in repository.iterdir()) == ["stays", "theirs"], done.stderr


@needs_schema
def test_nothing_is_taken_out_while_another_container_serves_from_the_repository(container: Container) -> None:
    for name in ("gone", "stays"):
        make_onnx(container.models / f"{name}.onnx")
    container.environment["REPVGG_SERVE"] = "onnx"
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('serves', flush=True); "
        "signal.pause()"
    )
    repository = container.engines / "onnx/model_repository"
    with container.popen("--triton", sys.executable, "-c", code) as server:
        assert server.stdout is not None
        assert "serves\n" in iter(server.stdout.readline, "")
        (container.models / "gone.onnx").unlink()
        done = container.start("--triton", *SHOW)
        assert done.returncode == 0, done.stderr
        assert "gone is no longer wanted, and stays: another container serves from " in done.stderr
        assert sorted(path.name for path in repository.iterdir()) == ["gone", "stays"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert container.start("--triton", *SHOW).returncode == 0
    assert [path.name for path in repository.iterdir()] == ["stays"]


@needs_schema
def test_plan_whose_onnx_was_taken_out_is_no_longer_served_and_found_again_when_it_is_back(
    machine: Machine, container: Container
) -> None:
    for seed, name in enumerate(("gone", "stays")):
        make_onnx(container.models / f"{name}.onnx", seed=seed)
    repository = Path(machine.start("--triton", "{repository}")[0])
    assert sorted(path.name for path in repository.iterdir()) == ["gone", "stays"]
    kept = (container.models / "gone.onnx").rename(container.models / "gone.bak")
    machine.start("--triton", "{repository}")
    assert [path.name for path in repository.iterdir()] == ["stays"]
    assert (repository.parent / "gone.plan").exists()
    kept.rename(container.models / "gone.onnx")
    machine.start("--triton", "{repository}")
    assert (repository / "gone/1/model.plan").read_bytes() == (repository.parent / "gone.plan").read_bytes()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "holds no .onnx"),
        ({"REPVGG_MODEL": "/no/such/model.onnx"}, "no such file or folder"),
        ({"REPVGG_SERVE": "pan"}, "REPVGG_SERVE is 'pan'"),
        ({"REPVGG_ENGINES": "/proc/engines"}, "--user"),
        ({"REPVGG_BUILD": "--backend 'rtx"}, "REPVGG_BUILD cannot be read"),
        ({"REPVGG_BUILD": "--backend none"}, "no backend is named"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_used_are_told_with_a_remedy(
    environment: dict[str, str], said: str, container: Container
) -> None:
    if environment:
        make_onnx(container.models / "net.onnx")
    if "/proc/engines" in environment.values() and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed, and without it nothing is written")
    done = container.start("echo", "started", **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr


def test_command_that_is_missing_or_not_there_is_told(container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    container.environment["REPVGG_SERVE"] = "onnx"
    assert container.start("--triton", "--").returncode == 2
    done = container.start("no-such-program")
    assert (done.returncode, "no-such-program" in done.stderr, "Traceback" in done.stderr) == (127, True, False)


def test_plan_that_is_given_is_checked_and_not_started_where_it_will_not_run(container: Container) -> None:
    plan = write_plan(container.models / "net.plan")
    done = container.start("echo", "started", REPVGG_MODEL=str(plan))
    assert (done.returncode, "started" in done.stdout) == (1, False)
    assert "error: " in done.stderr


# -- on a GPU that is pretended: what is called, and what becomes of it


class BecameError(Exception):
    """The command that would have been executed, and its REPVGG_MODEL."""


class Machine:
    """first_start.py in this process, on a GPU that is not there; `build` writes bytes with a passport, and no plan."""

    def __init__(self, container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[Path] = []
        self.gpu: Gpu | None = Gpu("NVIDIA A10", "8.6", "570.1")
        self.version = "10.11.0.33"
        monkeypatch.setattr(library, "look_for_gpu", lambda: GpuSearch(self.gpu))
        monkeypatch.setattr(
            library, "open_library", lambda _: SimpleNamespace(name=f"TensorRT {self.version}", is_rtx=False)
        )
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(os, "execvpe", self._become)
        monkeypatch.setattr(trt, "main", self._trt)
        for name, value in container.environment.items():
            if name.startswith("REPVGG_"):
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("REPVGG_BUILD", "")

    def start(self, *command: str) -> list[str]:
        with pytest.raises(BecameError) as became:
            runpy.run_path(str(PROGRAM))["main"](list(command))
        words: list[str] = became.value.args[0]
        return words

    def _become(self, _: str, command: list[str], environment: dict[str, str]) -> None:
        for handle in Path("/proc/self/fd").iterdir():
            if os.path.realpath(handle).endswith("/.serving"):  # the command would hold it until it ends
                os.close(int(handle.name))
        raise BecameError([*command, environment["REPVGG_MODEL"]])

    def _trt(self, argv: list[str]) -> int:
        if argv[0] != "build":
            return repvgg_trt(argv)
        onnx, plan = Path(argv[1]), Path(argv[argv.index("--out") + 1])
        self.built.append(plan)
        digest = hashlib.sha256(onnx.read_bytes()).hexdigest()
        write_plan(plan, b"ftrt " + onnx.read_bytes(), onnx_sha256=digest, tensorrt_version=self.version)
        return 0


@pytest.fixture
def machine(container: Container, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(container, monkeypatch)


@needs_schema
def test_triton_gets_the_plans_of_this_gpu_and_a_changed_one_as_the_next_version(
    machine: Machine, container: Container
) -> None:
    make_onnx(container.models / "net.onnx", seed=1)
    repository, model = machine.start("--triton", "{repository}")
    place = container.engines / "nvidia-a10-sm8.6-tensorrt-10.11.0.33"
    assert (Path(repository), Path(model)) == (place / "model_repository", place / "net.plan")
    first = (place / "net.plan").read_bytes()
    assert (Path(repository) / "net/1/model.plan").read_bytes() == first
    assert 'platform: "tensorrt_plan"' in (Path(repository) / "net/config.pbtxt").read_text()

    make_onnx(container.models / "net.onnx", ModelOptions(), seed=2)
    machine.start("--triton", "{repository}")
    assert (Path(repository) / "net/1/model.plan").read_bytes() == first
    assert (Path(repository) / "net/2/model.plan").read_bytes() == (place / "net.plan").read_bytes() != first
    machine.start("--triton", "{repository}")
    assert sorted(path.name for path in (Path(repository) / "net").iterdir() if path.is_dir()) == ["1", "2"]


def test_each_gpu_type_and_each_tensorrt_has_its_own_plan_in_one_folder(machine: Machine, container: Container) -> None:
    make_onnx(container.models / "net.onnx")
    machine.start("serve")
    machine.gpu = Gpu("NVIDIA L4", "8.9", "570.1")
    machine.start("serve")
    machine.version = "10.12.0.36"
    machine.start("serve")
    assert [plan.parent.name for plan in machine.built] == [
        "nvidia-a10-sm8.6-tensorrt-10.11.0.33",
        "nvidia-l4-sm8.9-tensorrt-10.11.0.33",
        "nvidia-l4-sm8.9-tensorrt-10.12.0.36",
    ]
    assert container.plans() == sorted(machine.built)


def test_tensorrt_without_a_gpu_says_how_to_give_the_container_one(
    machine: Machine, container: Container, capsys: pytest.CaptureFixture[str]
) -> None:
    make_onnx(container.models / "net.onnx")
    machine.gpu = None
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(PROGRAM))["main"](["serve"])
    assert stopped.value.code == 1
    assert "--gpus all" in capsys.readouterr().err
    assert not container.engines.exists()

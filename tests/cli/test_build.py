"""`repvgg-trt build`, as a user calls it: with TensorRT-RTX, which builds without a GPU."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.build import build as build_module
from repvgg_deploy.build.library import GpuSearch
from repvgg_deploy.cli.build import parse_bytes, read_build_options
from repvgg_deploy.cli.terminal import Progress
from repvgg_deploy.cli.trt import build_parser, main
from repvgg_deploy.errors import InputError
from repvgg_deploy.files.passport import read_passport
from repvgg_deploy.specs.values import ShapeProfile
from tests.build.make_typed import make_typed
from tests.precision.rtx import needs_rtx

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(folder))
    monkeypatch.setattr(
        build_module, "look_for_gpu", lambda: GpuSearch(None, "no driver")
    )  # also on a machine with a GPU
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["build", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def lines_of(out: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S[\w ]*?)  +(\S.*)$", out, re.M))


@needs_rtx
def test_build_prints_what_was_built_and_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_typed(tmp_path, "mixed")
    status, out, err = run(capsys, model, "--backend", "rtx", "--max-batch", 4, "--target", "sm_86", "8.9")
    assert status == 0, err
    lines = lines_of(out)
    assert out.startswith("builder")
    assert re.fullmatch(r"TensorRT-RTX [\d.]+, without a GPU; Triton cannot load its plans", lines["builder"])
    assert lines["precision"] == "int8; its layers were not inspected: there was no GPU to load it"
    assert lines["batches"] == "1 to 4, tuned for 4"
    assert re.fullmatch(r"compute capability 8\.6, 8\.9, with TensorRT-RTX [\d.]+ and no other", lines["runs on"])
    assert re.fullmatch(r"\d+\.\d: parse \d+\.\d, build \d+\.\d", lines["seconds"])
    plan = tmp_path / "mixed.plan"
    assert lines["written"] == f"{plan} ({plan.stat().st_size / 1e3:.1f} kB)"
    assert lines["passport"] == f"{plan}.json (written)"
    assert err == f"next: repvgg-trt check {plan}\n"
    passport = read_passport(plan)
    assert passport is not None and (passport.precision, passport.compute_capabilities) == (
        "not_inspected",
        ("8.6", "8.9"),
    )


@needs_rtx
def test_second_build_is_reused_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_typed(tmp_path, "fp16")
    run(capsys, model, "--backend", "rtx")
    status, out, _ = run(capsys, model, "--backend", "rtx")
    assert status == 0 and "seconds" not in lines_of(out)
    assert re.fullmatch(
        r"an identical plan is in its place already, built in \d+\.\d s: nothing was built now", lines_of(out)["reused"]
    )
    assert lines_of(out)["up to date"].startswith(str(tmp_path / "fp16.plan"))
    _, out, _ = run(capsys, model, "--backend", "rtx", "--out", tmp_path / "o.plan")
    assert "an identical plan is in the cache" in out
    assert (tmp_path / "o.plan").read_bytes() == (tmp_path / "fp16.plan").read_bytes()
    _, out, _ = run(capsys, model, "--backend", "rtx", "--out", tmp_path / "p.plan", "--no-cache")
    assert "reused" not in lines_of(out) and "seconds" in lines_of(out)


@needs_rtx
@pytest.mark.parametrize(
    ("flag", "text"),
    [("--fp16", r"the outputs differ by .*"), ("--int8", r"\d+\.\d\d% of the images keep FP32's best class")],
)
def test_fp32_graph_becomes_typed_and_the_second_time_is_not_even_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str, text: str
) -> None:
    model = make_typed(tmp_path, "fp32")
    np.savez(tmp_path / "i.npz", images=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    images = ["--calib", tmp_path / "i.npz", "--min-agreement", "0", "--fast"] if flag == "--int8" else []
    status, out, err = run(capsys, model, flag, "--backend", "rtx", *images)
    assert status == 0, err
    assert re.fullmatch(f"the graph was FP32 and became {flag[2:].upper()}: {text}", lines_of(out)["typed"])
    assert re.match(r"\d+\.\d: quantize \d+\.\d, parse", lines_of(out)["seconds"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npz") == [
        "fp32.onnx",
        "fp32.plan",
        "fp32.plan.json",
    ]
    monkeypatch.setattr(build_module, "compile_plan", None)
    monkeypatch.setattr("repvgg_deploy.precision.quantization.quantize", None)
    status, out, err = run(capsys, model, flag, "--backend", "rtx", *images)
    assert status == 0 and "nothing was built now" in out, err
    if images:
        np.savez(tmp_path / "i.npz", images=np.random.default_rng(1).integers(0, 256, (20, 16, 16, 3), np.uint8))
        assert (
            run(capsys, model, flag, "--backend", "rtx", *images)[0] == 1
        )  # other images: it is calibrated again, which cannot be here


@needs_rtx
def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_typed(tmp_path, "fp32", "uint8_top5")
    status, out, err = run(capsys, model, "--backend", "rtx", "--json")
    assert (status, err) == (0, "")
    answer: dict[str, Any] = json.loads(out)
    assert (answer["status"], answer["origin"], answer["typed_from_fp32"]) == ("written", "built", False)
    assert [output["name"] for output in answer["passport"]["spec"]["outputs"]] == ["scores", "classes"]
    assert (
        answer["passport"]["spec"]["input"]["dtype"] == "uint8" and answer["passport"]["config"]["precision"] == "fp32"
    )
    assert answer["bytes"] == (tmp_path / "fp32.plan").stat().st_size


@needs_rtx
def test_interrupt_while_tensorrt_builds_exits_130_and_leaves_nothing(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_typed(tmp_path, "fp16")
    before, heard = sorted(tmp_path.iterdir()), []

    def hear(self: Progress, stage: str, done: int, total: int) -> None:
        heard.append(stage)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "show", hear)
    status, out, err = run(capsys, model, "--backend", "rtx")
    assert (status, out, err) == (130, "", "interrupted\n")
    assert heard[0] == "build" and sorted(tmp_path.iterdir()) == before and list(own_cache.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "repvgg-build"]


@needs_rtx
def test_three_builds_of_the_same_plan_at_once_all_end_well(tmp_path: Path) -> None:
    model = make_typed(tmp_path, "fp32")
    command = [sys.executable, "-m", "repvgg_deploy.cli.trt", "build", str(model), "--backend", "rtx", "--json"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    plans = {json.loads(out)["passport"]["plan_sha256"] for out, _ in results}
    assert plans == {hashlib.sha256((tmp_path / "fp32.plan").read_bytes()).hexdigest()}
    passport = read_passport(tmp_path / "fp32.plan")
    assert passport is not None and passport.plan_sha256 in plans
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "fp32.plan", "fp32.plan.json"]


@needs_rtx
def test_bar_is_drawn_while_tensorrt_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["build", str(make_typed(tmp_path, "mixed")), "--backend", "rtx"]) == 0
    assert re.search(r"\[Kbuild \[[#.]+\] \d+/100", stream.getvalue())


FAULTS: dict[str, tuple[list[str], str]] = {
    "hopper": (["fp16.onnx", "--target", "sm_90"], "builds for compute capability 7.5, .*, not for 9.0"),
    "version": (["fp16.onnx", "--version-compatible"], "runs plans of its own release only"),
    "hardware": (["fp16.onnx", "--hardware-compatible"], "has no --hardware-compatible"),
    "fp32 of fp16": (["fp16.onnx", "--fp32"], "is typed fp16, and fp32 was asked for"),
    "int8 of fp16": (["fp16.onnx", "--int8"], "is typed fp16, and int8 was asked for"),
    "calib of fp16": (
        ["fp16.onnx", "--fp16", "--calib", "x"],
        "is typed fp16 already, so there is nothing to calibrate",
    ),
    "calib alone": (["fp32.onnx", "--calib", "x"], "--calib is of --fp16, --int8 and --fp8, and none is asked for"),
    "batches": (["fp16.onnx", "--min-batch", "4", "--max-batch", "2"], "expected 1 ≤ min ≤ opt ≤ max"),
    "config": (["fp16.onnx", "--config", "none.toml"], "cannot be read as a build configuration"),
    "config precision": (["fp16.onnx", "--config", "int8.toml"], "is typed fp16, and int8 was asked for"),
    "config and options": (
        ["fp32.onnx", "--config", "fp16.toml", "--calib", "statistics"],
        "--calib statistics is of --int8",
    ),
    "no file": (["none.onnx", "--fp16"], "no such file"),
    "foreign": (["foreign.onnx"], "truncated, or not an ONNX"),
    "calibration": (["fp32.onnx", "--int8"], "no images to calibrate with|calib"),
    "folder": (["fp16.onnx", "--out", "missing/x.plan"], "the folder missing does not exist"),
    "current": (["fp16.onnx", "--target", "current"], "the target is the current GPU"),
}


@needs_rtx
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_said_with_a_remedy_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    make_typed(tmp_path, "fp16")
    (tmp_path / "foreign.onnx").write_bytes(b"no model")
    for name in ("int8", "fp16"):
        (tmp_path / f"{name}.toml").write_bytes((ROOT / "engines" / "configs" / f"{name}.toml").read_bytes())
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments, message = FAULTS[fault]
    status, out, err = run(capsys, *arguments, "--backend", "rtx")
    assert (status, out) == (1, "")
    assert re.search(message, err), err
    assert "remedy:" in err and "unexpected" not in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


USAGE = {
    "both": (["--fp16", "--int8"], "not allowed with"),
    "profiles": (
        ["--profiles", "1,8", "--max-batch", "8"],
        "--max-batch is of one profile: it cannot hold with --profiles",
    ),
    "fp32 calib": (["--fp32", "--calib", "x"], "--calib is of --fp16, --int8 and --fp8: it cannot hold with --fp32"),
    "fp16 fast": (["--fp16", "--fast"], "--fast is of --int8"),
    "percentile": (["--int8", "--percentile", "99"], "needs --method percentile"),
    "target": (["--target", "a10"], "expected a compute capability such as sm_86"),
    "workspace": (["--workspace", "much"], "expected a size such as 4GiB"),
    "level": (["--optimization-level", "9"], "invalid choice"),
    "batch": (["--max-batch", "0"], "at least 1"),
    "backend": (["--backend", "cuda"], "invalid choice"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = USAGE[name]
    with pytest.raises(SystemExit) as caught:
        main(["build", "m.onnx", *arguments])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in err and err.startswith("usage: repvgg-trt build")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 << 29),
        ("2GB", 2_000_000_000),
        ("123", 123),
        ("1kB", 1000),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "4 apples", "-1", "0", "1e3", "99999999999GiB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((), (1, 8, 32)),
        (("--max-batch", "64"), (1, 8, 64)),
        (("--max-batch", "4"), (1, 4, 4)),
        (("--opt-batch", "64"), (1, 64, 64)),
        (("--min-batch", "16"), (16, 16, 32)),
        (("--min-batch", "50"), (50, 50, 50)),
        (("--min-batch", "2", "--opt-batch", "3", "--max-batch", "5"), (2, 3, 5)),
    ],
)
def test_batch_sizes_that_are_not_given_follow_those_that_are(
    tmp_path: Path, given: tuple[str, ...], wanted: tuple[int, int, int]
) -> None:
    args = build_parser().parse_args(["build", str(make_typed(tmp_path, "fp32")), *given])
    options = read_build_options(args)
    assert options.config.profile == ShapeProfile(*wanted) and options.profile_given == bool(given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("--profiles 8,1,32,8", ShapeProfile(1, 32, 32, batches=(1, 8, 32))),
        ("--profiles 16", ShapeProfile(1, 16, 16, batches=(16,))),
        ("", ShapeProfile(1, 4, 64, batches=(2, 64))),
        ("--max-batch 16", ShapeProfile(1, 4, 16)),
        ("--opt-size 640", ShapeProfile(1, 4, 64, *((640, 640),) * 3, batches=(2, 64))),
    ],
)
def test_profiles_of_the_command_line_come_before_those_of_the_file(
    tmp_path: Path, given: str, wanted: ShapeProfile
) -> None:
    file = tmp_path / "several.toml"
    file.write_text("[profile]\nopt_batch = 4\nmax_batch = 64\nbatches = [2, 64]\n")
    arguments = ["build", str(make_typed(tmp_path, "fp32")), "--config", str(file), *given.split()]
    assert read_build_options(build_parser().parse_args(arguments)).config.profile == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", (None, None, None)),
        ("--opt-size 640", ((640, 640),) * 3),
        ("--opt-size 480x640 --max-size 1280", ((480, 640), (480, 640), (1280, 1280))),
        ("--min-size 320 --max-size 640", ((320, 320), (640, 640), (640, 640))),
        ("--min-size 320 --opt-size 480×640 --max-size 1280", ((320, 320), (480, 640), (1280, 1280))),
    ],
)
def test_image_sizes_that_are_not_given_follow_those_that_are(tmp_path: Path, given: str, wanted: Any) -> None:
    args = build_parser().parse_args(["build", str(make_typed(tmp_path, "fp32")), *given.split()])
    profile = read_build_options(args).config.profile
    assert (profile.min_size, profile.opt_size, profile.max_size) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", ((320, 320), (640, 640), (1280, 1280))),
        ("--opt-size 256", ((256, 256), (256, 256), (1280, 1280))),
        ("--opt-size 1600x640", ((320, 320), (1600, 640), (1600, 1280))),
        ("--max-size 640", ((320, 320), (640, 640), (640, 640))),
    ],
)
def test_image_sizes_of_the_configuration_file_give_way(tmp_path: Path, given: str, wanted: Any) -> None:
    file = tmp_path / "sizes.toml"
    file.write_text("[profile]\nmin_size = [320, 320]\nopt_size = [640, 640]\nmax_size = [1280, 1280]\n")
    arguments = ["build", str(make_typed(tmp_path, "fp32")), "--config", str(file), *given.split()]
    profile = read_build_options(build_parser().parse_args(arguments)).config.profile
    assert (profile.min_size, profile.opt_size, profile.max_size) == wanted


def test_command_line_overrides_the_configuration_file(tmp_path: Path) -> None:
    model = make_typed(tmp_path, "fp32")
    file = ROOT / "engines" / "configs" / "edge.toml"
    arguments = ["build", str(model), "--config", str(file)]
    plain = read_build_options(build_parser().parse_args(arguments))
    assert (plain.config.precision, plain.config.profile, plain.config.workspace_bytes) == (
        "fp16",
        ShapeProfile(1, 1, 1),
        256 << 20,
    )
    assert plain.quantize is not None and plain.quantize.precision == "fp16"
    limits = ["--max-batch", "2", "--workspace", "1GiB", "--optimization-level", "0"]
    changed = build_parser().parse_args([*arguments, "--fp32", *limits, "--sparse", "--tf32"])
    config = read_build_options(changed).config
    assert (config.precision, config.profile, config.workspace_bytes) == ("fp32", ShapeProfile(1, 1, 2), 1 << 30)
    assert (config.optimization_level, config.sparse, config.tf32) == (0, True, True)


def test_configuration_with_options_of_another_precision_is_refused(tmp_path: Path) -> None:
    file = ROOT / "engines" / "configs" / "fp16.toml"
    args = build_parser().parse_args(
        ["build", str(make_typed(tmp_path, "fp32")), "--config", str(file), "--keep", "stage0.conv"]
    )
    with pytest.raises(InputError, match="--keep is of --int8"):
        read_build_options(args)

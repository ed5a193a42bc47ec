"""The program `repvgg-trt`: what is the same of all commands, and what each loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy import __version__
from repvgg_deploy.cli import export
from repvgg_deploy.cli.trt import main
from tests.runtime.make_model import make_onnx
from tests.serving.make_repository import needs_schema

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("command", [["infer", "{model}", "x.png"], ["inspect", "{model}"]])
@pytest.mark.parametrize("content", [None, b"", b"nonsense", "truncated"])
def test_bad_model_gives_one_message_and_exit_1(
    model: Path, capsys: pytest.CaptureFixture[str], command: list[str], content: bytes | str | None
) -> None:
    data = model.read_bytes()
    if content is None:
        model.unlink()
    else:
        model.write_bytes(data[:-20] if isinstance(content, str) else content)
    assert main([part.format(model=model) for part in command]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: .*m\.onnx: .*\n  remedy: .*\n", printed.err)
    assert main([*(part.format(model=model) for part in command), "--json"]) == 1
    assert set(json.loads(capsys.readouterr().out)) == {"error", "remedy"}


_LONG = "n" * 300  # no disk has such a name: even asking whether it is there is an error


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", _LONG],
        ["check", _LONG],
        ["infer", _LONG, "x.png"],
        ["infer", "{model}", _LONG],
        ["infer", "{model}", "x.png", "--labels", _LONG],
        ["infer", "{model}", "x.png", "--out", f"{_LONG}.csv"],
        ["eval", "{model}", "--data", _LONG],
        ["quantize", f"{_LONG}.onnx", "--fp16"],
        ["quantize", "{model}", "--fp16", "--out", f"{_LONG}.onnx"],
        ["quantize", "{model}", "--fp16", "--calib", _LONG],
        ["quantize", "{model}", "--int8", "--calib", "x.npz", "--scales", _LONG],
        ["fold", f"{_LONG}.onnx", "--out", "o.onnx"],
        ["build", f"{_LONG}.onnx", "--fp16"],
        ["triton", f"{_LONG}.onnx", "--out", "r"],
        pytest.param(["triton", "{model}", "--out", _LONG], marks=needs_schema),
        pytest.param(["triton", "--validate", _LONG], marks=needs_schema),
        ["export", "--ckpt", _LONG, "--describe"],
        ["export", "--ckpt", f"{_LONG}.index.json", "--describe"],
        ["export", "--ckpt", "m.index.json", "--describe"],
    ],
)
def test_name_that_is_too_long_is_named_and_nothing_else_is_blamed(
    model: Path, capsys: pytest.CaptureFixture[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    Path("m.index.json").write_text(json.dumps({"weight_map": {"a": _LONG}}), encoding="utf-8")
    np.savez("x.npz", images=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("x.png")
    before = sorted(model.parent.rglob("*"))
    program = export.main if command[0] == "export" else main
    assert program([part.format(model=model) for part in command if part != "export"]) == 1
    said = "".join(capsys.readouterr())
    assert "nnnnn" in said and "unexpected" not in said
    assert "m.onnx: cannot" not in said and "int8.onnx" not in said and "fp16.onnx: cannot" not in said
    assert sorted(model.parent.rglob("*")) == before


def test_bare_program_shows_its_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (main, export.main):
        monkeypatch.setattr(sys, "argv", ["program"])
        assert program() == 0
        assert capsys.readouterr().out.startswith("usage: repvgg-")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["inferr", "m.onnx"], "infer"),
        (["infer", "m.onnx", "x.png", "--batchsize", "3"], "--batch-size"),
        (["quantize", "m.onnx", "--int8", "--calibb", "x"], "--calib"),
        (["infer", "m.onnx", "x.png", "--backend", "openvin"], "openvino"),
        (["quantize", "m.onnx", "--in8"], "--int8"),  # what is required is said to be missing, for it is misspelt
        (["quantize", "m.onnx", "--calib", "x"], None),
        (["zzz"], None),
    ],
)
def test_usage_error_asks_what_was_meant(
    arguments: list[str], meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().err
    assert f"did you mean {meant}?" in said if meant else "did you mean" not in said


def test_usage_error_is_folded_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit) as caught:
        main(["inferr"])
    said = capfd.readouterr().err
    assert caught.value.code == 2
    assert max(map(len, said.splitlines())) <= 80
    assert " ".join(said.split()).endswith("'doctor'); did you mean infer?")


def test_help_breaks_no_word_at_a_hyphen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--help"])
    said = capsys.readouterr().out
    assert "hf-hub:ORG/NAME[/FILE][@REVISION]" in said


def test_completion_is_a_script_that_knows_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab, of the extra completion, is not installed")
    for program, words in ((main, ("quantize", "--calib")), (export.main, ("--ckpt",))):
        with pytest.raises(SystemExit) as caught:
            program(["--print-completion", "bash"])
        assert caught.value.code == 0
        script = capsys.readouterr().out
        assert all(word in script for word in words)
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json"],
        ["infer"],
        ["infer", "m.onnx"],
        ["infer", "m.onnx", "x.png", "--top", "0"],
        ["infer", "m.onnx", "x.png", "--threads", "x"],
        ["bild", "m.onnx"],
    ],
)
def test_usage_error_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: repvgg-trt")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"repvgg-trt {__version__}\n"


LOADED = """
import runpy, sys
sys.argv = {argv}
try:
    runpy.run_module("repvgg_deploy.cli.trt", run_name="__main__")
finally:
    print(*sorted(sys.modules))
"""


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (["infer", "--help"], set()),
        (["inspect", "{model}"], set()),
        (["infer", "{model}", "{image}"], {"numpy", "onnxruntime", "PIL"}),
    ],
)
def test_program_loads_only_what_its_command_needs(
    model: Path, sample_dir: Path, argv: list[str], allowed: set[str]
) -> None:
    """The modules and not the clock: what `--help` does not load, it does not wait for."""
    filled = ["repvgg-trt", *(part.format(model=model, image=sample_dir / "images" / "digit-0.png") for part in argv)]
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(argv=filled)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    heavy = {"numpy", "onnxruntime", "PIL", "onnx", "torch", "onnxsim", "scipy", "hashlib"} - (
        {"hashlib"} if "--help" not in argv else set()
    )
    assert heavy & set(done.stdout.splitlines()[-1].split()) == allowed


def test_program_is_installed_under_its_name() -> None:
    assert 'repvgg-trt = "repvgg_deploy.cli.trt:main"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


_WITHOUT_PACKAGES = """
import sys
from repvgg_deploy.errors import EXTRAS
for package in EXTRAS:
    sys.modules[package] = None  # as if it were not installed
from repvgg_deploy.cli import export, trt
program, *arguments = sys.argv[1:]
sys.exit((export if program == "repvgg-export" else trt).main(arguments))
"""


def run_without_packages(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_PACKAGES, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("repvgg-export --ckpt {sample}", "export,cpu"),
        ("repvgg-trt infer {model} {image}", "cpu"),
        ("repvgg-trt fold {model} --out {folder}.onnx", "quantize,cpu"),
        ("repvgg-trt quantize {model} --fp16", "quantize,cpu"),
        ("repvgg-trt build {model}", "tensorrt"),
        ("repvgg-trt triton {model} --out {folder}", "serving"),
        ("repvgg-trt eval {model} --data {folder}", "cpu"),
        ("repvgg-trt compare {model} {model} --data {folder}", "cpu"),
        ("repvgg-trt bench {model}", "cpu"),
    ],
    ids=lambda text: text.split()[1] if " " in text else text,
)
def test_command_without_its_extra_says_what_to_install(model: Path, tmp_path: Path, command: str, extra: str) -> None:
    images = ROOT / "models" / "sample" / "images"
    places = {
        "model": model,
        "sample": ROOT / "models" / "sample" / "repvgg-sample.pth",
        "image": images / "digit-3.png",
        "folder": images,
    }
    if "--out" in command or "--ckpt" in command:
        places["folder"] = tmp_path / "out"
    if "--ckpt" in command:
        command += f" --out {tmp_path / 'x.onnx'}"
    done = run_without_packages(*command.format(**places).split())
    assert done.returncode == 1 and done.stdout == ""
    assert f"pip install '.[{extra}]' in the repository's folder" in done.stderr
    assert "unexpected" not in done.stderr


def test_inspect_and_check_need_no_extra(model: Path) -> None:
    for name in ("inspect", "check"):
        done = run_without_packages("repvgg-trt", name, str(model), "--json")
        assert "pip install" not in done.stderr and json.loads(done.stdout), done.stderr


_OPTIMIZED = """
import sys
from repvgg_deploy.cli import export, trt
folder, sample, image = sys.argv[1:]
assert False, "python -O leaves this out"
sys.exit(
    export.main(["--ckpt", sample, "--describe"])
    or export.main(["--ckpt", sample, "--out", f"{folder}/a.onnx"])
    or trt.main(["quantize", f"{folder}/a.onnx", "--fp16", "--out", f"{folder}/b.onnx"])
    or trt.main(["infer", f"{folder}/b.onnx", image])
)
"""


def test_programs_run_without_assertions_and_docstrings(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    sample = ROOT / "models" / "sample"
    done = subprocess.run(
        [
            sys.executable,
            "-OO",
            "-c",
            _OPTIMIZED,
            tmp_path,
            sample / "repvgg-sample.pth",
            sample / "images/digit-3.png",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +1 +3 ", done.stdout, re.M)


@pytest.mark.parametrize(
    "command", [pytest.param("triton {model} --out -", marks=needs_schema), "fold {model} --out -"]
)
def test_dash_as_output_is_refused(model: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(command.format(model=model).split()) == 1
    assert "standard output" in capsys.readouterr().err
    assert not Path("-").exists()

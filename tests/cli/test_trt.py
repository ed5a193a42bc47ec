"""The program `repvgg-trt`: what is the same of all commands, and what each loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_deploy import __version__
from repvgg_deploy.cli.trt import main
from tests.runtime.make_model import make_onnx

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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
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

"""`repvgg-export` as a user meets it: output, exit codes, bad input, no file left."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repvgg_deploy.cli.export import build_parser, main
from repvgg_deploy.files import output
from repvgg_deploy.specs.variants import get_variant
from tests.endless import Stage, start_endless
from tests.model.generated import random_model, stated
from tests.model.random_blocks import small_variant
from tests.waiting import PATIENCE_SECONDS

SIZE = ["--image-size", "64"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(stated(random_model(small_variant())), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The message of a refusal: exit 1, a remedy, no traceback, no file."""
    before = sorted(folder.rglob("*"))
    status, out, err = run(capsys, *arguments)
    assert status == 1, err
    assert out == ""
    assert err.startswith("error: ") and "remedy: " in err and "Traceback" not in err
    assert sorted(folder.rglob("*")) == before
    return err


def test_export_prints_certificate_specification_and_next_command(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "--ckpt", checkpoint, *SIZE)
    assert status == 0
    for text in (
        "official, training form",
        "whole network, float64",
        "ONNX in ONNX Runtime",
        "(batch, 3, 64, 64)",
        "logits float32 (batch, 5)",
        "written",
    ):
        assert text in out
    assert err.strip().splitlines()[-1] == f"next: repvgg-trt infer {checkpoint.with_name('model.onnx')} IMAGE"
    status, out, _ = run(capsys, "--ckpt", checkpoint, *SIZE, "--json", "--save-deploy", checkpoint.with_name("d.pth"))
    data = json.loads(out)
    assert status == 0
    assert data["status"] == "up to date" and data["deploy_checkpoint"].endswith("d.pth")
    assert data["metadata"]["certificate"]["checks"]


def test_export_json_of_an_error_is_one_object(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--ckpt", checkpoint.with_name("absent.pth"), "--json")
    assert status == 1 and set(json.loads(out)) == {"error", "remedy"}


def test_export_all_graph_options_reach_the_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\né\n", encoding="utf-8")
    status, out, err = run(
        capsys, "--ckpt", checkpoint, "--out", tmp_path / "o.onnx", "--image-size", "48x64", "--batch", 2,
        "--opset", 19, "--input", "uint8", "--output", "top5", "--labels", tmp_path / "names.txt",
        "--mean", "1,2,3", "--std", "4,5,6", "--json",
    )  # fmt: skip
    assert status == 0, err
    spec = json.loads(out)["metadata"]["spec"]
    assert spec["input"] == {"name": "input", "dtype": "uint8", "shape": [2, 48, 64, 3], "layout": "NHWC"}
    assert spec["kind"] == "top5" and spec["labels"] == ["a", "b", "c", "d", "é"]
    assert spec["preprocessing"]["mean"] == [1.0, 2.0, 3.0] and spec["preprocessing"]["std"] == [4.0, 5.0, 6.0]
    assert spec["preprocessing"]["in_graph"] is True


def test_describe_prints_the_command_that_exports(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--ckpt", checkpoint, "--describe")
    assert status == 0
    assert "training" in out and "repvgg-export --" in out
    assert not checkpoint.with_suffix(".onnx").exists()


def test_strides_are_stated_where_no_file_tells_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pth"
    torch.save(random_model(small_variant()).state_dict(), path)
    status, out, _ = run(capsys, "--ckpt", path, "--describe")
    assert status == 0 and "--strides 2,2,2,2,2" in out and "custom variant" in out
    assert "--strides 2,2,2,2,2" in assert_refused(capsys, tmp_path, "--ckpt", path, *SIZE)
    status, out, _ = run(capsys, "--ckpt", path, "--strides", "1,2,2,2,1", *SIZE)
    assert status == 0 and "stated by the user: strides 1,2,2,2,1" in out
    status, out, _ = run(capsys, "--ckpt", path, "--strides", "1,2,2,2,1", "--describe")
    assert status == 0 and "--strides 1,2,2,2,1" in out


@pytest.mark.parametrize("text", ["2,2,2,2", "2,2,2,2,3", "two"])
def test_strides_that_are_none_are_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--ckpt", "x.pth", "--strides", text])
    assert caught.value.code == 2 and "five numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"PK\x03\x04 not a zip", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"],
)
def test_export_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert_refused(capsys, tmp_path, "--ckpt", tmp_path / "x.pth")


def test_export_missing_folder_or_truncated_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, tmp_path, "--ckpt", tmp_path / "absent.pth")
    assert_refused(capsys, tmp_path, "--ckpt", tmp_path)
    data = checkpoint.read_bytes()
    for part in (0.1, 0.5, 0.99):
        checkpoint.write_bytes(data[: int(len(data) * part)])
        assert_refused(capsys, tmp_path, "--ckpt", checkpoint)


class Evil:
    def __reduce__(self) -> object:
        return (os.system, ("touch was-run",))


@pytest.mark.parametrize("protocol", range(6))
def test_export_pickle_that_would_run_code_does_not_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=protocol))
    assert_refused(capsys, tmp_path, "--ckpt", "evil.pth")
    assert not (tmp_path / "was-run").exists()
    pickle.loads((tmp_path / "evil.pth").read_bytes())  # the file is a real one: plain pickle does run it
    assert (tmp_path / "was-run").exists()


def test_export_evil_object_beside_tensors_is_ignored_and_the_tensors_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    torch.save({**stated(random_model(small_variant())), "config": Evil()}, tmp_path / "m.pth")
    status, _, err = run(capsys, "--ckpt", tmp_path / "m.pth", "--out", tmp_path / "out" / "m.onnx", *SIZE)
    assert status == 0, err
    assert not Path("was-run").exists()


def test_export_another_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(
        {
            "conv1.weight": torch.zeros(64, 3, 7, 7),
            "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3),
            "fc.weight": torch.zeros(1000, 512),
        },
        tmp_path / "r.pth",
    )
    assert_refused(capsys, tmp_path, "--ckpt", tmp_path / "r.pth")


def test_export_wrong_arch_names_the_tensor_and_the_variant_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(random_model(get_variant("A0", num_classes=10)).state_dict(), tmp_path / "a0.pth")
    message = assert_refused(capsys, tmp_path, "--ckpt", tmp_path / "a0.pth", "--arch", "A1")
    assert "stage0" in message and "48" in message and "64" in message and "A0" in message
    assert_refused(capsys, tmp_path, "--ckpt", tmp_path / "a0.pth", "--arch", "Z9")


def test_export_half_converted_missing_and_extra_tensors_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    deploy = random_model(small_variant(), "deploy").state_dict()
    half = {k: v for k, v in state.items() if not k.startswith("stage2.0.")} | {
        k: v for k, v in deploy.items() if k.startswith("stage2.0.")
    }
    missing = {k: v for k, v in state.items() if k != "stage3.1.rbr_dense.bn.running_var"}
    extra = state | {"stage3.1.mystery.weight": torch.zeros(3)}
    for name, content, expected in (
        ("half", half, "stage2.0"),
        ("missing", missing, "stage3.1.rbr_dense.bn.running_var"),
        ("extra", extra, "mystery"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        assert expected in assert_refused(capsys, tmp_path, "--ckpt", tmp_path / f"{name}.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_export_weights_that_are_not_finite_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state["stage3.1.rbr_dense.conv.weight"][1, 2, 0, 1] = value
    torch.save(state, checkpoint)
    assert "stage3.1.rbr_dense.conv.weight" in assert_refused(capsys, tmp_path, "--ckpt", checkpoint)


def test_export_existing_different_output_needs_force(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    assert "--force" in assert_refused(capsys, tmp_path, "--ckpt", checkpoint, "--out", out, *SIZE)
    assert out.read_text() == "mine"
    assert run(capsys, "--ckpt", checkpoint, "--out", out, *SIZE, "--force")[0] == 0


def test_export_unwritable_folder_and_full_disk_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "mkdir" in assert_refused(capsys, tmp_path, "--ckpt", checkpoint, "--out", tmp_path / "no" / "m.onnx")
    assert "folder" in assert_refused(capsys, tmp_path, "--ckpt", checkpoint, "--out", tmp_path)

    def deny(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:  # tests may run as root, whom no folder denies anything
        patch.setattr(output.tempfile, "mkstemp", deny)
        assert "writable" in assert_refused(capsys, tmp_path, "--ckpt", checkpoint)

    from repvgg_deploy.export import export as pipeline

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"some bytes, then")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "write_model", full)
    assert "free some space" in assert_refused(capsys, tmp_path, "--ckpt", checkpoint, *SIZE)


def test_export_really_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A file-size limit of the operating system stops the write half-way, as a full disk does."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from repvgg_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, "--ckpt", str(checkpoint), "--out", str(tmp_path / "out" / "m.onnx"), *SIZE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "cannot be written" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "stage"), [(signal.SIGINT, 130, "to_onnx"), (signal.SIGTERM, 143, "verify_onnx")]
)
def test_export_interrupted_at_work_leaves_nothing(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, status: int, stage: str
) -> None:
    (tmp_path / "out").mkdir()
    arguments = ["--ckpt", checkpoint, "--out", tmp_path / "out" / "m.onnx", *SIZE]
    process = start_endless(
        "repvgg_deploy.cli.export", arguments, Stage("repvgg_deploy.export.export", stage), tmp_path / "reached"
    )
    assert len(list((tmp_path / "out").iterdir())) == 1  # the hidden partial file
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("text", ["48x64", "48X64", "48×64"])
def test_export_image_size_is_taken_as_it_is_printed(text: str) -> None:
    assert build_parser().parse_args(["--ckpt", "x.pth", "--image-size", text]).image_size == (48, 64)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--opset", "16"],
        ["--image-size", "100000"],
        ["--image-size", "٣"],
        ["--batch", "0"],
        ["--image-size", "0"],
        ["--image-size", "axb"],
        ["--mean", "1,2"],
        ["--features", "--output", "top5"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_export_usage_errors_exit_2(checkpoint: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--ckpt", str(checkpoint), *arguments])
    assert caught.value.code == 2

"""`repvgg-trt fold`, as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from repvgg_deploy.cli.trt import main
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.images.decode import fit_image, letterbox_preprocessing, normalize
from repvgg_deploy.runtime.engine import Engine
from tests.graph.make_blocks import BLOCKS, Draw
from tests.runtime.make_model import make_onnx


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two blocks, and a sum that cannot be one convolution."""
    draw = Draw()
    x = draw.node("Relu", [BLOCKS["MobileOne depthwise"][0](draw, "x")])
    x = draw.node("Relu", [draw.sum(draw.conv_bn(x), draw.conv_bn(x, kernel=1), draw.bn(x))])
    x = draw.node("Relu", [draw.sum(draw.conv_bn(x), draw.pool(x, count_include_pad=0))])
    path = tmp_path / "m.onnx"
    onnx.save(draw.model(x), path)
    return path


def test_fold_writes_a_file_and_a_table_of_what_it_saves(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.onnx")
    assert main(["fold", str(model), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for part in (
        "regions folded",
        "count_include_pad=0",
        "  region  branches  kernels",
        "1×1 + 4 of 3×3 → 3×3 depthwise",
        "3×3 + 1×1 → 3×3 ",
        "checks against the file as it was given",
        f"written   {out} (",
        "  total",
    ):
        assert part in printed.out
    # per pixel: one 3×3 of 8 channels, depthwise, and two dense ones
    work = "M → 30.08 M multiply-accumulates in these, of an image of 128×192"
    assert 128 * 192 * (9 * 8 + 2 * 9 * 64) == 30_081_024 and work in printed.out
    table = printed.out[printed.out.index("  region") :]
    assert re.search(r"^  total +-\d\d% ", table, re.MULTILINE)
    assert max(len(line) for line in table.splitlines()) <= 80
    assert printed.err == f"next: repvgg-trt inspect {out}\n"
    assert main(["inspect", "--full", str(out)]) == 0
    described = capsys.readouterr().out
    assert "fold: opset 17, regions_folded" in described and "checkpoint     none: an ONNX of others" in described


def test_fold_table_fits_80_columns_whatever_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = Draw()
    kernels = [draw.conv_bn("x", kernel=n, group=g) for n, g in ((1, 8), (3, 2), (5, 4), (7, 2), (9, 2), (1, 2))]
    given = draw.model(draw.sum(*kernels, draw.bn("x")))
    for node in given.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name.startswith("t"):
                    names[index] = f"/model/backbone/stage4/blocks.12/very/long/{name}"
    given.graph.output[0].name = given.graph.node[-1].output[0]
    onnx.save(given, tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), "--describe"]) == 0
    table = capsys.readouterr().out.partition("\n")[2]
    assert "…" in table and max(len(line) for line in table.splitlines()) <= 80


def test_fold_describe_writes_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold", str(model), "--describe"]) == 0
    printed = capsys.readouterr()
    assert "regions to fold" in printed.out and "written" not in printed.out
    assert printed.err == f"next: repvgg-trt fold {model} --out OUT.onnx\n"
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


def test_fold_with_json_prints_one_object(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.onnx")
    assert main(["fold", str(model), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["bytes_after"]) == ("written", out.stat().st_size)
    assert [one["kernel_after"] for one in found["folds"]][:2] == ["3×3 depthwise", "3×3"]
    assert found["folds"][1]["macs_before"] > found["folds"][1]["macs_after"] == 576
    assert "count_include_pad=0" in found["left"][0]["reason"]
    pixels = 128 * 192
    assert found["macs_after"] == pixels * sum(one["macs_after"] for one in found["folds"])
    assert found["macs_before"] == pixels * sum(one["macs_before"] for one in found["folds"])
    assert main(["fold", str(model), "--describe", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["status"], described["metadata"], described["checks"]) == ("described", None, [])
    assert described["folds"] == found["folds"]


def test_fold_output_cuts_the_rest_off(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(node.output[0] for node in onnx.load(model).graph.node if node.op_type == "AveragePool")
    given = next(node.input[0] for node in onnx.load(model).graph.node if node.op_type == "AveragePool")
    out = model.with_name("out.onnx")
    assert main(["fold", str(model), "--out", str(out), "--output", given]) == 0
    assert [output.name for output in read_metadata(out).spec.outputs] == [given]
    assert "AveragePool" not in {node.op_type for node in onnx.load(out).graph.node} and name != given
    capsys.readouterr()
    assert main(["fold", str(model), "--describe", "--output", "raw"]) == 1
    assert "nothing to cut off" in capsys.readouterr().err


def test_fold_with_nothing_to_fold_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = Draw()
    onnx.save(draw.model(draw.node("Relu", [draw.conv("x")])), tmp_path / "m.onnx")
    assert main(["fold", str(tmp_path / "m.onnx"), "--describe"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith(": nothing to fold\n") and printed.err == ""


def test_fold_of_what_exists_needs_force(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.onnx")
    out.write_bytes(b"other")
    assert main(["fold", str(model), "--out", str(out)]) == 1
    assert "exists and differs" in capsys.readouterr().err
    assert main(["fold", str(model), "--out", str(out), "--force"]) == 0
    assert main(["fold", str(model), "--out", str(out)]) == 0
    assert "up to date" in capsys.readouterr().out


def test_fold_with_what_a_classifier_does_not_state_makes_it_recognise_images(
    tmp_path: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = onnx.load(make_onnx(tmp_path / "ours.onnx"))
    del foreign.metadata_props[:]
    given, out, names = tmp_path / "given.onnx", tmp_path / "out.onnx", tmp_path / "names.txt"
    onnx.save(foreign, given)
    names.write_text("".join(f"kind {index}\n" for index in range(7)), encoding="utf-8")
    stated = ["--mean", "123.675,116.28,103.53", "--std", "58.395,57.12,57.375", "--labels", str(names)]
    assert main(["fold", str(given), "--out", str(out), *stated, "--resize", "20"]) == 0
    spec = read_metadata(out).spec
    assert (spec.kind, spec.labels) == ("logits", tuple(f"kind {index}" for index in range(7)))
    assert spec.preprocessing is not None
    assert (spec.preprocessing.resize_short, spec.preprocessing.crop) == (20, (16, 16))
    capsys.readouterr()
    assert main(["infer", str(out), str(sample_dir / "images")]) == 0
    assert "kind " in capsys.readouterr().out
    names.write_text("one\n", encoding="utf-8")
    assert main(["fold", str(given), "--out", str(out), "--labels", str(names), "--force"]) == 1
    assert "1 labels for the outputs logits" in capsys.readouterr().err
    assert main(["fold", str(given), "--out", str(out), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]) == 1
    assert "in units of 0–1" in capsys.readouterr().err


def test_fold_with_letterbox_runs_images_letterboxed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = onnx.load(make_onnx(tmp_path / "ours.onnx"))
    del foreign.metadata_props[:]
    given, out, photos = tmp_path / "given.onnx", tmp_path / "out.onnx", tmp_path / "photos"
    onnx.save(foreign, given)
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "tall.png")
    stated = ["--mean", "0,0,0", "--std", "255,255,255", "--letterbox", "9,8,7"]
    assert main(["fold", str(given), "--out", str(out), *stated]) == 0
    preprocessing = read_metadata(out).spec.preprocessing
    assert preprocessing == letterbox_preprocessing(16, 16, pad=(9, 8, 7))
    with Engine(out) as engine:
        expected = engine.infer(normalize(fit_image(pixels, preprocessing)[None], preprocessing))
        np.testing.assert_array_equal(engine.infer_images([photos / "tall.png"]), expected)
    capsys.readouterr()
    assert main(["infer", str(out), str(photos), "--top", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    assert found["predictions"][0]["class"] == expected.argmax()
    assert main(["inspect", "--full", str(out)]) == 0
    assert "letterboxed (bilinear) into 16×16, around it 9, 8, 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --out OUT.onnx, or --describe"),
        (["--describe", "--out", "o.onnx"], "cannot hold with --out"),
        (["--describe", "--force"], "cannot hold with --force"),
        (["--out", "o.onnx", "--std", "1,1,1"], "--mean and --std belong together"),
        (["--out", "o.onnx", "--resize", "256"], "--resize needs --mean and --std"),
        (["--out", "o.onnx", "--letterbox"], "--letterbox needs --mean and --std"),
        (
            ["--out", "o.onnx", "--mean", "0,0,0", "--std", "1,1,1", "--resize", "9", "--letterbox", "0,0,0"],
            "--resize and --letterbox cannot both hold",
        ),
        (["--out", "o.onnx", "--letterbox", "0,0,256"], "whole numbers of 0 to 255"),
    ],
)
def test_fold_options_that_cannot_hold_together_exit_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fold", "m.onnx", *options])
    assert caught.value.code == 2 and message in capsys.readouterr().err

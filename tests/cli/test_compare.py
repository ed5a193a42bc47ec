"""`repvgg-trt compare`, as a user calls it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.cli.compare import share_input
from repvgg_deploy.cli.trt import main
from repvgg_deploy.errors import InputError
from repvgg_deploy.evaluate.agreement import AgreementReport
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.images.calibration import load_calibration
from repvgg_deploy.images.decode import normalize
from repvgg_deploy.images.sets import SetOptions
from repvgg_deploy.precision.int8 import FAST, to_int8
from repvgg_deploy.precision.typed_model import write_typed
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.specs import codec
from tests.runtime.make_model import ModelOptions, make_metadata, make_onnx


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path, exported_sample: Path) -> Path:
    """The sample as FP32 and as INT8."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(exported_sample, folder / "fp32.onnx")
    images = load_calibration(
        sample_dir / "calib.npz", read_metadata(folder / "fp32.onnx").spec, options=SetOptions(64)
    )
    typed, _ = to_int8(folder / "fp32.onnx", images.batches, FAST)
    write_typed(folder / "int8.onnx", typed)
    return folder


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> AgreementReport:
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return codec.decode(AgreementReport, answer["report"])


def test_compare_of_int8_is_what_a_calculation_by_hand_gives(
    models: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = models / "fp32.onnx", models / "int8.onnx"
    report = ask(capsys, one, two, "--data", sample_dir / "eval.npz")
    with np.load(sample_dir / "eval.npz") as data, Engine(one) as fp32, Engine(two) as int8:
        batch = normalize(data["images"], fp32.spec.preprocessing)
        truth, found = fp32.infer(batch).astype(float), int8.infer(batch).astype(float)
        assert report.reference.top1 == (truth.argmax(1) == data["labels"]).mean()
        assert report.other.top1 == (found.argmax(1) == data["labels"]).mean()
    assert report.agreement == (truth.argmax(1) == found.argmax(1)).mean() > 0.97
    sqnr = 10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum())
    assert report.output.sqnr_db == pytest.approx(sqnr, abs=0.1)  # batches of another size sum in another order
    assert [layer.name for layer in report.layers][-1] == "linear"
    assert len(report.layers) == 14
    assert report.layers[-1].sqnr_db == pytest.approx(sqnr, abs=2)  # 64 images of the 400
    assert report.first_apart is None
    assert max(layer.largest_factor for layer in report.layers) > 1.2  # it was equalized


OTHER_FORMS = {
    "float32": (ModelOptions(), "logits"),
    "uint8": (ModelOptions(uint8=True), "logits"),
    "fixed batch": (ModelOptions(batch=3), "logits"),
    "any size": (ModelOptions(size=("height", "width")), "logits"),
    "probabilities": (ModelOptions(kind="probabilities"), None),
    "top-5": (ModelOptions(kind="top5"), None),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_compare_of_other_forms_of_one_network_finds_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, turned: bool
) -> None:
    options, kind = OTHER_FORMS[form]
    paths = [make_onnx(tmp_path / "one.onnx"), make_onnx(tmp_path / "two.onnx", options)]
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(10) % 7)
    report = ask(capsys, *(paths[::-1] if turned else paths), "--data", tmp_path / "set.npz", "--layer-images", 7)
    assert report.agreement == 1.0
    assert report.reference == report.other
    assert (report.output and report.output.kind) == kind
    # Float32 has 144 dB.
    assert report.output is None or report.output.sqnr_db > 100
    assert [layer.name for layer in report.layers] == ["conv", "logits"]
    assert all(layer.sqnr_db > 100 for layer in report.layers)


def test_compare_prints_a_summary_with_layers(
    models: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [models / "fp32.onnx", models / "int8.onnx", "--data", sample_dir / "eval.npz", "--limit", 60]
    assert main(["compare", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split(maxsplit=1)[1] == "int8.onnx with the reference fp32.onnx, 60 images"
    assert [line.split()[0] for line in lines[1:6]] == ["agreement", "logits", "top-1", "top-5", "data"]
    assert lines[6] == "layers (parted below 20 dB): they part nowhere"
    assert lines[8].split()[0] == "stage0.conv"


def test_compare_without_labels_leaves_accuracy_out_and_draws(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / f"{index}.png"
        )
    picture = tmp_path / "drawn" / "p.png"
    picture.parent.mkdir()
    report = ask(capsys, models / "fp32.onnx", models / "int8.onnx", "--data", tmp_path, "--plot", picture)
    assert report.images == 4
    assert report.reference is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    arguments = [models / "fp32.onnx", models / "int8.onnx", "--data", tmp_path / "0.png", "--layer-images", 0]
    assert main(["compare", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "layers not compared: not asked for" in printed
    assert "0.png: has no labels" in printed


def test_compare_says_which_folder_is_no_class_and_costs_the_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = make_onnx(tmp_path / "m.onnx"), tmp_path / "val"
    words = ["compare", str(model), str(model), "--data", str(data), "--layer-images", "0"]
    for name, is_known in (("class 0", True), ("wolf", False)):
        (data / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(data / name / "a.png")
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert ("top-1" in printed) is is_known
        assert ("not measured: " in printed and "the folder 'wolf' is no class of the model" in printed) is not is_known


def test_compare_of_different_networks_says_why_layers_are_left_out(
    models: Path, tmp_path: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (make_onnx(tmp_path / f"{classes}.onnx", ModelOptions(classes=classes)) for classes in (7, 8))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    assert main(["compare", str(one), str(two), "--data", str(tmp_path)]) == 1
    assert "has 7 classes" in capsys.readouterr().err
    assert main(["compare", str(models / "fp32.onnx"), str(one), "--data", str(sample_dir / "eval.npz")]) == 1
    assert "has 10 classes" in capsys.readouterr().err
    other = make_onnx(tmp_path / "seed.onnx", seed=5)
    report = ask(capsys, one, other, "--data", tmp_path / "a.png", "--plot", tmp_path / "agreement.png")
    assert report.layers_note == ""  # the same shapes: another training of one network can be compared
    fixed = [make_onnx(tmp_path / f"fixed{batch}.onnx", ModelOptions(batch=batch)) for batch in (2, 3)]
    assert "different fixed batches" in ask(capsys, *fixed, "--data", tmp_path / "a.png").layers_note


def test_compare_without_onnx_leaves_layers_out(
    models: Path, sample_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "repvgg_deploy.precision.layers", None)
    report = ask(capsys, models / "fp32.onnx", models / "int8.onnx", "--data", sample_dir / "eval.npz", "--limit", 5)
    assert "needs the package onnx" in report.layers_note
    assert report.images == 5


def test_models_that_see_other_images_are_refused() -> None:
    spec = make_metadata().spec
    assert spec.preprocessing is not None
    larger = dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, resize_short=20))
    with pytest.raises(InputError, match="do not see the same image"):
        share_input(spec, larger)
    with pytest.raises(InputError, match="do not see the same image"):
        share_input(spec, dataclasses.replace(spec, preprocessing=None))


def test_models_that_normalise_differently_see_the_same_pixels() -> None:
    spec = make_metadata().spec
    assert spec.preprocessing is not None
    other = dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, mean=(0.0, 0.0, 0.0)))
    inputs = share_input(spec, other)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert inputs.spec.input.dtype == "uint8"
    assert np.array_equal(inputs.reference(pixels), normalize(pixels, spec.preprocessing))
    assert np.array_equal(inputs.other(pixels), normalize(pixels, other.preprocessing))


@pytest.mark.parametrize(
    "arguments", [["a.onnx"], ["a.onnx", "b.onnx"], ["a.onnx", "b.onnx", "--data", "x", "--layer-images", "-1"]]
)
def test_compare_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2


def test_compare_of_a_missing_model_is_one_message(
    models: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(models / "fp32.onnx"), "nowhere.onnx", "--data", str(sample_dir / "eval.npz")]) == 1
    assert "nowhere.onnx: no such file" in capsys.readouterr().err

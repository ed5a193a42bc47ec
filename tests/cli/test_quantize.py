"""`repvgg-trt quantize`, as a user calls it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.cli.quantize_report import describe_demand, describe_sqnr
from repvgg_deploy.cli.trt import main
from repvgg_deploy.precision.metrics import Verification
from repvgg_deploy.runtime.engine import Engine
from tests.endless import Stage, start_endless
from tests.precision.make_chain import KINDS, ChainOptions, make_model, save
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture
def sample(exported_sample: Path, tmp_path: Path) -> Path:
    """The sample, with a few calibration images beside it."""
    for path in exported_sample.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / exported_sample.name


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two layers with random weights; images.npz beside it holds 40 random images."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    return save(tmp_path / "small.onnx", make_model(ChainOptions(widths=(8, 16), groups=(1, 1))))


@pytest.fixture
def real(sample_dir: Path) -> Path:
    return sample_dir / "calib.npz"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["quantize", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def accuracy(path: Path, sample_dir: Path) -> float:
    from repvgg_deploy.images.decode import normalize

    with np.load(sample_dir / "eval.npz") as data, Engine(path) as engine:
        logits = engine.infer(normalize(data["images"], engine.spec.preprocessing))
        return float((logits.argmax(axis=1) == data["labels"]).mean())


def test_quantize_takes_the_synthetic_images_beside_the_model(
    sample: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, sample, "--int8", "--fast")
    assert status == 0, err
    target = sample.with_name("sample-int8.onnx")
    lines = dict(re.findall(r"^(\S[\w ]*?)  +(\S.*)$", out, re.M))
    assert lines["quantized"] == f"{sample} (2.5 MB) to INT8, with FP16 for the rest"
    assert lines["calibration"] == (
        f"{sample.with_name('sample.calib.npz')}: 8 synthetic images, made from BatchNorm statistics, and 2 held "
        f"out to judge the result"
    )
    assert lines["INT8"] == "100.0% of the multiply-accumulates: every layer"
    assert re.fullmatch(
        r"\d+\.\d\d %: \d of 2 held-out images keep FP32's best class \(at least 97 % demanded\)", lines["agreement"]
    )
    assert re.fullmatch(rf"{re.escape(str(target))} \(0\.\d MB, 2\d% of the FP32 file\)", lines["written"])
    assert len(out.splitlines()) == 18 and "stage" in out.splitlines()[-1]
    assert err.splitlines()[-1] == f"next: repvgg-trt compare {sample} {target} --data PATH"
    assert accuracy(target, sample_dir) > 0.98


def test_demand_below_which_so_few_images_passed_says_why() -> None:
    # "83.33 %: 5 of 6 (at least 97 % demanded)" read as if a failure had been written.
    assert describe_demand(5 / 6, 0.97) == "at least 97 % demanded; of so few images one may differ"
    assert describe_demand(0.97, 0.97) == "at least 97 % demanded"


def test_sqnr_of_few_images_that_are_lost_stands_beside_that_of_most() -> None:
    lost, alike = (Verification(2000, True, 0.98, 0.0, 9.4, median_db=median) for median in (30.6, 10.0))
    assert describe_sqnr(lost).startswith("9.4 dB of the logits, 30.6 dB of the median image")
    assert describe_sqnr(alike) == "9.4 dB of the logits"


def test_quantize_with_real_images_keeps_the_accuracy(
    sample: Path, real: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(capsys, sample, "--int8", "--fast", "--calib", real, "--out", sample.with_name("o.onnx"))
    assert (answer["images"]["calibration"], answer["images"]["held_out"]) == (205, 51)
    assert answer["verification"]["agreement"] >= 0.98 and answer["verification"]["sqnr_db"] > 30
    assert answer["int8"]["held_out"]["agreement"] == answer["verification"]["agreement"]
    assert len(answer["int8"]["layers"]) == 14 and "scales" not in answer["int8"]
    assert answer["bytes_after"] < 0.3 * answer["bytes_before"]
    assert answer["metadata"]["history"][-1]["stage"] == "int8"
    assert accuracy(Path(answer["out"]), sample_dir) >= 0.99


def test_quantize_by_default_searches_and_rounds_to_second_order(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--calib", small.with_name("images.npz"), "--images", 14, "--min-agreement", 0]
    arguments = [small, "--int8", *images, "--target", "trt8"]
    options = ask(capsys, *arguments)["metadata"]["history"][-1]["options"]
    assert (options["rounding"], options["equalize"], options["target"]) == ("second_order", "measured", "trt8")
    _, out, _ = run(capsys, *arguments)
    assert re.search(r"^equalization .*exponents \S+ to \S+ by measured error", out, re.M)
    assert (
        "weights rounded so that each layer's output changes least; bias corrected" in out
        and "with FP32 for the rest" in out
    )


def test_quantize_by_statistics_says_that_nothing_was_verified(
    sample: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.with_name("sample.calib.npz").unlink()
    status, out, _ = run(capsys, sample, "--int8", "--calib", "statistics")
    assert status == 0
    assert "calibration   no images: ranges from the BatchNorm statistics of the checkpoint" in out
    assert "not verified  there are no images: nothing was compared with FP32" in out
    assert accuracy(sample.with_name("sample-int8.onnx"), sample_dir) > 0.97


@pytest.mark.parametrize("calib", [False, True])
def test_quantize_to_fp16(
    sample: Path, real: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str], calib: bool
) -> None:
    status, out, _ = run(capsys, sample, "--fp16", *(["--calib", real] if calib else []))
    assert status == 0
    assert ("measured on 256 images" if calib else "stated by the BatchNorm layers") in out
    assert ("256 of 256 images" if calib else "16 of 16 drawn images") in out
    assert "converted" in out and "50% of the FP32 file" in out
    assert accuracy(sample.with_name("sample-fp16.onnx"), sample_dir) == accuracy(sample, sample_dir)


def test_quantize_twice_is_up_to_date(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, small, "--fp16")[0] == 0
    assert "up to date" in run(capsys, small, "--fp16")[1]
    status, out, err = run(capsys, small, "--fp16", "--io", "fp16")
    assert (status, out) == (1, "") and "exists and differs" in err and "--force" in err
    assert run(capsys, small, "--fp16", "--io", "fp16", "--force")[0] == 0


def test_quantize_keeps_layers_and_shows_what_each_costs(
    sample: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--int8", "--fast", "--calib", real, "--images", 24]
    status, out, _ = run(capsys, sample, *few, "--keep", "stage0.conv", "linear", "--sensitivity")
    assert status == 0
    assert re.search(r"^INT8 +\d\d\.\d% of the multiply-accumulates; kept in FP16: stage0\.conv, linear$", out, re.M)
    assert "the layers that cost most when each alone is quantized" in out and "alone dB" in out
    assert main(["inspect", "--full", str(sample.with_name("sample-int8.onnx"))]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^precision +int8 \d\d\.\d %, fp16 \d+\.\d % of the multiply-accumulates$", printed, re.M)
    assert re.search(
        r"^ +int8: .*data_sha256 [0-9a-f]{16}…, .*images 24, kept stage0\.conv, linear, .*verified 12$", printed, re.M
    )
    assert re.search(r"^  linear .* fp16$", printed, re.M) and re.search(r"^  stage1\.0 .* int8$", printed, re.M)


def test_quantize_draws_layers_and_ranges(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = sample.with_name("p.png")
    assert run(capsys, sample, "--int8", "--fast", "--plot", picture)[0] == 0
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 1500
    for extra in (["--no-equalize"], ["--calib", "statistics"]):
        assert run(capsys, sample, "--int8", "--fast", "--plot", picture, "--force", *extra)[0] == 0
        with Image.open(picture) as image:
            assert image.width < 1200


def test_quantize_with_saved_scales_gives_the_same_file(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--calib", small.with_name("images.npz"), "--images", 14, "--min-agreement", 0]
    arguments = [small, "--int8", "--fast", "--no-equalize", *images]
    saved = small.with_name("s.json")
    status, out, _ = run(capsys, *arguments, "--save-scales", saved)
    assert status == 0 and f"scales written  {saved}" in out
    typed = small.with_name("small-int8.onnx")
    before = typed.read_bytes()
    arguments.remove("--no-equalize")
    assert run(capsys, *arguments, "--scales", saved)[0] == 0
    assert typed.read_bytes() == before
    status, _, err = run(capsys, *arguments, "--scales", saved, "--seed", 1)
    assert status == 1 and "of another images" in err


def test_quantize_below_the_gate_exits_1_and_names_layers(
    sample: Path, real: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chain = save(tmp_path / "m.onnx", make_model(KINDS["plain"]))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "i.npz", images=pixels)
    worst = ["--fast", "--method", "max", "--no-equalize"]
    status, out, err = run(capsys, chain, "--int8", *worst, "--calib", tmp_path / "i.npz", "--min-agreement", "1")
    assert (status, out) == (1, "")
    assert re.search(
        r"at least 100 % expected; the layers that cost most, each quantized alone: (\w+(\.conv)? \(\d+\.\d "
        r"dB\),? ?){3}",
        err,
    ), err
    assert "remedy: keep those layers in floating point (--keep " in err
    assert not (tmp_path / "m-int8.onnx").exists()


FAULTS: dict[str, tuple[list[str], str]] = {
    "no file": (["nowhere.onnx", "--fp16"], "no such file"),
    "folder": (["folder", "--fp16"], "is a folder, expected an ONNX file"),
    "truncated": (["short.onnx", "--int8"], "truncated"),
    "typed": (["half.onnx", "--int8", "--calib", "statistics"], "already"),
    "backbone of another": (["tiny.onnx", "--int8", "--calib", "statistics"], "no BatchNorm statistics"),
    "no images": (["tiny.onnx", "--int8"], r"INT8 needs calibration images: .* tiny\.calib\.npz is not there"),
    "no images for fp8": (["tiny.onnx", "--fp8"], "FP8 needs calibration images"),
    "damaged calibration": (["sample.onnx", "--int8"], "no calibration file that repvgg-export wrote"),
    "missing calibration": (["sample.onnx", "--int8", "--calib", "nowhere"], "no such file or folder"),
    "empty folder": (["sample.onnx", "--int8", "--calib", "folder"], "no image found"),
    "one image": (["sample.onnx", "--int8", "--calib", "one.png"], "at least 8 images .* found 1"),
    "one image for ever": (["sample.onnx", "--int8", "--calib", "alike.npz"], "all 20 images are alike"),
    "wrong size": (["sample.onnx", "--int8", "--calib", "large.npz"], "expected images of 32×32 pixels, found 40×40"),
    "nan": (["sample.onnx", "--int8", "--calib", "nan.npz"], "NaN"),
    "layer": (
        ["sample.onnx", "--int8", "--fast", "--calib", "good.npz", "--keep", "stage9"],
        "no layer is called 'stage9'",
    ),
    "exponent": (["sample.onnx", "--int8", "--calib", "good.npz", "--exponent", "2"], "between 0 and 1"),
    "percentile": (
        ["sample.onnx", "--int8", "--calib", "good.npz", "--method", "percentile", "--percentile", "nan"],
        "between 50 and 100",
    ),
    "drop": (["sample.onnx", "--int8", "--calib", "good.npz", "--max-drop", "-1"], "between 0 and 100"),
    "agreement": (["sample.onnx", "--int8", "--min-agreement", "97"], "share from 0 to 1"),
    "decibels": (["sample.onnx", "--int8", "--calib", "good.npz", "--max-drop", "201 dB"], "between 0 and 200 dB"),
    "metric": (["sample.onnx", "--int8", "--metric", "nowhere:map"], "there is no module nowhere"),
    "plot": (["sample.onnx", "--int8", "--plot", "p.jpg"], r"ends in \.png"),
    "plot over output": (["sample.onnx", "--int8", "--plot", "p.png", "--out", "p.png"], "would replace"),
    "out over input": (["sample.onnx", "--fp16", "--out", "sample.onnx"], "would replace"),
    "scales": (
        ["sample.onnx", "--int8", "--calib", "good.npz", "--scales", "short.onnx"],
        "not a calibration that --save-scales wrote",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_quantize_that_cannot_be_is_one_message(
    fault: str, sample: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sample.parent
    monkeypatch.chdir(folder)
    Path("folder").mkdir()
    Path("short.onnx").write_bytes(sample.read_bytes()[:-100])
    Path("sample.calib.npz").write_bytes(b"PK damaged")
    save(Path("tiny.onnx"), make_model())
    if fault == "typed":
        assert run(capsys, "sample.onnx", "--fp16", "--out", "half.onnx")[0] == 0
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    Image.fromarray(pixels[0]).save("one.png")
    for name, images in (
        ("good", pixels),
        ("alike", pixels[:1].repeat(20, 0)),
        ("large", np.zeros((9, 40, 40, 3), np.uint8)),
    ):
        np.savez(f"{name}.npz", images=images)
    np.savez("nan.npz", images=np.full((9, 3, 32, 32), np.nan, np.float32))
    before = sorted(folder.rglob("*"))
    arguments, message = FAULTS[fault]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert re.search(message, err), err
    assert "remedy:" in err and "unexpected" not in err and "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


USAGE = {
    "neither": ([], "one of the arguments --fp16 --int8 --fp8 is required"),
    "both": (["--fp16", "--int8"], "not allowed with"),
    "fp16 drop": (["--fp16", "--max-drop", "0.3"], "--max-drop is of --int8"),
    "fp16 no drop": (["--fp16", "--max-drop", "0"], "--max-drop is of --int8"),
    "fp16 no exponent": (["--fp16", "--exponent", "0"], "--exponent is of --int8"),
    "fp16 target": (["--fp16", "--target", "trt8"], "--target is of --int8"),
    "fp16 statistics": (["--fp16", "--calib", "statistics"], "--calib statistics is of --int8"),
    "fp16 plot": (["--fp16", "--plot", "p.png"], "--plot is of --int8"),
    "trt8 fp16": (["--int8", "--target", "trt8", "--io", "fp16"], "cannot hold with --io fp16"),
    "percentile": (["--int8", "--percentile", "99"], "needs --method percentile"),
    "exponent": (["--int8", "--no-equalize", "--exponent", "1"], "cannot hold with --no-equalize"),
    "fast": (["--int8", "--fast", "--rounding", "second_order"], "--fast rounds to nearest"),
    "scales": (["--int8", "--scales", "s", "--method", "max"], "cannot hold with --method"),
    "statistics scales": (["--int8", "--calib", "statistics", "--scales", "s"], "--scales needs images"),
    "statistics drop": (["--int8", "--calib", "statistics", "--max-drop", "1"], "--max-drop needs images"),
    "statistics no drop": (["--fp8", "--calib", "statistics", "--max-drop", "0"], "--max-drop needs images"),
    "saved scales": (["--int8", "--scales", "s.json", "--exponent", "0"], "it cannot hold with --exponent"),
    "statistics agreement": (
        ["--int8", "--calib", "statistics", "--min-agreement", "1"],
        "--min-agreement needs images",
    ),
    "statistics rounding": (
        ["--int8", "--calib", "statistics", "--rounding", "second_order"],
        "second_order needs images",
    ),
    "statistics plot": (["--int8", "--calib", "statistics", "--no-equalize", "--plot", "p.png"], "nothing to draw"),
    "images": (["--int8", "--images", "0"], "at least 1"),
    "seed": (["--int8", "--seed", "-1"], "at least 0"),
    "number": (["--int8", "--max-drop", "much"], "expected a loss such as 0.3, or decibels such as 24dB, found 'much'"),
    "fp16 decibels": (["--fp16", "--max-drop", "24dB"], "--max-drop is of --int8"),
    "score of nothing": (["--int8", "--min-metric", "0.5"], "--min-metric needs --metric"),
    "two judges": (["--int8", "--metric", "m:f", "--min-sqnr", "9"], "--metric judges in place of --min-sqnr"),
}


@pytest.mark.parametrize("name", USAGE)
def test_quantize_usage_errors(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = USAGE[name]
    with pytest.raises(SystemExit) as caught:
        main(["quantize", "m.onnx", *arguments])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in err and err.startswith("usage: repvgg-trt quantize")


def test_quantize_of_a_backbone_says_how_near_each_output_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m.onnx", make_model(KINDS["features"]))
    np.savez(tmp_path / "i.npz", images=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    status, out, err = run(capsys, model, "--int8", "--fast", "--calib", tmp_path / "i.npz", "--min-sqnr", 10)
    assert status == 0
    assert (
        err.splitlines()[-1] == f"next: repvgg-trt inspect {tmp_path / 'm-int8.onnx'}"
    )  # `compare` is for classifiers
    assert re.search(
        r"SQNR \(error\) +stage1 \d+\.\d dB \(\d+\.\d+%\), stage2 \d+\.\d dB \(\d+\.\d+%\) on \d+ held-out images "
        r"\(at least 10 dB each\)",
        out,
    )
    assert "agreement  " not in out


@pytest.mark.parametrize(("precision", "falls_to"), [("int8", "8"), ("fp8", "96.")])
def test_quantize_keeps_layers_for_a_measure_of_ones_own_and_says_what_it_gave(
    precision: str, falls_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measure that falls by 1 for every hundredth of the last map's size that the typed graph is off."""
    model = save(tmp_path / "m.onnx", make_model(KINDS["features"]))
    np.savez(tmp_path / "i.npz", images=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    (tmp_path / "nearness.py").write_text(
        "import numpy as np\nbatch = np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)\n"
        "truth = []\ndef score(run):\n    found = run(batch)['stage2']\n    truth.append(found)\n"
        "    return 100 - 100 * np.abs(found - truth[0]).mean() / np.abs(truth[0]).mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nearness", raising=False)
    arguments = [model, f"--{precision}", "--fast", "--calib", "i.npz", "--metric", "nearness:score"]
    title, other = precision.upper(), {"int8": "FP8", "fp8": "INT8"}[precision]
    status, out, err = run(capsys, *arguments, "--min-metric", "99.9")
    assert (status, out) == (1, "") and other not in err
    assert f"{title} is too far from FP32: nearness:score falls from 100 to {falls_to}" in err
    status, out, err = run(capsys, *arguments, "--max-drop", "2", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["score"]["metric"] == "nearness:score" and found["score"]["least"] == 98
    assert 98 <= found["score"]["found"] < 100 and "stage2.conv" in found[precision]["kept"]
    assert found[precision]["requantized"] == []
    assert {"name", "sqnr_db", "relative"} == set(found["verification"]["outputs"][0])
    status, out, err = run(capsys, *arguments, "--max-drop", "2", "--out", "again.onnx")
    flat = " ".join(out.split())
    assert re.search(r"score nearness:score gives 9\d\.\d+, FP32 100 \(at least 98 demanded\)", flat), out
    assert f" to {title}, with FP16 for the rest" in flat and other not in flat


def test_no_drop_keeps_layers_until_no_image_changes_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m.onnx", make_model(KINDS["plain"]))
    np.savez(tmp_path / "i.npz", images=np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), np.uint8))
    arguments = [model, "--fp8", "--fast", "--calib", tmp_path / "i.npz", "--images", 300, "--min-agreement", 0.5]
    before = ask(capsys, *arguments)
    assert before["verification"]["expected_drop"] > 0
    after = ask(capsys, *arguments, "--max-drop", "0", "--force")
    assert (after["verification"]["expected_drop"], after["verification"]["agreement"]) == (0, 1)
    assert len(after["fp8"]["kept"]) > len(before["fp8"]["kept"])


@pytest.mark.parametrize("kind", ["plain", "uint8_top5", "probabilities"])
def test_quantize_other_kinds_from_a_folder_of_photos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(24):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
    (folder / "0.jpg").write_bytes(b"broken")
    model = save(tmp_path / "m.onnx", make_model(KINDS[kind]))
    status, out, err = run(capsys, model, "--int8", "--fast", "--calib", folder, "--min-agreement", "0.5")
    assert status == 0, err
    assert re.search(r": 20 images, and 4 held out to judge the result; 1 could not be read$", out, re.M)
    assert "1 of 25 images could not be read" in err


def test_interrupted_quantize_leaves_nothing(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = sorted(sample.parent.iterdir())
    stage, marker = (
        Stage("repvgg_deploy.precision.quantization", "to_int8"),
        tmp_path_factory.mktemp("marker") / "reached",
    )
    process = start_endless("repvgg_deploy.cli.trt", ["quantize", sample, "--int8"], stage, marker)
    assert len(list(sample.parent.iterdir())) == len(before) + 1  # the hidden partial file
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out) == (130, ""), err
    assert err.endswith("interrupted\n")
    assert sorted(sample.parent.iterdir()) == before

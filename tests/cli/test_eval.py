"""`repvgg-trt eval`, as a user calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.cli.eval import _matrix
from repvgg_deploy.cli.terminal import plain
from repvgg_deploy.cli.trt import main
from repvgg_deploy.evaluate.accuracy import AccuracyReport, ConfusionMatrix
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.results import TopK
from repvgg_deploy.specs import codec
from tests.runtime.make_model import ModelOptions, make_onnx


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "m.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images a class of the tiny model, in folders named as its labels."""
    for label in range(7):
        place = tmp_path / "val" / f"class {label}"
        place.mkdir(parents=True)
        for index in range(2):
            pixels = np.random.default_rng(10 * label + index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path / "val"


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_eval_of_the_sample_gives_the_accuracy_of_its_card(
    exported_sample: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(capsys, exported_sample, "--data", sample_dir / "eval.npz", "--threads", 2)
    report = codec.decode(AccuracyReport, answer["report"])
    with np.load(sample_dir / "eval.npz") as data, Engine(exported_sample) as engine:
        from repvgg_deploy.images.decode import normalize

        best = engine.infer(normalize(data["images"], engine.spec.preprocessing)).argmax(axis=1)
        assert report.top1 == (best == data["labels"]).mean() > 0.95
    assert report.images == 400
    assert answer["labels_from"] == "labels are class indices"
    assert "ONNX Runtime" in answer["backend"]
    assert report.inference_images_per_second > 0


def test_eval_prints_a_summary_and_the_worst_classes(
    exported_sample: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["eval", str(exported_sample), "--data", str(sample_dir / "eval.npz"), "--limit", "390", "--worst", "2"])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split(maxsplit=1) == ["images", "390; labels are class indices"]
    assert [line.split()[0] for line in lines[1:5]] == ["top-1", "top-5", "speed", "data"]
    assert "like that of training" in lines[4]
    assert lines[5] == "worst classes"
    assert lines[9] == "rows: the right class, columns: what the model said"
    assert lines[10].split() == [str(index) for index in range(10)]
    matrix = [[int(cell.replace("·", "0")) for cell in line.split()] for line in lines[11:]]
    assert [row[0] for row in matrix] == list(range(10))
    assert sum(sum(row[1:]) for row in matrix) == 390


def test_matrix_of_long_names_fits_80_columns() -> None:
    names = tuple(f"English springer, English springer spaniel {index}" for index in range(10))
    lines = _matrix(ConfusionMatrix(tuple(range(10)), names, ((123,) * 10,) * 10, (0,) * 10))
    assert "English springer, Eng… (3)" in "\n".join(lines)
    assert max(len(plain(line)) for line in "\n".join(lines).splitlines()) <= 80


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(),
        ModelOptions(batch=3),
        ModelOptions(uint8=True),
        ModelOptions(kind="top5"),
        ModelOptions(half=True),
    ],
)
def test_eval_of_every_kind_of_model_agrees_with_the_engine(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], options: ModelOptions
) -> None:
    path = make_onnx(tmp_path / "kind.onnx", options)
    report = ask(capsys, path, "--data", folder, "--batch-size", 4)["report"]
    files = sorted(folder.rglob("*.png"))
    with Engine(path) as engine:
        found = engine.infer_images(files)
    best = found.classes[:, 0] if isinstance(found, TopK) else found.argmax(axis=1)
    labels = np.array([int(file.parent.name.split()[1]) for file in files])
    assert report["images"] == 14
    assert report["top1"] == (best == labels).mean()


def test_eval_skips_an_unreadable_image_with_a_warning(
    tmp_path: Path, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "class 3" / "1.png").write_bytes(b"broken")
    assert main(["eval", str(model), "--data", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "1 more could not be read" in printed.out
    assert "skipped" in printed.err
    assert "1.png" in printed.err
    (folder / "class 4" / "1.png").write_bytes(b"")
    assert main(["eval", str(model), "--data", str(folder)]) == 1
    assert "more than 10%" in capsys.readouterr().err


def test_eval_draws_a_picture_and_does_not_overwrite_another(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    arguments = ["eval", str(model), "--data", str(folder), "--plot", str(picture)]
    assert main(arguments) == 0
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 500
    before = picture.read_bytes()
    assert main(arguments) == 0  # the same picture: up to date
    assert main([*arguments, "--limit", "9"]) == 1
    printed = capsys.readouterr()
    assert "images  9;" in printed.out  # the figures are not lost
    assert "--force" in printed.err
    assert picture.read_bytes() == before
    assert main([*arguments, "--limit", "9", "--force"]) == 0
    assert picture.read_bytes() != before


def test_eval_that_is_perfect_draws_its_accuracy(tmp_path: Path, model: Path, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    with Engine(model) as engine:
        file = next(folder.rglob("*.png"))
        best = int(engine.infer_images([file]).argmax())
    (tmp_path / "one.csv").write_text(f"{file},{best}\n")
    assert main(["eval", str(model), "--data", str(tmp_path / "one.csv"), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000


FAULTS: dict[str, tuple[list[str], str]] = {
    "no data": (["--data", "nowhere"], "no such file or folder"),
    "no labels": (["--data", "val/class 0"], "one sub-folder a class"),
    "plot name": (["--data", "val", "--plot", "p.jpg"], r"ends in \.png"),
    "plot folder": (["--data", "val", "--plot", "nowhere/p.png"], "in a folder that exists"),
    "label": (["--data", "wrong.csv"], "label 7 is out of range: expected 0 to 6"),
    "cuda": (["--data", "val", "--device", "cuda"], "cuda"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_eval_that_cannot_be_is_one_message(
    fault: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    monkeypatch.chdir(folder.parent)
    Path("wrong.csv").write_text("val/class 0/0.png,7\n")
    arguments, message = FAULTS[fault]
    assert main(["eval", str(model), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err), printed.err
    assert "remedy:" in printed.err


def test_eval_of_a_backbone_is_refused(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_onnx(tmp_path / "features.onnx", ModelOptions(kind="features"))
    assert main(["eval", str(path), "--data", str(folder)]) == 1
    assert "gives features, not classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["--data", "x", "--limit", "0"], ["--data", "x", "--batch-size", "-1"], ["--data", "x", "--worst", "a"]],
)
def test_eval_usage_errors(model: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(model), *arguments])
    assert caught.value.code == 2


def test_eval_says_what_it_leaves_out_and_counts_images_by_content(
    tmp_path: Path, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "class 3" / "1.png").rename(folder / "class 3" / "1.jfif_large")
    (folder / ".DS_Store").touch()
    (folder / "class 3" / "readme").write_text("text")
    found = ask(capsys, model, "--data", folder)
    assert found["report"]["images"] == 14
    assert found["left_out"] == "left out: 1 hidden (.DS_Store); 1 no image (class 3/readme)"
    assert found["likeness"]["verdict"] == "not checked"


def test_eval_of_numbers_of_0_to_1_is_refused_with_the_conversion(
    tmp_path: Path, exported_sample: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(sample_dir / "eval.npz") as data:
        images = data["images"].transpose(0, 3, 1, 2).astype(np.float32) / 255
        np.savez(tmp_path / "unit.npz", images=images, labels=data["labels"])
    words = ["eval", str(exported_sample), "--data", str(tmp_path / "unit.npz")]
    assert main(words) == 1
    assert "images = (255 * images - mean) / std" in capsys.readouterr().err
    assert main([*words, "--accept-data"]) == 0
    assert "accepted all the same" in capsys.readouterr().out


def test_eval_by_sorted_folders_only_where_it_is_asked_for(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(11):
        (tmp_path / "set" / f"{index:02} z").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / f"{index:02} z" / "a.png")
    classes = Engine(model).spec.outputs[0].shape[-1]
    for extra in range(classes, 11):
        shutil.rmtree(tmp_path / "set" / f"{extra:02} z")
    assert main(["eval", str(model), "--data", str(tmp_path / "set")]) == 1
    assert "--sorted-folders" in capsys.readouterr().err
    assert "sorted order" in ask(capsys, model, "--data", tmp_path / "set", "--sorted-folders")["labels_from"]

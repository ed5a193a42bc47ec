"""`repvgg-trt infer`, as a user calls it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.cli.trt import main
from repvgg_deploy.runtime.engine import Engine
from tests.runtime.make_model import ModelOptions, make_onnx


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "m.onnx")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
    return folder


def predict(engine: Engine, path: Path) -> tuple[list[int], list[float]]:
    logits = engine.infer_images([path])
    assert isinstance(logits, np.ndarray)
    powers = np.exp(logits[0].astype(np.float64))
    probabilities = powers / powers.sum()
    order = np.argsort(-probabilities)[:5]
    return order.tolist(), probabilities[order].tolist()


def test_infer_prints_the_best_classes_of_each_image(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["infer", str(model), str(images)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    blocks = re.split(r"^(?=\S)", printed.out, flags=re.MULTILINE)[1:]
    assert [block.splitlines()[0] for block in blocks] == [str(images / f"{index}.png") for index in range(3)]
    with Engine(model) as engine:
        for index, block in enumerate(blocks):
            classes, probabilities = predict(engine, images / f"{index}.png")
            rows = [re.fullmatch(r"  (\d)  (class \d)  (0\.\d{4})", line) for line in block.splitlines()[1:]]
            assert [row and row.groups() for row in rows] == [
                (str(rank), f"class {best}", f"{probability:.4f}")
                for rank, (best, probability) in enumerate(zip(classes, probabilities, strict=True), start=1)
            ]


def test_infer_with_json_prints_one_object(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = images / "1.png"
    assert main(["infer", str(model), str(path), "--json", "--top", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    with Engine(model) as engine:
        classes, probabilities = predict(engine, path)
    assert answer["model"] == str(model)
    predictions = answer["images"][0]["predictions"]
    assert [p["class"] for p in predictions] == classes[:2]
    assert [p["label"] for p in predictions] == [f"class {index}" for index in classes[:2]]
    assert [p["probability"] for p in predictions] == pytest.approx(probabilities[:2], rel=1e-9)


@pytest.mark.parametrize("batch_size", ["1", "2", "16"])
def test_infer_with_a_bad_image_answers_the_others_and_exits_1(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str], batch_size: str
) -> None:
    (images / "1b.jpg").write_bytes(b"no picture")
    arguments = ["infer", str(model), str(images), str(images / "missing.png"), "--batch-size", batch_size]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert re.findall(r"(\d)\.png\n", printed.out) == ["0", "1", "2"]
    assert re.findall(r"error: .*/(\S+): ", printed.err) == ["1b.jpg", "missing.png"]
    assert printed.err.count("remedy: ") == 2
    assert main([*arguments, "--json"]) == 1
    answers = json.loads(capsys.readouterr().out)["images"]
    assert [Path(answer["image"]).name for answer in answers if "error" in answer] == ["1b.jpg", "missing.png"]
    assert all(answer["remedy"] for answer in answers if "error" in answer)
    assert sum("predictions" in answer for answer in answers) == 3


def test_infer_of_a_decompression_bomb_gives_one_message_and_no_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 9_000)).save(path)
    assert main(["infer", str(model), str(path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {path}: the image has 10000×9000 = 90,000,000 pixels")
    assert second.startswith("  remedy: shrink")


def test_infer_of_a_folder_without_images_is_named(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    assert main(["infer", str(model), str(tmp_path / "nothing"), str(images / "0.png")]) == 1
    printed = capsys.readouterr()
    assert "nothing: no image found there" in printed.err
    assert "0.png" in printed.out


@pytest.mark.parametrize("kind", ["logits", "probabilities", "top5"])
def test_infer_of_every_kind_of_classifier_prints_the_same_order(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    found = {}
    for name in ("logits", kind):
        path = make_onnx(tmp_path / f"{name}.onnx", ModelOptions(kind=name))
        assert main(["infer", str(path), str(images / "0.png"), "--json"]) == 0
        found[name] = [p["class"] for p in json.loads(capsys.readouterr().out)["images"][0]["predictions"]]
    assert len(found[kind]) == 5
    assert found[kind] == found["logits"]


def test_infer_with_labels_from_a_file_prints_them(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"Tier {index}\r\n" for index in range(7)), encoding="utf-8-sig")
    assert main(["infer", str(model), str(images / "0.png"), "--labels", str(labels), "--top", "1"]) == 0
    assert re.search(r"  1  Tier \d  0\.\d{4}\n$", capsys.readouterr().out)


def test_infer_without_labels_prints_class_numbers(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_onnx(tmp_path / "m.onnx", ModelOptions(labels=False))
    assert main(["infer", str(model), str(images / "0.png"), "--json"]) == 0
    assert {p["label"] for p in json.loads(capsys.readouterr().out)["images"][0]["predictions"]} == {None}
    assert main(["infer", str(model), str(images / "0.png")]) == 0
    assert "class " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"only\ntwo\n", "holds 2 labels, and the model has 7 classes"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_infer_with_unfit_labels_is_refused(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    labels = tmp_path / "labels.txt"
    if content is not None:
        labels.write_bytes(content)
    assert main(["infer", str(model), str(images), "--labels", str(labels)]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (ModelOptions(kind="features"), [], "gives features, not classes"),
        (ModelOptions(kind="module"), [], "gives module, not classes"),
        (ModelOptions(preprocessing=False), [], "does not say how an image becomes its input"),
        (ModelOptions(kind="top5"), ["--top", "6"], "--top 6 asks for more"),
    ],
    ids=str,
)
def test_infer_of_unfit_model_is_refused(
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    options: ModelOptions,
    arguments: list[str],
    message: str,
) -> None:
    model = make_onnx(tmp_path / "m.onnx", options)
    assert main(["infer", str(model), str(images), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_infer_searches_folders_and_says_what_it_leaves_out(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "deep").mkdir()
    (images / "0.png").rename(images / "deep" / "no suffix")
    (images / "._1.png").write_bytes(b"\0\5\x16\7")
    (images / "notes.txt").write_text("notes")
    assert main(["infer", str(model), str(images), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [Path(image["image"]).name for image in found["images"]] == ["1.png", "2.png", "no suffix"]
    assert found["left_out"] == {"hidden": ["._1.png"], "no_image": ["notes.txt"], "without_images": []}
    assert "left out: 1 hidden (._1.png); 1 no image (notes.txt)" in printed.err


def test_infer_of_one_image_on_standard_input(
    model: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for words in ([str(images / "1.png")], ["-"]):
        with (images / "1.png").open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            assert main(["infer", str(model), *words, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"][0]["predictions"])
    assert answers[0] == answers[1]


def test_infer_of_a_pipe_is_refused_and_not_waited_for(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(images / "pipe.png")
    assert main(["infer", str(model), str(images)]) == 1
    assert f"{images / 'pipe.png'}: is a pipe" in capsys.readouterr().err


def test_infer_with_a_max_value_reads_12_bits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (16, 16))
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "eight.png")
    # 4095 is 255 × 16 + 15: what v becomes that reads as v again.
    Image.fromarray((grey * 4095 // 255).astype(np.uint16)).save(tmp_path / "twelve.png")

    def ask(*words: object) -> object:
        assert main(["infer", str(model), *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["images"][0]["predictions"]

    assert ask(tmp_path / "twelve.png", "--max-value", 4095) == ask(tmp_path / "eight.png")
    assert main(["infer", str(model), str(tmp_path / "twelve.png")]) == 0
    assert "--max-value 4095" in capsys.readouterr().err

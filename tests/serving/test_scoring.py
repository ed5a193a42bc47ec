"""Batch scoring: every image once, in constant memory, whatever interrupts it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy import Engine
from repvgg_deploy.cli.trt import main
from repvgg_deploy.errors import InputError
from repvgg_deploy.images import ahead
from repvgg_deploy.serving.scoring import Scorer, ScoringOptions, score
from repvgg_deploy.serving.tables import GrowingTable
from tests.runtime.make_model import ModelOptions, make_onnx


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "model.onnx", ModelOptions())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random, folder = np.random.default_rng(0), tmp_path / "photos"
    for index in range(12):
        path = folder / f"{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    (folder / "1" / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_of_a_folder_has_the_answers_of_classify_and_what_is_wrong_with_the_rest(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    assert main(["infer", str(model), str(photos), "--out", str(out), "--top", "2", "--batch-size", "5"]) == 0
    said = capsys.readouterr().out
    assert "13 rows" in said
    assert "1 could not be read" in said
    assert "broken.jpg" in said
    table = read(out)
    assert [row["image"] for row in table] == sorted(str(path) for path in photos.rglob("*.*g"))
    with Engine(model) as engine:
        for row in table:
            if "broken" in row["image"]:
                assert row["class_1"] == row["label_2"] == ""
                assert row["error"]
                continue
            best, second = engine.classify(row["image"], top=2)
            assert (row["label_1"], row["class_2"], row["error"]) == (best.label, str(second.index), "")
            assert float(row["score_1"]) == pytest.approx(best.score, rel=1e-5)


def test_table_of_a_backbone_holds_each_output_averaged_over_the_image(photos: Path, tmp_path: Path) -> None:
    model = make_onnx(tmp_path / "f.onnx", ModelOptions(kind="features"))
    out = tmp_path / "table.jsonl"
    assert main(["infer", str(model), str(photos), "--out", str(out), "--features"]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    with Engine(model) as engine:
        result = engine.infer_images([rows[0]["image"]])
        outputs = result if isinstance(result, dict) else {"features": result}
        for name, value in outputs.items():
            vector = value[0].reshape(value.shape[1], -1).mean(1)
            np.testing.assert_allclose(rows[0][name], vector, rtol=1e-5, atol=1e-6)
    assert [row[next(iter(outputs))] for row in rows if row["error"]] == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScoringOptions(features=True), "gives logits, not features"),
        (ScoringOptions(top=0), "top: expected a whole number"),
    ],
)
def test_scorer_of_an_unfit_model_is_refused(model: Path, options: ScoringOptions, message: str) -> None:
    with Engine(model) as engine, pytest.raises(InputError, match=message):
        Scorer(engine, options)


def test_options_of_a_table_without_a_table_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["infer", str(model), "a.png", "--resume"])
    assert "--resume needs --out" in capsys.readouterr().err


def test_folder_without_images_is_refused_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["infer", str(model), str(tmp_path / "empty"), "--out", str(tmp_path / "t.csv")]) == 1
    assert "no image found there" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model.onnx"]


def test_folder_that_is_not_there_is_refused_and_a_file_among_others_is_a_row(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, out = tmp_path / "nowhere.png", tmp_path / "t.csv"
    assert main(["infer", str(model), str(nowhere), "--out", str(out)]) == 1
    assert f"{nowhere}: no such file or folder" in capsys.readouterr().err and not out.exists()
    assert main(["infer", str(model), str(photos / "1"), str(nowhere), "--out", str(out)]) == 0
    assert [row["image"] for row in read(out) if row["error"]] == [str(photos / "1" / "broken.jpg"), str(nowhere)]


def test_interrupted_run_keeps_what_it_computed_and_goes_on(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    command = ["infer", str(model), str(photos), "--out", str(out), "--batch-size", "2"]
    infer, calls = Engine.infer, []

    def interrupt(self: Engine, batch: np.ndarray) -> object:
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return infer(self, batch)

    monkeypatch.setattr(Engine, "infer", interrupt)
    assert main(command) == 130
    assert not out.exists()
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "9 of them now" in capsys.readouterr().out
    assert len({row["image"] for row in read(out)}) == len(read(out)) == 13


def test_arguments_that_overlap_give_each_image_once(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    assert main(["infer", str(model), str(photos), str(photos / "1"), "--out", str(out)]) == 0
    assert len(read(out)) == 13


@pytest.mark.slow
def test_run_killed_at_any_time_loses_and_doubles_no_row(model: Path, tmp_path: Path) -> None:
    random, folder, out = np.random.default_rng(0), tmp_path / "photos", tmp_path / "table.csv"
    folder.mkdir()
    pixels = Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8))
    for index in range(3000):
        pixels.save(folder / f"{index:05d}.png")
    program = (
        "import sys; from repvgg_deploy.serving import scoring; scoring.PART_ROWS = 50\n"
        "from repvgg_deploy.cli.trt import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "infer", str(model), str(folder), "--out", str(out), "--resume"]
    parts, kills = tmp_path / ".table.csv.parts", 0
    while not out.exists():
        before = len(list(parts.glob("*.csv"))) if parts.exists() else 0
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and (not parts.exists() or len(list(parts.glob("*.csv"))) < before + 9):
            os.sched_yield()
        if child.poll() is None:
            child.kill()
            kills += 1
        child.wait()
    if parts.exists():
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert kills >= 5
    names = [row["image"] for row in read(out)]
    assert sorted(names) == [str(folder / f"{index:05d}.png") for index in range(3000)]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    monkeypatch.setattr(ahead, "load_picture", lambda path, preprocessing: picture)
    peaks = []
    with Engine(model) as engine:
        answer = engine.infer(np.zeros((64, *engine.spec.input.shape[1:]), np.float32))
        monkeypatch.setattr(engine, "infer", lambda batch: answer[: len(batch)])
        scorer = Scorer(engine, ScoringOptions(top=1))
        for count in (6_000, 24_000):
            with GrowingTable(tmp_path / f"{count}.csv", scorer.columns, run={}) as table:
                tracemalloc.start()
                files = (f"{index}.png" for index in range(count))
                score(files, scorer, table, batch_size=64)
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
                assert table.finish() == count
    assert peaks[1] < 1.2 * peaks[0]

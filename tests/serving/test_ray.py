"""Scoring on Ray: rows as the Engine answers, and a worker that is killed loses none of them."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy import Engine
from repvgg_deploy.errors import InputError
from repvgg_deploy.serving.ray import ImageScorer
from repvgg_deploy.serving.scoring import ScoringOptions
from tests.contract.source_tree import ROOT
from tests.runtime.make_model import ModelOptions, make_onnx

pytest.importorskip("pyarrow", reason="pyarrow, of the extra dev, is not installed")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: make slow installs the extra ray"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "model.onnx", ModelOptions())


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    random, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{index:03d}.png" for index in range(40)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    paths[7].write_bytes(b"no image")
    return paths


@pytest.mark.parametrize("column", ["bytes", "image", "path"])
def test_scorer_answers_a_batch_of_each_kind_of_column(model: Path, photos: list[Path], column: str) -> None:
    paths = photos[:3] if column == "image" else photos[5:9]
    read = {"bytes": Path.read_bytes, "path": str, "image": lambda path: np.asarray(Image.open(path))}[column]
    values = [read(path) for path in paths]
    batch = {
        column: np.stack(values) if column == "image" else np.array(values, object),
        "path": np.array(list(map(str, paths))),
    }
    table = ImageScorer(str(model), ScoringOptions(top=2))(batch).to_pylist()
    assert [row["image"] for row in table] == [str(path) for path in paths]
    with Engine(model) as engine:
        for path, row in zip(paths, table, strict=True):
            if path == photos[7]:
                assert row["class_1"] is None
                assert "not an image" in row["error"]
            else:
                assert [row["label_1"], row["label_2"]] == [each.label for each in engine.classify(path, top=2)]


def test_scorer_of_a_batch_without_images_says_what_it_takes(model: Path) -> None:
    with pytest.raises(InputError, match="expected a column bytes, image, path, found text"):
        ImageScorer(str(model))({"text": np.array(["a"])})


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_with_a_worker_killed_midway_loses_and_doubles_no_row(
    model: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    workers = tmp_path / "workers"
    workers.mkdir()

    class Slow(ImageScorer):
        """Says who it is, and takes its time, so that it is killed in the middle of a batch."""

        def __init__(self, *args: object, **keywords: object) -> None:
            super().__init__(*args, **keywords)
            (workers / str(os.getpid())).touch()

        def __call__(self, batch: dict[str, object]) -> object:
            with (workers / str(os.getpid())).open("a") as file:
                file.write(".")
            time.sleep(0.3)
            return super().__call__(batch)

    def kill_one_at_its_second_batch() -> None:
        while not ended.is_set():
            for path in workers.iterdir():
                if path.stat().st_size >= 2:
                    os.kill(int(path.name), signal.SIGKILL)
                    killed.append(path.name)
                    return
            time.sleep(0.02)

    spec = importlib.util.spec_from_file_location("score_on_ray", ROOT / "examples" / "score_on_ray.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(example, "ImageScorer", Slow)
    ended = threading.Event()
    killed: list[str] = []
    killer = threading.Thread(target=kill_one_at_its_second_batch)
    example.start_ray(None, workers=2)
    try:
        killer.start()
        example.score(model, photos[0].parent, tmp_path / "scores", workers=2, batch_size=4, top=1)
        rows = ray.data.read_parquet(str(tmp_path / "scores")).take_all()
    finally:
        ended.set()
        killer.join()
        ray.shutdown()
    assert len(killed) == 1
    assert len(list(workers.iterdir())) >= 3  # two, and the one in its place
    assert sorted(row["image"] for row in rows) == [str(path) for path in photos]
    assert [row["image"] for row in rows if row["error"]] == [str(photos[7])]

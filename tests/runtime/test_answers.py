"""`classify`, `stream` and `logits`: labels with scores for images of every kind, decoded ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy import Engine
from repvgg_deploy.errors import InputError, ModelError
from repvgg_deploy.images import ahead
from repvgg_deploy.images.decode import load_image
from repvgg_deploy.runtime.results import rank_classes
from tests.runtime.make_model import ModelOptions, make_onnx


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(7)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(make_onnx(tmp_path / "model.onnx", ModelOptions())) as opened:
        yield opened


def test_classify_of_one_image_gives_labels_and_scores_best_first(engine: Engine, photos: list[Path]) -> None:
    found = engine.classify(photos[0], top=3)
    ((classes, scores),) = rank_classes(engine.infer_images([photos[0]]), engine.spec, 3)
    assert [each.index for each in found] == classes.tolist()
    assert [each.score for each in found] == scores.tolist()
    assert [each.label for each in found] == [engine.spec.labels[index] for index in classes]


def test_classify_takes_paths_bytes_pillow_images_and_pixels_alike(engine: Engine, photos: list[Path]) -> None:
    path, pixels = photos[1], np.asarray(Image.open(photos[1]))
    with Image.open(path) as opened:
        kinds = [path, str(path), path.read_bytes(), opened, pixels]
        answers = engine.classify(kinds)
        assert all(answer == engine.classify(path) for answer in answers)
        assert engine.classify(tuple(kinds)) == answers
    assert engine.classify([]) == []


def test_classify_of_an_image_that_pillow_has_not_turned_yet_turns_it(engine: Engine, tmp_path: Path) -> None:
    lying = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.png", exif=exif)
    with Image.open(tmp_path / "lying.png") as opened:
        assert engine.classify(opened) == engine.classify(tmp_path / "lying.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no image", "not an image"),
        (b"", "no bytes"),
        (np.zeros((4, 4), np.uint8), "expected pixels uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), "expected pixels uint8"),
        (np.zeros((4, 4, 3), np.float32), "expected pixels uint8"),
        (5, "found an object of type int"),
        ("missing.png", "no such image file"),
    ],
)
def test_classify_of_what_is_no_image_is_an_input_error(engine: Engine, image: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.classify(image)


def test_classify_of_a_damaged_image_of_pillow_is_an_input_error(engine: Engine, photos: list[Path]) -> None:
    photos[0].write_bytes(photos[0].read_bytes()[:500])
    with Image.open(photos[0]) as opened, pytest.raises(InputError, match="damaged or truncated"):
        engine.classify(opened)


def test_classify_without_labels_names_the_class(tmp_path: Path, photos: list[Path]) -> None:
    with Engine(make_onnx(tmp_path / "m.onnx", ModelOptions(labels=False))) as engine:
        best = engine.classify(photos[0])[0]
    assert best.label == f"class {best.index}"


def test_classify_of_more_classes_than_there_are_gives_all(tmp_path: Path, photos: list[Path]) -> None:
    with Engine(make_onnx(tmp_path / "m.onnx", ModelOptions(classes=7))) as engine:
        assert len(engine.classify(photos[0], top=100)) == 7
    with Engine(make_onnx(tmp_path / "t.onnx", ModelOptions(kind="top5"))) as engine:
        assert len(engine.classify(photos[0], top=9)) == 5


@pytest.mark.parametrize("top", [0, -1, 2.0, True, None])
def test_classify_with_a_wrong_top_is_an_input_error(engine: Engine, photos: list[Path], top: object) -> None:
    with pytest.raises(InputError, match="top: expected a whole number"):
        engine.classify(photos[0], top=top)


def test_classify_of_a_model_without_classes_or_preprocessing_is_an_input_error(
    tmp_path: Path, photos: list[Path]
) -> None:
    for name, options, message in (
        ("f", ModelOptions(kind="features"), "not classes"),
        ("p", ModelOptions(preprocessing=False), "does not say how an image becomes its input"),
    ):
        with Engine(make_onnx(tmp_path / f"{name}.onnx", options)) as engine, pytest.raises(InputError, match=message):
            engine.classify(photos[0])


def test_classify_of_a_model_that_answers_nan_is_a_model_error(
    engine: Engine, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "infer", lambda batch: np.full((len(batch), 7), np.nan, np.float32))
    with pytest.raises(ModelError, match=r"0\.png: the model answers with NaN"):
        engine.classify(photos[0])


def test_stream_yields_in_order_in_full_batches_and_goes_on_after_what_is_no_image(
    engine: Engine, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos[2].write_bytes(b"not an image")
    sizes, infer = [], engine.infer

    def count(batch: np.ndarray) -> object:
        sizes.append(len(batch))
        return infer(batch)

    monkeypatch.setattr(engine, "infer", count)
    answers = list(engine.stream(iter(photos), top=1, batch_size=4))
    assert [answer.image for answer in answers] == photos
    assert [answer.error is not None for answer in answers] == [path == photos[2] for path in photos]
    assert sizes == [4, 2]
    for answer in answers:
        if answer.error is None:
            assert list(answer.predictions) == engine.classify(answer.image, top=1)


def test_stream_of_images_without_end_takes_what_it_needs_and_stops_its_threads(
    engine: Engine, photos: list[Path]
) -> None:
    taken = []

    def endless() -> Iterator[Path]:
        while True:
            taken.append(1)
            yield photos[len(taken) % len(photos)]

    answers = engine.stream(endless(), batch_size=3)
    assert all(next(answers).error is None for _ in range(10))
    assert len(taken) <= 12 + 2 * 3 + ahead.count_cores()
    answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("repvgg-decode")]


@pytest.mark.parametrize("one", ["photo.png", b"bytes", Path("photo.png")])
def test_stream_of_one_image_says_classify(engine: Engine, one: object) -> None:
    with pytest.raises(InputError, match="expected many, found one") as caught:
        engine.stream(one)
    assert "classify" in caught.value.remedy


def test_stream_of_a_failing_source_raises_its_error(engine: Engine, photos: list[Path]) -> None:
    def broken() -> Iterator[Path]:
        yield photos[0]
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        list(engine.stream(broken()))


def test_stream_of_nothing_is_empty(engine: Engine) -> None:
    assert list(engine.stream([])) == []


def test_decode_ahead_gives_the_pixels_of_load_image(engine: Engine, photos: list[Path]) -> None:
    how = engine.spec.preprocessing
    pieces = list(ahead.decode_ahead(photos, how, batch_size=3, threads=4))
    assert [len(piece.pixels) for piece in pieces] == [3, 3, 1]
    expected = np.stack([load_image(path, how) for path in photos])
    np.testing.assert_array_equal(np.concatenate([piece.pixels for piece in pieces]), expected)


def test_one_image_is_decoded_without_threads(
    engine: Engine, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.classify(photos[:2])[0]
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", None)
    assert engine.classify(photos[0]) == engine.classify([photos[0]])[0] == expected


def test_logits_is_infer_of_a_model_that_gives_logits(engine: Engine, tmp_path: Path) -> None:
    batch = np.random.default_rng(0).standard_normal((3, *engine.spec.input.shape[1:]), np.float32)
    np.testing.assert_array_equal(engine.logits(batch), engine.infer(batch))
    with (
        Engine(make_onnx(tmp_path / "p.onnx", ModelOptions(kind="probabilities"))) as other,
        pytest.raises(InputError, match="gives probabilities, not logits"),
    ):
        other.logits(batch)

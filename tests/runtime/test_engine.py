"""Engine on ONNX Runtime: answers, ownership, batches, threads, closing."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg_deploy.errors import InputError, ModelError
from repvgg_deploy.images.decode import load_batch
from repvgg_deploy.runtime import checks
from repvgg_deploy.runtime.checks import usual_shape
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.runtime.results import TopK
from tests.runtime.make_model import CHANNELS, ModelOptions, make_onnx, random_batch

KINDS = [
    ModelOptions(),
    ModelOptions(batch=4),
    ModelOptions(uint8=True),
    ModelOptions(uint8=True, batch=3),
    ModelOptions(kind="probabilities"),
    ModelOptions(size=("height", "width")),
    ModelOptions(size=(10, 22)),
]


def assert_close(found: object, expected: np.ndarray) -> None:
    """Equal but for rounding: ONNX Runtime may choose another blocking for another batch size.

    Then float32 sums of 27 and 8 products of numbers around 1 differ in their last bits.
    """
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def run_bare(path: Path, batch: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {"images": batch})
    return outputs


def infer_array(engine: Engine, batch: np.ndarray) -> np.ndarray:
    result = engine.infer(batch)
    assert isinstance(result, np.ndarray)
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def fixed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("model") / "fixed.onnx", ModelOptions(batch=4))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_infer_equals_bare_session(tmp_path: Path, options: ModelOptions) -> None:
    path = make_onnx(tmp_path / "m.onnx", options)
    count = options.batch if isinstance(options.batch, int) else 5
    batch = random_batch(options, count)
    with Engine(path) as engine:
        result = infer_array(engine, batch)
    expected = run_bare(path, batch)[0]
    assert result.dtype == np.float32
    assert result.shape == (count, 7)
    assert np.ptp(expected) > 0.01  # a constant answer would prove nothing
    np.testing.assert_array_equal(result, expected)


def test_infer_of_top5_model_gives_topk(tmp_path: Path) -> None:
    options = ModelOptions(kind="top5", batch=4)
    path = make_onnx(tmp_path / "m.onnx", options)
    batch = random_batch(options, 4)
    with Engine(path) as engine:
        whole, padded = engine.infer(batch), engine.infer(batch[:3])
    assert isinstance(whole, TopK)
    assert isinstance(padded, TopK)
    assert whole.scores.dtype == np.float32
    assert whole.classes.dtype == np.int64
    assert (padded.scores.shape, padded.classes.shape) == ((3, 5), (3, 5))
    scores, classes = run_bare(path, batch)
    np.testing.assert_array_equal(whole.scores, scores)
    np.testing.assert_array_equal(whole.classes, classes)
    np.testing.assert_array_equal(padded.classes, classes[:3])


def test_infer_of_features_model_gives_arrays_by_name(tmp_path: Path) -> None:
    options = ModelOptions(kind="features", batch=2)
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        result = engine.infer(random_batch(options, 5))
    assert isinstance(result, dict)
    assert {name: array.shape for name, array in result.items()} == {
        "stage1": (5, CHANNELS, 16, 16),
        "stage2": (5, CHANNELS),
    }


def test_infer_of_half_precision_output_gives_float32(tmp_path: Path) -> None:
    options = ModelOptions(half=True)
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        assert infer_array(engine, random_batch(options, 2)).dtype == np.float32


def test_infer_of_output_without_row_per_image_refuses_to_split(tmp_path: Path) -> None:
    options = ModelOptions(kind="module")
    batch = random_batch(options, 4)
    with Engine(make_onnx(tmp_path / "m.onnx", options), options=EngineOptions(max_batch=4)) as engine:
        result = engine.infer(batch)
        assert isinstance(result, dict)
        assert result["mean"].shape == (1, CHANNELS)
        with pytest.raises(InputError, match=r"mean .* has no row per image") as caught:
            engine.infer(random_batch(options, 5))
    assert "at most 4 images" in caught.value.remedy


@settings(max_examples=40)
@given(count=st.integers(1, 23), max_batch=st.integers(1, 9), fixed=st.booleans(), seed=st.integers(0, 1000))
def test_infer_of_any_count_and_split_equals_one_by_one(
    model: Path, fixed_model: Path, count: int, max_batch: int, fixed: bool, seed: int
) -> None:
    batch = random_batch(ModelOptions(), count, seed=seed)
    with Engine(
        fixed_model if fixed else model, options=EngineOptions(max_batch=max_batch, intra_op_threads=1)
    ) as engine:
        together = infer_array(engine, batch)
        singly = np.concatenate([infer_array(engine, image[np.newaxis]) for image in batch])
    assert together.shape == (count, 7)
    assert_close(together, singly)


@pytest.mark.parametrize("count", [3, 4, 9])
@pytest.mark.parametrize(
    "order", ["read only", "fortran", "reversed", "channels last in memory", "every second", "memmap", "broadcast"]
)
def test_infer_of_any_memory_order_equals_plain_copy(tmp_path: Path, fixed_model: Path, order: str, count: int) -> None:
    batch = random_batch(ModelOptions(), count)
    variants = {
        "read only": batch.copy(),
        "fortran": np.asfortranarray(batch),
        "reversed": batch[::-1],
        "channels last in memory": np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "every second": np.repeat(batch, 2, axis=3)[..., ::2],
        "memmap": np.memmap(tmp_path / "map", np.float32, "w+", shape=batch.shape),
        "broadcast": np.broadcast_to(batch[:1], batch.shape),
    }
    variants["read only"].flags.writeable = False
    variants["memmap"][:] = batch
    odd = variants[order]
    with Engine(fixed_model) as engine:
        np.testing.assert_array_equal(
            infer_array(engine, odd), infer_array(engine, np.array(odd, np.float32, order="C", copy=True))
        )


@pytest.mark.parametrize("count", [1, 4, 6])
def test_infer_result_belongs_to_caller(fixed_model: Path, count: int) -> None:
    batch = random_batch(ModelOptions(), count)
    untouched = batch.copy()
    with Engine(fixed_model) as engine:
        first = infer_array(engine, batch)
        kept = first.copy()
        second = infer_array(engine, batch)
        assert not np.shares_memory(first, second)
        second[:] = np.nan
        np.testing.assert_array_equal(first, kept)
        # Not bit for bit: on a busy machine threads may share out the sums otherwise. What was written into `second`
        # would be NaN.
        np.testing.assert_allclose(infer_array(engine, batch), kept, rtol=1e-5, atol=1e-6)
    gc.collect()
    np.testing.assert_array_equal(first, kept)  # the memory outlives the Engine
    np.testing.assert_array_equal(batch, untouched)


def test_infer_of_padded_batch_does_not_keep_the_padding_alive(fixed_model: Path) -> None:
    with Engine(fixed_model) as engine:
        result = infer_array(engine, random_batch(ModelOptions(), 1))
    assert result.base is None


def test_infer_from_32_threads_equals_sequential(model: Path, fixed_model: Path) -> None:
    batches = [random_batch(ModelOptions(), 1 + index % 7, seed=index) for index in range(320)]
    for path in (model, fixed_model):
        with Engine(path, options=EngineOptions(max_batch=5)) as engine:
            expected = [infer_array(engine, batch) for batch in batches]
            with ThreadPoolExecutor(32) as pool:
                found = list(pool.map(engine.infer, batches))
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


def test_close_twice_and_infer_afterwards_is_refused(model: Path) -> None:
    engine = Engine(model)
    engine.close()
    engine.close()
    assert engine.closed
    with pytest.raises(InputError, match="is closed"):
        engine.infer(random_batch(ModelOptions(), 1))
    with pytest.raises(InputError, match="is closed"):
        engine.warm_up()


def test_close_while_threads_infer_gives_answers_or_closed_error(model: Path) -> None:
    batch = random_batch(ModelOptions(), 8)
    expected = run_bare(model, batch)[0]
    for _ in range(10):
        engine = Engine(model)
        started = threading.Barrier(9)
        unexpected: list[BaseException] = []

        def work(
            engine: Engine = engine, started: threading.Barrier = started, unexpected: list[BaseException] = unexpected
        ) -> None:
            started.wait()
            try:
                while True:
                    assert_close(infer_array(engine, batch), expected)
            except InputError as error:
                if "is closed" not in str(error):
                    unexpected.append(error)
            except BaseException as error:  # noqa: BLE001 - a thread cannot raise to the test
                unexpected.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        engine.close()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads)
        assert unexpected == []


def test_infer_images_equals_loading_and_inferring(tmp_path: Path) -> None:
    options = ModelOptions(uint8=True)
    paths = []
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 31, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        expected = infer_array(engine, load_batch(paths, engine.spec))
        for size in (None, 1, 2, 5, 9):
            result = engine.infer_images(iter(paths), batch_size=size)
            assert isinstance(result, np.ndarray)
            assert_close(result, expected)


def test_infer_images_of_output_without_row_per_image_refuses_to_join(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(path)
    with Engine(make_onnx(tmp_path / "m.onnx", ModelOptions(kind="module"))) as engine:
        result = engine.infer_images([path] * 3)
        assert isinstance(result, dict) and result["mean"].shape == (1, CHANNELS)
        with pytest.raises(InputError, match=r"mean .* has no row per image, so 3 images cannot be run 2 at a time"):
            engine.infer_images([path] * 3, batch_size=2)


@pytest.mark.parametrize(
    ("paths", "batch_size", "message"),
    [
        ([], None, "at least one image"),
        ("cat.jpg", None, "list of image paths"),
        (Path("cat.jpg"), None, "list of image paths"),
        ([np.zeros((4, 4, 3), np.uint8)], None, "path of an image file, found ndarray"),
        (["x"], 0, "batch_size"),
    ],
)
def test_infer_images_with_bad_arguments_is_refused(
    model: Path, paths: object, batch_size: int | None, message: str
) -> None:
    with Engine(model) as engine, pytest.raises(InputError, match=message):
        engine.infer_images(paths, batch_size=batch_size)  # type: ignore[arg-type]


def test_infer_images_without_preprocessing_is_refused(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx", ModelOptions(preprocessing=False))
    with Engine(path) as engine, pytest.raises(InputError, match="does not say how an image becomes its input"):
        engine.infer_images(["cat.jpg"])


@pytest.mark.parametrize("options", [*KINDS, ModelOptions(uint8=True, size=("height", "width"))], ids=str)
def test_warm_up_accepts_every_kind_of_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: ModelOptions
) -> None:
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        run, shapes = engine._backend.run, []

        def watch(batch: np.ndarray) -> object:
            shapes.append(batch.shape)
            return run(batch)

        monkeypatch.setattr(engine._backend, "run", watch)
        engine.warm_up()
        assert shapes == [(options.batch if isinstance(options.batch, int) else 1, *usual_shape(engine.spec)[1:])]


def test_warm_up_without_known_size_asks_for_a_shape(tmp_path: Path) -> None:
    options = ModelOptions(size=("height", "width"), preprocessing=False)
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        with pytest.raises(InputError, match="any size") as caught:
            engine.warm_up()
        engine.warm_up((2, 3, 9, 9))
    assert "shape" in caught.value.remedy


def test_engine_describes_itself(model: Path) -> None:
    with Engine(model) as engine:
        assert "tiny on cpu" in repr(engine)
        assert "float32 (batch, 3, 16, 16) NCHW" in repr(engine)
        assert engine.backend_name == f"ONNX Runtime {onnxruntime.__version__}, CPUExecutionProvider"
        assert engine.spec is engine.metadata.spec
        assert engine.path == model
        assert engine.device == "cpu"
    assert "closed" in repr(engine)


@pytest.mark.parametrize(
    "values",
    [
        {"max_batch": 0},
        {"intra_op_threads": 0},
        {"intra_op_threads": 1025},
        {"device_id": -1},
        {"max_batch": 2.5},
        {"max_batch": True},
    ],
    ids=str,
)
def test_engine_options_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        EngineOptions(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        (ModelOptions(), 5, (5, 3, 16, 16)),
        (ModelOptions(), (2, 3, 16, 16), (2, 3, 16, 16)),
        (ModelOptions(uint8=True), 3, (3, 16, 16, 3)),
        (ModelOptions(batch=4), 7, (7, 3, 16, 16)),
        (ModelOptions(size=("height", "width"), preprocessing=False), [2, 3, 24, 40], (2, 3, 24, 40)),
    ],
    ids=str,
)
def test_pinned_batch_is_filled_and_run(
    tmp_path: Path, options: ModelOptions, shape: object, expected: tuple[int, ...]
) -> None:
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        batch = engine.pinned_batch(shape)
        assert type(batch) is np.ndarray and (batch.shape, batch.dtype.name) == (expected, engine.spec.input.dtype)
        for seed in range(2):
            images = np.random.default_rng(seed).integers(0, 9, expected).astype(batch.dtype)
            batch[:] = images
            for given, wanted in ((batch, images), (batch[1:], images[1:])):
                np.testing.assert_array_equal(infer_array(engine, given), infer_array(engine, wanted))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (0, "found 0"),
        (True, "found True"),
        ("8", "found '8'"),
        ((), r"found \(\)"),
        ((2, 3, -1, 16), "positive sizes"),
        ((2, 3, 16), "batch dimension is missing"),
        ((2, 3, 16, 17), "the size differs"),
    ],
)
def test_pinned_batch_that_the_model_does_not_take_is_refused(model: Path, shape: Any, match: str) -> None:
    with Engine(model) as engine, pytest.raises(InputError, match=match):
        engine.pinned_batch(shape)
    with pytest.raises(InputError, match="closed"):
        engine.pinned_batch(1)


@pytest.mark.parametrize("on", [True, False])
def test_numbers_are_looked_at_once_a_batch_or_left_to_the_caller(
    model: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    looked: list[int] = []
    is_finite = checks._is_finite

    def look(array: np.ndarray) -> bool:
        looked.append(len(array))
        return is_finite(array)

    monkeypatch.setattr(checks, "_is_finite", look)
    batch = random_batch(ModelOptions(), 3)
    with Engine(model, options=EngineOptions(check_finite=on)) as engine, engine.batcher() as batcher:
        engine.infer(batch)
        engine.submit(batch[:2]).result(300)
        for future in [batcher.submit(batch[:1]) for _ in range(4)]:
            future.result(300)
        assert looked == ([3, 2, 1, 1, 1, 1] if on else [])
        batch[1] = np.nan
        if on:
            with pytest.raises(InputError, match="found 768 of 2304 NaN or infinite"):
                engine.infer(batch)
        else:
            found = engine.logits(batch)
            assert np.isnan(found[1]).any() and np.isfinite(found[[0, 2]]).all()
        with pytest.raises(InputError, match="dtype"):
            engine.infer(batch.astype(np.float64))


def test_engine_of_file_replaced_while_opening_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = make_onnx(tmp_path / "m.onnx"), make_onnx(tmp_path / "other.onnx", seed=1)
    original = onnxruntime.InferenceSession

    def swap_then_open(*args: object, **options: object) -> object:
        os.replace(other, path)
        return original(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", swap_then_open)
    with pytest.raises(ModelError, match="was replaced while it was being opened"):
        Engine(path)


def test_infer_of_many_pieces_keeps_their_order(model: Path) -> None:
    batch = random_batch(ModelOptions(), 40)
    with Engine(model, options=EngineOptions(max_batch=7)) as engine:
        assert_close(infer_array(engine, batch), run_bare(model, batch)[0])


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        ({"path": b"x" * 10**7}, "expected the path of a model file, found an object of type bytes", "to a file"),
        ({"path": "x" * 10**6}, "expected the path of a model file", "give a path"),
        ({"path": "x\0"}, "expected the path of a model file", "give a path"),
        ({"options": {"max_batch": 4}}, "options: expected EngineOptions, found an object of type dict", "options="),
        ({"backend": "y" * 10**6}, "backend: expected one of", "leave it out"),
        ({"device": "z" * 10**6}, "device: expected cpu", "give device"),
    ],
    ids=["bytes", "text", "nul", "options", "backend", "device"],
)
def test_wrong_argument_is_a_short_input_error(
    model: Path, arguments: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        Engine(**{"path": model, **arguments})
    assert remedy in refused.value.remedy
    assert len(str(refused.value)) < 1000


def test_wrong_count_is_a_short_input_error() -> None:
    with pytest.raises(InputError, match="EngineOptions: max_batch: expected a whole number") as refused:
        EngineOptions(max_batch="9" * 10**6)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 500


def test_engine_that_is_pickled_copied_or_sent_says_what_to_do_instead(model: Path) -> None:
    with Engine(model) as engine:
        for send in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(InputError, match="cannot be pickled") as refused:
                send(engine)
            assert refused.value.remedy == "send the path, and open an Engine in each process"
        process = multiprocessing.get_context("spawn").Process(target=print, args=(engine,))
        with pytest.raises(InputError, match="cannot be pickled"):
            process.start()

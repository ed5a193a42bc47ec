from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.export.verify import _compare
from repvgg_deploy.images.classes import softmax
from repvgg_deploy.images.decode import default_preprocessing, normalize
from repvgg_deploy.images.drawn import draw_images, make_batches
from repvgg_deploy.model import tolerance
from repvgg_deploy.specs.values import Certificate, ModelSpec, TensorSpec

PREPROCESSING = default_preprocessing(40, 56)


def test_make_batches_kinds_sizes_and_normalisation() -> None:
    batches = {batch.name: batch for batch in make_batches(PREPROCESSING, [(40, 56), (33, 20), (64, 64)])}
    sizes = ("40×56", "33×20")
    names = [f"{kind} {size}" for size in sizes for kind in ("image-like", "borders", "large constant")]
    assert list(batches) == [*names, "image-like 64×64"]
    for name, batch in batches.items():
        height, width = map(int, name.rsplit(" ", 1)[1].split("×"))
        assert batch.array.dtype == np.float32
        assert batch.array.shape[1:] == (3, height, width)
        assert np.isfinite(batch.array).all()
        if batch.images is not None:
            np.testing.assert_array_equal(batch.array, normalize(batch.images, PREPROCESSING))
    assert (
        np.abs(batches["large constant 40×56"].array).min() >= 30 * 2.7 / 1.0 - 1
    )  # far beyond the largest normalised pixel, about 2.7


def test_make_batches_are_the_same_every_time_and_images_differ() -> None:
    first, second = (make_batches(PREPROCESSING, [(20, 30)]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.array, b.array)
    images = draw_images((32, 32), 3, np.random.default_rng(1))
    assert images.std() > 20
    assert not np.array_equal(images[0], images[1])


def test_draw_images_are_smooth_like_photographs() -> None:
    image = draw_images((128, 128), 1, np.random.default_rng(0))[0, :, :, 0].astype(float)
    neighbours = np.corrcoef(image[:, :-1].ravel(), image[:, 1:].ravel())[0, 1]
    assert neighbours > 0.8  # white noise has 0


def test_input_for_uint8_gives_pixels_and_refuses_what_is_no_image() -> None:
    batches = make_batches(PREPROCESSING, [(40, 56)])
    assert batches[0].input_for("uint8").dtype == np.uint8
    with pytest.raises(AssertionError, match="no image"):
        batches[2].input_for("uint8")


def test_tolerance_comes_from_the_training_error_and_has_a_floor() -> None:
    assert tolerance.allow_float32(1e-5) == pytest.approx(1e-4)
    assert tolerance.allow_float32(0.0) == tolerance.FLOAT32_FLOOR
    assert tolerance.allow_float64(1e-5) == pytest.approx(1e-4 * 2**-29, rel=1e-6)
    assert tolerance.allow_float64(0.0) == tolerance.FLOAT64_FLOOR


def test_compare_nan_wrong_shape_and_infinity_fail() -> None:
    reference = np.ones((2, 3))
    for wrong in (np.full((2, 3), np.nan), np.full((2, 3), np.inf), np.ones((2, 4))):
        check = tolerance.compare("x", wrong, reference, 1e9)
        assert not check.passed
    assert tolerance.compare("x", reference + 1e-7, reference, 1e-6).passed


def test_certificate_without_checks_has_not_passed() -> None:
    assert not Certificate("nothing", (), {}).passed


def top5_spec() -> ModelSpec:
    outputs = (TensorSpec("scores", "float32", ("batch", 5), "NK"), TensorSpec("classes", "int64", ("batch", 5), "NK"))
    return ModelSpec(TensorSpec("input", "float32", ("batch", 3, 8, 8), "NCHW"), outputs, "top5")


def test_compare_top5_accepts_ties_and_refuses_wrong_classes_and_scores() -> None:
    logits = np.float32([[5, 5, 3, 2, 1, 0, -1]])
    probabilities = softmax(logits)
    reference = {"logits": logits}

    def passed(classes: list[int], scale: float = 1.0) -> bool:
        scores = np.take_along_axis(probabilities, np.array([classes]), 1).astype(np.float32) * scale
        return all(
            check.passed
            for check in _compare(
                "b", top5_spec(), {"scores": scores, "classes": np.array([classes])}, reference, allowed=1e-6
            )
        )

    assert passed([0, 1, 2, 3, 4])
    assert passed([1, 0, 2, 3, 4])
    assert not passed([0, 1, 2, 3, 5])
    assert not passed([0, 1, 2, 3, 4], 1.001)
    right = probabilities[:, :5].astype(np.float32)
    wrong = _compare(
        "b", top5_spec(), {"scores": right, "classes": np.array([[6, 1, 2, 3, 4]])}, reference, allowed=1e-6
    )
    assert [check.passed for check in wrong] == [True, False]


def test_compare_probabilities_of_huge_logits_are_no_check() -> None:
    logits = np.float32([[1e6, 0, 0, 0, 0]])
    assert (
        _compare(
            "b",
            top5_spec(),
            {"scores": softmax(logits), "classes": np.arange(5)[None]},
            {"logits": logits},
            allowed=1e-6,
        )
        == []
    )

"""Images are compared with what the model was trained on: refused with the conversion only where that is certain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repvgg_deploy.errors import CalibrationError, InputError
from repvgg_deploy.images.calibration import load_calibration
from repvgg_deploy.images.decode import IMAGENET_MEAN, IMAGENET_STD
from repvgg_deploy.images.drawn import draw_images
from repvgg_deploy.images.likeness import SAMPLE, Likeness, compare, require_like
from repvgg_deploy.images.sets import SetOptions, open_images
from repvgg_deploy.specs.values import InputStatistics, ModelSpec, TensorSpec
from tests.images.make_images import make_spec

MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
TINT = np.array([30, 5, -35])  # so that the channels can be told apart


def pictures(count: int, *, seed: int = 0) -> NDArray[np.uint8]:
    drawn = draw_images((8, 8), count, np.random.default_rng(seed)).astype(int) + TINT
    return np.clip(drawn, 0, 255).astype(np.uint8)


def trained_on(spec: ModelSpec, mean: Any = MEAN, std: Any = STD) -> ModelSpec:
    """With the statistics of a training that normalised so."""
    seen = (pictures(500, seed=1) - mean) / std
    first, second = seen.mean((0, 1, 2)).tolist(), seen.std((0, 1, 2)).tolist()
    return replace(spec, trained_on=InputStatistics(tuple(first), tuple(second)))


def planar(images: NDArray[Any]) -> NDArray[np.float32]:
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def look(folder: Path, images: NDArray[Any], spec: ModelSpec) -> Likeness:
    np.savez(folder / "set.npz", images=images)
    return compare(open_images(folder / "set.npz", spec, SetOptions(labels="none")))


@pytest.mark.parametrize("count", [8, 64, 300])
@pytest.mark.parametrize("uint8", [False, True])
def test_images_like_those_of_training_are_alike(tmp_path: Path, count: int, uint8: bool) -> None:
    spec = trained_on(make_spec(uint8=uint8))
    pixels = pictures(count)
    for images in (pixels, planar((pixels - MEAN) / STD)):
        found = look(tmp_path, images, spec)
        assert (found.verdict, found.images) == ("alike", min(count, SAMPLE))
        assert found.mean == pytest.approx(((pixels - MEAN) / STD).mean((0, 1, 2)), abs=0.2)


CONVERSIONS = {
    "pixels of 0 to 1": (lambda p: planar(p / 255), "(255 * images - mean) / std"),
    "pixels of 0 to 255": (planar, "(images - mean) / std"),
    "pixels of 0 to 1, blue first": (lambda p: planar(p[..., ::-1] / 255), "images[:, ::-1]"),
}


@pytest.mark.parametrize("what", CONVERSIONS)
@pytest.mark.parametrize("count", [16, 200])
@pytest.mark.parametrize("uint8", [False, True])
def test_numbers_of_another_range_are_refused_with_the_conversion(
    tmp_path: Path, what: str, count: int, uint8: bool
) -> None:
    make, formula = CONVERSIONS[what]
    spec = trained_on(make_spec(uint8=uint8))
    found = look(tmp_path, make(pictures(count)), spec)
    assert (found.verdict, found.better) == ("refused", what)
    images = open_images(tmp_path / "set.npz", spec, SetOptions(labels="none"))
    with pytest.raises(InputError, match="unlike what the model was trained on") as caught:
        require_like(images)
    assert formula in caught.value.remedy and "--accept-data" in caught.value.remedy
    assert require_like(images, accept=True).said.startswith("accepted all the same")
    with pytest.raises(CalibrationError, match="unlike what the model was trained on"):
        load_calibration(tmp_path / "set.npz", spec)
    accepted = load_calibration(tmp_path / "set.npz", spec, accept_data=True)
    assert accepted.likeness is not None and accepted.likeness.verdict == "refused"


def test_export_that_states_another_normalisation_than_that_of_training_is_refused_with_the_options(
    tmp_path: Path,
) -> None:
    for mean, std, options in ((0, 255, "--mean 0,0,0 --std 255,255,255"), (0, 1, "--mean 0,0,0 --std 1,1,1")):
        spec = trained_on(make_spec(), mean, std)
        found = look(tmp_path, pictures(100), spec)
        assert found.verdict == "refused"
        assert options in str(found.remedy)


def test_plausible_images_are_only_spoken_of_where_another_reading_fits_better(tmp_path: Path) -> None:
    found = look(tmp_path, pictures(SAMPLE)[..., ::-1], trained_on(make_spec()))
    assert (found.verdict, found.better) == ("differs", "blue first")
    found = look(tmp_path, planar(pictures(SAMPLE) / 127.5 - 1), trained_on(make_spec()))
    assert (found.verdict, found.better) == ("differs", "pixels of -1 to 1")


@pytest.mark.parametrize("name", ["calib", "eval"])
def test_gray_images_are_not_said_to_fit_better_blue_first(tmp_path: Path, name: str) -> None:
    """The sample's digits: swapped, they are the same; the sums that are compared differ by rounding only."""
    with np.load(Path(__file__).parents[2] / f"models/sample/{name}.npz") as file:
        gray = file["images"]
    assert np.array_equal(gray, gray[..., ::-1])
    seen = InputStatistics((-0.85499, -0.744611, -0.519079), (1.420991, 1.45271, 1.446253))
    source = TensorSpec("x", "float32", ("batch", 3, *gray.shape[1:3]), "NCHW")
    found = look(tmp_path, gray, replace(make_spec(), input=source, trained_on=seen))
    assert (found.verdict, found.better) == ("alike", None)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: np.full_like(p, 255),
        lambda p: np.zeros_like(p),
        lambda p: 200 + p // 6,
        lambda p: p // 8,
        lambda p: np.repeat(p.mean(-1, keepdims=True), 3, -1).astype(np.uint8),
        lambda p: np.random.default_rng(0).integers(0, 256, p.shape, dtype=np.uint8),
    ],
)
def test_unusual_pictures_are_never_refused(tmp_path: Path, change: Any) -> None:
    assert look(tmp_path, change(pictures(200)), trained_on(make_spec())).verdict in ("alike", "differs")


def test_of_few_images_nothing_is_refused(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        found = look(tmp_path, planar(pictures(count) / 255), trained_on(make_spec()))
        assert found.verdict != "refused"


def test_margin_shrinks_with_the_number_of_images(tmp_path: Path) -> None:
    """Too weak a contrast to be plausible: of few images it may be chance."""
    spec = trained_on(make_spec(), MEAN, STD)
    pale = np.rint(128 + (pictures(SAMPLE) - 128.0) / 2.6).astype(np.uint8)
    assert look(tmp_path, pale[:8], spec).said.startswith(("plausible", "like"))
    assert look(tmp_path, pale, spec).said.startswith("far from")


def test_without_statistics_nothing_is_checked_and_that_is_said(tmp_path: Path) -> None:
    found = look(tmp_path, planar(pictures(20) / 255), make_spec())
    assert found.verdict == "not checked"
    assert found.said.startswith("not checked: the model keeps no statistics")

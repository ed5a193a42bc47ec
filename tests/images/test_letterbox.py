"""Letterboxed images keep their shape, and boxes find the way back, from this and every other fit."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.calibration import load_calibration
from repvgg_deploy.images.decode import (
    decode_image,
    default_preprocessing,
    fit_image,
    image_size,
    letterbox_preprocessing,
    load_batch,
    load_image,
)
from repvgg_deploy.images.pixels import Placement, place
from repvgg_deploy.images.sets import SetOptions, open_images
from repvgg_deploy.specs.values import Preprocessing, TensorSpec
from tests.images.make_images import make_spec

SIZES = [(96, 64), (64, 96), (101, 33), (33, 101), (17, 17), (640, 479), (479, 640), (7, 300), (300, 7), (64, 64)]


def boxed(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """White on black, uint8 (H, W, 3); box is left, top, right, bottom."""
    image = np.zeros((*size, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [(64, 64), (48, 80), (65, 63)])
def test_letterboxed_image_keeps_its_shape_and_stands_in_the_middle(
    size: tuple[int, int], crop: tuple[int, int]
) -> None:
    how = letterbox_preprocessing(*crop, pad=(1, 2, 3))
    found = fit_image(np.full((*size, 3), 200, np.uint8), how)
    assert found.shape == (*crop, 3)
    inside = (found == 200).all(2)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    tall, wide = len(rows), len(columns)
    assert inside.sum() == tall * wide and (found[~inside] == (1, 2, 3)).all()
    # One side fills the input, the other follows within half a pixel, or is one pixel.
    factor = min(crop[0] / size[0], crop[1] / size[1])
    assert tall == crop[0] or wide == crop[1]
    assert abs(tall - max(1, size[0] * factor)) <= 0.5 and abs(wide - max(1, size[1] * factor)) <= 0.5
    # In the middle: of an odd rest the larger half lies below and on the right.
    assert crop[0] - tall - 2 * rows[0] in (0, 1) and crop[1] - wide - 2 * columns[0] in (0, 1)


def test_letterbox_is_ultralytics_for_a_photo() -> None:
    # Worked out by hand from its LetterBox(640): 1080×810 → ratio 0.5926, 640×480, 80 columns of 114 on each side;
    # 427×640 → 427 rows, 213 left over: 106 above, 107 below.
    assert place((1080, 810), letterbox_preprocessing(640, 640)) == Placement((1080, 810), (640, 480), (0, 80))
    assert place((427, 640), letterbox_preprocessing(640, 640)) == Placement((427, 640), (427, 640), (106, 0))


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (101, 133), (133, 101), (640, 479), (57, 300), (300, 57)])
def test_box_in_the_input_is_mapped_back_to_within_half_a_pixel(size: tuple[int, int]) -> None:
    box = (size[1] // 5, size[0] // 4, size[1] * 4 // 5, size[0] * 2 // 3)
    how = letterbox_preprocessing(96, 96, pad=(0, 0, 0))
    light = fit_image(boxed(size, box), how)[..., 0].astype(np.float64) / 255
    # Where the box lies in the input, between pixels: its centre is the light's, its sides what the light adds up to
    # in the row and column through the centre.
    y, x = (np.average(np.arange(96) + 0.5, weights=light.sum(axis)) for axis in (1, 0))
    wide, tall = light[int(y)].sum(), light[:, int(x)].sum()
    found = np.array([[x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2]])
    np.testing.assert_allclose(place(size, how).to_image(found), [box], atol=0.5)


@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    crop=st.tuples(st.integers(1, 96), st.integers(1, 96)),
    fit=st.sampled_from(["cover", "stretch", "letterbox", "short"]),
)
def test_affine_of_every_fit_maps_the_image_onto_what_was_made_of_it(
    size: tuple[int, int], crop: tuple[int, int], fit: str
) -> None:
    how = letterbox_preprocessing(*crop) if fit == "letterbox" else default_preprocessing(*crop)
    if fit in ("cover", "stretch"):
        box = (crop[0] + 3, crop[1] + 5)
        how = Preprocessing(how.mean, how.std, min(box), crop, box=box, fit=fit)  # type: ignore[arg-type]
    placed = place(size, how)
    scale_x, scale_y, shift_x, shift_y = placed.affine
    (top, left), (tall, wide) = placed.offset, placed.resized
    corners = [(left, top, 0, 0), (left + wide, top + tall, size[1], size[0])]
    for x, y, image_x, image_y in corners:
        assert (x * scale_x + shift_x, y * scale_y + shift_y) == pytest.approx((image_x, image_y), abs=1e-6)
    whole = placed.to_image(np.array([[left, top, left + wide, top + tall]], np.float32))
    np.testing.assert_allclose(whole, [[0, 0, size[1], size[0]]], atol=1e-3)


def test_boxes_end_where_the_image_does() -> None:
    placed = place((50, 100), letterbox_preprocessing(64, 64))
    found = placed.to_image(np.array([[-10, -10, 80, 80], [0, 0, 64, 16], [8, 20, 16, 24]], np.float64))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0, 0, 100, 50], [0, 0, 100, 0], [12.5, 6.25, 25, 12.5]])
    assert placed.to_image(np.empty((0, 4), np.float32)).shape == (0, 4)
    with pytest.raises(InputError, match=r"expected boxes"):
        placed.to_image(np.zeros((3, 5)))


def test_files_bytes_and_pixels_are_letterboxed_alike(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    how = letterbox_preprocessing(32, 40)
    expected = fit_image(pixels, how)
    np.testing.assert_array_equal(load_image(path, how), expected)
    np.testing.assert_array_equal(decode_image(path.read_bytes(), how), expected)
    np.testing.assert_array_equal(load_batch([path], how)[0], expected.transpose(2, 0, 1).astype(np.float32) / 255)


def test_calibration_and_evaluation_images_are_letterboxed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    (tmp_path / "class 1").mkdir()
    Image.fromarray(pixels).save(tmp_path / "class 1" / "a.png")
    how = letterbox_preprocessing(8, 12)
    spec = dataclasses.replace(make_spec(), preprocessing=how, input=TensorSpec("x", "float32", (1, 3, 8, 12), "NCHW"))
    expected = load_batch([tmp_path / "class 1" / "a.png"], how)
    (evaluated,) = open_images(tmp_path, dataclasses.replace(spec, labels=("class 0", "class 1")), SetOptions())
    np.testing.assert_array_equal(evaluated.images, expected)
    np.testing.assert_array_equal(load_calibration(tmp_path, spec).batches[0], expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_of_an_image_file_is_that_of_what_is_decoded(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(boxed((20, 34), (0, 0, 17, 10)))
    data = io.BytesIO()
    stored.save(data, kind, exif=exif)
    path = tmp_path / "a"
    path.write_bytes(data.getvalue())
    found = image_size(path)
    assert sorted(found) == [20, 34]
    # Fitted to its own size an image stays as it is: resized, its white quarter would fill another share.
    pixels = load_image(path, letterbox_preprocessing(*found, pad=(255, 0, 0)))
    assert abs(float((pixels > 127).all(2).mean()) - 0.25) < 0.03


@pytest.mark.parametrize(("name", "data", "message"), [("a.jpg", b"no image", "not an image"), ("b", None, "no such")])
def test_size_of_what_is_no_image_is_refused(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        image_size(tmp_path / name)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_pixels_that_are_no_rgb_image_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"expected pixels uint8 \(H, W, 3\)"):
        fit_image(pixels, letterbox_preprocessing(8, 8))


def test_letterbox_with_a_box_or_a_colour_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="colour around"):
        letterbox_preprocessing(8, 8, pad=(0, 0, 256))
    with pytest.raises(InputError, match="into crop"):
        Preprocessing((0, 0, 0), (1, 1, 1), 8, (8, 8), box=(9, 9), fit="letterbox")

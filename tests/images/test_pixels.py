"""Sizes, filters and depths that a model may state, and what is said of an image."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from repvgg_deploy.errors import InputError
from repvgg_deploy.images.decode import IMAGENET_MEAN, IMAGENET_STD
from repvgg_deploy.images.pixels import Decoded, decode
from repvgg_deploy.specs.values import Interpolation, Preprocessing


def read(image: Image.Image, preprocessing: Preprocessing, kind: str = "PNG") -> Decoded:
    stream = io.BytesIO()
    image.save(stream, kind)
    return decode(stream, preprocessing, where="a")


def how(crop: tuple[int, int], **changes: Any) -> Preprocessing:
    return Preprocessing(IMAGENET_MEAN, IMAGENET_STD, changes.pop("resize_short", min(crop)), crop, **changes)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", get_args(Interpolation))
def test_every_interpolation_is_pillows_of_that_name(name: str) -> None:
    image = noise(40, 60)
    expected = np.asarray(image.resize((24, 16), Image.Resampling[name.upper()]))[1:15, 5:19]
    found = read(image, how((14, 14), resize_short=16, interpolation=name))
    np.testing.assert_array_equal(found.pixels, expected)
    assert found.notes == ()


def test_stretched_image_loses_its_shape_as_with_two_sizes_in_torchvision() -> None:
    image = noise(50, 20)
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR))[2:14, 4:20]
    found = read(image, how((12, 16), box=(16, 24), fit="stretch"))
    np.testing.assert_array_equal(found.pixels, expected)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33), (7, 200), (50, 99)])
def test_box_is_covered_as_timm_resizes_for_an_oblong_crop(size: tuple[int, int]) -> None:
    # ResizeKeepRatio with longest=0: both sides divided by the smaller ratio of image to box, rounded.
    crop, box = (14, 21), (16, 24)
    image = noise(*size)
    ratio = min(size[0] / box[0], size[1] / box[1])
    height, width = (round(side / ratio) for side in size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 14) / 2), round((width - 21) / 2)
    found = read(image, how(crop, box=box))
    np.testing.assert_array_equal(found.pixels, resized[top : top + 14, left : left + 21])


def test_box_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(InputError, match="smaller than the crop"):
        how((14, 14), box=(16, 13))


def grey16(values: list[int]) -> Image.Image:
    return Image.fromarray(np.array([values] * 4, np.uint16))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("values", "most"), [([0, 1000, 4095, 7], 4095), ([0, 900, 1023, 7], 1023)])
def test_12_bit_data_in_16_is_said_and_read_with_its_max_value(kind: str, values: list[int], most: int) -> None:
    found = read(grey16(values), how((4, 4)), kind)
    assert found.pixels.max() == math.floor(most * 255 / 65535 + 0.5)
    assert len(found.notes) == 1 and f"--max-value {most}" in found.notes[0]
    found = read(grey16(values), how((4, 4), max_value=most), kind)
    assert found.notes == ()
    assert found.pixels[0, :, 0].tolist() == [math.floor(value * 255 / most + 0.5) for value in values]


def test_16_bit_data_is_not_spoken_of() -> None:
    assert read(grey16([0, 1, 4096, 9]), how((4, 4))).notes == ()
    assert read(grey16([0, 0, 0, 0]), how((4, 4))).notes == ()


def test_value_above_the_stated_white_is_refused() -> None:
    with pytest.raises(InputError, match="has the value 4096, and white is 4095") as caught:
        read(grey16([0, 1, 4096, 9]), how((4, 4), max_value=4095))
    assert "--max-value" in caught.value.remedy


def colour16(value: int) -> io.BytesIO:
    """A PNG with 16 bits a colour, which Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + struct.pack(">12H", *[value] * 12) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + data)


def test_16_bit_colours_that_are_nearly_black_are_said_and_not_scaled() -> None:
    assert decode(colour16(0x8000), how((4, 4)), where="a").notes == ()
    (note,) = decode(colour16(4000), how((4, 4)), where="a").notes
    assert "12-bit data in 16 bits" in note
    with pytest.raises(InputError, match="only the upper 8 are read"):
        decode(colour16(4000), how((4, 4), max_value=4095), where="a")

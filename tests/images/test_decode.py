"""Image files of every kind become the right pixels; what is no usable image becomes one clear error."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from repvgg_deploy.errors import InputError, MissingDependencyError
from repvgg_deploy.images import decode
from repvgg_deploy.images.decode import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    decode_image,
    default_preprocessing,
    load_batch,
    load_image,
    normalize,
)
from repvgg_deploy.images.pixels import place
from repvgg_deploy.specs.values import ModelSpec, Preprocessing, TensorSpec
from tests.images.make_images import make_jpegs

SMALL = default_preprocessing(6, 6)


def quadrants(height: int = 6, width: int = 6) -> NDArray[np.uint8]:
    """Red, green / blue, white: no two of the eight orientations look alike."""
    image = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    image[:top, :left], image[:top, left:] = (255, 0, 0), (0, 255, 0)
    image[top:, :left], image[top:, left:] = (0, 0, 255), (255, 255, 255)
    return image


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def crop_only(height: int, width: int, *, resize_short: int | None = None) -> Preprocessing:
    return Preprocessing(
        mean=IMAGENET_MEAN, std=IMAGENET_STD, resize_short=resize_short or min(height, width), crop=(height, width)
    )


# --- geometry
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "short"), [((224, 224), 256), ((320, 320), 320), ((32, 32), 32), ((224, 320), 224)])
def test_default_preprocessing_for_a_size_gives_the_original_evaluations_short_side(
    size: tuple[int, int], short: int
) -> None:
    assert default_preprocessing(*size).resize_short == short
    assert default_preprocessing(*size).crop == size


def test_default_preprocessing_constants_are_imagenets_in_byte_units() -> None:
    assert IMAGENET_MEAN == pytest.approx([255 * x for x in (0.485, 0.456, 0.406)], abs=1e-12)
    assert IMAGENET_STD == pytest.approx([255 * x for x in (0.229, 0.224, 0.225)], abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [(6, 9), (9, 6), (6, 6), (7, 10), (11, 6)])
def test_load_image_without_resize_crops_the_exact_centre(tmp_path: Path, height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    # A short side of 6 is already there, or (7, 10) is kept by resize_short=7: only the crop acts. Half pixels round to
    # even.
    spec = crop_only(6, 6, resize_short=min(height, width))
    top, left = round((height - 6) / 2), round((width - 6) / 2)
    np.testing.assert_array_equal(load_image(path, spec), pixels[top : top + 6, left : left + 6])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_load_image_larger_than_the_crop_equals_pillows_antialiased_resize(tmp_path: Path, interpolation: Any) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 75, 3), dtype=np.uint8)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    spec = Preprocessing(
        mean=IMAGENET_MEAN, std=IMAGENET_STD, resize_short=16, crop=(14, 14), interpolation=interpolation
    )
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    expected = np.asarray(Image.fromarray(pixels).resize((24, 16), filters[interpolation]))[1:15, 5:19]
    np.testing.assert_array_equal(load_image(path, spec), expected)


def test_load_image_smaller_than_the_crop_is_enlarged(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (3, 2), (10, 200, 30)), tmp_path / "a.png")
    result = load_image(path, default_preprocessing(224, 224))
    assert result.shape == (224, 224, 3)
    assert (result == (10, 200, 30)).all()


@pytest.mark.parametrize("crop", [(6, 12), (12, 6)])
@pytest.mark.parametrize("size", [(6, 6), (30, 7), (7, 30), (13, 11), (1, 2)])
def test_load_image_with_an_oblong_crop_covers_it_without_border(
    tmp_path: Path, crop: tuple[int, int], size: tuple[int, int]
) -> None:
    path = save(Image.new("RGB", size, (9, 9, 9)), tmp_path / "a.png")
    result = load_image(path, crop_only(*crop))
    assert result.shape == (*crop, 3)
    assert (result == 9).all(), "a crop beyond the picture would be filled with black"


def test_load_image_of_every_size_up_to_40_covers_the_crop() -> None:
    for width in range(1, 41):
        for height in range(1, 41):
            for crop in ((6, 6), (5, 9), (9, 5)):
                high, wide = place((height, width), crop_only(*crop)).resized
                assert high >= crop[0] and wide >= crop[1], (width, height, crop)


# --- EXIF
# ----------------------------------------------------------------------------------------------------

STORED_AS = {  # orientation → what a camera stores so that the picture comes out upright (EXIF 2.32, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),  # to be shown turned clockwise by 90°
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_load_image_with_exif_orientation_is_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = quadrants(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    options = exact.get(suffix, {})
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    path = save(stored, tmp_path / f"a.{suffix}", exif=exif, **options)
    result = load_image(path, crop_only(16, 24)).astype(int)
    # JPEG at quality 100 rounds its coefficients: a few levels. The others are lossless.
    assert np.abs(result - upright).max() <= (4 if suffix == "jpg" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_load_image_with_undefined_orientation_is_left_as_stored(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(quadrants()), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(path, SMALL), quadrants())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's own; it says what is so
@pytest.mark.parametrize(
    "block", [b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_load_image_with_damaged_exif_keeps_the_picture(tmp_path: Path, block: bytes) -> None:
    path = save(Image.fromarray(quadrants(16, 16)), tmp_path / "a.jpg", quality=100, subsampling=0, exif=block)
    result = load_image(path, crop_only(16, 16)).astype(int)
    assert np.abs(result - quadrants(16, 16)).max() <= 4  # JPEG's rounding


# --- colour modes
# ----------------------------------------------------------------------------------------------------


def load_one(image: Image.Image, path: Path, **options: Any) -> NDArray[np.uint8]:
    """A 6×6 image through a file."""
    return load_image(save(image, path, **options), SMALL)


def test_load_image_grey_repeats_the_channel(tmp_path: Path) -> None:
    grey = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
    np.testing.assert_array_equal(load_one(Image.fromarray(grey), tmp_path / "a.png"), np.repeat(grey[..., None], 3, 2))


def test_load_image_bilevel_becomes_black_and_white(tmp_path: Path) -> None:
    bits = np.eye(6, dtype=bool)
    np.testing.assert_array_equal(
        load_one(Image.fromarray(bits), tmp_path / "a.png"), np.repeat(bits[..., None], 3, 2) * np.uint8(255)
    )


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_load_image_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 36).round().astype(np.uint16).reshape(6, 6)
    result = load_one(Image.fromarray(values), tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(result, np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, 2))
    assert len(np.unique(result)) == 36, "clipping would leave one or two values"


def test_load_image_16_bit_big_endian_is_scaled(tmp_path: Path) -> None:
    values = np.full((6, 6), 0x80FF, np.uint16)
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 6 6 65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_array_equal(load_image(path, SMALL), np.full((6, 6, 3), round(0x80FF / 257)))


def test_load_image_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0100) * 6 for _ in range(6))
    path = tmp_path / "a.png"
    path.write_bytes(png(6, 6, zlib.compress(rows), bit_depth=16, colour=2))
    np.testing.assert_array_equal(
        load_image(path, SMALL), np.broadcast_to(np.array([255, 128, 1], np.uint8), (6, 6, 3))
    )


@pytest.mark.parametrize("value", [-1, 65536])
def test_load_image_32_bit_integers_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    path = save(Image.fromarray(np.full((6, 6), value, np.int32)), tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"pixels are int32 from {value} to {value}, expected 8 or 16 bits"):
        load_image(path, SMALL)


def test_load_image_floating_point_is_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.full((6, 6), 0.5, np.float32)), tmp_path / "a.tiff")
    with pytest.raises(InputError, match="pixels are float32"):
        load_image(path, SMALL)


def test_load_image_palette_is_resolved(tmp_path: Path) -> None:
    image = Image.fromarray(quadrants()).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    np.testing.assert_array_equal(load_one(image, tmp_path / "a.png"), quadrants())


def test_load_image_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    result = load_one(image, tmp_path / "a.png", transparency=0)
    np.testing.assert_array_equal(result[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(result[1, 1], [200, 100, 50])


@pytest.mark.parametrize(
    ("mode", "colour", "opaque"), [("RGBA", (0, 100, 200), (0, 100, 200)), ("LA", (40,), (40, 40, 40))]
)
@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_load_image_with_alpha_lies_on_white(
    tmp_path: Path, mode: str, colour: tuple[int, ...], opaque: tuple[int, ...], *, alpha: int
) -> None:
    result = load_one(Image.new(mode, (6, 6), (*colour, alpha)), tmp_path / "a.png")
    expected = np.array(opaque) * (alpha / 255) + 255 * (1 - alpha / 255)
    # Pillow composites in 8-bit integers: at most one level from the exact value.
    assert np.abs(result.astype(float) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "key", "expected"), [("L", 7, (255, 255, 255)), ("RGB", (7, 8, 9), (255, 255, 255))])
def test_load_image_with_transparent_colour_key_lies_on_white(
    tmp_path: Path, mode: str, key: Any, expected: tuple[int, ...]
) -> None:
    result = load_one(Image.new(mode, (6, 6), key), tmp_path / "a.png", transparency=key)
    np.testing.assert_array_equal(result, np.broadcast_to(np.array(expected, np.uint8), (6, 6, 3)))


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
@pytest.mark.parametrize(
    ("cmyk", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_load_image_cmyk_is_converted(tmp_path: Path, suffix: str, cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    result = load_one(Image.new("CMYK", (6, 6), cmyk), tmp_path / f"a.{suffix}")
    # JPEG rounds its coefficients: two levels. TIFF is lossless.
    assert np.abs(result.astype(int) - rgb).max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13,
    reason="Pillow 12 cannot read the uncompressed YCbCr TIFF that it writes",
)
def test_load_image_ycbcr_is_converted(tmp_path: Path) -> None:
    colour = (200, 60, 20)
    result = load_one(Image.new("RGB", (6, 6), colour).convert("YCbCr"), tmp_path / "a.tiff")
    assert np.abs(result.astype(int) - colour).max() <= 2  # 8-bit YCbCr holds a colour to about one level


def test_load_image_lab_is_refused_with_remedy(tmp_path: Path) -> None:
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (6, 6), (200, 60, 20)), transform)
    assert lab is not None
    with pytest.raises(InputError, match="CIE Lab"):
        load_one(lab, tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_load_image_of_an_animation_is_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    path = save(
        frames[0],
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    np.testing.assert_array_equal(load_image(path, SMALL), np.broadcast_to(np.array([255, 0, 0], np.uint8), (6, 6, 3)))


# --- what is no usable image
# ----------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes, *, bit_depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file with this header and this compressed data, whether or not they agree."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"not an image at all\n" * 50, "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "no_data": (png(6, 6, b""), "damaged or truncated"),
    "short_data": (png(6, 6, zlib.compress(b"\0" * 7)), "damaged or truncated"),
    "zero_width": (png(0, 6, zlib.compress(b"\0" * 7)), "0×6 pixels, expected at least|damaged|not an image"),
    "bomb": (png(20_000, 20_000, zlib.compress(b"\0" * 100)), "pixels"),
    "small_bomb": (png(9_500, 9_500, zlib.compress(b"\0" * 100)), "pixels"),
    **{
        f"truncated_{kind.lower()}": (encoded(kind)[: len(encoded(kind)) // 2], "damaged or truncated")
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
    },
    **{
        f"header_only_{kind.lower()}": (encoded(kind)[:20], "damaged or truncated|not an image")
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
    },
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_load_image_of_an_unusable_file_is_an_input_error_that_names_it(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_image(path, SMALL)
    assert str(path) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("name", BAD_FILES)
def test_decode_image_of_unusable_bytes_is_an_input_error(name: str) -> None:
    content, message = BAD_FILES[name]
    with pytest.raises(InputError, match=message.replace("is empty", "no bytes")) as caught:
        decode_image(content, SMALL)
    assert caught.value.remedy


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_image_gives_the_pixels_of_load_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.img"
    pixels = np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    Image.fromarray(pixels).save(path, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    preprocessing = default_preprocessing(24, 24)
    for data in (path.read_bytes(), bytearray(path.read_bytes())):
        np.testing.assert_array_equal(decode_image(data, preprocessing), load_image(path, preprocessing))


def test_decode_image_of_a_format_that_is_not_wanted_is_refused() -> None:
    with pytest.raises(InputError, match="not an image, or of a format") as caught:
        decode_image(encoded("TIFF"), SMALL, formats=("JPEG", "PNG"))
    assert "JPEG, PNG" in caught.value.remedy


def test_decode_image_of_more_pixels_than_wanted_is_refused() -> None:
    with pytest.raises(InputError, match="11×10 = 110 pixels, expected at most 100"):
        decode_image(png(11, 10, b""), SMALL, max_pixels=100)
    thin = io.BytesIO()
    Image.new("L", (1000, 1)).save(thin, "PNG")
    with pytest.raises(InputError, match=r"resized from 1000×1 .* it would have .* expected at most 2,000"):
        decode_image(thin.getvalue(), SMALL, max_pixels=2000)


def test_load_image_of_a_decompression_bomb_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    def fail(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(11, 10, b""))
    with pytest.raises(InputError, match="11×10 = 110 pixels, expected at most 100"):
        load_image(path, SMALL)


def test_load_image_of_a_thread_thin_image_does_not_grow_into_a_bomb(tmp_path: Path) -> None:
    path = save(Image.new("L", (60_000, 1)), tmp_path / "thin.png")
    with pytest.raises(InputError, match=r"resized from 60000×1 .* it would have 15360000×256"):
        load_image(path, default_preprocessing(224, 224))


def test_load_image_with_every_byte_damaged_in_turn_raises_input_error_or_loads(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    outcomes: set[object] = set()
    rng = np.random.default_rng(3)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(quadrants()).save(buffer, kind)
        for position in range(0, len(buffer.getvalue()), 5):
            content = bytearray(buffer.getvalue())
            content[position] ^= int(rng.integers(1, 256))
            path.write_bytes(content)
            try:
                outcomes.add(load_image(path, SMALL).shape)
            except InputError:
                outcomes.add("refused")
    assert outcomes == {(6, 6, 3), "refused"}


def test_load_image_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such image file"):
        load_image(tmp_path / "absent.jpg", SMALL)


def test_load_image_of_a_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path, SMALL)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000])
def test_load_image_of_an_impossible_path_is_an_input_error(path: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_image(path, SMALL)


def test_load_image_without_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("RGB", (6, 6)), tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[cpu\]'"):
        load_image(path, SMALL)


def test_preprocess_import_loads_neither_numpy_nor_pillow() -> None:
    code = "import sys, repvgg_deploy.images.decode; print([m for m in ('numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


# --- batches
# ----------------------------------------------------------------------------------------------------


def model_spec(preprocessing: Preprocessing | None) -> ModelSpec:
    image, scores = (
        TensorSpec("input", "float32", ("batch", 3, 6, 6), "NCHW"),
        TensorSpec("logits", "float32", ("batch", 10), "NC"),
    )
    return ModelSpec(image, (scores,), "logits", preprocessing)


def test_load_batch_for_a_float_model_is_normalised_channels_first(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    paths = [save(Image.fromarray(image), tmp_path / f"{index}.png") for index, image in enumerate(pixels)]
    batch = load_batch(paths, model_spec(SMALL))
    expected = (pixels.astype(np.float64) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert batch.dtype == np.float32 and batch.flags.c_contiguous
    # Values reach 2.7 and float32 rounds twice (subtract, divide): a few units of 2⁻²³.
    np.testing.assert_allclose(batch, expected.transpose(0, 3, 1, 2), atol=2e-6)


def test_load_batch_for_a_uint8_model_is_the_pixels(tmp_path: Path) -> None:
    path = save(Image.fromarray(quadrants()), tmp_path / "a.png")
    batch = load_batch([path, str(path)], default_preprocessing(6, 6, in_graph=True))
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch, np.stack([quadrants()] * 2))


def test_load_batch_takes_mean_and_std_from_the_specification(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (6, 6), (10, 20, 30)), tmp_path / "a.png")
    batch = load_batch([path], default_preprocessing(6, 6, mean=(10.0, 18.0, 26.0), std=(1.0, 2.0, 4.0)))
    np.testing.assert_array_equal(batch[0, :, 0, 0], [0, 1, 1])


@pytest.mark.parametrize("paths", [[], (), "photo.jpg"])
def test_load_batch_without_a_list_of_paths_is_refused(paths: Any) -> None:
    with pytest.raises(InputError, match="expected a list of at least one image path"):
        load_batch(paths, SMALL)


def test_load_batch_for_a_model_without_preprocessing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not say how an image becomes its input"):
        load_batch([tmp_path / "a.png"], model_spec(None))


@pytest.mark.parametrize(
    "images", [np.zeros((1, 6, 6, 3), np.float32), np.zeros((6, 6, 3), np.uint8), np.zeros((1, 3, 6, 6), np.uint8)]
)
def test_normalize_of_another_dtype_or_layout_is_refused(images: Any) -> None:
    with pytest.raises(InputError, match=r"expected uint8 images \(N, H, W, 3\)"):
        normalize(images, SMALL)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of the damaged EXIF blocks, which the programs silence
@pytest.mark.parametrize("name", [name for name in make_jpegs() if not name.startswith("bad")])
def test_jpeg_of_the_wild_is_read_and_turned_where_its_orientation_can_be_told(name: str) -> None:
    """The same files are given to Triton's decoder: tests/serving/test_jpeg_model.py."""
    image = decode_image(make_jpegs()[name], crop_only(28, 28))
    plain = decode_image(make_jpegs()["plain"], crop_only(28, 28))
    if "turned" in name or name.endswith("beside it") or "outside" in name:
        np.testing.assert_array_equal(image, np.rot90(plain, 3))
    elif name.startswith(("an ", "bytes")):
        np.testing.assert_array_equal(image, plain)

"""The bytes of one image file → RGB pixels, resized, cropped and normalised: the only decoder of the project.

Imports nothing of the package at run time but its errors, and does without: a copy of this file is the decoder of the
Triton repositories that are written. NumPy and Pillow are imported by the functions that need them.

Source: test.py of https://github.com/DingXiaoH/RepVGG for the steps; `Resize` and `CenterCrop` of torchvision and
`ResizeKeepRatio` of timm for the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

try:
    from ..errors import InputError, MissingDependencyError, say_install
except ImportError:  # a copy, alone in a server's Python

    class InputError(ValueError):  # type: ignore[no-redef]
        """What is wrong with an image."""

        def __init__(self, message: str, *, remedy: str) -> None:
            super().__init__(f"{message}; {remedy}")

    MissingDependencyError = InputError  # type: ignore[assignment, misc]

    def say_install(extras: str) -> str:
        """How the decoder's package is installed."""
        return "pip install pillow"


if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from ..specs.values import Preprocessing

MAX_PIXELS = 89_478_485
"""Largest image that is decoded or resized to: Pillow's own warning limit, 256 MiB of RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO", "PPM", "JPEG2000", "TGA", "AVIF")
"""What is decoded, by Pillow's names. A closed list: otherwise Pillow starts Ghostscript for a PostScript file."""
FULL_SCALE = 65535
"""The largest value of 16 bits: white, unless the preprocessing says otherwise."""
_TWELVE_BITS = 1 << 12
_ORIENTATION_TAG = 0x0112
_WHITE = (255, 255, 255, 255)
_SHRINK = "shrink or crop it first; a file of few bytes that claims so many pixels is a decompression bomb"
_COPY = "copy the file again from its source, or leave it out"


class Decoded(NamedTuple):
    """One image.

    Attributes:
        pixels: uint8 (H, W, 3), RGB, 0–255, with (H, W) = `Preprocessing.crop`.
        notes: What a person should know of the file, without its name.
    """

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]


def decode(
    source: str | BytesIO,
    preprocessing: Preprocessing,
    *,
    where: str,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """Decodes one image file: EXIF rotation, RGB, resized, centre cropped. Of an animation, the first frame.

    Args:
        source: A path, or what the file holds.
        preprocessing: Sizes, filter, and the value that is white in images of more than 8 bits.
        where: Names the image, for messages.
        formats: Which of FORMATS are accepted.
        max_pixels: The largest image that is decoded or resized to.

    Raises:
        InputError: It is truncated, not an image of these formats, or holds more than `max_pixels` pixels.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError(
            "reading image files needs Pillow, which is not installed", remedy=say_install("cpu")
        ) from error
    Image.init()
    notes: list[str] = []
    try:
        with Image.open(source, formats=[name for name in formats if name in Image.OPEN]) as image:
            _check_size(image.size, where, "the image has", max_pixels)
            bits_are_lost = ";16" in str(image.tile[:1]) and not image.mode.startswith("I")
            image.load()
            if bits_are_lost:
                _judge_wide_colour(image, preprocessing.max_value, where, notes)
            upright = _to_rgb(_upright(image, notes), preprocessing.max_value, where, notes)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{where}: more than the {max_pixels:,} pixels that are decoded here: {error}", remedy=_SHRINK
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{where}: not an image, or of a format that is not read here",
            remedy=f"convert it to one of {', '.join(formats)}",
        ) from error
    except Exception as error:  # damaged files: OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: the image is damaged or truncated: {said}", remedy=_COPY) from error
    return Decoded(np.asarray(_resize_and_crop(upright, preprocessing, where, max_pixels), np.uint8), tuple(notes))


def normalize(images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(x − mean) / std in float32, channels first.

    Args:
        images: uint8 (N, H, W, 3), RGB, 0–255.
        preprocessing: Mean and standard deviation in 0–255 units.

    Returns:
        float32 (N, 3, H, W), RGB, normalised, contiguous.

    Raises:
        InputError: `images` has another dtype or shape.
    """
    import numpy as np

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"expected uint8 images (N, H, W, 3), found {images.dtype} {images.shape}",
            remedy="give RGB bytes with channels last; load_image makes them",
        )
    count, height, width, channels = images.shape
    mean, std = (np.asarray(value, np.float32).reshape(3, 1, 1) for value in (preprocessing.mean, preprocessing.std))
    batch = np.empty((count, channels, height, width), np.float32)
    np.subtract(images.transpose(0, 3, 1, 2), mean, out=batch)
    return np.divide(batch, std, out=batch)


def _check_size(size: tuple[int, int], where: str, what: str, limit: int) -> None:
    width, height = size
    if min(size) < 1:
        raise InputError(f"{where}: {what} {width}×{height} pixels, expected at least 1×1", remedy="leave the file out")
    if width * height > limit:
        found = f"{width}×{height} = {width * height:,} pixels"
        raise InputError(f"{where}: {what} {found}, expected at most {limit:,}", remedy=_SHRINK)


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """Applies the EXIF orientation. Asked for after load(), because Pillow turns a TIFF while it loads it.

    The orientation alone is read: a malformed tag beside it is no reason to refuse a picture, or to leave it lying.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # noqa: BLE001 - a damaged EXIF block must not cost the picture; it too raises anything
        notes.append(f"EXIF block is damaged ({error}), orientation ignored")
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, max_value: int, where: str, notes: list[str]) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_16_bits(image, max_value, where, notes).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # La cannot be made RGBA at once
        canvas = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode == "LAB":
        raise InputError(
            f"{where}: is in CIE Lab colours, expected RGB, grey, palette or CMYK", remedy="convert it to RGB first"
        )
    return image.convert("RGB")


def _grey_from_16_bits(image: Image.Image, max_value: int, where: str, notes: list[str]) -> Image.Image:
    """`max_value` becomes 255. Pillow's own conversion clips at 255, which makes almost every 16-bit picture white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > FULL_SCALE:
        raise InputError(
            f"{where}: pixels are {values.dtype} from {low} to {high}, expected 8 or 16 bits",
            remedy="scale it to 8 bits first: only you know which value is white",
        )
    if high > max_value:
        raise InputError(
            f"{where}: has the value {high}, and white is {max_value}",
            remedy="give the --max-value of these images: 4095 for 12 bits, 65535 for 16",
        )
    if max_value == FULL_SCALE and 0 < high < _TWELVE_BITS:
        notes.append(_say_narrow(int(high)))
    return Image.fromarray(((values.astype(np.uint64) * 255 + max_value // 2) // max_value).astype(np.uint8))


def _judge_wide_colour(image: Image.Image, max_value: int, where: str, notes: list[str]) -> None:
    """Colours of 16 bits, of which Pillow keeps the upper 8: what lies below 4096 is nearly black."""
    if max_value != FULL_SCALE:
        raise InputError(
            f"{where}: has colours of 16 bits, of which only the upper 8 are read: --max-value {max_value} cannot hold",
            remedy=f"scale it to 8 bits first: 255 * pixels / {max_value}",
        )
    extrema = image.getextrema()
    high = max(pair[1] for pair in extrema if isinstance(pair, tuple))
    if 0 < high < _TWELVE_BITS >> 8:
        notes.append(_say_narrow((int(high) << 8) + 255))


def _say_narrow(high: int) -> str:
    bits = max(8, high.bit_length() + high.bit_length() % 2)
    return (
        f"no pixel is above {high} of {FULL_SCALE}, so that it is nearly black: {bits}-bit data in 16 bits has "
        f"--max-value {(1 << bits) - 1}"
    )


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, where: str, max_pixels: int) -> Image.Image:
    from PIL.Image import Resampling

    height, width = preprocessing.crop
    size = _resized(image.size, preprocessing)
    what = f"resized from {image.width}×{image.height} until it covers {height}×{width}, it would have"
    _check_size(size, where, what, max_pixels)
    if size != image.size:
        image = image.resize(size, Resampling[preprocessing.interpolation.upper()])
    left, top = (round((have - want) / 2) for have, want in zip(size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) after the resize; no smaller than the crop.

    With a box: stretched to it, or both sides by the same factor until it is covered, rounded as timm does. Without
    one: the short side at `resize_short`, or larger where the crop would stand out; rounded down and, in the crop, half
    to even: as torchvision's Resize and CenterCrop.
    """
    height, width = preprocessing.crop
    if preprocessing.box is not None:
        high, wide = preprocessing.box
        if preprocessing.fit == "stretch":
            return wide, high
        factor = max(wide / size[0], high / size[1])
        return max(wide, round(size[0] * factor)), max(high, round(size[1] * factor))
    short = min(size)
    # In integers: the smallest short side, not below resize_short, at which both sides (rounded down) cover the crop.
    covering = (-(-want * short // have) for want, have in zip((width, height), size, strict=True))
    target = max(preprocessing.resize_short, *covering)
    wide, high = (target if side == short else int(target * side / short) for side in size)
    return wide, high

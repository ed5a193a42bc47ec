"""The bytes of one image file → RGB pixels, resized, cropped and normalised: the only decoder of the project.

Imports nothing of the package at run time but its errors, and does without: a copy of this file is the decoder of the
Triton repositories that are written. NumPy and Pillow are imported by the functions that need them.

Source: test.py of https://github.com/DingXiaoH/RepVGG for the steps; `Resize` and `CenterCrop` of torchvision and
`ResizeKeepRatio` of timm for the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    from PIL.Image import Transpose
    from PIL.ImageFile import ImageFile

    from ..specs.values import Preprocessing

MAX_PIXELS = 89_478_485
"""Largest image that is decoded or resized to: Pillow's own warning limit, 256 MiB of RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO", "PPM", "JPEG2000", "TGA", "AVIF")
"""What is decoded, by Pillow's names. A closed list: otherwise Pillow starts Ghostscript for a PostScript file."""
FULL_SCALE = 65535
"""The largest value of 16 bits: white, unless the preprocessing says otherwise."""
_TWELVE_BITS = 1 << 12
_ORIENTATION_TAG = 0x0112
_TRANSPOSING = ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")
_WHITE = (255, 255, 255, 255)
_SHRINK = "shrink or crop it first; a file of few bytes that claims so many pixels is a decompression bomb"
_COPY = "copy the file again from its source, or leave it out"


class Decoded(NamedTuple):
    """One image.

    Attributes:
        pixels: uint8 (H, W, 3), RGB, 0–255, with (H, W) = `Preprocessing.crop`.
        notes: What a person should know of the file, without its name.
        placement: Where the image lies in `pixels`.
    """

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]
    placement: Placement


class Placement(NamedTuple):
    """Where an image lies in a model's input.

    Attributes:
        image: (height, width) of the image in pixels, upright.
        resized: (height, width) that it is resized to.
        offset: (row, column) of the input on which the resized image begins; negative where its edge is cropped off.
    """

    image: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]

    @property
    def affine(self) -> tuple[float, float, float, float]:
        """(scale x, scale y, shift x, shift y): a point of the input times scale plus shift is that of the image."""
        y, x = (have / made for have, made in zip(self.image, self.resized, strict=True))
        return x, y, -x * self.offset[1], -y * self.offset[0]

    def to_image(self, boxes: NDArray[np.floating]) -> NDArray[np.float32]:
        """Boxes in pixels of the image, cut off at its edges.

        Args:
            boxes: Floating-point (…, 4): left, top, right, bottom in pixels of the model's input; 0 is the outer edge
                of the first pixel.

        Returns:
            float32 (…, 4), in the same order.

        Raises:
            InputError: `boxes` has another shape.
        """
        import numpy as np

        if boxes.shape[-1:] != (4,):
            message = f"expected boxes (…, 4), found {boxes.shape}"
            raise InputError(message, remedy="give left, top, right and bottom of each box")
        scale, shift = (np.asarray(pair * 2) for pair in (self.affine[:2], self.affine[2:]))
        moved: NDArray[np.floating] = np.clip(boxes * scale + shift, 0, self.image[::-1] * 2)
        return moved.astype(np.float32)


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
    notes: list[str] = []
    with _open(source, where, formats, max_pixels) as image:
        bits_are_lost = ";16" in str(image.tile[:1]) and not image.mode.startswith("I")
        image.load()
        if bits_are_lost:
            _judge_wide_colour(image, preprocessing.max_value, where, notes)
        upright = _to_rgb(_upright(image, notes), preprocessing.max_value, where, notes)
    placed = place((upright.height, upright.width), preprocessing)
    return Decoded(fit_to_input(upright, preprocessing, where=where, max_pixels=max_pixels), tuple(notes), placed)


def convert(image: Image.Image, preprocessing: Preprocessing, *, where: str) -> NDArray[np.uint8]:
    """`decode` for an image that Pillow has opened already; EXIF rotation is applied where it still stands in it.

    Raises:
        InputError: It cannot be loaded, or would be resized to more than MAX_PIXELS pixels.
    """
    notes: list[str] = []
    _check_size(image.size, where, "the image has", MAX_PIXELS)
    try:
        image.load()
    except Exception as error:  # what is wrong with its file: OSError, SyntaxError, ValueError and more
        raise InputError(f"{where}: the image is damaged or truncated: {error}", remedy=_COPY) from error
    upright = _to_rgb(_upright(image, notes), preprocessing.max_value, where, notes)
    return fit_to_input(upright, preprocessing, where=where)


def read_size(source: str | BytesIO, *, where: str) -> tuple[int, int]:
    """(height, width) in pixels of an image file as `decode` sees it, upright; of most formats the head alone is read.

    Raises:
        InputError: It is no image, or holds more than MAX_PIXELS pixels.
        MissingDependencyError: Pillow is not installed.
    """
    with _open(source, where, FORMATS, MAX_PIXELS) as image:
        if image.format == "TIFF":
            image.load()  # Pillow turns it while it loads it
        turned = _find_turn(image, [])
        size = image.height, image.width
    return size if turned is None or turned.name not in _TRANSPOSING else size[::-1]


@contextmanager
def _open(source: str | BytesIO, where: str, formats: Sequence[str], max_pixels: int) -> Iterator[ImageFile]:
    """The opened file; whatever is wrong with it, also when it is loaded, is an InputError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError(
            "reading image files needs Pillow, which is not installed", remedy=say_install("cpu")
        ) from error
    Image.init()
    try:
        with Image.open(source, formats=[name for name in formats if name in Image.OPEN]) as image:
            _check_size(image.size, where, "the image has", max_pixels)
            yield image
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
    """Applies the EXIF orientation. Asked for after load(), because Pillow turns a TIFF while it loads it."""
    turn = _find_turn(image, notes)
    return image if turn is None else image.transpose(turn)


def _find_turn(image: Image.Image, notes: list[str]) -> Transpose | None:
    """What the EXIF orientation asks for.

    The orientation alone is read: a malformed tag beside it is no reason to refuse a picture, or to leave it lying.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # noqa: BLE001 - a damaged EXIF block must not cost the picture; it too raises anything
        notes.append(f"EXIF block is damaged ({error}), orientation ignored")
        return None


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


def fit_to_input(
    image: Image.Image, preprocessing: Preprocessing, *, where: str, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """An RGB image resized and laid into the model's input, uint8 (H, W, 3), as `place` says.

    Raises:
        InputError: It would be resized to more than `max_pixels` pixels.
    """
    import numpy as np
    from PIL import Image

    height, width = preprocessing.crop
    placed = place((image.height, image.width), preprocessing)
    size, (top, left) = placed.resized[::-1], placed.offset
    what = f"resized from {image.width}×{image.height} to fit {height}×{width}, it would have"
    _check_size(size, where, what, max_pixels)
    if size != image.size:
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    if preprocessing.fit != "letterbox":
        return np.asarray(image.crop((-left, -top, width - left, height - top)), np.uint8)
    canvas = Image.new("RGB", (width, height), tuple(preprocessing.pad))
    canvas.paste(image, (left, top))
    return np.asarray(canvas, np.uint8)


def place(size: tuple[int, int], preprocessing: Preprocessing) -> Placement:
    """Where an image lies in a model's input.

    Letterboxed: both sides resized by the same factor, rounded; of an odd rest the larger half lies below and on the
    right, as in Ultralytics' `LetterBox`. With a box: stretched to it, or both sides by the same factor until it is
    covered, rounded as timm does. Else the short side at `resize_short`, or larger where the crop would stand out;
    rounded down. What is cropped off is rounded half to even, as in torchvision's CenterCrop.

    Args:
        size: (height, width) of the image in pixels, upright.
        preprocessing: How it is fitted.
    """
    (high, wide), (height, width) = size, preprocessing.crop
    if preprocessing.fit == "letterbox":
        factor = min(height / high, width / wide)
        resized = max(1, round(high * factor)), max(1, round(wide * factor))
        return Placement(size, resized, ((height - resized[0]) // 2, (width - resized[1]) // 2))
    if preprocessing.box is not None:
        tall, broad = preprocessing.box
        resized = (tall, broad)
        if preprocessing.fit == "cover":
            factor = max(tall / high, broad / wide)
            resized = max(tall, round(high * factor)), max(broad, round(wide * factor))
    else:
        short = min(size)
        # In integers: the smallest short side, not below resize_short, at which both sides (rounded down) cover the
        # crop.
        target = max(preprocessing.resize_short, -(-height * short // high), -(-width * short // wide))
        resized = int(target * high / short), int(target * wide / short)
    return Placement(size, resized, (-round((resized[0] - height) / 2), -round((resized[1] - width) / 2)))

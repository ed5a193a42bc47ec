"""Image files → upright 8-bit RGB pictures, or one clear error: of whatever kind, colour or state the file is.

Used through `preprocess`. Pillow is imported when the first image is decoded.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL import Image

StrPath: TypeAlias = "str | os.PathLike[str]"

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485
"""Largest image that is decoded or resized to (Pillow's own warning limit): 256 MiB of RGB, more than any camera of one sensor needs."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO", "PPM", "JPEG2000", "TGA", "AVIF")
"""What is decoded, by Pillow's names; a closed list, because Pillow would otherwise start Ghostscript for a PostScript file."""
IMAGE_SUFFIXES = frozenset(
    f".{name}" for name in ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "mpo", "ppm", "pgm", "pbm", "jp2", "tga", "avif")
)
"""Of the files that count as images where a folder is searched."""
_ORIENTATION_TAG = 0x0112
_BACKGROUND = (255, 255, 255)


def list_images(paths: Iterable[StrPath]) -> tuple[Path, ...]:
    """Expands folders (their image files, not their subfolders) and glob patterns; files stay as they are.

    Args:
        paths: Files, folders and patterns such as `photos/*.jpg`.

    Returns:
        Files, sorted within each folder and pattern.

    Raises:
        InputError: A folder or pattern holds no image, a folder may not be read, or `paths` is empty.
    """
    found: list[Path] = []
    for item in paths:
        path, text = Path(item), os.fspath(item)
        if path.is_dir():
            matches = _images_in(path)
        elif not path.exists() and glob.has_magic(text):
            matches = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
        else:
            matches = [path]
        if not matches:
            raise InputError(
                f"{text}: no image found there", remedy=f"name image files ({', '.join(sorted(IMAGE_SUFFIXES))}), or a folder that holds some"
            )
        found += matches
    if not found:
        raise InputError("expected at least one image, found none", remedy="name image files, folders or patterns")
    return tuple(found)


def _images_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}", remedy="make the folder readable") from error


def decode_rgb(where: str) -> Image.Image:
    """The first frame of an image file, upright, in mode RGB.

    Raises:
        InputError: The file is missing, empty, truncated, not an image, or holds more than MAX_PIXELS pixels.
        MissingDependencyError: Pillow is not installed.
    """
    _require_file(where)
    return _decode(where, where, FORMATS, MAX_PIXELS)


def decode_rgb_bytes(data: bytes | bytearray, where: str, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """`decode_rgb` for what an image file holds.

    Args:
        data: The file's bytes.
        where: What it is called in messages.
        formats: Of FORMATS, what is accepted.
        max_pixels: What is decoded at most, MAX_PIXELS or fewer.

    Raises:
        InputError: It is empty, truncated, of another format or too large.
        MissingDependencyError: Pillow is not installed.
    """
    if not data:
        raise InputError(f"{where}: no bytes, expected those of an image file", remedy="send the file as it is")
    return _decode(BytesIO(data), where, formats, min(max_pixels, MAX_PIXELS))


def _decode(source: str | BytesIO, where: str, formats: Sequence[str], max_pixels: int) -> Image.Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("reading image files needs Pillow, which is not installed", remedy="pip install 'repvgg-deploy[cpu]'") from error
    Image.init()
    try:
        with Image.open(source, formats=[name for name in formats if name in Image.OPEN]) as image:
            check_size(image.size, where, limit=max_pixels)
            image.load()
            return _to_rgb(_upright(image), where)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{where}: more than the {max_pixels:,} pixels that are decoded here: {error}",
            remedy="shrink or crop it first; a file of few bytes that claims so many pixels is a decompression bomb",
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{where}: not an image, or of a format that is not read here", remedy=f"convert it to one of {', '.join(formats)}"
        ) from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        raise InputError(
            f"{where}: the image is damaged or truncated: {type(error).__name__}: {error}",
            remedy="copy the file again from its source, or leave it out",
        ) from error


def _require_file(where: str) -> None:
    try:
        with open(where, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such image file", remedy="check the path; relative paths start at the current folder") from error
    except IsADirectoryError as error:
        raise InputError(f"{where}: is a folder, expected an image file", remedy="expand folders with list_images([path])") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read: {error}", remedy="check the path and its permissions") from error
    if empty:
        raise InputError(f"{where}: the file is empty, expected an image", remedy="copy the file again from its source, or leave it out")


def check_size(size: tuple[int, int], where: str, *, what: str = "the image has", limit: int = MAX_PIXELS) -> None:
    """Refuses (width, height) with no pixel or more than `limit`.

    Raises:
        InputError: It is so; `what` begins the sentence.
    """
    width, height = size
    if min(size) < 1:
        raise InputError(f"{where}: {what} {width}×{height} pixels, expected at least 1×1", remedy="leave the file out")
    if width * height > limit:
        raise InputError(
            f"{where}: {what} {width}×{height} = {width * height:,} pixels, expected at most {limit:,}",
            remedy="shrink or crop it first; a file of few bytes that claims so many pixels is a decompression bomb",
        )


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. Asked for after load(), because Pillow turns a TIFF while it loads it."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # noqa: BLE001 - a damaged EXIF block must not cost the picture; it too raises anything
        logger.warning("%s: EXIF block is damaged (%s), orientation ignored", getattr(image, "filename", "image"), error)
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_16_bits(image, where).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(canvas, image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")).convert("RGB")
    if image.mode == "LAB":
        raise InputError(f"{where}: is in CIE Lab colours, expected RGB, grey, palette or CMYK", remedy="convert it to RGB first")
    return image.convert("RGB")


def _grey_from_16_bits(image: Image.Image, where: str) -> Image.Image:
    """65535 becomes 255. Pillow's own conversion clips at 255 instead, which makes almost every 16-bit picture white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"{where}: pixels are {values.dtype} from {values.min()} to {values.max()}, expected 8 or 16 bits",
            remedy="scale it to 8 bits first: only you know which value is white",
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))

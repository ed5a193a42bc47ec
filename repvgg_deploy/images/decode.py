"""Image files → batches as a model takes them, and the only normalisation constants in the project.

The steps are those of the original evaluation: decode, RGB, resize the short side (antialiased), centre crop,
normalise. Sizes and offsets are rounded as torchvision rounds them, so that a published accuracy can be reproduced to
the last image. NumPy and Pillow are imported by the functions that need them: a service that makes its own batches
needs no Pillow.

Source: test.py of https://github.com/DingXiaoH/RepVGG; `Resize` and `CenterCrop` of torchvision for the rounding.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import InputError, MissingDependencyError, say_install
from ..specs.values import ModelSpec, Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Uint8Array: TypeAlias = NDArray[np.uint8]
    Float32Array: TypeAlias = NDArray[np.float32]

StrPath: TypeAlias = "str | os.PathLike[str]"
logger = logging.getLogger(__name__)
MAX_PIXELS = 89_478_485
"""Largest image that is decoded or resized to: Pillow's own warning limit, 256 MiB of RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO", "PPM", "JPEG2000", "TGA", "AVIF")
"""What is decoded, by Pillow's names. A closed list: otherwise Pillow starts Ghostscript for a PostScript file."""
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo", ".ppm", ".pgm", ".pbm", ".jp2", ".tga",
    ".avif",
})  # fmt: skip
"""Suffixes of the files that count as images where a folder is searched."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean of ImageNet's red, green and blue, 0–255: 255 × (0.485, 0.456, 0.406), as in RepVGG's train.py and test.py."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation, 0–255: 255 × (0.229, 0.224, 0.225). The 58.624 of some model zoos is a slip for 58.395."""
_ORIENTATION_TAG = 0x0112
_WHITE = (255, 255, 255, 255)
_SHRINK = "shrink or crop it first; a file of few bytes that claims so many pixels is a decompression bomb"
_COPY = "copy the file again from its source, or leave it out"


def default_preprocessing(
    height: int,
    width: int,
    *,
    in_graph: bool = False,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Preprocessing:
    """The original evaluation's preprocessing for an input size.

    At 224×224 the short side becomes 256 and the centre is cropped. At every other size the short side becomes the
    crop's own: so the original evaluates at 320, and a margin cut from a small image would be content lost.

    Args:
        height: Input height in pixels.
        width: Input width in pixels.
        in_graph: Whether the model casts and normalises itself (uint8 input).
        mean: Per RGB channel, 0–255.
        std: Per RGB channel, 0–255.

    Raises:
        InputError: A size or a standard deviation is not positive.

    Source: test.py of https://github.com/DingXiaoH/RepVGG (`--resolution`).
    """
    resize_short = 256 if (height, width) == (224, 224) else min(height, width)
    return Preprocessing(mean=mean, std=std, resize_short=resize_short, crop=(height, width), in_graph=in_graph)


def load_batch(paths: Sequence[StrPath], spec: ModelSpec | Preprocessing) -> Uint8Array | Float32Array:
    """Reads image files as the batch that a model expects.

    Args:
        paths: N image files.
        spec: The model's specification (`Engine.spec`), or its preprocessing alone.

    Returns:
        uint8 (N, H, W, 3) RGB 0–255 where the model normalises itself (`in_graph`), else float32 (N, 3, H, W) RGB,
        normalised.

    Raises:
        InputError: No paths, a file is not a usable image, or the model states no preprocessing.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    preprocessing = spec.preprocessing if isinstance(spec, ModelSpec) else spec
    if preprocessing is None:
        raise InputError(
            "the model does not say how an image becomes its input",
            remedy="make the batch yourself and call infer(batch)",
        )
    if isinstance(paths, (str, os.PathLike)) or not len(paths):
        raise InputError(
            f"expected a list of at least one image path, found {paths!r}", remedy="give a list such as ['photo.jpg']"
        )
    images = np.empty((len(paths), *preprocessing.crop, 3), np.uint8)
    for index, path in enumerate(paths):
        images[index] = load_image(path, preprocessing)
    return images if preprocessing.in_graph else normalize(images, preprocessing)


def normalize(images: Uint8Array, preprocessing: Preprocessing) -> Float32Array:
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


def load_image(path: StrPath, preprocessing: Preprocessing) -> Uint8Array:
    """Decodes one image file: EXIF rotation, RGB, short side resized, centre cropped. Of an animation, the first frame.

    Grey is repeated, 16-bit grey is scaled (÷ 257), palettes are resolved, CMYK is converted, transparency is laid on
    white. An image smaller than the crop is enlarged; one that is narrower than a wide crop is resized until it covers
    it.

    Args:
        path: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, TGA or AVIF file.
        preprocessing: Sizes and filter.

    Returns:
        uint8 (H, W, 3), RGB, 0–255, with (H, W) = `preprocessing.crop`.

    Raises:
        InputError: The file is missing, empty, truncated, not an image, or holds more than MAX_PIXELS pixels; or `path`
            is no path.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            f"expected the path of an image file, found {type(path).__name__}",
            remedy="give paths; a file's bytes go to decode_image, pixels in memory to infer(batch)",
        )
    where = os.fspath(path)
    _require_file(where)
    image = _decode(where, where, FORMATS, MAX_PIXELS)
    return np.asarray(_resize_and_crop(image, preprocessing, where, MAX_PIXELS), np.uint8)


def decode_image(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    *,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Uint8Array:
    """`load_image` for the bytes of an image file: what a service receives.

    Args:
        data: What the file holds, still encoded.
        preprocessing: Sizes and filter.
        formats: Which of FORMATS are accepted: a service that expects photos need not run every decoder.
        max_pixels: The largest image that is decoded; MAX_PIXELS at most.

    Returns:
        uint8 (H, W, 3), RGB, 0–255, with (H, W) = `preprocessing.crop`; the same pixels as `load_image` gives.

    Raises:
        InputError: It is empty, truncated, not an image of these formats, or holds more than `max_pixels` pixels.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    where = "the image that was sent"
    if not data:
        raise InputError(f"{where}: no bytes, expected those of an image file", remedy="send the file as it is")
    limit = min(max_pixels, MAX_PIXELS)
    image = _decode(BytesIO(data), where, formats, limit)
    return np.asarray(_resize_and_crop(image, preprocessing, where, limit), np.uint8)


def _require_file(where: str) -> None:
    try:
        with open(where, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise InputError(
            f"{where}: no such image file", remedy="check the path; relative paths start at the current folder"
        ) from error
    except IsADirectoryError as error:
        raise InputError(
            f"{where}: is a folder, expected an image file", remedy="expand folders with list_images([path])"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read: {error}", remedy="check the path and its permissions") from error
    if empty:
        raise InputError(f"{where}: the file is empty, expected an image", remedy=_COPY)


def _decode(source: str | BytesIO, where: str, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """The first frame, upright, in mode RGB."""
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
            image.load()
            return _to_rgb(_upright(image), where)
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


def _check_size(size: tuple[int, int], where: str, what: str, limit: int) -> None:
    width, height = size
    if min(size) < 1:
        raise InputError(f"{where}: {what} {width}×{height} pixels, expected at least 1×1", remedy="leave the file out")
    if width * height > limit:
        found = f"{width}×{height} = {width * height:,} pixels"
        raise InputError(f"{where}: {what} {found}, expected at most {limit:,}", remedy=_SHRINK)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. Asked for after load(), because Pillow turns a TIFF while it loads it."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # noqa: BLE001 - a damaged EXIF block must not cost the picture; it too raises anything
        name = getattr(image, "filename", "image")
        logger.warning("%s: EXIF block is damaged (%s), orientation ignored", name, error)
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_16_bits(image, where).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # La cannot be made RGBA at once
        canvas = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode == "LAB":
        raise InputError(
            f"{where}: is in CIE Lab colours, expected RGB, grey, palette or CMYK", remedy="convert it to RGB first"
        )
    return image.convert("RGB")


def _grey_from_16_bits(image: Image.Image, where: str) -> Image.Image:
    """65535 becomes 255. Pillow's own conversion clips at 255, which makes almost every 16-bit picture white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"{where}: pixels are {values.dtype} from {values.min()} to {values.max()}, expected 8 or 16 bits",
            remedy="scale it to 8 bits first: only you know which value is white",
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, where: str, max_pixels: int) -> Image.Image:
    from PIL.Image import Resampling

    height, width = preprocessing.crop
    size = _resized(image.size, preprocessing)
    what = f"resized from {image.width}×{image.height} until it covers {height}×{width}, it would have"
    _check_size(size, where, what, max_pixels)
    if size != image.size:
        bicubic = preprocessing.interpolation == "bicubic"
        image = image.resize(size, Resampling.BICUBIC if bicubic else Resampling.BILINEAR)
    left, top = (round((have - want) / 2) for have, want in zip(size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) with the short side at `resize_short`, or larger where the crop would stand out.

    Rounded down and, in the crop, half to even: as torchvision's Resize and CenterCrop.
    """
    height, width = preprocessing.crop
    short = min(size)
    # In integers: the smallest short side, not below resize_short, at which both sides (rounded down) cover the crop.
    covering = (-(-want * short // have) for want, have in zip((width, height), size, strict=True))
    target = max(preprocessing.resize_short, *covering)
    wide, high = (target if side == short else int(target * side / short) for side in size)
    return wide, high


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
            try:
                entries = sorted(path.iterdir())
            except OSError as error:
                message = f"{path}: cannot be read: {error.strerror}"
                raise InputError(message, remedy="make the folder readable") from error
            matches = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
        elif not path.exists() and glob.has_magic(text):
            matches = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
        else:
            matches = [path]
        if not matches:
            raise InputError(
                f"{text}: no image found there",
                remedy=f"name image files ({', '.join(sorted(IMAGE_SUFFIXES))}), or a folder that holds some",
            )
        found += matches
    if not found:
        raise InputError("expected at least one image, found none", remedy="name image files, folders or patterns")
    return tuple(found)

"""Image files → batches as a model takes them, and the only normalisation constants in the project.

The steps are those of the original evaluation: decode, RGB, resize the short side (antialiased), centre crop,
normalise (`pixels`). Sizes and offsets are rounded as torchvision rounds them, so that a published accuracy can be
reproduced to the last image. NumPy and Pillow are imported by the functions that need them: a service that makes its
own batches needs no Pillow.

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
from .pixels import FORMATS, MAX_PIXELS, decode, fit_to_input, read_size
from .pixels import normalize as normalize  # noqa: PLC0414 - handed on: it is public here

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Uint8Array: TypeAlias = NDArray[np.uint8]
    Float32Array: TypeAlias = NDArray[np.float32]

StrPath: TypeAlias = "str | os.PathLike[str]"
logger = logging.getLogger(__name__)
MAX_SCANS = 100
"""Of a JPEG that somebody sends: ten times the usual number of a progressive one."""
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo", ".ppm", ".pgm", ".pbm", ".jp2", ".tga",
    ".avif",
})  # fmt: skip
"""Suffixes of the files that count as images where a folder is searched."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean of ImageNet's red, green and blue, 0–255: 255 × (0.485, 0.456, 0.406), as in RepVGG's train.py and test.py."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation, 0–255: 255 × (0.229, 0.224, 0.225). The 58.624 of some model zoos is a slip for 58.395."""
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


def letterbox_preprocessing(
    height: int,
    width: int,
    *,
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (255.0, 255.0, 255.0),
    pad: tuple[int, int, int] = (114, 114, 114),
) -> Preprocessing:
    """What most detectors are trained with: the image keeps its shape, and stands in the middle of the input.

    Args:
        height: Input height in pixels.
        width: Input width in pixels.
        mean: Per RGB channel, 0–255. With the default of `std`: RGB ÷ 255.
        std: Per RGB channel, 0–255.
        pad: Colour around the image, RGB, 0–255.

    Raises:
        InputError: A size or a standard deviation is not positive, or the colour is none.

    Source: `LetterBox` of https://github.com/ultralytics/ultralytics. OpenCV's bilinear filter, which is used there, is
        not antialiased; Pillow's, which is used here, is.
    """
    return Preprocessing(mean, std, min(height, width), (height, width), fit="letterbox", pad=pad)


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


def load_image(path: StrPath, preprocessing: Preprocessing) -> Uint8Array:
    """Decodes one image file: EXIF rotation, RGB, short side resized, centre cropped. Of an animation, the first frame.

    Grey is repeated, 16-bit grey is scaled (÷ 257, or so that `max_value` is white), palettes are resolved, CMYK is
    converted, transparency is laid on white. An image smaller than the crop is enlarged; one that is narrower than a
    wide crop is resized until it covers it.

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
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            f"expected the path of an image file, found {type(path).__name__}",
            remedy="give paths; a file's bytes go to decode_image, pixels in memory to infer(batch)",
        )
    where = os.fspath(path)
    _require_file(where)
    found = decode(where, preprocessing, where=where, max_pixels=MAX_PIXELS)
    for note in found.notes:
        logger.warning("%s: %s", where, note)
    return found.pixels


def image_size(path: StrPath) -> tuple[int, int]:
    """(height, width) in pixels of an image file, upright, as `load_image` sees it.

    With it, `place(image_size(path), spec.preprocessing).to_image(boxes)` are boxes on the image.

    Raises:
        InputError: The file is missing, empty, not an image, or holds more than MAX_PIXELS pixels.
        MissingDependencyError: Pillow is not installed.
    """
    where = os.fspath(path)
    _require_file(where)
    return read_size(where, where=where)


def fit_image(pixels: Uint8Array, preprocessing: Preprocessing) -> Uint8Array:
    """`load_image` for pixels in memory, such as a frame of a camera.

    Args:
        pixels: uint8 (H, W, 3), RGB, 0–255, of any size.
        preprocessing: Sizes and filter.

    Returns:
        uint8 (H, W, 3) with (H, W) = `preprocessing.crop`; `normalize` takes a stack of them.

    Raises:
        InputError: `pixels` has another dtype or shape, or would have more than MAX_PIXELS pixels.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(
            f"expected pixels uint8 (H, W, 3), found {pixels.dtype} {pixels.shape}",
            remedy="give RGB bytes with channels last; OpenCV's BGR becomes RGB by pixels[..., ::-1]",
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "resizing images needs Pillow, which is not installed", remedy=say_install("cpu")
        ) from error
    return fit_to_input(Image.fromarray(pixels), preprocessing, where="the image in memory")


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
    where = "the image that was sent"
    if not data:
        raise InputError(f"{where}: no bytes, expected those of an image file", remedy="send the file as it is")
    # Each scan of a progressive JPEG costs a pass over all of its pixels, and few bytes. The marker may also stand in
    # a thumbnail or in metadata: a few are counted too many.
    scans = data.count(b"\xff\xda") if data[:2] == b"\xff\xd8" else 0
    if scans > MAX_SCANS:
        raise InputError(
            f"{where}: a JPEG of {scans} scans, expected at most {MAX_SCANS}",
            remedy="save it again as a baseline JPEG; usual progressive ones have ten scans",
        )
    limit = min(max_pixels, MAX_PIXELS)
    found = decode(BytesIO(data), preprocessing, where=where, formats=formats, max_pixels=limit)
    for note in found.notes:
        logger.warning("%s: %s", where, note)
    return found.pixels


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

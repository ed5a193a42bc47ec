"""Image files → batches as a model takes them, and the only normalisation constants in the project.

The steps are those of the original evaluation: decode, RGB, resize the short side (antialiased), centre crop,
normalise (`pixels`). Sizes and offsets are rounded as torchvision rounds them, so that a published accuracy can be
reproduced to the last image. NumPy and Pillow are imported by the functions that need them: a service that makes its
own batches needs no Pillow.

Source: test.py of https://github.com/DingXiaoH/RepVGG; `Resize` and `CenterCrop` of torchvision for the rounding.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from ..errors import InputError, MissingDependencyError, say_install
from ..files.signatures import HEAD_BYTES
from ..specs.values import ModelSpec, Preprocessing
from .formats import name_special, name_unread, read_head
from .listing import STANDARD_INPUT
from .listing import StrPath as StrPath  # noqa: PLC0414 - handed on
from .pixels import FORMATS, MAX_PIXELS, Decoded, convert, decode, fit_to_input, read_size
from .pixels import normalize as normalize  # noqa: PLC0414 - handed on: it is public here

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Uint8Array: TypeAlias = NDArray[np.uint8]
    Float32Array: TypeAlias = NDArray[np.float32]


class PillowImage(Protocol):
    """An image of Pillow, for type checkers in an environment without Pillow."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""

    def getexif(self) -> Any:
        """Its EXIF data."""


Picture: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8] | PillowImage"
"""One image: the path of a file, what a file holds, pixels uint8 (H, W, 3) RGB 0–255 of any size, or Pillow's."""

logger = logging.getLogger(__name__)
MAX_SCANS = 100
"""Of a JPEG that somebody sends: ten times the usual number of a progressive one."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean of ImageNet's red, green and blue, 0–255: 255 × (0.485, 0.456, 0.406), as in RepVGG's train.py and test.py."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation, 0–255: 255 × (0.229, 0.224, 0.225). The 58.624 of some model zoos is a slip for 58.395."""
_MAX_BYTES = 1 << 29  # of an image on standard input
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
        path: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, TGA or AVIF file; `-` or `/dev/stdin` for the one that
            comes on standard input.
        preprocessing: Sizes and filter.

    Returns:
        uint8 (H, W, 3), RGB, 0–255, with (H, W) = `preprocessing.crop`.

    Raises:
        InputError: The file is missing, empty, truncated, not an image (the message says what it is where that is
            known), a pipe or device, or holds more than MAX_PIXELS pixels; or `path` is no path.
        MissingDependencyError: Pillow is not installed.
    """
    found = read_image(path, preprocessing)
    for note in found.notes:
        logger.warning("%s: %s", os.fspath(path), note)
    return found.pixels


def read_image(path: StrPath, preprocessing: Preprocessing) -> Decoded:
    """`load_image` with what is to be said of the file, which is not logged.

    Raises:
        InputError: As `load_image`.
        MissingDependencyError: Pillow is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            f"expected the path of an image file, found {type(path).__name__}",
            remedy="give paths; a file's bytes go to decode_image, pixels in memory to infer(batch)",
        )
    where = os.fspath(path)
    if where in STANDARD_INPUT:
        data = _read_standard_input()
        _require_readable(Path("standard input"), data)
        return decode(BytesIO(data), preprocessing, where="standard input", max_pixels=MAX_PIXELS)
    _require_readable(Path(where), _open_head(where))
    return decode(where, preprocessing, where=where, max_pixels=MAX_PIXELS)


def load_picture(picture: Picture, preprocessing: Preprocessing) -> Uint8Array:
    """`load_image` for whatever an image is given as.

    Args:
        picture: The path of a file; what a file holds; pixels uint8 (H, W, 3), RGB, 0–255; or an image of Pillow.
        preprocessing: Sizes and filter.

    Returns:
        uint8 (H, W, 3), RGB, 0–255, with (H, W) = `preprocessing.crop`.

    Raises:
        InputError: It is not a usable image, or nothing that an image can be given as.
        MissingDependencyError: Pillow is not installed.
    """
    if isinstance(picture, (str, os.PathLike)):
        return load_image(picture, preprocessing)
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return decode_image(bytes(picture), preprocessing)
    kind = type(picture)
    if any(base.__module__ == "PIL.Image" for base in kind.__mro__):
        return convert(cast("Image", picture), preprocessing, where="the image in memory")
    if hasattr(picture, "dtype") and hasattr(picture, "ndim"):
        return fit_image(cast("Uint8Array", picture), preprocessing)
    raise InputError(
        f"expected an image, found an object of type {kind.__qualname__}",
        remedy="give a path, the bytes of a file, pixels uint8 (H, W, 3) in RGB, an image of Pillow, or a list of them",
    )


def image_size(path: StrPath) -> tuple[int, int]:
    """(height, width) in pixels of an image file, upright, as `load_image` sees it.

    With it, `place(image_size(path), spec.preprocessing).to_image(boxes)` are boxes on the image.

    Raises:
        InputError: The file is missing, empty, not an image, or holds more than MAX_PIXELS pixels.
        MissingDependencyError: Pillow is not installed.
    """
    where = os.fspath(path)
    _require_readable(Path(where), _open_head(where))
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
    _require_readable(Path(where), bytes(data[:HEAD_BYTES]))
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


def _read_standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "standard input: nothing is sent to it, expected an image file",
            remedy="send one: repvgg-trt infer MODEL - < photo.jpg",
        )
    data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InputError(f"standard input: more than {_MAX_BYTES:,} bytes, expected one image file", remedy=_COPY)
    return data


def _open_head(where: str) -> bytes:
    special = name_special(where)
    if special is not None:
        raise InputError(
            f"{where}: is {special}, expected an image file",
            remedy="write the image to a file, or send it to standard input and name it -",
        )
    try:
        return read_head(where)
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


def _require_readable(path: Path, head: bytes) -> None:
    """Names what is known to be no image of a format that is read here."""
    if not head:
        raise InputError(f"{path}: the file is empty, expected an image", remedy=_COPY)
    found = name_unread(path, head)
    if found is not None:
        raise InputError(f"{path}: is {found.what}, not an image of a format that is read here", remedy=found.remedy)

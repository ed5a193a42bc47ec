"""Image files → batches, and the only normalisation constants in the project.

The steps are those of the original evaluation: decode, RGB, resize the short side (antialiased), centre crop, normalise. Sizes and offsets
are rounded as torchvision rounds them, so that a published accuracy can be reproduced to the last image. NumPy and Pillow are imported by
the functions that need them: a service that makes its own batches needs no Pillow.

Source: test.py of https://github.com/DingXiaoH/RepVGG; `Resize` and `CenterCrop` of torchvision for the rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from .errors import InputError
from .image_files import FORMATS, MAX_PIXELS, StrPath, check_size, decode_rgb, decode_rgb_bytes, list_images
from .specs.values import ModelSpec, Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Uint8Array: TypeAlias = NDArray[np.uint8]
    Float32Array: TypeAlias = NDArray[np.float32]

__all__ = [
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "StrPath",
    "decode_image",
    "default_preprocessing",
    "list_images",
    "load_batch",
    "load_image",
    "normalize",
]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean of ImageNet's red, green and blue, 0–255: 255 × (0.485, 0.456, 0.406), as in RepVGG's train.py and test.py."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation, 0–255: 255 × (0.229, 0.224, 0.225). Some model zoos carry 58.624 for red, which is a slip for 58.395."""


def default_preprocessing(
    height: int,
    width: int,
    *,
    in_graph: bool = False,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Preprocessing:
    """The original evaluation's preprocessing for an input size.

    At 224×224 the short side becomes 256 and the centre is cropped. At every other size the short side becomes the crop's own: so the
    original evaluates at 320, and a margin cut from a small image would be content lost.

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
        uint8 (N, H, W, 3) RGB 0–255 where the model normalises itself (`in_graph`), else float32 (N, 3, H, W) RGB, normalised.

    Raises:
        InputError: No paths, a file is not a usable image, or the model states no preprocessing.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    preprocessing = spec.preprocessing if isinstance(spec, ModelSpec) else spec
    if preprocessing is None:
        raise InputError("the model does not say how an image becomes its input", remedy="make the batch yourself and call infer(batch)")
    if isinstance(paths, (str, os.PathLike)) or not len(paths):
        raise InputError(f"expected a list of at least one image path, found {paths!r}", remedy="give a list such as ['photo.jpg']")
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

    Grey is repeated, 16-bit grey is scaled (÷ 257), palettes are resolved, CMYK is converted, transparency is laid on white. An image
    smaller than the crop is enlarged; one that is narrower than a wide crop is resized until it covers it.

    Args:
        path: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, TGA or AVIF file.
        preprocessing: Sizes and filter.

    Returns:
        uint8 (H, W, 3), RGB, 0–255, with (H, W) = `preprocessing.crop`.

    Raises:
        InputError: The file is missing, empty, truncated, not an image, or holds more than MAX_PIXELS pixels; or `path` is no path.
        MissingDependencyError: Pillow is not installed.
    """
    import numpy as np

    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            f"expected the path of an image file, found {type(path).__name__}",
            remedy="give paths; a file's bytes go to decode_image, pixels in memory to infer(batch)",
        )
    where = os.fspath(path)
    image = _resize_and_crop(decode_rgb(where), preprocessing, where, MAX_PIXELS)
    return np.asarray(image, np.uint8)


def decode_image(
    data: bytes | bytearray, preprocessing: Preprocessing, *, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS
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
    image = _resize_and_crop(decode_rgb_bytes(data, where, formats, max_pixels), preprocessing, where, min(max_pixels, MAX_PIXELS))
    return np.asarray(image, np.uint8)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, where: str, max_pixels: int) -> Image.Image:
    from PIL.Image import Resampling

    height, width = preprocessing.crop
    size = _resized(image.size, preprocessing)
    check_size(size, where, what=f"resized from {image.width}×{image.height} until it covers {height}×{width}, it would have", limit=max_pixels)
    if size != image.size:
        image = image.resize(size, Resampling.BICUBIC if preprocessing.interpolation == "bicubic" else Resampling.BILINEAR)
    left, top = (round((have - want) / 2) for have, want in zip(size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) with the short side at `resize_short`, or larger where the crop would stand out.

    Rounded down and, in the crop, half to even: as torchvision's Resize and CenterCrop.
    """
    height, width = preprocessing.crop
    short = min(size)
    # Integers throughout: the smallest short side, not below resize_short, at which both sides (rounded down) cover the crop.
    target = max(preprocessing.resize_short, *(-(-want * short // have) for want, have in zip((width, height), size, strict=True)))
    wide, high = (target if side == short else int(target * side / short) for side in size)
    return wide, high

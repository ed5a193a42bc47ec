"""Single images, as a set stores them → the batch that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .preprocess import normalize
from .specs.values import ModelSpec, Preprocessing

_RESIZE = "give image files, which are resized and cropped, or store images of the size that the model takes"


def to_input(images: Sequence[NDArray[Any]], spec: ModelSpec, name: str) -> NDArray[Any]:
    """Stacks images to a batch as the model takes it.

    Args:
        images: All uint8 (H, W, 3) or (3, H, W), RGB, 0–255; or all float32 of either layout, normalised. None give a batch of none.
        spec: Of the model. Its input is uint8 NHWC, or floating-point NCHW.
        name: Of the set, for messages.

    Returns:
        uint8 (N, H, W, 3) where the model normalises itself, else float32 (N, 3, H, W).

    Raises:
        InputError: The images are of another size or not RGB, or the model does not say how they are normalised.
    """
    takes_bytes = spec.input.dtype == "uint8"
    if not images:
        return np.empty((0, 0, 0, 3) if takes_bytes else (0, 3, 0, 0), np.uint8 if takes_bytes else np.float32)
    _require_size(images[0], spec, name)
    batch = np.stack([_channels_last(image) for image in images])
    if takes_bytes:
        return batch if batch.dtype == np.uint8 else _to_bytes(batch, spec, name)
    if batch.dtype == np.uint8:
        return normalize(batch, _preprocessing(spec, name))
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def _is_planar(image: NDArray[Any]) -> bool:
    """Whether the channels stand first. Where both ends are 3 long: bytes have them last, floating-point numbers first."""
    return image.shape[0] == 3 and (image.shape[2] != 3 or image.dtype != np.uint8)


def _channels_last(image: NDArray[Any]) -> NDArray[Any]:
    return image.transpose(1, 2, 0) if _is_planar(image) else image


def _require_size(image: NDArray[Any], spec: ModelSpec, name: str) -> None:
    height, width, channels = _channels_last(image).shape
    wanted = spec.input.shape[1:3] if spec.input.dtype == "uint8" else spec.input.shape[2:4]
    if channels != 3:
        raise InputError(
            f"{name}: expected RGB images (H, W, 3), found {image.shape}", remedy="repeat a grey channel three times, drop an alpha channel"
        )
    if any(isinstance(want, int) and want != have for want, have in zip(wanted, (height, width), strict=False)):
        raise InputError(f"{name}: expected images of {wanted[0]}×{wanted[1]} pixels, found {height}×{width}", remedy=_RESIZE)


def _to_bytes(batch: NDArray[np.float32], spec: ModelSpec, name: str) -> NDArray[np.uint8]:
    """Normalised float32 (N, H, W, 3) back to RGB bytes, rounded."""
    preprocessing = _preprocessing(spec, name)
    mean, std = (np.asarray(value, np.float32) for value in (preprocessing.mean, preprocessing.std))
    return np.asarray(np.clip(np.rint(batch * std + mean), 0, 255), np.uint8)


def _preprocessing(spec: ModelSpec, name: str) -> Preprocessing:
    if spec.preprocessing is None:
        raise InputError(
            f"{name}: the model does not say how bytes are normalised", remedy="store float32 images (N, 3, H, W) as the model takes them"
        )
    return spec.preprocessing

"""Images to choose quantization scales with: drawn from any set, or from the `NAME.calib.npz` beside an ONNX.

`NAME.calib.npz` holds synthetic images for one ONNX in two arrays: `images`, uint8 (N, H, W, 3) RGB 0–255 or float32
(N, 3, H, W) normalised, and `provenance`, () text: the JSON of `specs.values.CalibrationProvenance`. No code of the
file is executed.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, InputError, clean_text
from ..specs import codec
from ..specs.values import CalibrationProvenance, ModelSpec
from .decode import StrPath
from .likeness import Likeness, require_like
from .sets import ImageSet, SetOptions, open_images
from .sources import explain_damage, read_array

logger = logging.getLogger(__name__)
USUAL_IMAGES = 256
_REMAKE = (
    "make it again: repvgg-export --ckpt CHECKPOINT --out ONNX --synthetic-calibration; of a module, with "
    "ModuleOptions.synthetic_calibration"
)
_FEW_IMAGES = 16  # fewer are warned of
_TRAINING = "give images of the training split"
_SUFFIX = ".calib.npz"


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images to calibrate with and to judge the result on, as the model takes them.

    Attributes:
        batches: To calibrate with: uint8 (N, H, W, 3), or float32 (N, 3, H, W), normalised.
        held_out: To judge the result with, likewise; without any, those to calibrate with stand in.
        name: Where they came from.
        skipped: How many images could not be read.
        fixed_batch: Whether the model has a fixed batch: then all batches have that size, and none is cut.
        likeness: How they compare with what the model was trained on.
        left_out: What stood beside them and is no image, counted and named; empty where nothing did.
    """

    batches: Sequence[NDArray[Any]]
    held_out: Sequence[NDArray[Any]] = ()
    name: str = ""
    skipped: int = 0
    fixed_batch: bool = False
    likeness: Likeness | None = None
    left_out: str = ""

    @property
    def images(self) -> int:
        """How many there are to calibrate with."""
        return sum(map(len, self.batches))


def load_calibration(
    path: StrPath, spec: ModelSpec, *, options: SetOptions | None = None, accept_data: bool = False
) -> Images:
    """Reads images to calibrate with; labels are not looked at.

    Args:
        path: A folder, searched recursively; an .npz with `images`, uint8 (N, H, W, 3) or float32 and normalised (a
            `NAME.calib.npz` too), or an .npy of them; a text or CSV file of paths, relative to it; or one image.
        spec: The specification of the model to calibrate.
        options: Which images, USUAL_IMAGES for None; the size of a model's fixed batch takes the place of its batch.
        accept_data: Take images that are unlike those that the model was trained on.

    Raises:
        CalibrationError: There are no images, too many are unreadable, they are all alike, hold NaN, or are not what
            the model takes or was trained on.
    """
    options = options or SetOptions(USUAL_IMAGES)
    options = replace(options, batch_size=spec.batch or options.batch_size, labels="none")
    try:
        images = open_images(path, spec, options)
        found = list(images)
    except InputError as error:
        raise CalibrationError(error.message, remedy=error.remedy) from error
    skipped = sum(len(batch.skipped) for batch in found)
    batches = [batch.images for batch in found if len(batch.images)]
    _require_usable(batches, images)
    try:
        likeness = require_like(images, accept=accept_data)
    except InputError as error:
        raise CalibrationError(error.message, remedy=error.remedy) from error
    if skipped:
        logger.warning("%s: %d of %d images could not be read and were left out", images.name, skipped, len(images))
    filled = _fill(batches, spec.batch, images.name)
    return Images(filled, (), images.name, skipped, spec.batch is not None, likeness, images.left_out)


def split_held_out(images: Images, *, share: float = 0.2) -> Images:
    """Divides images into those to calibrate with, and those to judge the result on.

    Evenly: with a share of 0.2 every fifth image is held out (with a fixed batch: every fifth batch), so that both
    parts hold all classes. Equal images are always divided alike.

    Args:
        images: Not changed.
        share: To hold out, more than 0 and less than 1; at least one image is, and at least one is left.

    Raises:
        CalibrationError: The share is out of range, or there is only one image (or one fixed batch).
    """
    if not 0 < share < 1:
        raise CalibrationError(
            f"the share to hold out must lie between 0 and 1, found {share}", remedy="give 0.2, or leave it out"
        )
    units = [batch[np.newaxis] for batch in images.batches] if images.fixed_batch else images.batches
    count = sum(map(len, units))
    if count < 2:
        what = "batch" if images.fixed_batch else "image"
        raise CalibrationError(
            f"{images.name}: one {what} cannot be divided into calibration and judgement",
            remedy=f"{_TRAINING}, 256 of them",
        )
    held = np.floor(np.arange(1, count + 1) * share) > np.floor(np.arange(count) * share)
    held[-1] |= not held.any()
    held[0] &= not held.all()
    masks = np.split(held, np.cumsum([len(unit) for unit in units])[:-1])
    left, held_out = _part(images, units, [~mask for mask in masks]), _part(images, units, masks)
    return replace(images, batches=left, held_out=held_out)


def _part(images: Images, units: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The rows of `units` (images; with a fixed batch, batches) that the masks choose; whole units are not copied."""
    chosen = [unit if mask.all() else unit[mask] for unit, mask in zip(units, masks, strict=True) if mask.any()]
    return [part[0] for part in chosen] if images.fixed_batch else chosen


def _fill(batches: list[NDArray[Any]], fixed: int | None, name: str) -> list[NDArray[Any]]:
    """Whole batches only, for a model with a fixed one: the rest is dropped; if it is all there is, repeated."""
    if fixed is None or len(batches[-1]) == fixed:
        return batches
    if len(batches) == 1:
        logger.warning("%s: %d images are repeated to fill the model's batch of %d", name, len(batches[0]), fixed)
        return [np.resize(batches[0], (fixed, *batches[0].shape[1:]))]
    logger.warning(
        "%s: the last %d images do not fill the model's batch of %d and are left out", name, len(batches[-1]), fixed
    )
    return batches[:-1]


def _require_usable(batches: list[NDArray[Any]], images: ImageSet) -> None:
    count = sum(map(len, batches))
    if not count:
        raise CalibrationError(f"{images.name}: none of {len(images)} images can be read", remedy=_TRAINING)
    if not all(np.isfinite(batch).all() for batch in batches):
        raise CalibrationError(
            f"{images.name}: the images hold NaN or infinite values", remedy="look at how they were made"
        )
    if count > 1 and all((batch == batches[0][0]).all() for batch in batches):
        raise CalibrationError(f"{images.name}: all {count} images are alike", remedy=_TRAINING)
    if count < _FEW_IMAGES:
        logger.warning(
            "%s: %d images are few to calibrate with: 256 of the training split are usual", images.name, count
        )


def calibration_path(onnx_path: StrPath) -> Path:
    """Where the calibration file of an ONNX stands: `b2.calib.npz` beside `b2.onnx`."""
    path = Path(onnx_path)
    stem = path.name[: -len(".onnx")] if path.name.lower().endswith(".onnx") else path.name
    return path.with_name(stem + _SUFFIX)


def find_calibration_file(onnx_path: StrPath) -> Path | None:
    """The calibration file beside an ONNX, or None where there is none. Whether it is intact is not looked at."""
    path = calibration_path(onnx_path)
    return path if path.is_file() else None


def load_calibration_file(path: StrPath, onnx_sha256: str | None = None) -> tuple[NDArray[Any], CalibrationProvenance]:
    """Reads calibration images and where they come from.

    Args:
        path: `NAME.calib.npz`.
        onnx_sha256: The ONNX that they must have been made for; None takes any.

    Returns:
        uint8 (N, H, W, 3), RGB 0–255, or float32 (N, 3, H, W), normalised RGB, finite; and the provenance.

    Raises:
        InputError: The file is not there.
        CalibrationError: It is truncated, not one of ours, or made for another ONNX.
    """
    where = Path(path)
    arrays = _read_arrays(where)
    provenance = _read_provenance(where, arrays["provenance"])
    if onnx_sha256 is not None and provenance.onnx_sha256 != onnx_sha256:
        raise CalibrationError(
            f"{path}: made for another ONNX: expected sha256 {onnx_sha256[:16]}…, found {provenance.onnx_sha256[:16]}…",
            remedy="name it with --calib if it suits this ONNX too, or " + _REMAKE,
        )
    _require_images(where, arrays["images"], provenance)
    return arrays["images"], provenance


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="look at the path, or " + _REMAKE)
    try:
        with explain_damage(path), zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
        if names != ["images.npy", "provenance.npy"]:
            found = ", ".join(clean_text(name.removesuffix(".npy")[:40]) for name in names[:9]) or "none"
            raise _not_ours(path, f"expected the arrays images and provenance, found {found}")
        return {name: read_array(path, name) for name in ("images", "provenance")}
    except InputError as error:
        raise _not_ours(path, error.message.removeprefix(f"{path}: ")) from error


def _read_provenance(path: Path, text: NDArray[Any]) -> CalibrationProvenance:
    if text.dtype.kind != "U" or text.ndim != 0:
        raise _not_ours(path, f"provenance: expected one text, found {text.dtype} {text.shape}")
    try:
        return codec.loads(CalibrationProvenance, str(text[()]))
    except InputError as error:
        raise _not_ours(path, f"provenance: {error.message}") from error


def _require_images(path: Path, images: NDArray[Any], provenance: CalibrationProvenance) -> None:
    colours = {np.dtype(np.uint8): 3, np.dtype(np.float32): 1}.get(images.dtype)
    if colours is None or images.ndim != 4 or images.shape[colours] != 3 or 0 in images.shape:
        raise _not_ours(
            path, f"images: expected uint8 (N, H, W, 3) or float32 (N, 3, H, W), found {images.dtype} {images.shape}"
        )
    if len(images) != provenance.images:
        raise _not_ours(path, f"expected {provenance.images} images as its provenance says, found {len(images)}")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise _not_ours(path, "images: NaN or infinite values")


def _not_ours(path: Path, reason: str) -> CalibrationError:
    return CalibrationError(
        f"{path}: no calibration file that repvgg-export wrote, or a damaged one: {reason}", remedy=_REMAKE
    )

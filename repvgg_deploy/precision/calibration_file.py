"""`NAME.calib.npz`: calibration images beside the ONNX that they were made for, with where they come from. NumPy and the standard library only.

Two arrays: `images`, uint8 (N, H, W, 3) RGB 0–255 or float32 (N, 3, H, W) normalised, and `provenance`, () text: the JSON of
`specs.CalibrationProvenance`. No code of the file is executed.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, InputError
from ..image_files import StrPath
from ..specs import codec
from ..specs.values import CalibrationProvenance

REMAKE = "make it again: repvgg-export --ckpt CHECKPOINT --out ONNX --synthetic-calibration"
_SUFFIX = ".calib.npz"


def calibration_path(onnx_path: StrPath) -> Path:
    """Where the calibration file of an ONNX stands: `b2.calib.npz` beside `b2.onnx`."""
    path = Path(onnx_path)
    stem = path.name[: -len(".onnx")] if path.name.lower().endswith(".onnx") else path.name
    return path.with_name(stem + _SUFFIX)


def find_calibration_file(onnx_path: StrPath) -> Path | None:
    """The calibration file beside an ONNX, or None where there is none; it may be damaged or of another ONNX (`load_calibration_file` says)."""
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
    arrays = _read(Path(path))
    provenance = _provenance(Path(path), arrays)
    if onnx_sha256 is not None and provenance.onnx_sha256 != onnx_sha256:
        raise CalibrationError(
            f"{path}: made for another ONNX: expected sha256 {onnx_sha256[:16]}…, found {provenance.onnx_sha256[:16]}…",
            remedy="name it with --calib if it suits this ONNX too, or " + REMAKE,
        )
    return _images(Path(path), arrays["images"], provenance), provenance


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="look at the path, or " + REMAKE)
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
        if names != ["images.npy", "provenance.npy"]:
            raise _not_ours(
                path, f"expected the arrays images and provenance, found {', '.join(n.removesuffix('.npy') for n in names[:9]) or 'none'}"
            )
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: np.asarray(stored[name]) for name in ("images", "provenance")}
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _not_ours(path, f"cannot be read: {error}") from error


def _provenance(path: Path, arrays: dict[str, NDArray[Any]]) -> CalibrationProvenance:
    text = arrays["provenance"]
    if text.dtype.kind != "U" or text.ndim != 0:
        raise _not_ours(path, f"provenance: expected one text, found {text.dtype} {text.shape}")
    try:
        return codec.loads(CalibrationProvenance, str(text))
    except InputError as error:
        raise _not_ours(path, f"provenance: {error.message}") from error


def _images(path: Path, images: NDArray[Any], provenance: CalibrationProvenance) -> NDArray[Any]:
    layouts = {np.dtype(np.uint8): 3, np.dtype(np.float32): 1}
    colours = layouts.get(images.dtype)
    if colours is None or images.ndim != 4 or images.shape[colours] != 3 or 0 in images.shape:
        raise _not_ours(path, f"images: expected uint8 (N, H, W, 3) or float32 (N, 3, H, W), found {images.dtype} {images.shape}")
    if len(images) != provenance.images:
        raise _not_ours(path, f"expected {provenance.images} images as its provenance says, found {len(images)}")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise _not_ours(path, "images: NaN or infinite values")
    return images


def _not_ours(path: Path, reason: str) -> CalibrationError:
    return CalibrationError(f"{path}: no calibration file that repvgg-export wrote, or a damaged one: {reason}", remedy=REMAKE)

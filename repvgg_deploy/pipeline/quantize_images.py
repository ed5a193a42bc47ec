"""Where the images of a quantization come from, and which of them are kept aside to judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..files.output import sha256_file
from ..images.calibration import CalibrationImages, calibration_path, find_calibration_file, load_calibration, load_calibration_file, split_held_out
from ..images.decode import normalize
from ..images.drawn import draw_images
from ..precision.execute import count_images
from ..specs.values import ModelSpec
from .quantize_options import QuantizeOptions

LEAST_IMAGES = 8
"""Fewer cannot be calibrated with and judged on."""
_EXTRA_SHARE = 0.5  # held out beyond the images to calibrate with, where there are so many
_HELD_OUT_SHARE = 0.2
_DRAWN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Images as the model takes them.

    Attributes:
        name: Where they came from.
        synthetic: Whether `repvgg-export --synthetic-calibration` made them, of this very ONNX.
        skipped: How many could not be read.
        batches: To calibrate with; of FP16 to measure ranges on.
        held_out: To judge on.
    """

    name: str
    synthetic: bool
    skipped: int
    batches: Sequence[NDArray[Any]]
    held_out: Sequence[NDArray[Any]]

    @property
    def images(self) -> int:
        """How many to calibrate with."""
        return count_images(self.batches)


def gather_images(model: Path, spec: ModelSpec, options: QuantizeOptions) -> Gathered | None:
    """Reads the images that the options name, or those beside the ONNX. None where FP16 has none, or INT8 is to do without.

    Raises:
        CalibrationError: There are none, too few or unusable ones; where a file stands beside the ONNX, it is damaged or of another ONNX.
    """
    if options.from_statistics or (options.precision == "fp16" and options.calibration is None):
        return None
    synthetic = options.calibration is None
    source = _find_beside(model) if synthetic else Path(str(options.calibration))
    limit = options.images + int(options.images * _EXTRA_SHARE)
    found = load_calibration(source, spec, limit=limit, seed=options.seed)
    if options.precision == "fp16":
        return Gathered(found.name, synthetic, found.skipped, found.batches, found.batches)
    if found.images < LEAST_IMAGES:
        raise CalibrationError(
            f"{found.name}: expected at least {LEAST_IMAGES} images to calibrate with and to judge the result, found {found.images}",
            remedy="give some hundred images of the training split, and no smaller --images",
        )
    calibrate, held_out = split_held_out(found, share=_share(found, options.images))
    return Gathered(found.name, synthetic, found.skipped, calibrate.batches, held_out.batches)


def _share(found: CalibrationImages, wanted: int) -> float:
    return max(_HELD_OUT_SHARE, 1 - wanted / found.images)


def _find_beside(model: Path) -> Path:
    path = find_calibration_file(model)
    if path is None:
        raise CalibrationError(
            f"{model}: INT8 needs calibration images: none were given, and {calibration_path(model).name} is not there",
            remedy=f"repvgg-export --ckpt CHECKPOINT --out {model} --synthetic-calibration makes them of a training-form checkpoint alone; or give "
            "--calib DIR with images of the training split; or --calib statistics, which takes no time and is less exact",
        )
    load_calibration_file(path, sha256_file(model))
    return path


def draw_inputs(spec: ModelSpec) -> list[NDArray[Any]]:
    """Drawn images as the model takes them, others than those that `precision.ranges` measures on; the same every time."""
    assert spec.preprocessing is not None, "precision.ranges refused the model before"
    sizes = spec.input.shape[1:3] if spec.input.dtype == "uint8" else spec.input.shape[2:4]
    height, width = (size if isinstance(size, int) else usual for size, usual in zip(sizes, spec.preprocessing.crop, strict=True))
    images: NDArray[Any] = draw_images((height, width), _DRAWN, np.random.default_rng(1))
    if spec.batch is not None:
        images = np.resize(images, (-(-len(images) // spec.batch) * spec.batch, *images.shape[1:]))
    if spec.input.dtype != "uint8":
        images = normalize(images, spec.preprocessing)
    size = spec.batch or len(images)
    return [images[start : start + size] for start in range(0, len(images), size)]

"""How an exported ONNX becomes a typed one, for `quantize`. Options that contradict each other are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import InputError
from ..images.calibration import USUAL_IMAGES
from .fp16 import Fp16Options
from .grids import require_format
from .int8 import Int8Options
from .score import Metric

STATISTICS = "statistics"
"""In place of images: ranges in closed form, from the BatchNorm statistics in the metadata."""
MIN_AGREEMENT = 0.97
MIN_SQNR_DB = 20.0
"""A tenth of the outputs' root mean square; what detectors and segmentation bear without a measurable loss is more."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What to make of an exported ONNX.

    Attributes:
        precision: What the layers of the graph to write compute in.
        calibration: Images (a folder, list, .npz or image; see `images.calibration.load_calibration`), or `statistics`.
            None: for INT8 and FP8 the `NAME.calib.npz` beside the ONNX; for FP16 no images.
        images: At most so many to calibrate with. Where there are more, up to half as many again are held out to judge
            the result; else a fifth is.
        seed: Another gives another choice of images.
        int8: Steps of INT8 and FP8 and their methods (`precision` chooses the format); without effect for FP16.
        fp16: Margin and types of FP16; of FP16 only.
        min_agreement: Share of held-out images whose best class must be FP32's, 0 to 1. Of so few images that one alone
            is more than that, one may differ.
        min_sqnr_db: What INT8 or FP8 must reach at every output of a graph without a classifier, on held-out images.
        metric: The user's own measure, on data of its own, in place of agreement and SQNR: a function that is given
            `run(batch)`, which runs a graph on a batch as `Engine.infer` does (an array, or a dict of them by the names
            of the outputs), and returns one number, larger is better. `int8.max_drop` then is what it may fall by.
        min_metric: What it must give the typed graph; None: 97 % of what it gives FP32, or what `int8.max_drop` leaves.
        scales: A calibration that was saved (`scales.ScaleFile`), used in place of a new one.
        save_scales: Where to save the calibration.
        accept_data: Calibrate with images that are unlike those that the model was trained on.
        max_value: What is white in images of more than 8 bits; None: what the model states.
    """

    precision: Literal["fp16", "fp8", "int8"]
    calibration: Path | str | None = None
    images: int = USUAL_IMAGES
    seed: int = 0
    int8: Int8Options = field(default_factory=Int8Options)
    fp16: Fp16Options = field(default_factory=Fp16Options)
    min_agreement: float = MIN_AGREEMENT
    min_sqnr_db: float = MIN_SQNR_DB
    metric: Metric | None = None
    min_metric: float | None = None
    scales: Path | None = None
    save_scales: Path | None = None
    accept_data: bool = False
    max_value: int | None = None

    @property
    def from_statistics(self) -> bool:
        """Whether INT8 or FP8 is to do without images."""
        return self.calibration == STATISTICS

    def __post_init__(self) -> None:
        if self.precision not in ("fp16", "fp8", "int8"):
            raise InputError(
                f"the precision must be fp16, fp8 or int8, found {self.precision!r}", remedy="give one of them"
            )
        if not 0 <= self.min_agreement <= 1:
            raise InputError(
                f"the least agreement is a share from 0 to 1, found {self.min_agreement}",
                remedy="give --min-agreement 0.97, or leave it out",
            )
        if not 0 <= self.min_sqnr_db <= 200:
            raise InputError(
                f"the least SQNR is 0 to 200 dB, found {self.min_sqnr_db}", remedy="give --min-sqnr 20, or leave it out"
            )
        if self.min_metric is not None and self.metric is None:
            raise InputError(
                "a least score needs a measure that gives one", remedy="give --metric module:function, too"
            )
        if self.images < 1:
            raise InputError(
                f"expected at least one image, found {self.images}", remedy="give --images 256, or leave it out"
            )
        if self.precision == "fp8":
            require_format("fp8", target=self.int8.target, method=self.int8.scales.method)
        with_scales = self.scales is not None or self.save_scales is not None
        if self.precision == "fp16" and (self.from_statistics or with_scales):
            raise InputError(
                "FP16 has no scales to choose: --calib statistics, --scales and --save-scales are of INT8 and FP8",
                remedy="leave them out: without images, FP16 takes the BatchNorm statistics by itself",
            )
        if self.from_statistics and with_scales:
            raise InputError(
                "--calib statistics takes no time, so its scales are neither saved nor reused",
                remedy="leave the scales out",
            )
        if self.from_statistics and (self.int8.bounded or self.int8.sensitivity):
            raise InputError(
                "--max-drop and --sensitivity are measured on images, and --calib statistics has none",
                remedy="give --calib images",
            )

"""How a graph becomes INT8, and what is reported of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import CalibrationError
from .check import Target
from .equalize import EqualizeOptions, InterfaceReport
from .halves import Io
from .metrics import Judgement
from .round import RoundOptions
from .scales import ScaleFile, ScaleOptions
from .search import SearchOptions
from .sensitivity import LayerCost


@dataclass(frozen=True, slots=True)
class Int8Options:
    """How a graph becomes INT8; every step can be left out.

    Attributes:
        target: `trt10`: FP16 for the rest, opset 19, strongly typed: TensorRT 10, 11 and RTX. `trt8`: FP32 for the rest and FP32 scales, opset 17:
            TensorRT 8.5 and 8.6, ONNX Runtime, OpenVINO.
        io: Type of the inputs and outputs that are floating-point; of `trt10` only.
        equalize: None leaves the channels as they are. Its exponent stands where `search` does not choose one.
        search: Chooses the exponent of each interface by measured error; None takes `equalize`'s.
        range_percentile: Of each channel's values: what equalization takes for its range.
        scales: How activation scales are chosen.
        rounding: How weights are rounded.
        keep: Names of layers that stay in floating point.
        max_drop: Keeps the fewest further layers in floating point with which the expected top-1 drop (see `metrics.Judgement`), in points, is at
            most this; None keeps none.
        sensitivity: Whether layers are ranked by their cost, also without `max_drop`.
    """

    target: Target = "trt10"
    io: Io = "fp32"
    equalize: EqualizeOptions | None = field(default_factory=lambda: EqualizeOptions(0.7))
    search: SearchOptions | None = field(default_factory=SearchOptions)
    range_percentile: float = 99.99
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    rounding: RoundOptions = field(default_factory=RoundOptions)
    keep: tuple[str, ...] = ()
    max_drop: float | None = None
    sensitivity: bool = False

    def __post_init__(self) -> None:
        if self.target not in ("trt8", "trt10"):
            raise CalibrationError(f"the target must be trt8 or trt10, found {self.target!r}", remedy="give trt10, or leave it out")
        if self.io == "fp16" and self.target == "trt8":
            raise CalibrationError("FP16 inputs and outputs need the target trt10: trt8 keeps FP32 beside INT8", remedy="leave io out, or give trt10")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise CalibrationError(f"the largest drop must lie between 0 and 100 points, found {self.max_drop}", remedy="give 0.3, or leave it out")
        if not 50 < self.range_percentile <= 100:
            raise CalibrationError(f"the range percentile must lie between 50 and 100, found {self.range_percentile}", remedy="leave it out")


MAX_CALIBRATION = Int8Options(
    target="trt8", equalize=None, search=None, scales=ScaleOptions("max"), rounding=RoundOptions(method="nearest", bias_correction=False)
)
"""What most tools do: per-channel weights, per-tensor activations, nothing clipped."""
FAST = Int8Options(target="trt8", equalize=EqualizeOptions(0.5), search=None, rounding=RoundOptions(method="nearest"))
"""Without the second-order rounding and without the search."""


def require_layers(keep: Sequence[str], known: Sequence[str]) -> None:
    """Every name of `keep` must be a layer's.

    Raises:
        CalibrationError: One is not.
    """
    unknown = sorted(set(keep) - set(known))
    if unknown:
        # `repvgg-trt inspect` lists stage1.0, the whole block; its convolution is what can be kept.
        meant = f"{unknown[0]}.conv"
        remedy = f"give {meant}" if meant in known else f"its layers are {', '.join(known)}"
        raise CalibrationError(f"no layer is called {unknown[0]!r}", remedy=remedy)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What INT8 did to one layer.

    Attributes:
        name: The layer.
        activation_scale: Of its input.
        sqnr_db: Signal-to-quantization-noise ratio of its output, all layers before it quantized, in decibels.
        kept: Whether it stayed in floating point.
        macs: Multiply-accumulates of one image.
    """

    name: str
    activation_scale: float
    sqnr_db: float
    kept: bool
    macs: int


@dataclass(frozen=True, slots=True)
class Int8Report:
    """What was done and what it cost, measured on calibration images; without images nothing is measured, and figures are 0.

    Attributes:
        images: Calibration images.
        source: `images`, or `statistics` for ranges in closed form.
        layers: In order; the last is the classifier, whose figure is that of the logits.
        interfaces: Of the equalization; empty without.
        scales: To be saved and reused.
        costs: Layers ranked by what each alone costs, the costliest first; empty where it was not asked for.
        kept: Layers that stayed in floating point.
        int8_share: Share of the multiply-accumulates that are INT8, 0 to 1.
        held_out: Judged on images that took no part; None where there were none, or where there is no classifier.
    """

    images: int
    source: Literal["images", "statistics"]
    layers: tuple[LayerReport, ...]
    interfaces: tuple[InterfaceReport, ...]
    scales: ScaleFile
    costs: tuple[LayerCost, ...] = ()
    kept: tuple[str, ...] = ()
    int8_share: float = 1.0
    held_out: Judgement | None = None

"""One INT8 quantization under way: its steps in order, with what each leaves for the next.

How a graph becomes INT8, and what is reported of it.

FP32 ONNX → INT8 ONNX with explicit quantization, as TensorRT wants it.

Pairs stand on the input of every convolution and of the classifier, and nowhere else (none between Conv and ReLU: it
would break the fusion); weights are INT8 initializers behind DequantizeLinear, one scale per output channel; zero
points are 0; biases stay floating-point.

The steps, each a function of its own and each can be left out: ranges (`calibrate`, or `closed_form` without images),
equalization (`search`, `equalize`), scales (`scales`), rounding with bias correction (`round_network`), sensitivity
(`sensitivity`), types (`mixed`).
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from .chain import read_chain, read_weights
from .check import Target, check_quantized
from .closed_form import closed_form_statistics, correct_bias
from .equalize import EqualizeOptions, InterfaceReport, apply_factors, equalize
from .halves import Io, half_spec
from .metrics import Judgement, LayerCost, blank_batch, count_macs, fewest_kept, judge, layer_sqnr, rank_layers
from .mixed import halve_quantized, round_activation_scales, round_layer_to_half
from .qdq import insert_pairs, write_integers
from .ranges import Statistics, collect, hash_images
from .round import RoundedLayer, RoundOptions, round_by_prior, round_nearest
from .round_network import Prepared, round_weights
from .run_onnx import has_fixed_batch, spread_images
from .scales import ScaleFile, ScaleOptions, choose_scales, fit_scales, graph_sha256
from .search import SearchOptions, choose_exponents
from .typed_model import StrPath, TypedModel, extend, load_parent


@dataclass(frozen=True, slots=True)
class Int8Options:
    """How a graph becomes INT8; every step can be left out.

    Attributes:
        target: `trt10`: FP16 for the rest, opset 19, strongly typed: TensorRT 10, 11 and RTX. `trt8`: FP32 for the rest
            and FP32 scales, opset 17: TensorRT 8.5 and 8.6, ONNX Runtime, OpenVINO.
        io: Type of the inputs and outputs that are floating-point; of `trt10` only.
        equalize: None leaves the channels as they are. Its exponent stands where `search` does not choose one.
        search: Chooses the exponent of each interface by measured error; None takes `equalize`'s.
        range_percentile: Of each channel's values: what equalization takes for its range.
        scales: How activation scales are chosen.
        rounding: How weights are rounded.
        keep: Names of layers that stay in floating point.
        max_drop: Keeps the fewest further layers in floating point with which the expected top-1 drop (see
            `metrics.Judgement`), in points, is at most this; None keeps none.
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
            raise CalibrationError(
                f"the target must be trt8 or trt10, found {self.target!r}", remedy="give trt10, or leave it out"
            )
        if self.io == "fp16" and self.target == "trt8":
            raise CalibrationError(
                "FP16 inputs and outputs need the target trt10: trt8 keeps FP32 beside INT8",
                remedy="leave io out, or give trt10",
            )
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise CalibrationError(
                f"the largest drop must lie between 0 and 100 points, found {self.max_drop}",
                remedy="give 0.3, or leave it out",
            )
        if not 50 < self.range_percentile <= 100:
            raise CalibrationError(
                f"the range percentile must lie between 50 and 100, found {self.range_percentile}",
                remedy="leave it out",
            )


MAX_CALIBRATION = Int8Options(
    target="trt8",
    equalize=None,
    search=None,
    scales=ScaleOptions("max"),
    rounding=RoundOptions(method="nearest", bias_correction=False),
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


Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""
_REPORT_IMAGES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images as the model takes them (`calibration_images.load_calibration`).

    Attributes:
        batches: To calibrate with.
        held_out: To judge the result with; without any, the calibration images stand in where a bound is to be met.
    """

    batches: Sequence[NDArray[Any]]
    held_out: Sequence[NDArray[Any]] = ()


class Int8Work:
    """One quantization under way.

    Args:
        model: FP32, as exported.
        images: May be empty.
        options: Steps and their methods.
        progress: Who is told.
    """

    def __init__(self, model: onnx.ModelProto, images: Images, options: Int8Options, progress: Progress | None) -> None:
        self._model = model
        self._images = images
        self._options = options
        self._progress = progress
        self._chain = read_chain(model)
        self._half = options.target == "trt10"
        require_layers(options.keep, [layer.name for layer in self._chain.layers])
        self._prepared = model
        self._scales: dict[str, float] = {}
        self._factors: dict[str, NDArray[np.float64]] = {}
        self._exponents: dict[str, float] = {}
        self._interfaces: tuple[InterfaceReport, ...] = ()
        self._data = ("", 0)

    def stage(self, name: str) -> Callable[[int, int], None] | None:
        """The progress of one stage."""
        progress = self._progress
        return None if progress is None else lambda done, total: progress(name, done, total)

    def _tell(self, name: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(name, done, total)

    def calibrate(self, statistics: Statistics) -> None:
        """Equalizes, and chooses the scales."""
        options = self._options
        self._data = (statistics.data_sha256, statistics.images)
        if options.equalize is not None:
            how = options.equalize
            if options.search is not None:
                wanted = dataclasses.replace(options.search, range_percentile=options.range_percentile)
                self._exponents = choose_exponents(
                    self._model, self._images.batches, statistics, wanted, progress=self.stage("equalize")
                )
                how = dataclasses.replace(how, by_interface={**(how.by_interface or {}), **self._exponents})
            result = equalize(self._model, statistics.ranges(options.range_percentile), how)
            self._prepared, self._interfaces, statistics = (
                result.model,
                result.interfaces,
                statistics.rescaled(result.factors),
            )
            self._remember(result.factors)
        if self._half:
            # With a bound to meet, any layer may become one that is kept.
            kept = options.keep if options.max_drop is None else tuple(layer.name for layer in self._chain.layers)
            fit = fit_scales(self._prepared, statistics.ranges(), kept=kept)
            self._prepared, statistics = fit.model, statistics.rescaled(fit.factors)
            self._remember(fit.factors)
        scales = choose_scales(self._prepared, statistics, options.scales)
        self._scales = round_activation_scales(scales) if self._half else scales

    def _remember(self, factors: dict[str, NDArray[np.float64]]) -> None:
        for interface in self._chain.interfaces:
            tensor = self._chain.layer(interface.readers[0]).input if interface.readers else ""
            if tensor in factors and interface.blocked_by is None:
                self._factors[interface.source] = self._factors.get(interface.source, 1.0) * factors[tensor]

    def reuse(self, saved: ScaleFile) -> None:
        """Takes a calibration that was saved."""
        digest, count = hash_images(self._images.batches)
        saved.check(graph_sha256(self._model), digest)
        if self._half and saved.target == "trt8":
            raise CalibrationError(
                "the saved scales were made for trt8, and FP16 may not hold them",
                remedy="calibrate again, or give --target trt8",
            )
        missing = set(self._chain.quantized_tensors()) ^ set(saved.scales)
        if missing:
            raise CalibrationError(f"the saved scales do not suit this graph: {min(missing)}", remedy="calibrate again")
        self._data, self._exponents = (digest, count), dict(saved.exponents)
        self._factors = {
            name: np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)
            for name, text in saved.factors.items()
        }
        self._prepared = apply_factors(self._model, self._factors)
        self._scales = round_activation_scales(saved.scales) if self._half else dict(saved.scales)

    def finish(self) -> tuple[onnx.ModelProto, Int8Report]:
        """Rounds the weights, meets the bound, writes the graph."""
        options, batches = self._options, self._images.batches
        rounded = self._round(options.keep)
        costs: tuple[LayerCost, ...] = ()
        kept = options.keep
        if options.sensitivity or options.max_drop is not None:
            costs = rank_layers(self._prepared, self._scales, rounded, batches, progress=self.stage("sensitivity"))
        if options.max_drop is not None:
            kept, rounded = self._meet(options.max_drop, costs, rounded)
        graph = self._write(rounded, kept)
        self._tell("measure layers", 0, 1)
        measured = layer_sqnr(self._prepared, graph, spread_images(self._model, batches, _REPORT_IMAGES))
        self._tell("measure layers", 1, 1)
        judged = judge(self._prepared, graph, self._images.held_out) if len(self._images.held_out) else None
        report = self._report(
            kept, measured, count_macs(self._model, batches[0][:1] if not has_fixed_batch(self._model) else batches[0])
        )
        return self._typed(graph, kept), dataclasses.replace(report, costs=costs, held_out=judged)

    def finish_without_images(
        self, statistics: Statistics, moments: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    ) -> tuple[onnx.ModelProto, Int8Report]:
        """Everything, from statistics in closed form and the mean and deviation of each layer's input channels."""
        check_opset(self._model)
        self.calibrate(statistics)
        weights = read_weights(self._prepared)
        sources = {name: i.source for i in self._chain.interfaces for name in i.readers}
        rounded: dict[str, RoundedLayer] = {}
        layers = [layer for layer in self._chain.layers if layer.name not in self._options.keep]
        for index, layer in enumerate(layers):
            mean, deviation = (
                value / self._factors.get(sources.get(layer.name, ""), 1.0) for value in moments[layer.input]
            )
            if self._options.rounding.method == "nearest":
                found = round_nearest(weights[layer.weight], weights[layer.bias])
            else:
                found = round_by_prior(
                    weights[layer.weight], weights[layer.bias], deviation=deviation, groups=layer.groups
                )
            if self._options.rounding.bias_correction:
                bias = correct_bias(weights[layer.weight], found.weight(), found.bias, groups=layer.groups, mean=mean)
                found = dataclasses.replace(found, bias=bias)
            rounded[layer.name] = round_layer_to_half(found) if self._half else found
            self._tell("round", index + 1, len(layers))
        graph = self._write(rounded, self._options.keep)
        report = self._report(self._options.keep, {}, count_macs(self._model, blank_batch(self._model)))
        return self._typed(graph, self._options.keep), dataclasses.replace(report, source="statistics")

    def _round(self, kept: Sequence[str]) -> dict[str, RoundedLayer]:
        prepared = Prepared(self._prepared, self._scales, tuple(kept), self._half)
        return round_weights(prepared, self._images.batches, self._options.rounding, progress=self.stage("round"))

    def _meet(
        self, bound: float, costs: Sequence[LayerCost], rounded: dict[str, RoundedLayer]
    ) -> tuple[tuple[str, ...], dict[str, RoundedLayer]]:
        """The layers to keep, and the others' weights."""
        judges = self._images.held_out if len(self._images.held_out) else self._images.batches
        always = self._options.keep
        halvings, tried = len(costs).bit_length() + 1, 0  # `fewest_kept` halves what is left; more are rare

        def drop(kept: tuple[str, ...], weights: dict[str, RoundedLayer]) -> float:
            nonlocal tried
            tried += 1
            self._tell("meet the bound", min(tried, halvings) - 1, halvings)
            found = judge(
                self._prepared, self._write({name: w for name, w in weights.items() if name not in kept}, kept), judges
            )
            if found is None:
                raise CalibrationError(
                    "a largest drop needs a classifier, and this graph gives features", remedy="leave --max-drop out"
                )
            return found.expected_drop

        kept = fewest_kept(costs, lambda names: drop((*always, *names), rounded) <= bound)
        while kept is not None:
            # The weights after a kept layer are rounded anew: they saw what its quantized form gave.
            final = self._round((*always, *kept)) if kept else rounded
            if drop((*always, *kept), final) <= bound:
                return (*always, *kept), final
            kept = tuple(cost.name for cost in costs[: len(kept) + 1]) if len(kept) < len(costs) else None
        raise CalibrationError(
            f"not even with every layer in floating point is the expected drop at most {bound} points",
            remedy="give a larger --max-drop",
        )

    def _write(self, rounded: dict[str, RoundedLayer], kept: Sequence[str]) -> onnx.ModelProto:
        """With FP32 scales, whatever the target."""
        return write_integers(insert_pairs(self._prepared, self._scales, kept=kept), rounded)

    def _typed(self, graph: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
        if self._half:
            return halve_quantized(graph, io=self._options.io, kept=kept)
        check_quantized(graph, target="trt8", kept=kept)
        return graph

    def _report(self, kept: Sequence[str], sqnr: dict[str, float], macs: dict[str, int]) -> Int8Report:
        layers = tuple(
            LayerReport(
                layer.name,
                self._scales[layer.input],
                sqnr.get(layer.output, 0.0),
                layer.name in kept,
                macs.get(layer.name, 0),
            )
            for layer in self._chain.layers
        )
        total = sum(layer.macs for layer in layers)
        share = sum(layer.macs for layer in layers if not layer.kept) / total if total else 1.0
        factors = {
            name: base64.b64encode(value.astype("<f8").tobytes()).decode("ascii")
            for name, value in self._factors.items()
        }
        scales = ScaleFile(
            schema=1,
            graph_sha256=graph_sha256(self._model),
            data_sha256=self._data[0],
            images=self._data[1],
            method=self._options.scales.method,
            scales=dict(self._scales),
            factors=factors,
            exponents=dict(self._exponents),
            target=self._options.target,
        )
        return Int8Report(self._data[1], "images", layers, self._interfaces, scales, kept=tuple(kept), int8_share=share)


def check_opset(model: onnx.ModelProto) -> None:
    """Refuses an opset whose Q/DQ pairs have no scale per channel.

    Raises:
        CalibrationError: It is older than 13.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 13:
        raise CalibrationError(
            f"opset {opset}: scales per output channel need at least 13", remedy="export with --opset 17"
        )


def to_int8(
    source: StrPath | onnx.ModelProto,
    images: Images | Sequence[NDArray[Any]] | None,
    options: Int8Options | None = None,
    *,
    saved: ScaleFile | None = None,
    progress: Progress | None = None,
) -> tuple[TypedModel, Int8Report]:
    """Makes the INT8 graph of an FP32 ONNX that repvgg-export wrote, with its metadata extended; `typed_model.write_typed` writes it.

    Args:
        source: File, or the model in memory.
        images: Calibration images, in a list. None: ranges in closed form from the BatchNorm statistics that an export
            of a training form keeps, nothing clipped, and weights rounded by what is true of every image; see
            `closed_form` and `round_prior`.
        options: Steps and their methods.
        saved: Scales of an earlier calibration of the same graph and images.
        progress: See `Progress`.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, the bound cannot be met, or the result is
            not what TensorRT takes.
        ModelError: The file is damaged or not one of ours.
    """
    options = options or Int8Options()
    parent = load_parent(source)
    if images is None:
        statistics, moments = closed_form_statistics(parent)
        # Nothing can be measured; and a normal distribution's tail is no reason to clip.
        options = dataclasses.replace(
            options,
            search=None,
            sensitivity=False,
            max_drop=None,
            equalize=options.equalize and EqualizeOptions(0.5),
            scales=ScaleOptions("max"),
        )
        work = Int8Work(parent.model, Images(()), options, progress)
        graph, report = work.finish_without_images(statistics, moments)
    else:
        graph, report = quantize_graph(parent.model, images, options, saved=saved, progress=progress)
    said: dict[str, str | int | float | bool | None] = {
        "target": options.target,
        "equalize": None
        if options.equalize is None
        else "measured"
        if options.search is not None
        else options.equalize.exponent,
        "scales": options.scales.method,
        "rounding": options.rounding.method if images is not None or options.rounding.method == "nearest" else "prior",
        "bias_correction": options.rounding.bias_correction,
        "kept": ", ".join(report.kept) or None,
        "images": report.images,
        "data_sha256": report.scales.data_sha256,
    }
    spec = half_spec(parent.metadata.spec, options.io) if options.target == "trt10" else None
    return extend(parent, graph, stage="int8", options=said, spec=spec), report


def quantize_graph(
    model: onnx.ModelProto,
    images: Images | Sequence[NDArray[Any]],
    options: Int8Options | None = None,
    *,
    saved: ScaleFile | None = None,
    progress: Progress | None = None,
) -> tuple[onnx.ModelProto, Int8Report]:
    """Makes the INT8 graph of an exported FP32 graph. Its metadata is still the parent's.

    Args:
        model: FP32, as exported; not changed.
        images: Calibration images.
        options: Steps and their methods.
        saved: Scales of an earlier calibration of the same graph and images.
        progress: See `Progress`.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, the bound cannot be met, or the result is
            not what TensorRT takes.
        ModelError: The graph is not one of ours.
    """
    check_opset(model)
    given = images if isinstance(images, Images) else Images(images)
    work = Int8Work(model, given, options or Int8Options(), progress)
    if saved is None:
        work.calibrate(collect(model, given.batches, progress=work.stage("ranges")))
    else:
        work.reuse(saved)
    return work.finish()

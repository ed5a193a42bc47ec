"""FP32 ONNX → INT8 ONNX with explicit quantization, as TensorRT wants it.

Pairs stand on the input of every layer and where TensorRT adds or moves integers (`qdq`), none between a layer and its
activation: it would break the fusion. Weights are INT8, a scale each output channel; zero points 0; biases floating.

`quantize_graph` is the story: ranges (`ranges`; without images `closed_form`), equalization (`search`, `equalize`),
scales (`scales`), rounding with bias correction (`round_network`), the bound on what may be lost (`metrics`), and the
graph with its types (`qdq`, `mixed`). A new step goes between two of these, with its options in `Int8Options`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..graph.edit import opset_of
from ..images.calibration import Images
from .check import Target, check_quantized
from .closed_form import closed_form_statistics, correct_bias
from .equalize import EqualizeOptions, InterfaceReport, apply_factors, decode, encode, equalize
from .fp16 import find_islands, find_large
from .grids import GRIDS, Format, Grid, find_unsuited, require_format
from .halves import LARGEST, Io, half_spec
from .keep import Bound
from .metrics import Judge, QuantizationCost, Verification, blank_batch, count_macs, layer_sqnr, rank_layers
from .mixed import fit_opset, halve_quantized, round_activation_scales
from .network import Layer, Network, read_network, read_weights
from .normalise import KINDS
from .qdq import find_requantized, insert_pairs, write_integers
from .ranges import Statistics, collect, hash_images, leave_out
from .round import RoundedLayer, RoundOptions, round_by_prior, round_nearest
from .round_network import Prepared, round_weights
from .run_onnx import has_fixed_batch, spread_images
from .scales import ScaleFile, ScaleOptions, choose_scales, encode_factors, fit_scales, graph_sha256
from .search import SearchOptions, choose_exponents
from .share import share_scales
from .typed_model import Parent, StrPath, TypedModel, extend, load_parent

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""
_REPORT_IMAGES = 64
FP16_MARGIN = 8.0
"""Other images may give values between the layers that are so many times as large."""


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
        keep_gates: Whether the layers of squeeze-and-excitation do: they are a thousandth of the work, and an error of
            theirs is one of a whole channel of the image, which no pooling averages away.
        max_drop: Keeps the fewest further layers in floating point with which the expected top-1 drop (see
            `metrics.Verification`), in points, is at most this; None keeps none.
        least_sqnr_db: Likewise, with which every output reaches so many decibels.
        accepts: Likewise, with which this, asked about a typed graph, says yes; `quantize` asks the user's own measure.
            One of the three can be given.
        sensitivity: Whether layers are ranked by their cost, also without `max_drop`.
        format: `int8`, or `fp8`: E4M3 numbers by the same steps, for Ada, Hopper and Blackwell; of `trt10` only.
            Layers that TensorRT has no FP8 kernels for stay in FP16 (`grids.find_unsuited`).
    """

    target: Target = "trt10"
    io: Io = "fp32"
    equalize: EqualizeOptions | None = field(default_factory=lambda: EqualizeOptions(0.7))
    search: SearchOptions | None = field(default_factory=SearchOptions)
    range_percentile: float = 99.99
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    rounding: RoundOptions = field(default_factory=RoundOptions)
    keep: tuple[str, ...] = ()
    keep_gates: bool = True
    max_drop: float | None = None
    least_sqnr_db: float | None = None
    accepts: Callable[[onnx.ModelProto], bool] | None = None
    sensitivity: bool = False
    format: Format = "int8"

    def __post_init__(self) -> None:
        if self.target not in ("trt8", "trt10"):
            raise CalibrationError(
                f"the target must be trt8 or trt10, found {self.target!r}", remedy="give trt10, or leave it out"
            )
        require_format(self.format, target=self.target, method=self.scales.method)
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
        if self.least_sqnr_db is not None and not 0 <= self.least_sqnr_db <= 200:
            raise CalibrationError(
                f"the least SQNR must lie between 0 and 200 dB, found {self.least_sqnr_db:g}",
                remedy="give 24, or leave it out",
            )
        if sum(bound is not None for bound in (self.max_drop, self.least_sqnr_db, self.accepts)) > 1:
            raise CalibrationError(
                "layers can be kept for one bound: max_drop, least_sqnr_db or accepts", remedy="give one of them"
            )
        if not 50 < self.range_percentile <= 100:
            raise CalibrationError(
                f"the range percentile must lie between 50 and 100, found {self.range_percentile}",
                remedy="leave it out",
            )

    @property
    def grid(self) -> Grid:
        """The number format."""
        return GRIDS[self.format]

    @property
    def half(self) -> bool:
        """Whether what is not INT8 is FP16."""
        return self.target == "trt10"

    @property
    def bounded(self) -> bool:
        """Whether layers are kept so that a bound is met."""
        return any(bound is not None for bound in (self.max_drop, self.least_sqnr_db, self.accepts))

    def without_images(self) -> Int8Options:
        """These options where nothing can be measured; a normal distribution's tail is no reason to clip."""
        equalize, scales = self.equalize and EqualizeOptions(0.5), ScaleOptions("max")
        unbound = dataclasses.replace(self, max_drop=None, least_sqnr_db=None, accepts=None, sensitivity=False)
        return dataclasses.replace(unbound, equalize=equalize, search=None, scales=scales)


MAX_CALIBRATION = Int8Options(
    target="trt8",
    equalize=None,
    search=None,
    scales=ScaleOptions("max"),
    rounding=RoundOptions(method="nearest", bias_correction=False),
    keep_gates=False,
)
"""What most tools do: per-channel weights, per-tensor activations, nothing clipped."""
FAST = Int8Options(target="trt8", equalize=EqualizeOptions(0.5), search=None, rounding=RoundOptions(method="nearest"))
"""Without the second-order rounding and without the search."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What INT8 did to one layer.

    Attributes:
        name: Of its node.
        activation_scale: Real value of one integer step of its input.
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
    """What was done and what it cost, measured on calibration images; without images figures are 0.

    Attributes:
        images: Calibration images.
        source: `images`, or `statistics` for ranges in closed form.
        layers: In order.
        interfaces: What equalization did; empty without.
        scales: To be saved and reused.
        costs: Layers ranked by what each alone costs, the costliest first; empty where it was not asked for.
        kept: Layers that stayed in floating point.
        int8_share: Share of the multiply-accumulates that are INT8 (or FP8), 0 to 1.
        held_out: Judged on images that took no part; None where there were none, or where there is no classifier.
        requantized: Tensors that are quantized more than once, because one scale for all that reads them would cost too
            much (`share`); each once for every scale but the first.
        format: What was made.
        unsuited: Why each layer stayed that the format has no kernels for, by name; they are among `kept`.
    """

    images: int
    source: Literal["images", "statistics"]
    layers: tuple[LayerReport, ...]
    interfaces: tuple[InterfaceReport, ...]
    scales: ScaleFile
    costs: tuple[QuantizationCost, ...] = ()
    kept: tuple[str, ...] = ()
    int8_share: float = 1.0
    held_out: Verification | None = None
    requantized: tuple[str, ...] = ()
    format: Format = "int8"
    unsuited: Mapping[str, str] = field(default_factory=dict)


def to_int8(
    source: StrPath | onnx.ModelProto | Parent,
    images: Images | Sequence[NDArray[Any]] | None,
    options: Int8Options | None = None,
    *,
    saved: ScaleFile | None = None,
    progress: Progress | None = None,
) -> tuple[TypedModel, Int8Report]:
    """Makes the INT8 (or FP8) graph of an FP32 ONNX of ours; `typed_model.write_typed` writes it.

    Args:
        source: File, the model in memory, or what `load_parent` read.
        images: Calibration images, in a list. None: ranges in closed form from the BatchNorm statistics that an export
            of a training form keeps, nothing clipped, and weights rounded by what is true of every image; see
            `closed_form` and `round.round_by_prior`.
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
        options = options.without_images()
        graph, report = _quantize_without_images(parent, options, progress or _ignore)
    else:
        graph, report = quantize_graph(parent.network, images, options, saved=saved, progress=progress)
    equalized: str | float | None = None
    if options.equalize is not None:
        equalized = "measured" if options.search is not None else options.equalize.exponent
    prior = images is None and options.rounding.method != "nearest"
    said: dict[str, str | int | float | bool | None] = {
        "target": options.target,
        "equalize": equalized,
        "scales": options.scales.method,
        "rounding": "prior" if prior else options.rounding.method,
        "bias_correction": options.rounding.bias_correction,
        "kept": ", ".join(report.kept) or None,
        "images": report.images,
        "data_sha256": report.scales.data_sha256,
    }
    spec = half_spec(parent.metadata.spec, options.io) if options.half else None
    return extend(parent, graph, stage=options.format, options=said, spec=spec), report


def _ignore(stage: str, done: int, total: int) -> None:
    """Progress of a caller who does not want to know."""


def quantize_graph(
    model: onnx.ModelProto | Network,
    images: Images | Sequence[NDArray[Any]],
    options: Int8Options | None = None,
    *,
    saved: ScaleFile | None = None,
    progress: Progress | None = None,
) -> tuple[onnx.ModelProto, Int8Report]:
    """Makes the INT8 graph of an exported FP32 graph. Its metadata is still the parent's.

    Args:
        model: FP32, as exported, or its structure; not changed.
        images: Calibration images.
        options: Steps and their methods.
        saved: Scales of an earlier calibration of the same graph and images.
        progress: See `Progress`.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, the bound cannot be met, or the result is
            not what TensorRT takes.
        ModelError: The graph is not one of ours.
    """
    network = model if isinstance(model, Network) else read_network(model)
    images = images if isinstance(images, Images) else Images(images)
    tell, batches = progress or _ignore, images.batches
    options = _require_fit(network, options or Int8Options())
    network = fit_opset(network, options.grid)
    # Ranges, equalization and scales; or those of before.
    if saved is None:
        statistics = collect(network, batches, progress=partial(tell, "ranges"))
        batches = leave_out(batches, statistics.left_out)
        exponents: dict[str, float] = {}
        if options.equalize is not None and options.search is not None:
            wanted = dataclasses.replace(options.search, range_percentile=options.range_percentile, grid=options.grid)
            exponents = choose_exponents(network, batches, statistics, wanted, progress=partial(tell, "equalize"))
        prepared, scales, interfaces = _calibrate(network, statistics, options, exponents)
        prepared = share_scales(prepared, batches, progress=partial(tell, "share scales"))
        scales = dataclasses.replace(scales, scales=dict(prepared.scales))
    else:
        prepared, scales, interfaces = *_reuse(network, batches, saved, options), ()
        batches = leave_out(batches, saved.left_out)
    # Weights; and which layers must stay in floating point.
    rounded = round_weights(prepared, batches, options.rounding, progress=partial(tell, "round"))
    macs = count_macs(network, batches[0] if has_fixed_batch(network.model) else batches[0][:1])
    costs: tuple[QuantizationCost, ...] = ()
    if options.sensitivity or options.bounded:
        costs = rank_layers(prepared, rounded, batches, macs=macs, progress=partial(tell, "sensitivity"))
    judge = Judge(prepared.network, images.held_out if len(images.held_out) else batches)
    finish = partial(_finish, options=options, full=_find_full(prepared, images.batches))
    if options.bounded:
        bound = Bound(*_find_bound(options, judge), finish, batches, tell)
        prepared, rounded = bound.meet(prepared, rounded, costs, options.rounding)
    # The graph, and what it costs.
    graph = _write(prepared, rounded)
    tell("measure layers", 0, 1)
    sqnr = layer_sqnr(prepared.network, graph, spread_images(network.model, batches, _REPORT_IMAGES))
    tell("measure layers", 1, 1)
    judged = judge.compare(graph) if judge.classifies and len(images.held_out) else None
    report = dataclasses.replace(_report(prepared, scales, macs, sqnr), interfaces=interfaces, costs=costs)
    return finish(prepared, rounded), dataclasses.replace(report, held_out=judged, requantized=find_requantized(graph))


def _find_full(prepared: Prepared, batches: Sequence[NDArray[Any]]) -> set[str]:
    """Outputs of nodes that FP16 cannot hold, where the rest is FP16."""
    if not prepared.half:
        return set()
    tried = spread_images(prepared.network.model, batches, _REPORT_IMAGES)
    return find_islands(prepared.network, find_large(prepared.network, tried, LARGEST / FP16_MARGIN))


def _quantize_without_images(
    parent: Parent, options: Int8Options, tell: Progress
) -> tuple[onnx.ModelProto, Int8Report]:
    """The same from statistics in closed form and the mean and deviation of each layer's input channels."""
    network = parent.network
    options = _require_fit(network, options)
    network = fit_opset(network, options.grid)
    statistics, moments = closed_form_statistics(parent)
    prepared, scales, interfaces = _calibrate(network, statistics, options, {})
    weights, factors = read_weights(prepared.network), decode(network, scales.channel_factors())
    rounded: dict[str, RoundedLayer] = {}
    layers = [layer for layer in network.layers if layer.name not in options.keep]
    for index, layer in enumerate(layers):
        weight, bias = weights[layer.weight], weights[layer.bias]
        mean, deviation = (value / factors[layer.source] for value in moments[layer.input])
        if options.rounding.method == "nearest":
            found = round_nearest(weight, bias, options.grid)
        else:
            found = round_by_prior(weight, bias, deviation=deviation, groups=layer.groups, grid=options.grid)
        if options.rounding.bias_correction:
            corrected = correct_bias(weight, found.weight(), bias, groups=layer.groups, mean=mean)
            found = dataclasses.replace(found, bias=corrected)
        rounded[layer.name] = prepared.finish(found)
        tell("round", index + 1, len(layers))
    report = _report(prepared, scales, count_macs(network, blank_batch(network.model)), {})
    graph = _type(_write(prepared, rounded), prepared, options)
    report = dataclasses.replace(report, source="statistics", interfaces=interfaces)
    return graph, dataclasses.replace(report, requantized=find_requantized(graph))


def _require_fit(network: Network, options: Int8Options) -> Int8Options:
    """The options with all layers to keep; the graph must have them, and scales per channel."""
    if opset_of(network.model) < 13:
        raise CalibrationError(
            f"opset {opset_of(network.model)}: scales per output channel need at least 13",
            remedy="export with --opset 17",
        )
    if options.max_drop is not None and not network.classifies:
        raise CalibrationError(
            "a largest drop in points of top-1 needs a classifier, and this graph has none",
            remedy="say how many decibels every output must reach (--max-drop 24dB), or give a measure of your own "
            "(--metric module:function)",
        )
    known = [layer.name for layer in network.layers]
    unknown = sorted(set(options.keep) - set(known))
    if unknown:
        # `repvgg-trt inspect` lists stage1.0, the whole block; its convolution is what can be kept.
        meant = f"{unknown[0]}.conv"
        remedy = f"give {meant}" if meant in known else f"its layers are {', '.join(known)}"
        raise CalibrationError(f"no layer is called {unknown[0]!r}", remedy=remedy)
    gates = network.gates if options.keep_gates else ()
    more = dict.fromkeys((*gates, *find_unsuited(network.layers, options.grid)))
    return dataclasses.replace(options, keep=(*options.keep, *(name for name in more if name not in options.keep)))


def _calibrate(
    network: Network, statistics: Statistics, options: Int8Options, exponents: dict[str, float]
) -> tuple[Prepared, ScaleFile, tuple[InterfaceReport, ...]]:
    """Equalizes, makes room for FP16, and chooses the scales."""
    rescaled, factors = network, network.ones()
    interfaces: tuple[InterfaceReport, ...] = ()
    if options.equalize is not None:
        how = options.equalize
        if exponents:
            how = dataclasses.replace(how, by_interface={**(how.by_interface or {}), **exponents})
        rescaled, divided, interfaces = equalize(network, statistics.ranges(options.range_percentile), how)
        factors, statistics = factors * divided, statistics.rescaled(network.divided(divided))
    if options.half:
        # With a bound to meet, any layer may become one that is kept.
        kept = options.keep if not options.bounded else tuple(layer.name for layer in network.layers)
        rescaled, divided = fit_scales(rescaled, statistics.ranges(), kept=kept, grid=options.grid)
        factors, statistics = factors * divided, statistics.rescaled(network.divided(divided))
    scales = choose_scales(rescaled, statistics, options.scales, options.grid)
    file = ScaleFile(
        schema=1,
        graph_sha256=graph_sha256(network.model),
        data_sha256=statistics.data_sha256,
        images=statistics.images,
        method=options.scales.method,
        scales=round_activation_scales(scales) if options.half else scales,
        factors=encode_factors(encode(network, factors)),
        exponents=exponents,
        left_out=statistics.left_out,
        target=options.target,
        format=options.format,
    )
    return Prepared(rescaled, file.scales, options.keep, options.half, options.grid), file, interfaces


def _reuse(
    network: Network, batches: Sequence[NDArray[Any]], saved: ScaleFile, options: Int8Options
) -> tuple[Prepared, ScaleFile]:
    """Takes a calibration that was saved."""
    if options.format != saved.format:
        raise CalibrationError(f"the saved scales are of {saved.format.upper()}", remedy="calibrate again")
    digest, _ = hash_images(batches)
    saved.check(graph_sha256(network.model), digest)
    if options.half and saved.target == "trt8":
        raise CalibrationError(
            "the saved scales were made for trt8, and FP16 may not hold them",
            remedy="calibrate again, or give --target trt8",
        )
    missing = set(network.quantized_tensors()) ^ set(saved.scales)
    if missing:
        raise CalibrationError(f"the saved scales do not suit this graph: {min(missing)}", remedy="calibrate again")
    scales = round_activation_scales(saved.scales) if options.half else saved.scales
    rescaled = apply_factors(network, saved.channel_factors())
    file = dataclasses.replace(saved, scales=scales, target=options.target)
    return Prepared(rescaled, scales, options.keep, options.half, options.grid), file


def _find_bound(options: Int8Options, judge: Judge) -> tuple[Callable[[onnx.ModelProto], bool], str]:
    """What says of a typed graph whether it is what the options ask for; and that, for an error."""
    if options.accepts is not None:
        return options.accepts, "is the graph accepted by the measure that was given"
    least, drop = options.least_sqnr_db, options.max_drop
    if least is not None:
        return lambda graph: judge.compare(graph).sqnr_db >= least, f"does every output reach {least:g} dB"

    def holds(graph: onnx.ModelProto) -> bool:
        found = judge.compare(graph).expected_drop
        return found is not None and drop is not None and found <= drop

    return holds, f"is the expected drop at most {drop} points"


def _write(prepared: Prepared, rounded: Mapping[str, RoundedLayer]) -> onnx.ModelProto:
    """The INT8 graph, with FP32 scales and FP32 for the rest, whatever the target."""
    paired = insert_pairs(prepared.network, prepared.scales, kept=prepared.kept, grid=prepared.grid)
    chosen = {name: layer for name, layer in rounded.items() if name not in prepared.kept}
    return write_integers(paired, prepared.network, chosen, prepared.grid)


def _finish(
    prepared: Prepared, rounded: Mapping[str, RoundedLayer], *, options: Int8Options, full: AbstractSet[str]
) -> onnx.ModelProto:
    return _type(_write(prepared, rounded), prepared, options, full)


def _type(
    graph: onnx.ModelProto, prepared: Prepared, options: Int8Options, full: AbstractSet[str] = frozenset()
) -> onnx.ModelProto:
    """The graph with the types of its target; `full` are outputs of nodes that FP16 cannot hold."""
    layers = {layer.name for layer in prepared.network.layers}
    others = (node.name for node in graph.graph.node if node.op_type in KINDS and node.name not in layers)
    kept = (*prepared.kept, *others)
    if options.half:
        own = {node.output[0] for node in graph.graph.node if node.name in layers}
        return halve_quantized(graph, io=options.io, kept=kept, full=full - own, grid=options.grid)
    check_quantized(graph, target="trt8", kept=kept)
    return graph


def _report(prepared: Prepared, scales: ScaleFile, macs: Mapping[str, int], sqnr: Mapping[str, float]) -> Int8Report:
    def report(layer: Layer) -> LayerReport:
        kept, scale = layer.name in prepared.kept, prepared.scales[layer.input]
        return LayerReport(layer.name, scale, sqnr.get(layer.output, 0.0), kept, macs.get(layer.name, 0))

    layers = tuple(map(report, prepared.network.layers))
    total = sum(layer.macs for layer in layers)
    share = sum(layer.macs for layer in layers if not layer.kept) / total if total else 1.0
    unsuited = find_unsuited(prepared.network.layers, prepared.grid)
    base = Int8Report(scales.images, "images", layers, (), scales, (), tuple(prepared.kept), share)
    return dataclasses.replace(base, format=prepared.grid.name, unsuited=unsuited)

"""FP32 ONNX → INT8 ONNX with explicit quantization, as TensorRT wants it.

Pairs stand on the input of every convolution and of the classifier, and nowhere else (none between Conv and ReLU: it would break the fusion); weights
are INT8 initializers behind DequantizeLinear, one scale per output channel; zero points are 0; biases stay FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from .calibrate import collect
from .chain import read_chain, read_weights, replace_weights
from .check import check_quantized
from .equalize import EqualizeOptions, InterfaceReport, equalize
from .execute import Steps, run_tensors
from .qdq import fake_quantize, insert_pairs, write_integers
from .round import Moments, RoundedLayer, RoundOptions, round_layer, round_nearest
from .scales import ScaleFile, ScaleOptions, choose_scales, graph_sha256
from .typed_model import StrPath, TypedModel, extend, load_parent

_REPORT_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Int8Options:
    """How a graph becomes INT8; every step can be left out.

    Attributes:
        target: `trt8`: FP32 scales, opset 17 or what the FP32 graph has; also for TensorRT 10 and 11, where the rest then runs in FP32.
        equalize: None leaves the channels as they are. The exponent 0.7 leans to the activations: second-order rounding repairs the weights.
        range_percentile: Of each channel's values: what equalization takes for its range.
        scales: How activation scales are chosen.
        rounding: How weights are rounded.
    """

    target: Literal["trt8"] = "trt8"
    equalize: EqualizeOptions | None = field(default_factory=lambda: EqualizeOptions(0.7))
    range_percentile: float = 99.99
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    rounding: RoundOptions = field(default_factory=RoundOptions)


MAX_CALIBRATION = Int8Options(equalize=None, scales=ScaleOptions("max"), rounding=RoundOptions(method="nearest", bias_correction=False))
"""What most tools do: per-channel weights, per-tensor activations, nothing clipped."""
FAST = Int8Options(equalize=EqualizeOptions(0.5), rounding=RoundOptions(method="nearest"))
"""Without the second-order rounding."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What INT8 did to one layer.

    Attributes:
        name: The layer.
        activation_scale: Of its input.
        sqnr_db: Signal-to-quantization-noise ratio of its output, all layers before it quantized, in decibels.
    """

    name: str
    activation_scale: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class Int8Report:
    """What was done and what it cost, measured on calibration images.

    Attributes:
        images: Calibration images.
        layers: In order; the last is the classifier, whose figure is that of the logits.
        interfaces: Of the equalization; empty without.
        scales: To be saved and reused.
    """

    images: int
    layers: tuple[LayerReport, ...]
    interfaces: tuple[InterfaceReport, ...]
    scales: ScaleFile


def to_int8(
    source: StrPath | onnx.ModelProto,
    batches: Sequence[NDArray[Any]],
    options: Int8Options | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TypedModel, Int8Report]:
    """Makes the INT8 graph of an FP32 ONNX that repvgg-export wrote, with its metadata extended; `typed_model.write_typed` writes it.

    Args:
        source: File, or the model in memory.
        batches: Calibration images as the model takes them (`preprocess.load_batch`), in a list.
        options: Steps and their methods.
        progress: Called with layers done and layers in all.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, or the result is not what TensorRT takes.
        ModelError: The file is damaged or not one of ours.
    """
    options = options or Int8Options()
    parent = load_parent(source)
    graph, report = quantize_graph(parent.model, batches, options, progress=progress)
    said: dict[str, str | int | float | bool | None] = {
        "target": options.target,
        "equalize": None if options.equalize is None else options.equalize.exponent,
        "scales": options.scales.method,
        "rounding": options.rounding.method,
        "bias_correction": options.rounding.bias_correction,
        "images": report.images,
        "data_sha256": report.scales.data_sha256,
    }
    return extend(parent, graph, stage="int8", options=said), report


def quantize_graph(
    model: onnx.ModelProto,
    batches: Sequence[NDArray[Any]],
    options: Int8Options | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[onnx.ModelProto, Int8Report]:
    """Makes the INT8 graph of an exported FP32 graph. Its metadata is still the parent's.

    Args:
        model: FP32, as exported; not changed.
        batches: Calibration images, as the model takes them.
        options: Steps and their methods.
        progress: Called with layers done and layers in all.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, or the result is not what TensorRT takes.
        ModelError: The graph is not one of ours.
    """
    options = options or Int8Options()
    _check_opset(model)
    statistics = collect(model, batches)
    interfaces: tuple[InterfaceReport, ...] = ()
    prepared = model
    if options.equalize is not None:
        result = equalize(model, statistics.ranges(options.range_percentile), options.equalize)
        prepared, interfaces, statistics = result.model, result.interfaces, statistics.rescaled(result.factors)
    scales = choose_scales(prepared, statistics, options.scales)
    rounded = round_weights(prepared, scales, batches, options.rounding, progress=progress)
    quantized = write_integers(insert_pairs(prepared, scales), rounded)
    check_quantized(quantized)
    saved = ScaleFile(1, graph_sha256(prepared), statistics.data_sha256, statistics.images, options.scales.method, scales)
    measured = layer_sqnr(prepared, quantized, _first(batches, _REPORT_IMAGES))
    layers = tuple(LayerReport(layer.name, scales[layer.input], measured[layer.output]) for layer in read_chain(prepared).layers)
    return quantized, Int8Report(statistics.images, layers, interfaces, saved)


def _check_opset(model: onnx.ModelProto) -> None:
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 13:
        raise CalibrationError(f"opset {opset}: scales per output channel need at least 13", remedy="export with --opset 17")


def round_weights(
    model: onnx.ModelProto,
    scales: dict[str, float],
    batches: Sequence[NDArray[Any]],
    options: RoundOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, RoundedLayer]:
    """Rounds every layer, first to last, each seeing what the quantized layers before it give.

    Args:
        model: FP32, equalized or not.
        scales: Of each layer's input.
        batches: Calibration images; activations of one layer are in memory at a time.
        options: Method.
        progress: Called with layers done and layers in all.

    Returns:
        By name of the layer.
    """
    chain, weights = read_chain(model), read_weights(model)
    if options.method == "nearest" and not options.bias_correction:
        return {layer.name: round_nearest(weights[layer.weight], weights[layer.bias]) for layer in chain.layers}
    current = insert_pairs(model, scales)
    reference, quantized = Steps(model, batches), Steps(current, batches)
    positions = max(1, -(-options.samples // sum(len(batch) for batch in batches)))
    rounded: dict[str, RoundedLayer] = {}
    for index, layer in enumerate(chain.layers):
        moments = Moments(layer, weights[layer.weight], positions=positions, seed=options.seed + index, full=options.method == "second_order")
        for found, truth in zip(quantized.advance(layer.input), reference.advance(layer.input), strict=True):
            moments.add(fake_quantize(found, scales[layer.input]), truth)
        rounded[layer.name] = round_layer(weights[layer.weight], weights[layer.bias], moments, options)
        current = replace_weights(current, {layer.weight: rounded[layer.name].weight(), layer.bias: rounded[layer.name].bias})
        quantized.update(current)
        if progress is not None:
            progress(index + 1, len(chain.layers))
    return rounded


def layer_sqnr(reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[NDArray[Any]]) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of every layer's output in decibels, by tensor; 200 where there is no difference.

    Args:
        reference: FP32, with the same factors on its channels as `quantized`.
        quantized: With the same tensor names.
        batches: Images.
    """
    names = [layer.output for layer in read_chain(reference).layers]
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    kept = list(batches)
    for truth, found in zip(run_tensors(reference, names, kept), run_tensors(quantized, names, kept), strict=True):
        for name in names:
            signal[name] += float(np.square(truth[name], dtype=np.float64).sum())
            noise[name] += float(np.square(np.subtract(truth[name], found[name], dtype=np.float64)).sum())
    return {name: decibels(signal[name], noise[name]) for name in names}


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), between −200 and 200."""
    tiny = 1e-300
    return float(np.clip(10 * np.log10(max(signal, tiny) / max(noise, tiny)), -200.0, 200.0)) if noise > 0 else 200.0


def _first(batches: Iterable[NDArray[Any]], images: int) -> list[NDArray[Any]]:
    kept: list[NDArray[Any]] = []
    for batch in batches:
        if images <= 0:
            break
        # A fixed batch size cannot be cut.
        kept.append(batch)
        images -= len(batch)
    return kept

"""One INT8 quantization under way: its steps in order, with what each leaves for the next."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CalibrationError
from .calibrate import Statistics, hash_images
from .chain import read_chain, read_weights
from .check import check_quantized
from .closed_form import correct_bias
from .equalize import InterfaceReport, apply_factors, equalize
from .execute import has_fixed_batch, spread_images
from .fit import fit_scales
from .int8_options import Int8Options, Int8Report, LayerReport, require_layers
from .metrics import judge, layer_sqnr
from .mixed import halve_quantized, round_activation_scales, round_layer_to_half
from .qdq import insert_pairs, write_integers
from .round import RoundedLayer, round_nearest
from .round_network import Prepared, round_weights
from .round_prior import round_by_prior
from .scales import ScaleFile, choose_scales, graph_sha256
from .search import choose_exponents
from .sensitivity import LayerCost, blank_batch, count_macs, fewest_kept, rank_layers

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
                self._exponents = choose_exponents(self._model, self._images.batches, statistics, wanted, progress=self.stage("equalize"))
                how = dataclasses.replace(how, by_interface={**(how.by_interface or {}), **self._exponents})
            result = equalize(self._model, statistics.ranges(options.range_percentile), how)
            self._prepared, self._interfaces, statistics = result.model, result.interfaces, statistics.rescaled(result.factors)
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
            raise CalibrationError("the saved scales were made for trt8, and FP16 may not hold them", remedy="calibrate again, or give --target trt8")
        missing = set(self._chain.quantized_tensors()) ^ set(saved.scales)
        if missing:
            raise CalibrationError(f"the saved scales do not suit this graph: {min(missing)}", remedy="calibrate again")
        self._data, self._exponents = (digest, count), dict(saved.exponents)
        self._factors = {name: np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64) for name, text in saved.factors.items()}
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
        report = self._report(kept, measured, count_macs(self._model, batches[0][:1] if not has_fixed_batch(self._model) else batches[0]))
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
            mean, deviation = (value / self._factors.get(sources.get(layer.name, ""), 1.0) for value in moments[layer.input])
            if self._options.rounding.method == "nearest":
                found = round_nearest(weights[layer.weight], weights[layer.bias])
            else:
                found = round_by_prior(weights[layer.weight], weights[layer.bias], deviation=deviation, groups=layer.groups)
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

    def _meet(self, bound: float, costs: Sequence[LayerCost], rounded: dict[str, RoundedLayer]) -> tuple[tuple[str, ...], dict[str, RoundedLayer]]:
        """The layers to keep, and the others' weights."""
        judges = self._images.held_out if len(self._images.held_out) else self._images.batches
        always = self._options.keep
        halvings, tried = len(costs).bit_length() + 1, 0  # `fewest_kept` halves what is left; more are rare

        def drop(kept: tuple[str, ...], weights: dict[str, RoundedLayer]) -> float:
            nonlocal tried
            tried += 1
            self._tell("meet the bound", min(tried, halvings) - 1, halvings)
            found = judge(self._prepared, self._write({name: w for name, w in weights.items() if name not in kept}, kept), judges)
            if found is None:
                raise CalibrationError("a largest drop needs a classifier, and this graph gives features", remedy="leave --max-drop out")
            return found.expected_drop

        kept = fewest_kept(costs, lambda names: drop((*always, *names), rounded) <= bound)
        while kept is not None:
            # The weights after a kept layer are rounded anew: they saw what its quantized form gave.
            final = self._round((*always, *kept)) if kept else rounded
            if drop((*always, *kept), final) <= bound:
                return (*always, *kept), final
            kept = tuple(cost.name for cost in costs[: len(kept) + 1]) if len(kept) < len(costs) else None
        raise CalibrationError(
            f"not even with every layer in floating point is the expected drop at most {bound} points", remedy="give a larger --max-drop"
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
            LayerReport(layer.name, self._scales[layer.input], sqnr.get(layer.output, 0.0), layer.name in kept, macs.get(layer.name, 0))
            for layer in self._chain.layers
        )
        total = sum(layer.macs for layer in layers)
        share = sum(layer.macs for layer in layers if not layer.kept) / total if total else 1.0
        factors = {name: base64.b64encode(value.astype("<f8").tobytes()).decode("ascii") for name, value in self._factors.items()}
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
        raise CalibrationError(f"opset {opset}: scales per output channel need at least 13", remedy="export with --opset 17")

"""What a typed graph must show against FP32, and what is said of one that does not: which layers are to blame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from ..errors import ParityError
from ..evaluate.agreement import compare_layers
from ..specs.values import Check
from .equalize import apply_factors
from .grids import GRIDS
from .layers import LayerRun, run_pairs
from .metrics import QuantizationCost, Verification, count_macs, rank_layers
from .mixed import fit_opset
from .network import Network, read_weights
from .round import round_nearest
from .round_network import Prepared
from .run_onnx import spread_images
from .scales import ScaleFile
from .score import Score

MIN_FP16_DB = 40.0
"""FP16 rounds to 66 dB an operation; some thirty layers in a row leave 50 or more. Below 40, a hundredth of the logits,
something has overflowed or gone subnormal."""
_BLAMED = 3
_BLAME_IMAGES = 16


def allowed_to_differ(images: int, min_agreement: float) -> int:
    """How many of so many images may have another best class: one at least, unless all must agree."""
    allowed = math.floor(images * (1 - min_agreement) + 1e-9)
    return max(allowed, 1) if min_agreement < 1 else 0


def agreement_check(found: Verification, precision: str, min_agreement: float) -> Check:
    """The comparison as the certificate states it."""
    allowed = allowed_to_differ(found.images, min_agreement) / found.images
    name = f"{precision} against fp32 in ONNX Runtime, {found.images} {_images(found)}: share of other best classes"
    return Check(name, found.differing / found.images, allowed, 1.0)


def error_check(found: Verification, precision: str, min_sqnr_db: float = MIN_FP16_DB) -> Check:
    """Root mean square of the error by that of the outputs (of the worst of them), as the certificate states it."""
    name = f"{precision} against fp32 in ONNX Runtime, {found.images} {_images(found)}: rms error of the outputs"
    return Check(name, 10 ** (-found.sqnr_db / 20), 10 ** (-min_sqnr_db / 20), 1.0)


def _images(found: Verification) -> str:
    return "held-out images" if found.held_out else "images"


def refuse_fp16(
    found: Verification, network: Network, typed: onnx.ModelProto, batches: Sequence[NDArray[Any]]
) -> ParityError:
    """The error of an FP16 graph that does not pass; it names the layers to blame."""
    share = f", same best class on {_percent(found)} of {found.images} {_images(found)}"
    return ParityError(
        f"FP16 is too far from FP32: SQNR {found.sqnr_db:.1f} dB, at least {MIN_FP16_DB:g} expected"
        f"{'' if found.agreement is None else share}; they part at {_list(blame_fp16(network.model, typed, batches))}",
        remedy="keep the model in FP32, or give --calib images of the training split, so that ranges are measured",
    )


def refuse_int8(
    found: Verification, min_agreement: float, blamed: Sequence[QuantizationCost], title: str = "INT8"
) -> ParityError:
    """The error of an INT8 or FP8 graph that does not pass; it names what `blame_int8` found."""
    return ParityError(
        f"{title} agrees with FP32 on {_percent(found)} of {found.images} {_images(found)}, at least "
        f"{100 * min_agreement:g} % expected; the layers that cost most, each quantized alone: {_costliest(blamed)}",
        remedy=f"keep those layers in floating point (--keep {blamed[0].name}, or --max-drop 0.3 to find how few are "
        f"needed); give more images with --calib; leave --fast and other short cuts out; or accept it with a lower "
        f"--min-agreement",
    )


def refuse_outputs(
    found: Verification, min_sqnr_db: float, blamed: Sequence[QuantizationCost], title: str = "INT8"
) -> ParityError:
    """The error of a graph without a classifier that does not pass; of each low output it names the layers."""
    low = [output for output in found.outputs if output.sqnr_db < min_sqnr_db]
    count = 1 if len(low) > _BLAMED else _BLAMED
    said = [
        f"{output.name} {output.sqnr_db:.1f} dB (an error of {output.relative:.1%}), most of it by "
        f"{_costliest(blamed, output.name, count)}"
        for output in sorted(low, key=lambda output: output.sqnr_db)
    ]
    return ParityError(
        f"{title} is too far from FP32 on {found.images} {_images(found)}, at least {min_sqnr_db:g} dB expected: "
        f"{'; '.join(said)}; behind each layer, what the output has with that alone quantized",
        remedy=f"keep those layers in floating point (--keep {blamed[0].name}, or --max-drop {min_sqnr_db:g}dB to find "
        f"how few are needed); give more images with --calib; leave --fast and other short cuts out; or accept it with "
        f"a lower --min-sqnr",
    )


def score_check(score: Score, precision: str) -> Check:
    """The user's own measure as the certificate states it: what it fell by, and what it was allowed to."""
    name = f"{precision} against fp32 in ONNX Runtime, {score.metric}: what the score fell by"
    return Check(name, score.fp32 - score.found, score.fp32 - score.least, score.fp32)


def refuse_score(score: Score, precision: str, blamed: Sequence[QuantizationCost]) -> ParityError:
    """The error of a graph that the user's own measure does not pass; `blamed` is empty where nothing was measured."""
    why = f"; the layers that cost the outputs most, each quantized alone: {_costliest(blamed)}" if blamed else ""
    keep = ""
    if blamed:
        keep = (
            f"keep those layers in floating point (--keep {blamed[0].name}, or --max-drop to find how few are needed); "
        )
    return ParityError(
        f"{precision.upper()} is too far from FP32: {score.metric} falls from {score.fp32:g} to {score.found:g}, at "
        f"least {score.least:g} expected{why}",
        remedy=f"{keep}give images of the training split with --calib; leave short cuts out; or "
        f"accept it with a lower --min-metric",
    )


def _costliest(blamed: Sequence[QuantizationCost], output: str | None = None, count: int = _BLAMED) -> str:
    """The layers that cost most, at one output or at the worst of all."""
    if output is None:
        return _list([(cost.name, cost.sqnr_db) for cost in blamed[:count]])
    there = [(cost.name, cost.outputs[output]) for cost in blamed if output in cost.outputs]
    return _list(sorted(there, key=lambda item: item[1])[:count])


def _percent(found: Verification) -> str:
    return f"{100 * (found.agreement or 0.0):.2f} %"


def _list(blamed: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} ({sqnr_db:.1f} dB)" for name, sqnr_db in blamed)


def blame_int8(
    network: Network, scales: ScaleFile, kept: Sequence[str], batches: Sequence[NDArray[Any]]
) -> tuple[QuantizationCost, ...]:
    """What each layer costs when it alone is quantized with the chosen scales, the worst first.

    Weights are rounded to nearest and few images are run: a fraction of the time that the quantization took.
    """
    grid = GRIDS[scales.format]
    network = fit_opset(network, grid)
    prepared = Prepared(apply_factors(network, scales.channel_factors()), scales.scales, grid=grid)
    weights = read_weights(prepared.network)
    layers = [layer for layer in network.layers if layer.name not in kept]
    rounded = {layer.name: round_nearest(weights[layer.weight], weights[layer.bias], grid) for layer in layers}
    images = spread_images(network.model, batches, _BLAME_IMAGES)
    return rank_layers(prepared, rounded, images, macs=count_macs(network, images[0]))


def blame_fp16(
    reference: onnx.ModelProto, typed: onnx.ModelProto, batches: Sequence[NDArray[Any]]
) -> list[tuple[str, float]]:
    """The first layers whose outputs have too low an SQNR, or those with the lowest; rescaling is undone."""
    one, two = LayerRun(reference), LayerRun(typed)
    images = spread_images(reference, batches, _BLAME_IMAGES)
    layers = compare_layers(run_pairs(one, two, ((batch, batch) for batch in images)), fixed=one.classifiers)
    below = [layer for layer in layers if layer.sqnr_db < MIN_FP16_DB]
    worst = below or sorted(layers, key=lambda layer: layer.sqnr_db)
    return [(layer.name, layer.sqnr_db) for layer in worst[:_BLAMED]]

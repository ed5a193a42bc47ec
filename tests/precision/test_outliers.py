"""INT8 of networks with the outliers that make RepVGG collapse: ours beside per-channel max calibration.

Images that no calibration saw judge. Logits cannot be better than INT8 activations allow, whatever is done to the
weights: `ceiling` is the network with FP32 weights and our scales.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from repvgg_deploy.precision.equalize import apply_factors
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, Int8Options, Int8Report, quantize_graph
from repvgg_deploy.precision.metrics import Judge
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.qdq import insert_pairs
from repvgg_deploy.specs.values import SePosition, VariantSpec
from tests.precision.make_outliers import NETWORKS, batches, make_trained_like

OURS = Int8Options(target="trt8")
GAINS = {
    "channel scales": 15.0,
    "grown activations": 15.0,
    "centre tap": 12.0,  # 14 to 20 dB measured: INT8 keeps few levels of a channel that hardly varies around its mean
    "heavy weights": 6.0,  # 8 to 12 dB measured: max calibration keeps 6 to 11 dB, and activations alone leave 17 to 24
}
"""Decibels of logits that ours keeps beyond max calibration; the reason where it is not 15."""
BELOW_CEILING = 3.0
"""The weights' noise at its best is about that of the activations, which costs 3 dB; measured 0.9 to 1.6."""
NETWORKS_BY_COST = [*("g4", "se"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("g2", "wide"))]


@pytest.fixture(scope="module")
def calibration() -> list[np.ndarray]:
    return batches(256, 1)


@pytest.fixture(scope="module")
def fresh() -> list[np.ndarray]:
    return batches(128, 2)


def ceiling(model: onnx.ModelProto, report: Int8Report) -> onnx.ModelProto:
    """FP32 weights, INT8 activations with the scales of `report`."""
    return insert_pairs(apply_factors(read_network(model), report.scales.channel_factors()), report.scales.scales)


@pytest.mark.parametrize("outlier", GAINS)
@pytest.mark.parametrize("network", NETWORKS_BY_COST)
def test_outliers_that_ruin_max_calibration_leave_ours_usable(
    network: str, outlier, calibration: list[np.ndarray], fresh: list[np.ndarray]
) -> None:
    model = make_trained_like(NETWORKS[network], outlier)
    graph, report = quantize_graph(model, calibration, OURS)
    bare, _ = quantize_graph(model, calibration, MAX_CALIBRATION)
    judge = Judge(read_network(model), fresh)
    plain, ours, most = (judge.compare(one).sqnr_db for one in (bare, graph, ceiling(model, report)))
    shown = f"max calibration {plain:.1f} dB, ours {ours:.1f} dB, INT8 activations alone {most:.1f} dB"
    assert plain < (12 if outlier == "heavy weights" else 10), shown
    assert ours >= plain + GAINS[outlier], shown
    assert ours >= most - BELOW_CEILING, shown


def test_outliers_are_what_ruins_it(calibration: list[np.ndarray], fresh: list[np.ndarray]) -> None:
    """Without them the same network keeps more than 10 dB with max calibration: it is not the network that is hard."""
    model = make_trained_like(NETWORKS["g4"], "none")
    graph, _ = quantize_graph(model, calibration, MAX_CALIBRATION)
    assert Judge(read_network(model), fresh).compare(graph).sqnr_db > 12


@pytest.mark.parametrize(("se", "gain"), [("before_relu", 6.0), ("after_relu", 3.0)])
def test_a_deep_network_with_se_keeps_its_gates_in_floating_point(se: SePosition, gain: float) -> None:
    """An error of a gate is one of a whole channel, which no pooling averages away. 9.3 and 4.4 dB were measured."""
    spec = VariantSpec(
        "deep-se", (2, 2, 3, 1), (16, 16, 16, 24, 64), (1,) * 9, se, 4, strides=(1, 2, 2, 2, 1), num_classes=10
    )
    model = make_trained_like(spec, "none")
    judge = Judge(read_network(model), batches(64, 2))
    found = {}
    for kept in (True, False):
        graph, report = quantize_graph(model, batches(64, 1), dataclasses.replace(FAST, keep_gates=kept))
        found[kept] = judge.compare(graph).sqnr_db
        assert report.kept == (read_network(model).gates if kept else ())
        assert report.int8_share > 0.99
    assert found[True] >= found[False] + gain, found
    assert found[True] >= 16, found  # 18.3 and 19.2 were measured

from __future__ import annotations

import numpy as np
import onnx
import pytest

from repvgg_deploy.precision.chain import read_chain, read_weights, replace_weights, scale_inputs
from repvgg_deploy.precision.equalize import apply_factors
from repvgg_deploy.precision.layers import Trial, cut_after
from repvgg_deploy.precision.qdq import insert_pairs
from repvgg_deploy.precision.run_onnx import run_tensors
from tests.precision.make_chain import KINDS, make_batches, make_model

WHOLE = 100  # more layers than any of these networks has


def trial_of(model: onnx.ModelProto, name: str, batches: list[np.ndarray], horizon: int = WHOLE) -> Trial:
    chain = read_chain(model)
    cut = cut_after(chain, chain.layer(name), horizon)
    return Trial(model, cut, list(run_tensors(model, (*cut.given, cut.end), batches)))


def test_cut_after_ends_at_the_input_of_a_later_layer_or_at_the_classifier() -> None:
    model = make_model()
    chain = read_chain(model)
    first = chain.layers[0]
    assert [cut_after(chain, first, horizon).end for horizon in (1, 2, 5, 6, WHOLE)] == [
        "stage0",
        "stage1",
        "flatten",
        "logits",
        "logits",
    ]
    cut = cut_after(chain, first, 2)
    assert [node.name for node in cut.nodes] == ["stage0.conv", "stage0", "stage1.conv", "stage1"]
    assert cut.given == ("input",)
    assert cut_after(chain, chain.layers[-1], 3).end == "logits"


def test_cut_after_se_takes_what_the_gate_multiplies() -> None:
    model = make_model(KINDS["se_after"])
    chain = read_chain(model)
    cut = cut_after(chain, chain.layer("stage1.se.up.conv"), 1)
    assert cut.given == ("stage1.se.down", "stage1")
    assert [node.name for node in cut.nodes] == ["stage1.se.up.conv", "stage1.se.gate", "stage1.se.scaled"]


@pytest.mark.parametrize("kind", KINDS)
def test_trial_whole_network_errs_as_the_graph_with_one_layer_quantized(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 16)
    chain, weights = read_chain(model), read_weights(model)
    end = chain.layers[-1].output
    truth = np.concatenate([values[end] for values in run_tensors(model, [end], batches)]).astype(np.float64)
    for layer in chain.layers:
        coarse = np.round(weights[layer.weight] * 8) / 8
        step = 0.05
        others = [other.name for other in chain.layers if other is not layer]
        graph = replace_weights(insert_pairs(chain, {layer.input: step}, kept=others), {layer.weight: coarse})
        found = np.concatenate([values[end] for values in run_tensors(graph, [end], batches)])
        expected = float(np.square(found - truth).sum())
        trial = trial_of(model, layer.name, batches)
        # The cut ends where the layer's influence does: of features, the last that is shown.
        if cut_after(chain, layer, WHOLE).end == end:
            assert trial.error(step, np.ones(layer.in_channels), coarse) == pytest.approx(
                expected, rel=1e-3
            )  # float32 order of summation
            assert trial.signal == pytest.approx(float(np.square(truth).sum()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_trial_with_factors_errs_as_the_rescaled_graph_and_a_bias_counts(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 16)
    chain, weights = read_chain(model), read_weights(model)
    layer, end = chain.layer("stage1.conv"), chain.layers[-1].output
    trial = trial_of(model, layer.name, batches)
    factors = np.exp2(np.random.default_rng(0).uniform(-2, 2, layer.in_channels))
    step = 0.3
    rescaled = scale_inputs(weights[layer.weight].astype(np.float64), layer.groups, factors).astype(np.float32)
    graph = insert_pairs(
        apply_factors(chain, {"stage0.conv": factors}),
        {layer.input: step},
        kept=[o.name for o in chain.layers if o is not layer],
    )
    truth, found = (
        np.concatenate([v[end] for v in run_tensors(m, [end], batches)]).astype(np.float64) for m in (model, graph)
    )
    expected = float(np.square(found - truth).sum())
    if cut_after(chain, layer, WHOLE).end == end:
        # float32 rounding may put a value on the other side of half a step
        assert trial.error(step, factors, rescaled) == pytest.approx(expected, rel=0.02)
    assert trial.error(step, np.ones(layer.in_channels), rescaled) > 1.5 * expected  # a factor that is forgotten shows
    moved = read_weights(model)[layer.bias] + np.float32(2.0)
    assert trial.error(step, factors, rescaled, bias=moved) > 1.5 * trial.error(step, factors, rescaled)

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from repvgg_deploy.evaluate.agreement import decibels
from repvgg_deploy.graph.edit import replace_weights
from repvgg_deploy.precision.metrics import layer_sqnr
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.run_onnx import run_tensors
from tests.precision.compare import judge
from tests.precision.make_chain import KINDS, make_batches, make_model


def with_logits(logits: list[float]) -> onnx.ModelProto:
    """A network that gives every image the same logits."""
    model = make_model()
    return replace_weights(
        model, {"linear.weight": np.zeros((10, 32), np.float32), "linear.bias": np.array(logits, np.float32)}
    )


def biased(model: onnx.ModelProto, name: str, by: float) -> onnx.ModelProto:
    bias = numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))
    return replace_weights(model, {name: bias + np.float32(by)})


def test_decibels_known_ratios_and_ends() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert decibels(1.0, 2.0) == pytest.approx(-3.0103, abs=1e-4)
    assert (decibels(1.0, 0.0), decibels(0.0, 0.0), decibels(0.0, 1.0)) == (200.0, 200.0, -200.0)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_sqnr_is_that_of_the_tensors_and_counts_only_what_follows_a_change(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 20)
    changed = biased(model, "stage1.bias", 0.5)
    found, network = layer_sqnr(read_network(model), changed, batches), read_network(model)
    assert list(found) == [layer.output for layer in network.layers]
    assert found["stage0.conv"] == 200.0
    truth, other = (
        np.concatenate([v["stage1.conv"] for v in run_tensors(m, ["stage1.conv"], batches)]).astype(np.float64)
        for m in (model, changed)
    )
    assert found["stage1.conv"] == pytest.approx(
        10 * np.log10(np.square(truth).sum() / np.square(truth - other).sum()), abs=1e-9
    )
    assert found["stage2.conv"] < 100


def test_judge_expected_drop_is_what_fp32_gives_its_own_answer_less_the_others() -> None:
    """FP32 gives 60, 30 and 10 % to three classes; the others nearly nothing."""
    batches, few = make_batches(count=20), [-30.0] * 7
    truth = with_logits([*np.log([0.6, 0.3, 0.1]), *few])
    second, third = (with_logits([*np.log(shares), *few]) for shares in ([0.2, 0.7, 0.1], [0.1, 0.2, 0.7]))
    assert judge(truth, truth, batches).expected_drop == 0.0
    assert judge(truth, second, batches).expected_drop == pytest.approx(30.0, abs=1e-4)
    found = judge(truth, third, batches)
    assert found.expected_drop == pytest.approx(50.0, abs=1e-4)
    assert (found.images, found.agreement) == (20, 0.0)
    logits = np.array([np.log([0.6, 0.3, 0.1]), np.log([0.1, 0.2, 0.7])])
    noise = np.square(logits[0] - logits[1]).sum()
    assert found.sqnr_db == pytest.approx(10 * np.log10((np.square(logits[0]).sum() + 7 * 900) / noise), abs=1e-4)


def test_judge_a_choice_between_equal_classes_costs_nothing() -> None:
    truth, other = with_logits([1.0, 1.0, *[-9.0] * 8]), with_logits([1.0, 1.1, *[-9.0] * 8])
    found = judge(truth, other, make_batches(count=8))
    assert (found.agreement, found.expected_drop) == (0.0, 0.0)


def test_judge_drop_is_the_mean_over_images_that_change() -> None:
    model, batches = make_model(), make_batches(count=60)
    changed = biased(model, "stage4.bias", 0.3)
    truth, other = (
        np.concatenate([v["logits"] for v in run_tensors(m, ["logits"], batches)]).astype(np.float64)
        for m in (model, changed)
    )
    shares = np.exp(truth - truth.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    lost = [row[row.argmax()] - row[answer.argmax()] for row, answer in zip(shares, other, strict=True)]
    found = judge(model, changed, batches)
    assert 0 < found.agreement < 1
    assert found.agreement == np.mean(truth.argmax(axis=1) == other.argmax(axis=1))
    assert found.expected_drop == pytest.approx(100 * np.mean(lost), rel=1e-9)
    each = 10 * np.log10(np.square(truth).sum(axis=1) / np.square(truth - other).sum(axis=1))
    assert found.median_db == pytest.approx(np.median(each), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_judge_logits_are_found_behind_every_output_and_features_have_none(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 8)
    found = judge(model, model, batches)
    best = (None, None) if kind == "features" else (1.0, 0.0)
    assert (found.agreement, found.expected_drop, found.sqnr_db) == (*best, 200.0)

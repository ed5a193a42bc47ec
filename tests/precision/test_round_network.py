from __future__ import annotations

import numpy as np
import onnx
import pytest

from repvgg_deploy.precision.network import read_network, read_weights
from repvgg_deploy.precision.qdq import insert_pairs, write_integers
from repvgg_deploy.precision.round import RoundedLayer, RoundOptions, round_nearest
from repvgg_deploy.precision.round_network import Prepared, round_weights
from repvgg_deploy.precision.run_onnx import LayerWalk, run_tensors
from tests.precision.make_chain import KINDS, make_batches, make_model
from tests.precision.make_quantized import input_ranges

EVERYWHERE = 10**6  # samples: all positions of all images


def scales_of(model: onnx.ModelProto, batches: list[np.ndarray]) -> dict[str, float]:
    return {name: float(np.float32(value.max() / 127)) for name, value in input_ranges(model, batches).items()}


@pytest.mark.parametrize("method", ["nearest", "second_order"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_weights_every_layers_mean_output_is_that_of_fp32(kind: str, method) -> None:
    """Each bias takes up what all the layers before it lost, too: it sees what they give once they are quantized."""
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 24)
    scales = scales_of(model, batches)
    rounded = round_weights(
        Prepared(read_network(model), scales), batches, RoundOptions(method=method, samples=EVERYWHERE)
    )
    network = read_network(model)
    graph = write_integers(insert_pairs(network, scales), network, rounded)
    for layer in network.layers:
        truth, found = (
            np.concatenate([v[layer.output] for v in run_tensors(m, [layer.output], batches)]) for m in (model, graph)
        )
        axes = (0, *range(2, truth.ndim))
        missing = np.abs((truth - found).mean(axis=axes, dtype=np.float64))
        # float32 sums, and a value half-way between two steps that falls to the other side in another order of
        # summation
        assert (missing <= 1e-3 * np.abs(truth).mean()).all(), layer.name
        assert np.abs(truth - found).mean() > 1e-3 * np.abs(truth).mean()


def test_round_weights_kept_layers_are_left_out_and_progress_counts_the_others() -> None:
    model, batches = make_model(), make_batches(count=16)
    seen: list[tuple[int, int]] = []
    kept = ("stage1.conv", "linear")
    prepared = Prepared(read_network(model), scales_of(model, batches), kept)
    found = round_weights(prepared, batches, RoundOptions(), progress=lambda done, total: seen.append((done, total)))
    assert list(found) == ["stage0.conv", "stage2.conv", "stage3.conv", "stage4.conv"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_round_weights_half_gives_scales_and_biases_that_fp16_holds() -> None:
    model, batches = make_model(), make_batches(count=16)
    for layer in round_weights(
        Prepared(read_network(model), scales_of(model, batches), half=True), batches, RoundOptions()
    ).values():
        for values in (layer.scales, layer.bias):
            assert np.array_equal(values.astype(np.float16).astype(np.float32), values)


def test_round_weights_nearest_without_correction_needs_no_images() -> None:
    model = make_model()
    weights = read_weights(read_network(model))
    found = round_weights(Prepared(read_network(model), {}), [], RoundOptions(method="nearest", bias_correction=False))
    for layer in read_network(model).layers:
        expected = round_nearest(weights[layer.weight], weights[layer.bias])
        assert same(found[layer.name], expected)


def same(one: RoundedLayer, other: RoundedLayer) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("integers", "scales", "bias"))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_little_memory_give_the_same_tensors_for_fewer_batches_and_catch_up(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 48, size=8)
    tensors = read_network(model).quantized_tensors()
    whole = [list(run_tensors(model, [name], batches)) for name in tensors]
    steps = LayerWalk(
        model,
        batches,
        budget_bytes=3 * max(values[0][name].nbytes for name, values in zip(tensors, whole, strict=True)),
    )
    counts = []
    for name, expected in zip(tensors, whole, strict=True):
        found = list(steps.advance(name))
        counts.append(len(found))
        for value, truth in zip(found, expected, strict=False):
            # float32 rounding: cut graphs are fused differently
            np.testing.assert_allclose(value, truth[name], rtol=1e-5, atol=1e-5 * np.abs(truth[name]).max())
    assert 1 <= min(counts) < 6
    if kind != "features":
        assert counts[-1] == 6, counts  # pooled: all fit


def test_steps_one_batch_is_run_whatever_it_takes() -> None:
    model, batches = make_model(), make_batches(count=32, size=8)
    steps = LayerWalk(model, batches, budget_bytes=1)
    assert [len(list(steps.advance(name))) for name in read_network(model).quantized_tensors()] == [1] * 6


def test_steps_that_catch_up_use_the_model_as_it_is_by_then() -> None:
    """Weights are chosen layer by layer; batches that join late run through the layers as they have become."""
    model, other, batches = make_model(), make_model(seed=7), make_batches(count=48, size=8)
    first, last = (list(run_tensors(m, ["flatten"], batches)) for m in (model, other))
    steps = LayerWalk(model, batches, budget_bytes=30_000)
    assert len(list(steps.advance("stage0"))) < 6
    model.graph.CopyFrom(other.graph)
    found = list(steps.advance("flatten"))
    assert len(found) == 6
    np.testing.assert_allclose(found[-1], last[-1]["flatten"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0], first[0]["flatten"]) and not np.allclose(
        found[0], last[0]["flatten"]
    )  # stage0 of one, the rest of the other

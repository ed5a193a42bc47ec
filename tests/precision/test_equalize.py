from __future__ import annotations

import numpy as np
import onnx
import pytest

from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.precision.equalize import EqualizeOptions, apply_factors, encode, equalize
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.ranges import collect
from repvgg_deploy.precision.run_onnx import run_tensors
from repvgg_deploy.specs.values import SePosition, VariantSpec
from tests.precision.make_chain import KINDS, make_batches, make_model
from tests.precision.make_variant import images_for, make_variant


def outputs(model: onnx.ModelProto, batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in model.graph.output]
    values = list(run_tensors(model, names, batches))
    return {name: np.concatenate([v[name] for v in values]) for name in names}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [EqualizeOptions(), EqualizeOptions(1.0, powers_of_two=True), EqualizeOptions(0.3, {"stage1.conv": 0.9})],
    ids=str,
)
def test_equalize_every_kind_of_graph_computes_the_same(kind: str, options: EqualizeOptions) -> None:
    network, batches = read_network(make_model(KINDS[kind])), make_batches(KINDS[kind])
    equalized, factors, _ = equalize(network, collect(network, batches).ranges(), options)
    before, after = outputs(network.model, batches), outputs(equalized.model, batches)
    for name, value in before.items():
        if value.dtype != np.float32:
            assert np.mean(value == after[name]) > 0.99  # classes: two almost equal scores may change places
            continue
        # float32 rounding of six layers; the promise of the module is 1e-5
        assert np.abs(value - after[name]).max() <= 1e-5 * np.abs(value).max()
    assert any(np.ptp(np.log2(factor)) > 0.5 for factor in network.divided(factors).values())  # it did something


def test_equalize_spreads_become_smaller_and_ranges_alike() -> None:
    network, batches = read_network(make_model()), make_batches()
    equalized, _, reports = equalize(network, collect(network, batches).ranges(), EqualizeOptions(1.0))
    open_ = [i for i in reports if i.blocked_by is None]
    assert len(open_) == 5
    assert max(i.spread_before for i in open_) > 4
    # The ranges given are exactly those divided by.
    assert max(i.spread_after for i in open_) == pytest.approx(1.0, abs=1e-9)
    ranges = collect(equalized, batches).ranges()
    for layer in network.layers[1:]:
        alive = ranges[layer.input][ranges[layer.input] > 0]
        assert np.ptp(alive) <= 1e-5 * alive.max()  # measured again: float32 rounding


def test_equalize_exposed_outputs_stay_as_they_are() -> None:
    options = KINDS["features"]
    network, batches = read_network(make_model(options)), make_batches(options)
    _, factors, reports = equalize(network, collect(network, batches).ranges())
    assert [i.blocked_by for i in reports] == [None, "output stage1", "output stage2"]
    assert set(network.divided(factors)) == {"stage0"}


def test_equalize_powers_of_two_are_exact_factors() -> None:
    network, batches = read_network(make_model()), make_batches()
    _, factors, _ = equalize(network, collect(network, batches).ranges(), EqualizeOptions(powers_of_two=True))
    logs = np.log2(factors)
    assert np.array_equal(logs, np.round(logs)) and np.ptp(logs) >= 2


def test_equalize_dead_channel_keeps_its_factor_finite() -> None:
    network, batches = read_network(make_model()), make_batches()
    ranges = collect(network, batches).ranges()
    ranges["stage1"] = ranges["stage1"].copy()
    ranges["stage1"][3] = 0.0
    factor = network.divided(equalize(network, ranges)[1])["stage1"]
    assert np.isfinite(factor).all() and (factor > 0).all() and factor[3] == 1.0


@pytest.mark.parametrize("value", [None, np.ones(3), np.full(16, np.nan)], ids=["missing", "shape", "nan"])
def test_equalize_bad_ranges_are_refused(value) -> None:
    network, batches = read_network(make_model()), make_batches()
    ranges = collect(network, batches).ranges()
    ranges.pop("stage1")
    if value is not None:
        ranges["stage1"] = value
    with pytest.raises(CalibrationError, match="ranges of stage1"):
        equalize(network, ranges)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_factors_of_an_equalization_give_the_same_network(kind: str) -> None:
    network, batches = read_network(make_model(KINDS[kind])), make_batches(KINDS[kind])
    equalized, factors, _ = equalize(network, collect(network, batches).ranges())
    again = apply_factors(network, encode(network, factors)).model
    assert again.SerializeToString(deterministic=True) == equalized.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("source", "factor"),
    [
        ("stage9.conv", np.ones(16)),
        ("stage1.conv", np.ones(7)),
        ("stage1.conv", np.zeros(16)),
        ("linear", np.full(10, 2.0)),
    ],
    ids=["unknown layer", "shape", "zero", "blocked"],
)
def test_apply_factors_of_another_graph_are_refused(source: str, factor) -> None:
    with pytest.raises(CalibrationError, match=f"saved factors of '{source}'"):
        apply_factors(read_network(make_model()), {source: factor})


def test_equalize_options_out_of_range_are_refused() -> None:
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        EqualizeOptions(1.5)


@pytest.mark.parametrize("se", ["before_relu", "after_relu"])
def test_equalize_few_classes_the_classifier_decides_not_the_se_of_the_last_block(se: SePosition) -> None:
    """The SE has more weights than the classifier, and the averages that it reads differ from what a gate lets by."""
    spec = VariantSpec("few", (1, 1, 1, 1), (8, 8, 8, 16, 32), (1,) * 5, se=se, se_reduction=2, num_classes=4)
    network = read_network(make_variant(spec))
    linear, down = network.layers[-1], network.layers[-3]
    assert np.prod(down.weight_shape) > np.prod(linear.weight_shape)
    ranges = collect(network, images_for(network.model, 8)).ranges()
    factor = equalize(network, ranges, EqualizeOptions(1.0))[1][linear.source]
    alike = ranges[linear.input] / factor
    alive = alike > 0
    assert np.ptp(alike[alive]) <= 1e-9 * alike.max()
    assert np.ptp(np.log2((ranges[down.input] / factor)[alive])) > 0.1  # what the SE reads has other ranges

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.ranges import _by_image, collect, find_extreme, hash_images, leave_out
from repvgg_deploy.precision.run_onnx import LayerWalk, run_tensors
from repvgg_deploy.precision.scales import ScaleFile, ScaleOptions, choose_scales, graph_sha256
from repvgg_deploy.specs import codec
from tests.precision.make_chain import KINDS, make_batches, make_model


def test_collect_ranges_and_histograms_are_those_of_the_tensors() -> None:
    model, batches = make_model(), make_batches()
    network = read_network(model)
    statistics = collect(network, batches)
    whole = np.concatenate([values["stage2"] for values in run_tensors(model, ["stage2"], batches)])
    found = statistics.tensors["stage2"]
    assert np.array_equal(found.largest, np.abs(whole).max(axis=(0, 2, 3)).astype(np.float64))
    assert (found.histogram.sum(axis=1) == whole[:, 0].size).all()
    for channel in (0, 5):
        truth = np.percentile(np.abs(whole[:, channel]), 99, method="inverted_cdf")
        # The upper edge of its bin, and one bin for rounding.
        assert 0 <= found.channel_percentile(99)[channel] - truth + 1e-6 <= 2 * found.largest[channel] / 1024
    assert (statistics.images, len(statistics.tensors)) == (64, 6)


def test_collect_batches_of_another_size_give_the_same() -> None:
    model = make_model()
    one, other = (collect(read_network(model), make_batches(size=size)) for size in (16, 7))
    assert one.data_sha256 == other.data_sha256
    # Another batch size may choose another summation order in float32: a value may fall into the neighbouring bin.
    moved = np.abs(one.tensors["stage3"].histogram - other.tensors["stage3"].histogram).sum()
    assert moved <= 0.001 * one.tensors["stage3"].histogram.sum()


def test_choose_scales_methods_are_deterministic_and_ordered() -> None:
    model, batches = make_model(), make_batches()
    network = read_network(model)
    statistics = collect(network, batches)
    scales = {
        method: choose_scales(network, statistics, ScaleOptions(method))
        for method in ("max", "percentile", "entropy", "min_error")
    }
    assert scales["max"]["stage1"] == pytest.approx(
        statistics.tensors["stage1"].largest.max() / 127, rel=1e-6
    )  # float32
    for method, found in scales.items():
        assert found == choose_scales(network, collect(network, batches), ScaleOptions(method))
        assert all(0 < value <= scales["max"][name] * 1.001 for name, value in found.items())  # one histogram bin above
        assert method == "max" or any(value < 0.99 * scales["max"][name] for name, value in found.items())


def test_choose_scales_min_error_is_least_among_methods() -> None:
    """On the layer's own measure, with many small values and one outlier."""
    model, batches = make_model(), make_batches()
    network = read_network(model)
    statistics = collect(network, batches)
    values = np.concatenate([v["stage3"] for v in run_tensors(model, ["stage3"], batches)])
    weight = next(t for t in model.graph.initializer if t.name == "stage4.weight")
    importance = np.square(np.frombuffer(weight.raw_data, "<f4").reshape(32, 24, 9)).sum(axis=(0, 2))

    def error(method) -> float:
        step = choose_scales(network, statistics, ScaleOptions(method))["stage3"]
        rounded = np.clip(np.rint(values / step), -127, 127) * step
        return float((np.square(values - rounded).mean(axis=(0, 2, 3)) * importance).sum())

    best = error("min_error")
    assert all(best <= error(method) * 1.01 for method in ("max", "percentile", "entropy"))  # 64 candidates only


def test_scales_saved_come_back_and_are_bound_to_graph_and_images() -> None:
    model = make_model()
    file = ScaleFile(
        1,
        graph_sha256(model),
        "d" * 64,
        64,
        "min_error",
        {"stage1": 0.25},
        {"stage1.conv": "AAAAAAAA8D8="},
        {"stage1.conv": 0.85},
    )
    again = codec.loads(ScaleFile, codec.dumps(file))
    assert again == file
    again.check(graph_sha256(model), "d" * 64)
    with pytest.raises(CalibrationError, match="another graph"):
        again.check(graph_sha256(make_model(seed=1)))
    with pytest.raises(CalibrationError, match="another images"):
        again.check(graph_sha256(model), "e" * 64)


def test_graph_sha256_metadata_does_not_matter_but_weights_do() -> None:
    model, other = make_model(), make_model()
    other.metadata_props.add(key="note", value="x")
    assert graph_sha256(model) == graph_sha256(other) != graph_sha256(make_model(seed=1))


def test_collect_bad_images_are_refused() -> None:
    network, batches = read_network(make_model()), make_batches()
    with pytest.raises(CalibrationError, match="no calibration images"):
        collect(network, [])
    with pytest.raises(CalibrationError, match="all 4 calibration images are alike"):
        collect(network, [np.repeat(batches[0][:1], 4, axis=0)])
    with pytest.raises(CalibrationError, match="only once"):
        collect(network, iter(batches))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        collect(network, [np.where(np.arange(16).reshape(-1, 1, 1, 1) == 3, np.float32(np.nan), batches[0])])
    with pytest.raises(CalibrationError, match="does not take a batch"):
        collect(network, make_batches(KINDS["uint8_top5"]))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_what_the_whole_graph_gives(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 24)
    tensors = list(collect(read_network(model), batches).tensors)
    steps = LayerWalk(model, batches)
    for name in tensors:
        whole = [values[name] for values in run_tensors(model, [name], batches)]
        for found, expected in zip(steps.advance(name), whole, strict=True):
            # float32 rounding: cut graphs are fused differently
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_an_image_beside_which_the_others_vanish_takes_no_part() -> None:
    """One image a thousand times as large would leave the others a few of the 127 steps."""
    model, batches = make_model(), make_batches()
    wild = [batch.copy() for batch in batches]
    wild[1][3] *= 1000
    index = len(batches[0]) + 3
    found = collect(read_network(model), wild)
    assert found.left_out == (index,)
    plain = collect(read_network(model), leave_out(batches, [index]))
    assert plain.left_out == ()
    assert (found.images, found.data_sha256) == (64, hash_images(wild)[0])
    for name, value in found.tensors.items():
        # The same images stand in the same batches.
        assert np.array_equal(value.largest, plain.tensors[name].largest)
        assert np.array_equal(value.histogram, plain.tensors[name].histogram)


def test_images_that_are_no_exceptions_take_part() -> None:
    sizes = np.ones(100, np.float32)
    sizes[:5] = 31
    assert find_extreme([np.ones(100, np.float32), sizes], []) == (0, 1, 2, 3, 4)
    sizes[5] = 31
    assert find_extreme([sizes], []) == ()
    assert find_extreme([np.where(sizes > 1, sizes, 0)], []) == ()  # most are dead: nothing to compare with


def test_an_image_is_judged_by_what_it_gives_before_it_is_judged_by_what_is_between() -> None:
    """Many times as much between layers does no harm that the outputs do not show."""
    sizes = np.ones(100, np.float32)
    sizes[:2] = [2.9, 3.1]
    assert find_extreme([sizes], []) == ()
    assert find_extreme([sizes], [sizes]) == (1,)
    sizes[3] = 17  # they are clipped, so that two of a hundred are too many
    assert find_extreme([sizes], [sizes]) == ()
    sizes[4] = 31
    assert find_extreme([sizes], [sizes]) == (4,)


def test_leave_out_keeps_the_size_of_batches() -> None:
    batches = [np.arange(4), np.arange(4, 6), np.arange(6, 7)]
    found = leave_out(batches, (1, 4, 6))
    assert [batch.tolist() for batch in found] == [[0, 2, 3, 0], [5, 5]]


def test_images_are_told_apart_where_the_first_axis_is_of_windows() -> None:
    value = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)
    peak, size = _by_image(value, 3)
    assert np.array_equal(peak, np.abs(value).reshape(3, 2, 4, 5).max(axis=(1, 3)))
    assert size == pytest.approx(np.sqrt(np.square(value).reshape(3, -1).mean(axis=1)), rel=1e-5)
    peak, size = _by_image(value, 4)
    assert np.array_equal(peak, np.tile(np.abs(value).max(axis=(0, 2)), (4, 1)))
    assert len(set(size.tolist())) == 1

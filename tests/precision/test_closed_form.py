from __future__ import annotations

import base64
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from repvgg_deploy import export_module
from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.export.module import ModuleOptions
from repvgg_deploy.images.decode import normalize
from repvgg_deploy.images.drawn import draw_images
from repvgg_deploy.precision.check import check_quantized
from repvgg_deploy.precision.closed_form import DEVIATIONS, closed_form_statistics, correct_bias
from repvgg_deploy.precision.int8 import Int8Options, to_int8
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.round import round_nearest
from repvgg_deploy.precision.run_onnx import open_session, run_tensors
from repvgg_deploy.precision.typed_model import Parent, load_parent
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import METADATA_KEY, ChannelStatistics
from tests.export.test_calibrate import SEEN, train_pyramid
from tests.precision.compare import judge
from tests.precision.make_chain import KINDS, make_batches, make_model, metadata_of

DRAWN = 200_000


def encode(values: np.ndarray) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode("ascii")


def statistics_for(model: onnx.ModelProto, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random means and deviations of what 3×3 convolutions give, from always off to always on."""
    generator, found = np.random.default_rng(seed), {}
    for layer in read_network(model).layers:
        if layer.op_type == "Conv" and layer.weight_shape[2] == 3:
            std = np.exp2(generator.uniform(-3, 3, layer.out_channels))
            found[layer.output] = (generator.uniform(-2.5, 4, layer.out_channels) * std, std)
    return found


def with_statistics(model: onnx.ModelProto, stated: dict[str, tuple[np.ndarray, np.ndarray]]) -> Parent:
    statistics = {name: ChannelStatistics(encode(mean), encode(std)) for name, (mean, std) in stated.items()}
    return Parent(read_network(model), dataclasses.replace(metadata_of(model), statistics=statistics))


def stated_of(model: onnx.ModelProto, batches: list[np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What BatchNorm layers would have seen of these images."""
    names = [
        layer.output for layer in read_network(model).layers if layer.op_type == "Conv" and layer.weight_shape[2] == 3
    ]
    values = list(run_tensors(model, names, batches))
    whole = {name: np.concatenate([value[name] for value in values]).astype(np.float64) for name in names}
    return {name: (value.mean(axis=(0, 2, 3)), value.std(axis=(0, 2, 3))) for name, value in whole.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_means_and_ranges_are_those_of_drawn_rectified_normals(kind: str) -> None:
    model = make_model(KINDS[kind])
    stated = statistics_for(model)
    statistics, moments = closed_form_statistics(with_statistics(model, stated))
    network, generator = read_network(model), np.random.default_rng(1)
    assert set(statistics.tensors) == set(moments) == set(network.quantized_tensors())
    for index in range(1, len(stated)):
        tensor = network.layer(f"stage{index}.conv").input
        if tensor != f"stage{index - 1}":
            continue  # an SE gate lies between
        mean, std = stated[f"stage{index - 1}.conv"]
        drawn = np.maximum(generator.normal(mean[:, None], std[:, None], (len(mean), DRAWN)), 0)
        # Means of 200,000 draws err by 0.22 % of a standard deviation, deviations by less; five times that.
        assert (np.abs(moments[tensor][0] - drawn.mean(axis=1)) <= 0.011 * std).all()
        assert (np.abs(moments[tensor][1] - drawn.std(axis=1)) <= 0.011 * std).all()
        found = statistics.tensors[tensor]
        np.testing.assert_allclose(found.largest, np.maximum(mean + DEVIATIONS * std, 0.0), rtol=1e-5, atol=1e-6)
        for percent, truth in zip((90.0, 99.0), np.percentile(drawn, (90.0, 99.0), axis=1), strict=True):
            # A bin's width above, and what 2,000 draws beyond the percentile leave open.
            assert (np.abs(found.channel_percentile(percent) - truth) <= found.largest / 1024 + 0.06 * std).all()
        share_of_zeros = found.histogram[:, 0] / found.histogram.sum(axis=1)
        assert (np.abs(share_of_zeros - (drawn <= found.largest[:, None] / 1024).mean(axis=1)) <= 0.006).all()


def test_closed_form_pooling_keeps_the_mean() -> None:
    model = make_model()
    stated = statistics_for(model)
    _, moments = closed_form_statistics(with_statistics(model, stated))
    mean, std = stated["stage4.conv"]
    drawn = np.maximum(np.random.default_rng(2).normal(mean[:, None], std[:, None], (len(mean), DRAWN)), 0).mean(axis=1)
    assert (np.abs(moments["flatten"][0] - drawn) <= 0.011 * std).all()


def test_closed_form_image_is_bounded_by_black_and_white() -> None:
    model = make_model(KINDS["uint8_top5"])
    statistics, _ = closed_form_statistics(with_statistics(model, statistics_for(model)))
    image = statistics.tensors[read_network(model).image]
    chequers = np.stack([np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)])
    extremes = next(iter(run_tensors(model, [read_network(model).image], [chequers])))[read_network(model).image]
    np.testing.assert_allclose(image.largest, np.abs(extremes).max(axis=(0, 2, 3)), rtol=1e-5)


def test_closed_form_without_any_statistics_is_refused() -> None:
    with pytest.raises(CalibrationError, match="exported from a deploy form"):
        closed_form_statistics(with_statistics(make_model(), {}))


def test_closed_form_layer_without_statistics_is_computed_of_what_it_reads() -> None:
    model, batches = make_model(), make_batches(KINDS["plain"], 32)
    stated = stated_of(model, batches)
    whole, _ = closed_form_statistics(with_statistics(model, stated))
    del stated["stage1.conv"]
    found, _ = closed_form_statistics(with_statistics(model, stated))
    ratio = found.tensors["stage1"].largest.max() / whole.tensors["stage1"].largest.max()
    assert 0.5 < ratio < 2
    assert {name for name in found.tensors if found.tensors[name] is not whole.tensors[name]} >= {"stage1"}


def test_closed_form_of_a_graph_has_the_moments_that_images_have(tmp_path: Path) -> None:
    """Two scales, Resize, Concat and SiLU; BatchNorms have seen the very images that are compared with."""
    images = normalize(draw_images((32, 32), 64, np.random.default_rng(0)), SEEN)
    export_module(
        train_pyramid(images), torch.zeros(1, 3, 32, 32), tmp_path / "p.onnx", options=ModuleOptions(preprocessing=SEEN)
    )
    parent = load_parent(tmp_path / "p.onnx")
    statistics, moments = closed_form_statistics(parent)
    network = parent.network
    assert list(statistics.tensors) == list(moments) == list(network.quantized_tensors())
    (values,) = run_tensors(network.model, network.quantized_tensors()[1:], [images])
    for name, value in values.items():
        mean, std = moments[name]
        # A normal distribution before SiLU is what is assumed of each channel, and is not quite what it is.
        np.testing.assert_allclose(mean, value.mean((0, 2, 3)), atol=0.15)
        np.testing.assert_allclose(std, value.std((0, 2, 3)), rtol=0.35)
        ratio = statistics.tensors[name].largest / np.abs(value).max((0, 2, 3))
        assert (0.5 < ratio).all() and (ratio < 3).all()
    again, _ = closed_form_statistics(parent)
    assert all(np.array_equal(t.histogram, again.tensors[name].histogram) for name, t in statistics.tensors.items())
    typed, report = to_int8(parent, None, Int8Options(target="trt8"))
    assert report.source == "statistics"
    assert judge(network.model, typed.model, [images]).sqnr_db > 20  # what is demanded by convention


@pytest.mark.parametrize("kind", KINDS)
def test_to_int8_without_images_is_a_whole_graph_of_either_target(kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 32)
    parent = with_statistics(model, stated_of(model, batches))
    stamped = onnx.ModelProto()
    stamped.CopyFrom(model)
    stamped.metadata_props.add(key=METADATA_KEY, value=codec.dumps(parent.metadata))
    for target in ("trt8", "trt10"):
        typed, report = to_int8(stamped, None, Int8Options(target=target))
        gates = read_network(model).gates
        check_quantized(typed.model, target=target, kept=gates)
        assert (report.source, report.images, report.kept) == ("statistics", 0, gates)
        assert typed.metadata.history[-1].options["rounding"] == "prior"
        if target == "trt10":
            continue
        found = judge(model, typed.model, batches)
        # No image was seen, and channels spread over six octaves.
        assert found.agreement is None or found.sqnr_db > 15, found


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_correct_bias_restores_the_mean_output(groups: int) -> None:
    """Checked by convolving an input that is the same everywhere, and so its own mean, away from the border."""
    from onnx import TensorProto, helper

    generator = np.random.default_rng(groups)
    weight = generator.standard_normal((12, 8 // groups, 3, 3)).astype(np.float32)
    bias, mean = generator.standard_normal(12).astype(np.float32), generator.uniform(0, 4, 8)
    coarse = round_nearest(np.round(weight * 4) / 4, bias).weight()
    corrected = correct_bias(weight, coarse, bias, groups=groups, mean=mean)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=groups)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "w", "b", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:3], values[3:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    session = open_session(model)
    x = np.broadcast_to(mean.reshape(1, 8, 1, 1), (1, 8, 3, 3)).astype(np.float32)
    truth, plain, ours = (
        session.run(None, {"x": x, "w": w, "b": b})[0].ravel()
        for w, b in ((weight, bias), (coarse, bias), (coarse, corrected))
    )
    assert np.abs(plain - truth).max() > 0.1
    np.testing.assert_allclose(ours, truth, atol=1e-4)  # float32 sums of 72 products around 10

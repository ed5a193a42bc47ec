from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.precision.network import Layer
from repvgg_deploy.precision.ranges import Moments, columns, output_size
from repvgg_deploy.precision.round import RoundOptions, round_layer, round_nearest
from repvgg_deploy.precision.run_onnx import open_session

GENERATOR_SEED = 5


def layer(groups: int = 1, stride: int = 1, channels: int = 8, out: int = 12) -> Layer:
    return Layer(
        *("c", "Conv", "x", "y", "w", "b", (out, channels // groups, 3, 3), np.arange(channels), np.arange(out)),
        *(groups, (stride, stride), (1, 1, 1, 1)),
    )


def problem(conv: Layer) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Weights with a heavy centre tap, a bias, and inputs whose channels and neighbours are correlated."""
    generator = np.random.default_rng(GENERATOR_SEED)
    weight = generator.standard_normal(conv.weight_shape)
    weight[:, :, 1, 1] *= 8
    mixed = np.einsum(
        "dc,nchw->ndhw",
        generator.standard_normal((conv.in_channels, 3)),
        generator.standard_normal((32, 3, 6, 6)).repeat(2, 2).repeat(2, 3),
    )
    x = np.maximum(mixed + 0.3 * generator.standard_normal(mixed.shape), 0)
    return (
        weight.astype(np.float32),
        generator.standard_normal(conv.out_channels).astype(np.float32),
        x.astype(np.float32),
    )


def every_position(conv: Layer, x: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.tile(np.arange(int(np.prod(output_size(x.shape, conv)))), (len(x), 1))


def output(
    conv: Layer, x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(positions, out) by matrix product."""
    found = columns(x, conv, every_position(conv, x))
    rows = weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    return np.concatenate([found[g] @ rows[g].T for g in range(conv.groups)], axis=1) + bias


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_columns_times_weights_are_the_convolution(groups: int, stride: int) -> None:
    from onnx import TensorProto, helper, numpy_helper

    conv = layer(groups, stride)
    weight, bias, x = problem(conv)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[stride] * 2, pads=[1] * 4, group=groups)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(
        [node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    truth = open_session(model).run(None, {"x": x})[0]
    found = output(conv, x, weight, bias).reshape(len(x), *truth.shape[2:], -1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-4)  # float32 sums of 72 products around 10


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_round_layer_second_order_errs_much_less_than_nearest(groups: int) -> None:
    conv = layer(groups)
    weight, bias, x = problem(conv)
    truth = output(conv, x, weight, bias)
    moments = Moments(conv, weight, positions=10**6, seed=0)
    for part in np.split(x, 4):
        moments.add(part, part)
    errors = {}
    for method in ("nearest", "second_order"):
        rounded = round_layer(weight, bias, moments, RoundOptions(method=method))
        assert rounded.integers.dtype == np.int8 and np.abs(rounded.integers.astype(int)).max() <= 127
        errors[method] = float(np.square(output(conv, x, rounded.weight(), rounded.bias) - truth).mean())
    # In four groups a row has 18 weights only: less to pass an error on to.
    assert errors["second_order"] < (0.5 if groups < 4 else 0.7) * errors["nearest"]


def test_round_layer_bias_takes_up_the_mean_error() -> None:
    conv = layer()
    weight, bias, x = problem(conv)
    truth = output(conv, x, weight, bias)
    moments = Moments(conv, weight, positions=10**6, seed=0, full=False)
    moments.add(x, x)
    rounded = round_layer(weight, bias, moments, RoundOptions(method="nearest"))
    plain = round_nearest(weight, bias)
    assert np.array_equal(rounded.integers, plain.integers)
    before = np.abs((output(conv, x, plain.weight(), plain.bias) - truth).mean(axis=0)).max()
    after = np.abs((output(conv, x, rounded.weight(), rounded.bias) - truth).mean(axis=0)).max()
    assert after < 1e-4  # float32 rounding of outputs around 30
    assert before > 1e-3


def test_round_layer_corrects_what_earlier_layers_lost() -> None:
    """The quantized network's input is the true one with an error that depends on it linearly."""
    conv = layer()
    weight, bias, x = problem(conv)
    worse = (x * np.linspace(0.9, 1.1, 8, dtype=np.float32).reshape(1, 8, 1, 1)).astype(np.float32)
    truth = output(conv, x, weight, bias)
    moments = Moments(conv, weight, positions=10**6, seed=0)
    moments.add(worse, x)
    errors = []
    for ridge in (1e-3, 1e9):  # 1e9: no correction
        rounded = round_layer(weight, bias, moments, RoundOptions(ridge=ridge))
        errors.append(float(np.square(output(conv, worse, rounded.weight(), rounded.bias) - truth).mean()))
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("images", [3, 32])  # 144 positions each, and 72 inputs
def test_round_layer_learns_nothing_of_few_positions_by_heart(images: int) -> None:
    """What earlier layers lost depends on the input; of too few positions it is not asked how."""
    conv = layer()
    weight, bias, x = problem(conv)
    worse = (x * np.linspace(0.9, 1.1, 8, dtype=np.float32).reshape(1, 8, 1, 1)).astype(np.float32)
    found = []
    for truth in (x, worse):
        moments = Moments(conv, weight, positions=10**6, seed=0)
        moments.add(worse[:images], truth[:images])
        found.append(round_layer(weight, bias, moments, RoundOptions()))
    assert np.array_equal(found[0].integers, found[1].integers) == (images == 3)
    assert not np.allclose(found[0].bias, found[1].bias)  # the mean is corrected all the same


def test_round_layer_constant_input_and_zero_rows_stay_finite() -> None:
    conv = layer()
    weight, bias, x = problem(conv)
    weight[3] = 0
    moments = Moments(conv, weight, positions=64, seed=0)
    moments.add(np.zeros_like(x), np.zeros_like(x))
    rounded = round_layer(weight, bias, moments, RoundOptions())
    assert np.isfinite(rounded.scales).all() and (rounded.scales > 0).all() and not rounded.integers[3].any()
    np.testing.assert_allclose(rounded.bias, bias)


@pytest.mark.parametrize(
    "fields",
    [{"damping": 0.0}, {"ridge": -1.0}, {"clips": ()}, {"clips": (1.2,)}, {"samples": 0}, {"sweeps": -1}],
    ids=str,
)
def test_round_options_that_cannot_hold_are_refused(fields) -> None:
    with pytest.raises(CalibrationError, match="rounding"):
        RoundOptions(**fields)

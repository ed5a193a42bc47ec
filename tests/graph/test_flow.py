"""Channels that must share a factor: whatever the free ones are divided by, the graph computes the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.graph.edit import GraphView
from repvgg_deploy.graph.flow import ChannelFlow, find_flow
from tests.graph.make_blocks import CHANNELS, Draw
from tests.graph.rescale import rescale_channels

SIZE = (2, CHANNELS, 12, 10)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(3).standard_normal(SIZE).astype(np.float32)})


def rescale(model: onnx.ModelProto, seed: int = 0) -> tuple[onnx.ModelProto, ChannelFlow]:
    """Every free variable divided by another power of two, which float32 carries without rounding."""
    view = GraphView(model)
    flow = find_flow(view)
    factors = np.exp2(np.random.default_rng(seed).integers(-3, 4, flow.count).astype(np.float64))
    factors[list(flow.held)] = 1
    return rescale_channels(view, flow, factors), flow


def assert_same(model: onnx.ModelProto, seed: int = 0) -> ChannelFlow:
    """Sums of float32 in which every term is scaled by a power of two are the same sums: 1e-5 is for other orders."""
    before = model.SerializeToString()
    rescaled, flow = rescale(model, seed)
    onnx.checker.check_model(rescaled, full_check=True)
    assert model.SerializeToString() == before
    for one, other in zip(run(model), run(rescaled), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * float(np.abs(one).max() + 1e-30))
    return flow


def between(make: Callable[[Draw, str], str], *, fixed_size: bool = False) -> onnx.ModelProto:
    """A convolution, what is tried, and a layer after it, so that the factors in between are free."""
    d = Draw(seed=1)
    made = make(d, d.conv("x", bias=True))
    if d.channels[made]:
        made = d.conv(made, kernel=1, bias=True)
    model = d.model(made)
    if fixed_size:
        for dim, value in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], SIZE[1:], strict=True):
            dim.dim_value = value
    model.graph.output[0].type.tensor_type.ClearField("shape")  # of whatever rank it is
    return onnx.shape_inference.infer_shapes(model)


def tail(d: Draw, x: str, inner: int, *, transposed: bool = True) -> str:
    """A Gemm at the end of what was made flat."""
    shape = (5, inner) if transposed else (inner, 5)
    name = d.node("Gemm", [x, d.random_constant(*shape), d.random_constant(5)], transB=int(transposed))
    d.channels[name] = 0
    return name


def _gate(d: Draw, x: str) -> str:
    pooled = d.node("GlobalAveragePool", [x])
    narrow = d.node("Relu", [d.conv(pooled, 3, kernel=1, bias=True)])
    gate = d.node("Sigmoid", [d.conv(narrow, CHANNELS, kernel=1, bias=True)])
    return d.node("Mul", [gate, x])


def _concat(d: Draw, x: str) -> str:
    other = d.node("Relu", [d.conv(x, 5)])
    return d.node("Concat", [d.node("Relu", [x]), other], 8 + 5, axis=1)


def _split(d: Draw, x: str) -> str:
    name = d.node("Split", [x, d.constant_integers([3, 5])], axis=1)
    d.nodes[-1].output.append("rest")
    d.channels |= {name: 3, "rest": 5}
    return d.node("Concat", ["rest", d.node("Relu", [name])], 8, axis=1)


def _shuffle(d: Draw, x: str) -> str:
    apart = d.node("Reshape", [x, d.constant_integers([0, 2, 4, 12, 10])])
    turned = d.node("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    return d.node("Reshape", [turned, d.constant_integers([0, 8, 12, 10])], 8)


def _tokens(d: Draw, x: str) -> str:
    flat = d.node("Reshape", [x, d.constant_integers([0, 8, -1])])
    tokens = d.node("Transpose", [flat], perm=[0, 2, 1])
    inner = d.node("Add", [d.node("MatMul", [tokens, d.random_constant(8, 6)]), d.random_constant(6)])
    name = d.node("MatMul", [d.node("Relu", [inner]), d.random_constant(6, 4)])
    d.channels[name] = 0
    return name


FREE: dict[str, tuple[Callable[[Draw, str], str], int]] = {
    "relu": (lambda d, x: d.node("Relu", [x]), 8),
    "leaky": (lambda d, x: d.node("LeakyRelu", [x], alpha=0.1), 8),
    "prelu": (lambda d, x: d.node("PRelu", [x, d.random_constant(8, 1, 1)]), 8),
    "clip at zero": (lambda d, x: d.node("Clip", [x, d.constant(0.0)]), 8),
    "max with zero": (lambda d, x: d.node("Max", [x, d.constant(0.0)]), 8),
    "max pooling": (lambda d, x: d.node("MaxPool", [x], kernel_shape=[3, 3]), 8),
    "resize": (lambda d, x: d.node("Resize", [x, "", d.constant([1, 1, 2, 2])], mode="nearest"), 8),
    "zero padding": (lambda d, x: d.node("Pad", [x, d.constant_integers([0, 0, 1, 1, 0, 0, 1, 1])]), 8),
    "constant factor": (lambda d, x: d.node("Mul", [x, d.random_constant(8, 1, 1)]), 8),
    "constant term": (lambda d, x: d.node("Add", [d.random_constant(1), x], 8), 8),
    "taken from a constant": (lambda d, x: d.node("Sub", [d.random_constant(8, 1, 1), x], 8), 8),
    "depthwise": (lambda d, x: d.conv(x, group=8, bias=True), 16),
    "grouped": (lambda d, x: d.node("Relu", [d.conv(x, group=2, bias=True)]), 16),
    "gate": (_gate, 8 + 3),
    "concat": (_concat, 8 + 5),
    "split": (_split, 8),
    "slice": (lambda d, x: d.slice(x, 2, 7, 5), 8),
    "every other": (lambda d, x: d.slice(x, 0, 8, 4, step=2), 8),
    "backwards": (lambda d, x: d.slice(x, -1, -100, 8, step=-1), 8),
    "residual": (lambda d, x: d.sum(x, d.conv(d.node("Relu", [x]), bias=True)), 8),
    "transposed": (lambda d, x: d.transposed(x, 6, group=2), 8 + 6),
    "channel shuffle": (_shuffle, 8),
    "mean over the image": (lambda d, x: tail(d, d.node("ReduceMean", [x], axes=[2, 3], keepdims=0), 8), 8),
    "flat": (lambda d, x: tail(d, d.node("Flatten", [d.node("Relu", [x])]), 960, transposed=False), 8),
    "squeezed": (lambda d, x: tail(d, d.node("Squeeze", [d.pooled(x), d.constant_integers([-1, 2])]), 8), 8),
    "tokens": (_tokens, 8 + 6),
}


@pytest.mark.parametrize("name", FREE)
def test_channels_are_free_where_a_factor_passes(name: str) -> None:
    flow = assert_same(between(FREE[name][0], fixed_size=True))
    assert flow.count - len(flow.held) == FREE[name][1]


HELD: dict[str, Callable[[Draw, str], str]] = {
    "Sigmoid": lambda d, x: d.node("Mul", [x, d.node("Sigmoid", [x])]),
    "HardSwish": lambda d, x: d.node("HardSwish", [x]),
    "Clip": lambda d, x: d.node("Clip", [x, d.constant(0.0), d.constant(6.0)]),
    "Max": lambda d, x: d.node("Max", [x, d.constant(0.5)]),
    "Softmax": lambda d, x: d.node("Softmax", [x], axis=1),
    "Pad": lambda d, x: d.node("Pad", [x, d.constant_integers([0, 0, 1, 1, 0, 0, 1, 1]), d.constant(0.5)]),
    "Mul": lambda d, x: d.node("Mul", [x, x]),
    "ReduceMean": lambda d, x: d.node("Mul", [d.node("Relu", [x]), d.node("ReduceMean", [x], axes=[1])]),
    "Div": lambda d, x: d.node("Div", [d.constant(1.0), d.node("Exp", [x])], 8),
    "output t0": lambda d, x: x,
}


@pytest.mark.parametrize("reason", HELD)
def test_channels_that_something_sees_as_they_are_stay(reason: str) -> None:
    model = between(HELD[reason])
    if reason.startswith("output"):
        model.graph.output.append(onnx.helper.make_tensor_value_info("t0", onnx.TensorProto.FLOAT, ["n", 8, "h", "w"]))
    flow = assert_same(model)
    ids = flow.tensors["t0"]
    expected = "Exp" if reason == "Div" else reason
    assert {flow.held.get(int(i), "free") for i in ids.ravel()} == {expected}


def test_reshape_that_may_move_channels_holds_them() -> None:
    """(n, 8, h, w) → (-1, 8, 8): where the second axis is as long as before, the elements may be others."""
    model = between(lambda d, x: d.node("Reshape", [x, d.constant_integers([-1, 8, 8, 1])], 8))
    flow = find_flow(GraphView(model))
    assert {flow.held.get(int(i)) for i in flow.tensors["t0"].ravel()} == {"Reshape"}


def test_weight_that_two_layers_share_is_rescaled_for_each() -> None:
    d = Draw()
    first = d.node("Relu", [d.conv("x", bias=True)])
    second = d.node("Conv", [first, *d.nodes[0].input[1:]], 8, pads=[1, 1, 1, 1])
    assert_same(d.model(d.conv(d.node("Relu", [second]))))


def test_groups_hold_together_what_layers_concatenations_and_sums_connect() -> None:
    d = Draw()
    first = d.node("Relu", [d.conv("x", 4)])
    other = d.node("Relu", [d.conv(first, 6)])
    both = d.node("Concat", [first, other], 10, axis=1)
    last = d.node("Relu", [d.conv(both, 3)])
    flow = find_flow(GraphView(d.model(d.conv(last, 2))))
    assert [len(group) for group in flow.groups()] == [10, 3]


CHOICES = [*FREE, "silu", "hard", "join"]


@given(st.lists(st.sampled_from(CHOICES), min_size=1, max_size=7), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_any_graph_computes_the_same_whatever_its_free_channels_are_divided_by(steps: list[str], seed: int) -> None:
    d = Draw(seed)
    made = [d.conv("x", bias=True)]
    for step in steps:
        x = made[(seed * 7 + len(made)) % len(made)]
        if step == "silu":
            made.append(d.node("Mul", [d.node("Sigmoid", [x]), x]))
        elif step == "hard":
            made.append(d.node("Clip", [x, d.constant(-1.0), d.constant(1.0)]))
        elif step == "join":
            made.append(d.sum(d.conv(x, 8, kernel=1, bias=True), d.conv(made[-1], 8, kernel=1)))
        elif d.channels[x] == 8 and step not in ("max pooling", "zero padding", "resize", "flat", "tokens", "squeezed"):
            name = FREE[step][0](d, x)
            if d.channels[name]:
                made.append(name)
    assert_same(d.model(d.conv(made[-1], 4, kernel=1)), seed)

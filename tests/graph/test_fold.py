"""Linear regions become fewer convolutions, equal at the borders, too; what would not be equal or not pay is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from repvgg_deploy.errors import ParityError
from repvgg_deploy.graph import edit, regions
from repvgg_deploy.graph.edit import resolve_sizes
from repvgg_deploy.graph.fold import fold_branches
from repvgg_deploy.graph.linear import Form
from tests.graph.make_blocks import BLOCKS, BORDERS, CHANNELS, Draw, make_block, make_border
from tests.graph.random_graphs import random_graph

OPERATORS = [
    *("conv", "half", "half pool", "point", "depthwise", "grouped", "bn"),
    *("pool", "scale", "shift", "add", "add", "sub", "relu"),
]
SIZES = ((1, 15, 14), (2, 9, 9), (1, 16, 20))


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """As it stands: ONNX Runtime 1.23 fuses a Pad with a pooling that has pads of its own, and refuses what it made."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def assert_equal(
    model: onnx.ModelProto, folded: onnx.ModelProto, *, sizes: Sequence[tuple[int, int, int]] = SIZES
) -> None:
    """Within 1e-5 of the largest value: float32 sums of at most a few hundred terms, added in another order."""
    onnx.checker.check_model(folded, full_check=True)
    for count, height, width in sizes:
        x = np.random.default_rng(3).standard_normal((count, CHANNELS, height, width)).astype(np.float32)
        for one, other in zip(run(model, x), run(folded, x), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * float(np.abs(one).max() + 1e-30))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_of_a_network_becomes_one_convolution(name: str) -> None:
    model = make_block(name)
    before = model.SerializeToString()
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Relu": 2, "Conv": 1} and model.SerializeToString() == before
    assert [one.kernel_after for one in report.folds] == [BLOCKS[name][1]] and report.left == ()
    assert report.folds[0].error < 2.0**-23 and report.folds[0].macs_after < report.folds[0].macs_before
    assert_equal(model, folded)


@pytest.mark.parametrize("name", BORDERS)
def test_border_that_holds_what_zeros_would_give_makes_a_diverse_branch_block_one_convolution(name: str) -> None:
    model = make_border(name)
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Relu": 2, "Conv": 1} and report.folds[0].branches == 4
    assert_equal(model, folded, sizes=[(1, 9, 10)])


def test_branch_whose_shapes_onnx_cannot_tell_is_folded_by_what_its_weights_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind such a border old exporters leave every size unknown, of pooling and BatchNorm, too."""
    model = make_border("scattered")
    hidden = {node.output[0] for node in model.graph.node if node.op_type in ("ScatterND", "AveragePool")}
    hidden |= {
        node.output[0] for node in model.graph.node if node.op_type == "BatchNormalization" and node.input[0] in hidden
    }
    shape = edit.GraphView.shape

    def forget(view: edit.GraphView, name: str) -> tuple[int | None, ...] | None:
        return (None,) * 4 if name in hidden else shape(view, name)

    monkeypatch.setattr(edit.GraphView, "shape", forget)
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Relu": 2, "Conv": 1} and report.left == ()
    assert_equal(model, folded, sizes=[(1, 9, 10)])


def test_sum_behind_a_border_that_cannot_be_computed_remains_with_its_reason() -> None:
    """The border's length is read from an image whose size varies."""
    model = make_border("scattered")
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "w"
    first = next(node for node in model.graph.node if node.op_type == "ScatterND")
    value = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == first.input[2]))[..., :1]
    constants = {"value": value, "three": np.array(3), "two": np.array([2]), "rest": np.array([1, 8, 1])}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "three"], ["width"]),
        helper.make_node("Add", ["width", "two"], ["length"]),
        helper.make_node("Concat", ["rest", "length"], ["wanted"], axis=0),
        helper.make_node("Expand", ["value", "wanted"], ["edge"]),
    ]
    first.input[2] = "edge"
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
    folded, report = fold_branches(model)
    assert kinds(folded)["Add"] > 1 and "a border that is overwritten" in report.left[0][1]
    assert_equal(model, folded, sizes=[(1, 9, 10)])


@pytest.mark.parametrize("name", BORDERS)
def test_border_of_other_values_is_left_alone(name: str) -> None:
    model = make_border(name, spoil=1e-3)
    folded, _ = fold_branches(model)
    assert kinds(folded)["Conv"] > 1
    assert_equal(model, folded, sizes=[(1, 9, 10)])


def test_result_that_is_folded_again_stays_as_it_is() -> None:
    once, _ = fold_branches(make_block("MobileOne depthwise"))
    twice, report = fold_branches(once)
    assert report.folds == () and twice.graph == once.graph


LEFT_ALONE = {
    "a spatial kernel before a padded one": lambda d, x: d.sum(d.conv(d.conv(x)), d.conv(x, kernel=1)),
    "a bias before padding": lambda d, x: d.sum(d.conv(d.conv(x, kernel=1, bias=True)), d.conv(x)),
    "pooling that does not count zeros": lambda d, x: d.sum(d.pool(x, count_include_pad=0), d.conv(x)),
    "pooling with ceil_mode": lambda d, x: d.sum(
        d.pool(x, 2, pads=[0] * 4, ceil_mode=1), d.conv(x, kernel=2, pads=[0] * 4)
    ),
    "a dense branch beside a large depthwise one": lambda d, x: d.sum(
        d.conv(x, kernel=1), d.conv(x, kernel=7, group=8)
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_sum_that_would_not_be_equal_or_not_pay_remains_with_its_reason(name: str) -> None:
    draw = Draw()
    model = draw.model(draw.node("Relu", [LEFT_ALONE[name](draw, "x")]))
    folded, report = fold_branches(model)
    assert kinds(folded) == kinds(model)
    ((tensor, reason),) = report.left
    assert tensor in draw.channels and len(reason) > 20
    assert_equal(model, folded)


def test_depthwise_part_folds_where_the_product_with_the_pointwise_one_would_not_pay() -> None:
    draw = Draw()
    token = draw.bn(draw.sum(draw.conv_bn("x", group=8), draw.conv("x", kernel=1, group=8), "x"))
    model = draw.model(draw.conv_bn(token, 16, kernel=1))
    folded, report = fold_branches(model)
    assert [one.kernel_after for one in report.folds] == ["3×3 depthwise", "1×1"]
    assert_equal(model, folded)


def test_some_branches_fold_together_and_the_others_are_added() -> None:
    draw = Draw()
    model = draw.model(
        draw.sum(draw.conv_bn("x", kernel=1), draw.conv_bn("x", kernel=7, group=8), draw.conv_bn("x", group=8))
    )
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Conv": 2, "Add": 1}
    assert sorted(one.kernel_after for one in report.folds) == ["1×1", "7×7 depthwise"]
    assert_equal(model, folded)


def test_tensor_that_is_an_output_or_read_elsewhere_is_still_made() -> None:
    draw = Draw()
    inner = draw.conv_bn("x")
    model = draw.model(draw.sum(inner, draw.conv_bn("x", kernel=1)), inner, draw.node("Sigmoid", [draw.bn(inner)]))
    folded, _ = fold_branches(model)
    assert [value.name for value in folded.graph.output] == [value.name for value in model.graph.output]
    assert_equal(model, folded)


def test_weights_that_two_convolutions_share_stay_right() -> None:
    draw = Draw()
    first = draw.conv("x")
    second = draw.node("Conv", [first, draw.nodes[0].input[1]], pads=[1] * 4)
    model = draw.model(draw.node("Relu", [draw.sum(draw.bn(first), "x")]), draw.node("Relu", [draw.bn(second)]))
    folded, _ = fold_branches(model)
    assert_equal(model, folded)


def test_weights_behind_an_identity_are_constants_and_stay_where_a_convolution_stays() -> None:
    draw = Draw()
    shared = draw.node("Identity", [draw.random_constant(8, 8, 1, 1)], 8)
    first = draw.node("Conv", ["x", shared])
    last = draw.node("Conv", [draw.node("Relu", [draw.sum(first, draw.bn("x"))]), shared])
    model = draw.model(draw.node("Relu", [last]))
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Conv": 2, "Relu": 2, "Identity": 1} and len(report.folds) == 1
    assert_equal(model, folded)


def test_gate_in_a_sum_is_no_branch_that_remains() -> None:
    draw = Draw()
    gate = draw.node("Mul", ["x", draw.node("Sigmoid", ["x"])])
    model = draw.model(draw.sum("x", gate))
    assert fold_branches(model)[1].left == ()


def test_sum_of_a_tensor_with_itself_and_differences_are_right() -> None:
    draw = Draw()
    conv = draw.conv("x")
    model = draw.model(draw.node("Sub", [draw.node("Neg", [draw.node("Add", [conv, conv])]), draw.conv("x", kernel=1)]))
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Conv": 1} and len(report.folds) == 1
    assert_equal(model, folded)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_is_read(auto: str) -> None:
    draw = Draw()
    plain, other = (draw.conv("x", kernel=n, auto_pad=auto, pads=[0] * 4) for n in (3, 3))
    for node in draw.nodes:
        del node.attribute[[a.name for a in node.attribute].index("pads")]
    model = draw.model(draw.sum(plain, other))
    folded, _ = fold_branches(model)
    assert kinds(folded) == {"Conv": 1}
    assert_equal(model, folded)


def test_batch_normalisation_of_training_is_no_constant() -> None:
    draw = Draw()
    name = draw.conv_bn("x")
    draw.nodes[-1].attribute.append(helper.make_attribute("training_mode", 1))
    model = draw.model(name)
    assert fold_branches(model)[0].graph.node == model.graph.node


@st.composite
def linear_graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Random operators on random tensors made before, two strides of them; only tensors of one size are added."""
    graph = Draw(draw(st.integers(0, 2**16)))
    halvings = {"x": 0}
    for _ in range(draw(st.integers(2, 8))):
        x = draw(st.sampled_from(list(halvings)))
        other = draw(st.sampled_from([name for name, count in halvings.items() if count == halvings[x]]))
        kind = draw(st.sampled_from(OPERATORS))
        name = {
            "conv": lambda x=x: graph.conv(x, bias=draw(st.booleans())),
            "half": lambda x=x: graph.conv(x, kernel=draw(st.sampled_from([1, 3])), strides=[2, 2]),
            "half pool": lambda x=x: graph.pool(x, strides=[2, 2]),
            "point": lambda x=x: graph.conv(x, kernel=1, bias=draw(st.booleans())),
            "depthwise": lambda x=x: graph.conv(x, group=8, dilations=[draw(st.integers(1, 2))] * 2),
            "grouped": lambda x=x: graph.conv(x, kernel=(1, 3), group=draw(st.sampled_from([2, 4]))),
            "bn": lambda x=x: graph.bn(x),
            "pool": lambda x=x: graph.pool(x),
            "scale": lambda x=x: graph.node("Mul", [x, graph.random_constant(8, 1, 1)]),
            "shift": lambda x=x: graph.node("Sub", [graph.random_constant(1, 8, 1, 1), x], 8),
            "add": lambda x=x, other=other: graph.node("Add", [x, other]),
            "sub": lambda x=x, other=other: graph.node("Sub", [x, other]),
            "relu": lambda x=x: graph.node("Relu", [x]),
        }[kind]()
        halvings[name] = halvings[x] + kind.startswith("half")
    names = list(halvings)
    return graph.model(names[-1], *draw(st.lists(st.sampled_from(names[1:-1]), max_size=1)))


@settings(max_examples=60)
@given(linear_graphs())
def test_random_graph_is_equal_after_folding_and_never_costs_more(model: onnx.ModelProto) -> None:
    folded, report = fold_branches(model)
    assert all(one.macs_after <= one.macs_before for one in report.folds)
    assert_equal(model, folded)


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_random_graph_of_any_geometry_is_equal_and_folded_at_once(seed: int) -> None:
    model, size = random_graph(seed)
    folded, report = fold_branches(model)
    assert all(one.macs_after <= one.macs_before for one in report.folds)
    assert_equal(model, folded, sizes=[(2, *size[1:])])
    assert fold_branches(folded)[1].folds == ()


@pytest.mark.parametrize("deepest", [1, 3])
@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_random_graph_deeper_than_is_looked_at_together_is_equal(deepest: int, seed: int) -> None:
    model, size = random_graph(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_DEEPEST", deepest)
        assert_equal(model, fold_branches(model)[0], sizes=[(2, *size[1:])])


def test_hundreds_of_linear_operators_in_a_row_are_folded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of all of them at once would need more calls in one another than Python allows."""
    monkeypatch.setattr(regions, "_DEEPEST", 16)
    draw = Draw()
    x = draw.conv("x", kernel=1)
    for _ in range(1100):
        x = draw.node("Neg", [x])
    model = draw.model(draw.conv(x, kernel=1))
    folded, report = fold_branches(model)
    assert report.folds and len(folded.graph.node) < len(model.graph.node)
    assert_equal(model, folded)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [15, 16, 17])
def test_automatic_padding_of_a_stride_is_that_of_the_known_size(auto: str, size: int) -> None:
    """As TensorFlow's exporters write it: its padding on a map of another size is another."""
    draw = Draw()
    name = draw.conv("x", strides=[2, 2], auto_pad=auto)
    del draw.nodes[-1].attribute[[a.name for a in draw.nodes[-1].attribute].index("pads")]
    model = draw.model(draw.node("Relu", [draw.bn(name)]))
    assert kinds(fold_branches(model)[0])["BatchNormalization"] == 1  # of an unknown size it stays
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    folded, _ = fold_branches(model)
    assert kinds(folded) == {"Conv": 1, "Relu": 1}
    assert_equal(model, folded, sizes=[(1, size, size)])


def test_sum_of_one_tensor_is_that_tensor() -> None:
    draw = Draw()
    model = draw.model(draw.node("Relu", [draw.node("Sum", [draw.conv_bn("x")])]))
    folded, _ = fold_branches(model)
    assert kinds(folded) == {"Conv": 1, "Relu": 1}
    assert_equal(model, folded)


def test_nodes_that_lead_to_no_output_hold_nothing() -> None:
    draw = Draw()
    branch = draw.conv_bn("x")
    draw.node("Sigmoid", [branch])
    model = draw.model(draw.node("Relu", [draw.sum(branch, draw.conv("x", kernel=1))]))
    folded, report = fold_branches(model)
    assert kinds(folded) == {"Conv": 1, "Relu": 1} and len(report.folds) == 1
    assert_equal(model, folded)


def test_convolutions_of_another_type_than_float32_stay() -> None:
    draw = Draw()
    wide = draw.node("Cast", ["x"], to=onnx.TensorProto.DOUBLE)
    total = draw.node("Add", [draw.bn(draw.conv(wide)), draw.pool(draw.node("Neg", [wide]))])
    for tensor in draw.constants:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    model = draw.model(draw.node("Cast", [total], to=onnx.TensorProto.FLOAT))
    folded, report = fold_branches(model)
    assert folded.graph.node == model.graph.node and report.folds == ()


def test_sum_without_a_convolution_is_no_branch_that_remains() -> None:
    draw = Draw()
    conv = draw.conv("x")
    twice = draw.node("Add", [conv, conv])
    model = draw.model(twice, draw.node("Relu", [draw.sum("x", draw.bn("x"))]), conv)
    folded, report = fold_branches(model)
    assert report.left == ()
    assert_equal(model, folded)


MUTATIONS = {
    "a sign": lambda kernel, bias: (-kernel, bias),
    "a shifted kernel": lambda kernel, bias: (np.roll(kernel, 1, axis=3), bias),
    "a dropped branch": lambda kernel, bias: (kernel * (np.arange(9).reshape(3, 3) != 4), bias),
    "a wrong border": lambda kernel, bias: (kernel * (np.arange(9).reshape(3, 3) > 2), bias),
    "a bias of one channel": lambda kernel, bias: (kernel, bias + np.eye(len(bias))[0]),
    "one weight off by 1e-5": lambda kernel, bias: (
        kernel + 1e-5 * (np.arange(kernel.size) == 0).reshape(kernel.shape),
        bias,
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_fold_that_is_wrong_is_refused(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = regions.add

    def spoiled(forms: list[Form]) -> Form:
        form = honest(forms)
        assert isinstance(form, Form)
        return replace(form, weights=lambda: MUTATIONS[mutation](*form.weights()))

    monkeypatch.setattr(regions, "add", spoiled)
    model = make_block("RepVGG")
    with pytest.raises(ParityError, match="differs from its region"):
        fold_branches(model)


def test_half_of_the_channels_by_a_computed_size_is_known() -> None:
    """As a chunk is exported: Slice up to Div(Gather(Shape))."""
    draw = Draw()
    integers = {"zero": [0], "one": 1, "two": [2], "first": [1]}
    draw.constants += [numpy_helper.from_array(np.array(value), name) for name, value in integers.items()]
    channels = draw.node("Gather", [draw.node("Shape", [draw.node("Relu", ["x"])]), "one"])
    half = draw.node("Div", [draw.node("Unsqueeze", [channels, "zero"]), "two"])
    x = draw.node("Slice", [draw.nodes[0].output[0], "zero", half, "first"], 4)
    model = draw.model(draw.node("Relu", [draw.sum(draw.conv_bn(x), x)]))
    assert fold_branches(model)[1].left[0][1] == "the number of channels of a branch is not known"
    folded, report = fold_branches(resolve_sizes(model))
    assert kinds(folded) == {"Relu": 2, "Slice": 1, "Conv": 1} and report.left == ()
    assert_equal(model, folded)

"""Operators that are no convolution of one tensor say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from repvgg_deploy.graph.edit import GraphView
from repvgg_deploy.graph.linear import Axis, Form, add, chain, identity, padding, read_operator, scaling
from tests.graph.make_blocks import Draw

HALF = replace(identity(8), rows=Axis((0,), 2), columns=Axis((0,), 2))
SHORTER = replace(identity(8), rows=Axis((0, 1), 1, -2))


@pytest.mark.parametrize(
    ("forms", "reason"),
    [
        ([identity(8), HALF], "different strides"),
        ([identity(8), SHORTER], "outputs of different size"),
        ([identity(8), replace(identity(8), out_channels=1)], "one channel"),
    ],
)
def test_forms_that_cannot_be_added_say_why(forms: list[Form], reason: str) -> None:
    found = add(forms)
    assert isinstance(found, str) and reason in found


def test_border_of_other_values_than_zeros_would_give_is_no_convolution() -> None:
    first = scaling(np.ones(8), np.arange(8.0))
    same, other = (chain(first, padding(8, (1, 1), (1, 1), np.arange(8.0) + shift)) for shift in (0, 1))
    assert isinstance(same, Form) and isinstance(other, str) and "border" in other


REFUSED: dict[str, tuple[Callable[[Draw], str], str]] = {
    "weights of the input": (lambda d: d.node("Conv", ["x", "x"], 8), "weights are no constants"),
    "one dimension": (lambda d: d.node("Conv", ["x", d.random_constant(8, 8, 3)], 8), "no convolution of images"),
    "a dilated pooling": (lambda d: d.pool("x", 3, dilations=[2, 2], pads=[0] * 4), "dilated"),
    "statistics of the input": (
        lambda d: d.node("BatchNormalization", ["x", *[d.random_constant(8)] * 3, "x"]),
        "statistics are no constants",
    ),
    "padding with ones": (
        lambda d: d.node("Pad", ["x", d.constant([0, 0, 1, 1, 0, 0, 1, 1]), d.constant(1.0)]),
        "something else than zeros",
    ),
    "padding of the batch": (lambda d: d.node("Pad", ["x", d.constant([1, 0, 0, 0, 0, 0, 0, 0])]), "pads the batch"),
    "a constant image": (lambda d: d.node("Mul", ["x", d.random_constant(1, 1, 5, 5)]), "varies over the image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operator_that_is_no_convolution_says_why(name: str) -> None:
    draw = Draw()
    make, reason = REFUSED[name]
    view = GraphView(draw.model(make(draw)))
    found = read_operator(view, view.nodes[-1])
    assert isinstance(found, str) and reason in found


def test_operator_of_another_kind_or_domain_or_of_two_inputs_is_none() -> None:
    draw = Draw()
    draw.node("Div", [draw.constant(1.0), "x"], 8)
    draw.node("Mul", ["x", "x"])
    view = GraphView(draw.model(draw.node("Relu", ["x"])))
    assert [read_operator(view, node) for node in view.nodes] == [None, None, None]
    assert read_operator(view, helper.make_node("Conv", ["x", "w"], ["y"], domain="com.example")) is None

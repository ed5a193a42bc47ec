"""One scale for what meets in a Concat, as far as the outputs bear it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from repvgg_deploy.precision.int8 import FAST, quantize_graph
from repvgg_deploy.precision.metrics import Judge
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.qdq import find_meetings, find_requantized, insert_pairs
from repvgg_deploy.precision.round_network import Prepared
from repvgg_deploy.precision.share import MOST_LOST_DB, share_scales
from tests.precision.make_graph import GRAPHS, Network, draw
from tests.precision.make_quantized import input_ranges


def prepare(model: onnx.ModelProto) -> Prepared:
    """Scales of the largest values."""
    scales = {name: float(np.float32(value.max() / 127)) for name, value in input_ranges(model, draw(16)).items()}
    return Prepared(read_network(model), scales)


def paired(prepared: Prepared) -> onnx.ModelProto:
    return insert_pairs(prepared.network, prepared.scales)


def _unlike(factor: float) -> onnx.ModelProto:
    """A map that a layer reads, and a Concat for another; what it meets there is so many times as large."""
    n = Network(seed=7)
    x = n.layer("x", 8)
    large = n.node("Mul", [n.layer(x, 8), n.constant(factor)])
    both = n.node("Concat", [x, large], 16, axis=1)
    return n.finish(n.layer(x, 4, ""), n.layer(both, 4, ""))


def test_tensors_that_meet_get_the_largest_of_their_scales_where_the_outputs_bear_it() -> None:
    before = prepare(GRAPHS["neck"]())
    groups = find_meetings(before.network)
    after = share_scales(before, draw(16, seed=3))
    assert len(groups) == 1 and len(groups[0]) == 3
    assert {after.scales[name] for name in groups[0]} == {max(before.scales[name] for name in groups[0])}
    others = set(before.scales) - set(groups[0])
    assert all(after.scales[name] == before.scales[name] for name in others)
    assert len(find_requantized(paired(before))) == 1 and find_requantized(paired(after)) == ()
    judge = Judge(before.network, draw(16, seed=3))
    own, found = (judge.compare(paired(each)).outputs for each in (before, after))
    assert all(one.sqnr_db - other.sqnr_db < MOST_LOST_DB for one, other in zip(own, found, strict=True))


@pytest.mark.parametrize(("factor", "remaining"), [(0.5, 0), (60.0, 1)])
def test_tensor_keeps_a_pair_for_each_reader_where_one_scale_costs_too_much(factor: float, remaining: int) -> None:
    """Within a sixtieth of another's range a map has two bits: what reads it alone would lose most of it."""
    model = _unlike(factor)
    graph, report = quantize_graph(model, draw(16), dataclasses.replace(FAST, equalize=None))
    found = [node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert len(report.requantized) == remaining
    assert sorted(report.requantized) == sorted(name for name in set(found) if found.count(name) > 1)
    assert Judge(read_network(model), draw(16)).compare(graph).sqnr_db > 25


def test_groups_that_can_share_do_where_all_together_cannot() -> None:
    n = Network(seed=8)
    x = n.layer("x", 8)
    y = n.layer(x, 8)
    near = n.layer(n.node("Concat", [y, n.layer(y, 8)], 16, axis=1), 8)
    large = n.node("Mul", [n.layer(near, 8), n.constant(200.0)])
    far = n.layer(n.node("Concat", [x, large], 16, axis=1), 4, "")
    before = prepare(n.finish(n.layer(x, 4, ""), near, far))
    done: list[tuple[int, int]] = []
    after = share_scales(before, draw(16), progress=lambda *steps: done.append(steps))
    assert len(find_meetings(before.network)) == 2
    assert len(find_requantized(paired(before))) == 2
    assert find_requantized(paired(after)) == (x,)
    assert done == [(1, 3), (2, 3), (3, 3), (3, 3)]


def test_split_moves_integers_where_all_that_reads_its_parts_has_one_scale() -> None:
    n = Network(seed=9)
    left = n.node("Split", [n.layer("x", 16), n.constant_integers([8, 8])], axis=1)
    n.nodes[-1].output.append("right")
    n.channels |= {left: 8, "right": 8}
    inner = n.node("Mul", [n.layer("right", 8), n.constant(0.5)])
    both = n.node("Concat", [left, "right", inner], 24, axis=1)
    before = prepare(n.finish(n.layer(both, 4, "")))
    after = share_scales(before, draw(16))
    for prepared, op_type in ((before, "Relu"), (after, "DequantizeLinear")):
        graph = paired(prepared)
        made_by = {name: node.op_type for node in graph.graph.node for name in node.output}
        (split,) = (node for node in graph.graph.node if node.op_type == "Split")
        assert made_by[split.input[0]] == op_type
    assert find_requantized(paired(after)) == ()


def test_chain_has_nothing_to_share_and_nothing_is_measured() -> None:
    n = Network(seed=9)
    prepared = prepare(n.finish(n.layer(n.layer("x", 8), 4, "")))
    assert share_scales(prepared, []) is prepared


def test_saved_scales_are_shared_as_they_were() -> None:
    model = _unlike(0.5)
    graph, report = quantize_graph(model, draw(16), FAST)
    again, other = quantize_graph(model, draw(16), FAST, saved=report.scales)
    scales = [
        {t.name: numpy_helper.to_array(t).tolist() for t in each.graph.initializer if t.name.endswith(".scale")}
        for each in (graph, again)
    ]
    assert scales[0] == scales[1]
    assert report.requantized == other.requantized == ()

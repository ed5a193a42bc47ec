"""In what precision the layers of a graph compute, read from what their weights are stored as. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .onnx_file import GraphSummary

_NAMES = {"float32": "fp32", "float16": "fp16", "int8": "int8"}
_ORDER = ("int8", "fp16", "fp32")


@dataclass(frozen=True, slots=True)
class WeightedNode:
    """A convolution or classifier.

    Attributes:
        name: Of the node, or of its output where it has none.
        op_type: `Conv` or `Gemm`.
        weight_shape: Of its weight, behind a DequantizeLinear, too; None where it is not stored.
        precision: `int8` (behind a DequantizeLinear), `fp16` or `fp32`; else the stored type.
    """

    name: str
    op_type: str
    weight_shape: tuple[int, ...] | None
    precision: str


def weighted_nodes(graph: GraphSummary) -> tuple[WeightedNode, ...]:
    """The layers of a graph, in order."""
    producers = {name: node for node in graph.nodes for name in node.outputs}
    result = []
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        producer = producers.get(weight)
        if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs:
            weight = producer.inputs[0]
        kind = graph.types.get(weight, "unknown")
        result.append(WeightedNode(node.name or node.outputs[0], node.op_type, graph.initializers.get(weight), _NAMES.get(kind, kind)))
    return tuple(result)


def graph_precision(nodes: Iterable[WeightedNode]) -> Literal["fp32", "fp16", "int8"]:
    """What a graph is typed as: the lowest precision that any of its layers computes in."""
    found = {node.precision for node in nodes}
    return "int8" if "int8" in found else "fp16" if "fp16" in found else "fp32"


def precision_of(row: str, nodes: Iterable[WeightedNode]) -> str | None:
    """The precision of a row of the layer table: `stage1.0`, `stage1.0.se`, `linear`; None where no node is its."""
    if row.endswith(".se"):
        block = row.removesuffix("se")
        found = {node.precision for node in nodes if node.name.startswith(block) and node.name != f"{block}conv"}
    else:
        found = {node.precision for node in nodes if node.name in (row, f"{row}.conv")}
    return "+".join(sorted(found)) or None


def describe_shares(counts: Iterable[tuple[str, int]], what: str) -> str:
    """`int8 97.1 %, fp16 2.9 % of the multiply-accumulates`, or the one precision there is.

    Args:
        counts: Precision and how much computes in it.
        what: What is counted.
    """
    totals = share_by_precision(counts)
    if len(totals) <= 1:
        return next(iter(totals), "unknown")
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in totals.items()) + f" of the {what}"


def share_by_precision(counts: Iterable[tuple[str, int]]) -> dict[str, float]:
    """By precision, the lowest first: its share, 0 to 1."""
    totals: dict[str, int] = {}
    for name, count in counts:
        totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    whole = sum(totals.values())
    return {name: totals[name] / whole for name in names} if whole else {}


def count_weights(node: WeightedNode) -> int:
    """Numbers in its weight."""
    return math.prod(node.weight_shape or (0,))

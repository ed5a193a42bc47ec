"""What the layers of a plan compute in, as TensorRT's layer inspector says, against what the graph is typed as."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BuildError
from ..files.onnx import GraphSummary, weighted_nodes

_TOLERATED_SHARE = 0.05
"""The stem, which reads three channels, may be computed in a wider type: this share of the work at most."""
_LEAST_SEEN = 0.5
_WIDTH = {"int8": 0, "fp8": 0, "fp16": 1, "bf16": 1, "fp32": 2}
_PATTERNS = (
    ("int8", r"int8|\bi8\b"),
    ("fp8", r"fp8|float8"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half|float16"),
    ("fp32", r"fp32|float"),
)
_SHOWN = 3
_COPIES = ("Reformat", "NoOp")
"""Kinds of layers that compute nothing. Their names hold those of their neighbours."""


@dataclass(frozen=True, slots=True)
class WeightedLayer:
    """A convolution or classifier of the graph.

    Attributes:
        name: Name of its node.
        precision: What the graph is typed as: `int8`, `fp8`, `fp16` or `fp32`.
        macs: Multiply-accumulates of one image.
    """

    name: str
    precision: str
    macs: int


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """What a plan computes in.

    Attributes:
        shares: Share of the multiply-accumulates that were seen, 0 to 1, by precision.
        seen: Share of all multiply-accumulates whose precision the inspector gave, 0 to 1.
        fallen: Layers that compute in a wider type than the graph says: name, wanted, found.
        fallen_share: Their share of all multiply-accumulates, 0 to 1.
    """

    shares: dict[str, float]
    seen: float
    fallen: tuple[tuple[str, str, str], ...]
    fallen_share: float

    @property
    def inspected(self) -> bool:
        """Whether enough was seen to judge."""
        return self.seen >= _LEAST_SEEN

    @property
    def precision(self) -> str:
        """What most is computed in."""
        return max(self.shares, key=lambda name: self.shares[name])


def weigh_layers(graph: GraphSummary, shapes: Mapping[str, tuple[int, ...]]) -> tuple[WeightedLayer, ...]:
    """The layers with weights and their work; `shapes` are by tensor, as TensorRT found them."""
    outputs = {node.name or node.outputs[0]: node.outputs[0] for node in graph.nodes}
    result = []
    for node in weighted_nodes(graph):
        place = shapes.get(outputs[node.name], ())[2:] if node.op_type == "Conv" else ()
        macs = math.prod(node.weight_shape or ()) * math.prod(max(size, 1) for size in place)
        result.append(WeightedLayer(node.name, node.precision, macs))
    return tuple(result)


def read_layers(*texts: str) -> dict[str, str]:
    """The precision that each ONNX node computes in, from the inspector's JSON. Nodes without one are left out.

    One text for each optimization profile; a text may also speak of several.

    Both shapes of the JSON are read: TensorRT up to 10 ends with the list `Bindings`, 11 with the objects
    `I/O Tensors`. A plan without detailed verbosity has names only, and so no precision. Of a node in several layers
    the widest type counts.

    Raises:
        BuildError: It is neither.
    """
    found: dict[str, str] = {}
    for layer in (layer for text in texts for layer in _read(text)):
        precision = _layer_precision(layer) if isinstance(layer, Mapping) else None
        if precision is not None:
            for node in _node_names(str(layer.get("Name", "")), str(layer.get("Metadata", ""))):
                if _WIDTH[precision] >= _WIDTH[found.get(node, precision)]:
                    found[node] = precision
    return found


def _read(text: str) -> list[Any]:
    """The layers."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise _not_understood(str(error)) from error
    layers = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(layers, list) or not {"Bindings", "I/O Tensors"} & set(data):
        raise _not_understood(f"expected Layers, and Bindings or I/O Tensors, found {text[:80]!r}")
    return layers


def _not_understood(why: str) -> BuildError:
    return BuildError(
        f"the layer inspector's answer is not understood: {why}",
        remedy="please report this with the version of TensorRT",
    )


def _layer_precision(layer: Mapping[str, Any]) -> str | None:
    if layer.get("LayerType") in _COPIES or str(layer.get("Name", "")).startswith("Reformatting CopyNode"):
        return None
    # What the layer reads is what it computes in: integer weights that meet floats are no INT8. With dynamic shapes the
    # inspector may not say it.
    weights = layer.get("Weights")
    stated = _kind(weights.get("Type")) if isinstance(weights, Mapping) else None
    return _input_kind(layer.get("Inputs")) or stated or _tactic_kind(str(layer.get("TacticName", "")))


def _input_kind(inputs: Any) -> str | None:
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not inputs or not isinstance(inputs[0], Mapping):
        return None
    first = inputs[0]
    return _kind(first.get("Format/Datatype", first.get("Datatype", first.get("Format"))))


def _kind(text: Any) -> str | None:
    lowered = str(text or "").lower()
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, lowered)), None)


def _tactic_kind(tactic: str) -> str | None:
    found = re.search(r"(?:fprop|gemm|conv)\w*?_(i8i8|f16f16|f32f32|tf32tf32|bf16bf16)", tactic.lower())
    return None if found is None else {"i8": "int8", "f1": "fp16", "bf": "bf16"}.get(found[1][:2], "fp32")


def _node_names(name: str, metadata: str) -> frozenset[str]:
    """`a.conv + a.relu [profile 1]` and `[ONNX Layer: a.conv]` → `a.conv` and so on."""
    name = re.sub(r"\s*\[profile \d+\]", "", name)
    parts = {part.strip() for part in re.split(r" \+ |\|\|", name)}
    inner = {match for part in parts for match in re.findall(r"(?:PWN|fused)\(([^()]+)\)", part)}
    stated = {match.strip() for match in re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata)}
    return frozenset({*parts, *inner, *stated})


def measure(found: Mapping[str, str], weighted: Sequence[WeightedLayer]) -> PrecisionReport:
    """What the layers with weights compute in, by share of the multiply-accumulates; `found` is from `read_layers`."""
    total = sum(wanted.macs for wanted in weighted) or 1
    seen = [wanted for wanted in weighted if wanted.name in found]
    sums: dict[str, int] = {}
    for wanted in seen:
        sums[found[wanted.name]] = sums.get(found[wanted.name], 0) + wanted.macs
    fallen = [wanted for wanted in seen if _WIDTH[found[wanted.name]] > _WIDTH.get(wanted.precision, 2)]
    counted = sum(sums.values()) or 1
    return PrecisionReport(
        {name: count / counted for name, count in sums.items()},
        sum(sums.values()) / total,
        tuple((wanted.name, wanted.precision, found[wanted.name]) for wanted in fallen),
        sum(wanted.macs for wanted in fallen) / total,
    )


def require_honest(report: PrecisionReport, library: str) -> None:
    """Refuses a plan that computes in a wider type than its graph says.

    Raises:
        BuildError: More of the multiply-accumulates than the stem's have fallen back.
    """
    if not report.inspected or report.fallen_share <= _TOLERATED_SHARE:
        return
    shown = ", ".join(f"{name} ({wanted} asked, {found} built)" for name, wanted, found in report.fallen[:_SHOWN])
    more = f" and {len(report.fallen) - _SHOWN} more" if len(report.fallen) > _SHOWN else ""
    raise BuildError(
        f"{library} fell back: {report.fallen_share:.1%} of the multiply-accumulates compute in a wider type "
        f"than the graph says: {shown}{more}",
        remedy="this GPU may lack fast kernels of that type: build --fp16 in place of --int8, or without a precision "
        "flag; or use another TensorRT",
    )

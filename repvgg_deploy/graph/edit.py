"""An ONNX graph as it is read and edited: who makes a tensor, who reads it, what is constant, how many channels it has.

`GraphView` never changes its graph: `rebuild` writes a new one from a list of nodes. Below are copies of whole models
with other weights; the two functions called `set_` alone change what they are given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

_MOST_NUMBERS = 1024  # sizes, axes and the like that decide shapes are far shorter
_OF_SIZES = ("Add", "Sub", "Mul", "Div", "Concat", "Unsqueeze", "Squeeze", "Cast")


@dataclass(frozen=True, slots=True)
class Border:
    """A padding with constants.

    Attributes:
        data: The tensor that is padded.
        before: Rows above and columns to the left.
        after: Rows below and columns to the right.
        values: float64 (C,), what the border holds.
        inner: Tensors between data and result, which nothing else reads.
    """

    data: str
    before: tuple[int, int]
    after: tuple[int, int]
    values: NDArray[np.float64]
    inner: frozenset[str]


class GraphView:
    """A model's main graph with its lookups.

    Args:
        model: Not changed, and not to be changed while the view is used.

    Attributes:
        nodes: In topological order, as ONNX demands.
        made_by: By the name of a tensor, the node that makes it.
        readers: By the name of a tensor, the nodes that read it, once each; subgraphs of If and Loop count.
        kept: Tensors that must exist whatever is folded: the graph's outputs, and what subgraphs read.
        borders: By their results, paddings with constants; `border.find_borders` finds them.
        channels: Of tensors that are images whatever ONNX can tell of their shape; `regions.Regions` fills it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.made_by = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.borders: dict[str, Border] = {}
        self.channels: dict[str, int] = {}
        self.kept = {value.name for value in graph.output}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
            self.kept.update(read_in_subgraphs(node))
        self._inputs = {value.name for value in graph.input}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        constants = self._initializers.keys() - self._inputs
        values = {name: value for name, value in infer_values(model).items() if name not in constants}
        self._shapes = {name: shape for name, value in values.items() if (shape := _shape(value)) is not None}
        self._types = {name: value.type.tensor_type.elem_type for name, value in values.items()}
        self._names = itertools.count()
        self._taken = set(self.made_by) | set(self._initializers) | self._inputs

    def constant(self, name: str) -> NDArray[np.float64] | None:
        """A floating-point constant in float64; None for all else."""
        array = self.raw_constant(name)
        return None if array is None or array.dtype.kind != "f" else array.astype(np.float64)

    def raw_constant(self, name: str) -> NDArray[np.generic] | None:
        """A constant of any type as it is stored, or None."""
        tensor = self.stored(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def stored(self, name: str) -> onnx.TensorProto | None:
        """A constant whose numbers are not read yet, also behind an Identity, with which exporters share it; or None.

        An initializer that is also an input may be replaced by the caller: it is none.
        """
        if name in self._initializers:
            return None if name in self._inputs else self._initializers[name]
        node = self.made_by.get(name)
        if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor: onnx.TensorProto = node.attribute[0].t
            return tensor
        return self.stored(node.input[0]) if node is not None and node.op_type == "Identity" else None

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """A tensor's shape, None for a dynamic dimension; None where the rank is not known."""
        return self._shapes.get(name)

    def may_be_float32(self, name: str) -> bool:
        """Whether a tensor is float32, or ONNX cannot tell."""
        return self._types.get(name, 0) in (TensorProto.UNDEFINED, TensorProto.FLOAT)

    def new_name(self, near: str) -> str:
        """A name that no tensor has, made of another."""
        while (name := f"{near}.folded{next(self._names) or ''}") in self._taken:
            pass
        self._taken.add(name)
        return name

    def rebuild(self, nodes: Sequence[onnx.NodeProto], added: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
        """A model of other nodes, in any order. What leads to no output, and constants that nobody reads, go.

        Args:
            nodes: All that is to remain, and what is new.
            added: New initializers.
        """
        makers = {output: node for node in nodes for output in node.output if output}
        ordered: list[onnx.NodeProto] = []
        done: set[int] = set()
        stack: list[tuple[onnx.NodeProto, bool]] = []
        wanted = [value.name for value in self.model.graph.output]
        for name in wanted:
            if name in makers:
                stack.append((makers[name], False))
            while stack:
                node, ready = stack.pop()
                if id(node) in done:
                    continue
                if ready:
                    done.add(id(node))
                    ordered.append(node)
                    continue
                stack.append((node, True))
                needs = [*node.input, *read_in_subgraphs(node)]
                stack.extend(
                    (makers[need], False) for need in reversed(needs) if need in makers and id(makers[need]) not in done
                )
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        del copy.graph.node[:]
        del copy.graph.initializer[:]
        del copy.graph.value_info[:]
        copy.graph.node.extend(ordered)
        read = {name for node in ordered for name in [*node.input, *read_in_subgraphs(node)]} | set(wanted)
        copy.graph.initializer.extend(t for t in (*self._initializers.values(), *added) if t.name in read)
        return copy


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, as Python values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def drop_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without nodes that lead to no output: as readers, they would hold tensors that nobody needs."""
    wanted = {value.name for value in model.graph.output}
    read: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            read.append(node)
            wanted.update((*node.input, *read_in_subgraphs(node)))
    if len(read) == len(model.graph.node):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(reversed(read))
    return copy


def sum_stacks(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a Sum where tensors were stacked only to be summed or averaged over the stack.

    Unsqueeze of each → Concat → ReduceSum or ReduceMean, all along one axis: `torch.stack(…).sum(…)` of branches.
    """
    if not any(node.op_type in ("ReduceSum", "ReduceMean") for node in model.graph.node):
        return model
    view = GraphView(model)
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    for node in view.nodes:
        parts = _stacked(view, node)
        if not parts:
            nodes.append(node)
            continue
        result = node.output[0]
        total = view.new_name(result) if node.op_type == "ReduceMean" else result
        nodes.append(onnx.helper.make_node("Sum", parts, [total], name=node.name))
        if total != result:
            factor = view.new_name(result)
            added.append(numpy_helper.from_array(np.array(1 / len(parts), np.float32), factor))
            nodes.append(onnx.helper.make_node("Mul", [total, factor], [result], name=total))
    if nodes == view.nodes:
        return model
    summed = view.rebuild(nodes, added)
    summed.graph.value_info.extend(model.graph.value_info)  # what the exporter knew of shapes
    return summed


def _stacked(view: GraphView, node: onnx.NodeProto) -> list[str]:
    """The float32 tensors that a node sums or averages after they were stacked; none for any other node."""
    if node.op_type not in ("ReduceSum", "ReduceMean") or int(attributes(node).get("keepdims", 1)):
        return []
    concat = view.made_by.get(node.input[0])
    if concat is None or concat.op_type != "Concat" or not view.may_be_float32(node.output[0]):
        return []
    stacked = [view.made_by.get(name) for name in concat.input]
    axis = _axes(view, node)
    if axis != [int(attributes(concat)["axis"])] or axis[0] < 0:
        return []
    if not all(part is not None and part.op_type == "Unsqueeze" and _axes(view, part) == axis for part in stacked):
        return []
    return [part.input[0] for part in stacked if part is not None]


def _axes(view: GraphView, node: onnx.NodeProto) -> list[int] | None:
    """The constant axes of a node: an attribute of old operator sets, an input of new ones."""
    given = attributes(node).get("axes")
    array = view.raw_constant(node.input[1]) if given is None and len(node.input) > 1 else given
    return None if array is None else [int(axis) for axis in np.ravel(array)]


def resolve_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with integers that follow from known sizes as constants.

    Exporters cut a tensor into halves by the size of its shape, and ONNX's own inference does not follow that.
    """
    while True:
        view = GraphView(model)
        known: dict[str, NDArray[np.generic]] = {}
        for node in view.nodes:
            value = _evaluate_sizes(view, node, known)
            if value is not None and node.op_type not in ("Constant", "Identity"):
                known[node.output[0]] = value
        if not known:
            return model
        added = [numpy_helper.from_array(np.asarray(value), name) for name, value in known.items()]
        model = view.rebuild([node for node in view.nodes if node.output[0] not in known], added)


def _evaluate_sizes(
    view: GraphView, node: onnx.NodeProto, known: dict[str, NDArray[np.generic]]
) -> NDArray[np.generic] | None:
    """What a node of integers gives, if that is known; of a shape, one of its sizes."""
    maker = view.made_by.get(node.input[0]) if node.input else None
    constants = [known[name] if name in known else view.raw_constant(name) for name in node.input]
    if node.op_type == "Gather" and maker is not None and maker.op_type == "Shape" and not maker.attribute:
        shape, index = view.shape(maker.input[0]), constants[1]
        size = shape[int(index.reshape(-1)[0])] if shape is not None and index is not None and index.size == 1 else None
        return None if size is None or index is None else np.full(index.shape, size, np.int64)
    if node.op_type not in _OF_SIZES or len(node.output) != 1 or not constants:
        return None
    arrays = {name: value for name, value in zip(node.input, constants, strict=True) if value is not None}
    if len(arrays) != len(set(node.input)) or any(value.dtype.kind != "i" for value in arrays.values()):
        return None
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, a.shape) for n, a in arrays.items()]
    result = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.INT64, None)
    graph = onnx.helper.make_graph([node], "sizes", inputs, [result])
    alone = onnx.helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=view.model.ir_version)
    found = np.asarray(ReferenceEvaluator(alone).run(None, arrays)[0])  # type: ignore[index]
    return found if found.dtype.kind == "i" else None


def read_in_subgraphs(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the branches of an If, or the body of a Loop or Scan, read or give."""
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []), *attribute.graphs]:
            for inner in graph.node:
                yield from inner.input
                yield from read_in_subgraphs(inner)
            yield from (value.name for value in graph.output)


def infer_values(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Type, and shape as far as ONNX can tell, of every tensor that is no large constant.

    Of weights the shapes alone are handed to ONNX, which copies all that it is given.
    """
    lean = onnx.ModelProto(ir_version=model.ir_version)
    lean.opset_import.extend(model.opset_import)
    lean.functions.extend(model.functions)
    source, graph = model.graph, lean.graph
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    given = {value.name for value in source.input}
    for tensor in source.initializer:
        if math.prod(tensor.dims) <= _MOST_NUMBERS:
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    found = shape_inference.infer_shapes(lean).graph
    return {value.name: value for value in (*found.input, *found.value_info, *found.output)}


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    """A tensor's shape, None for a dynamic dimension; None where ONNX cannot tell its rank."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set; 0 where the graph names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def set_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> None:
    """Adds initializers, or changes their values, in place: copying a large model for each layer would be slow."""
    there = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in weights.items():
        tensor = there[name] if name in there else model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replaces the nodes of a graph in place; the new ones may be its own."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def copy_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, weights and all."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def replace_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy with other values of some initializers, by name; those that the graph does not have are added."""
    result = copy_without(model, weights)
    set_weights(result, weights)
    return result


def copy_without(model: onnx.ModelProto, names: Container[str]) -> onnx.ModelProto:
    """A copy without some initializers, which are never copied.

    What is deleted from a message keeps its memory until the whole message goes, and weights are most of a model.
    """
    result = onnx.ModelProto()
    _copy_fields(model, result, leave_out="graph")
    _copy_fields(model.graph, result.graph, leave_out="initializer")
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    return result


def _copy_fields(source: Any, target: Any, *, leave_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == leave_out:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)

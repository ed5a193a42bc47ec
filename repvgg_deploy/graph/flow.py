"""Which channels of a graph must share a factor, so that all of them can be rescaled and the graph computes the same.

Every channel of every tensor belongs to a *variable*: a positive number by which its values may be divided. ReLU,
pooling, Resize, Concat, Split, Slice and the like give their output the variables of their input; a sum makes those of
its terms one; a layer with weights starts new ones, because its rows can be divided by the new and its columns
multiplied by the old. Whatever else reads a tensor sees its true values and holds its variables at 1.

Source: Nagel et al. 2019, arXiv:1906.04721 (cross-layer equalization), of which this is the form for any graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .edit import GraphView, attributes

Ids = NDArray[np.int64]
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
_GATES = ("Sigmoid", "HardSigmoid", "Softmax", "Clip", "Tanh")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True, slots=True, eq=False)
class LayerFlow:
    """A node with constant weights between two sets of variables.

    Attributes:
        node: Conv, ConvTranspose, Gemm, or MatMul whose second operand is constant.
        groups: Of a convolution; 1 for the others.
        source: Variables of its input channels, (in,).
        result: Variables of its output channels, (out,).
    """

    node: onnx.NodeProto
    groups: int
    source: Ids
    result: Ids


@dataclass(frozen=True, slots=True, eq=False)
class ChannelFlow:
    """The variables of a graph.

    Attributes:
        count: Of variables; they are numbered from 0.
        tensors: By name, the variable of each element: of the tensor's rank, 1 along axes on which it does not change.
        weighted: In the order of the graph.
        shifts: Nodes that add a constant to a tensor: the node, which input the constant is, the tensor's variables.
        held: By variable, why it must stay 1.
    """

    count: int
    tensors: dict[str, Ids]
    weighted: tuple[LayerFlow, ...]
    shifts: tuple[tuple[onnx.NodeProto, int, Ids], ...]
    held: dict[int, str]

    def groups(self) -> list[Ids]:
        """The free variables, those together that one layer's output, a Concat or a sum connects; in graph order."""
        sets = _Sets(self.count)
        for layer in self.weighted:
            sets.join(layer.result, np.full_like(layer.result, layer.result[0]))
        for ids in self.tensors.values():
            sets.join(ids.ravel(), np.full(ids.size, ids.flat[0]))
        found: dict[int, list[int]] = {}
        for variable in range(self.count):
            if variable not in self.held:
                found.setdefault(sets.root(variable), []).append(variable)
        return [np.array(members, np.int64) for members in found.values()]


def find_flow(view: GraphView) -> ChannelFlow:
    """Follows every channel through the graph.

    Args:
        view: Of an FP32 graph. A tensor whose shape is not known is held at 1 wherever the shape matters.
    """
    return _Reader(view).read()


class _Sets:
    """Disjoint sets of variables."""

    def __init__(self, count: int = 0) -> None:
        self._parent = list(range(count))

    def new(self, count: int) -> Ids:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, variable: int) -> int:
        while self._parent[variable] != variable:
            self._parent[variable] = self._parent[self._parent[variable]]
            variable = self._parent[variable]
        return variable

    def join(self, one: Ids, other: Ids) -> None:
        """Makes the variables at each position one; the first to come is the set's root."""
        pairs = np.stack([part.ravel() for part in np.broadcast_arrays(one, other)], axis=1)
        for a, b in np.unique(pairs, axis=0).tolist():
            first, second = sorted((self.root(a), self.root(b)))
            self._parent[second] = first

    def roots(self) -> Ids:
        """Of every variable."""
        return np.array([self.root(variable) for variable in range(len(self._parent))], np.int64)


class _Reader:
    """Gives every tensor its variables, node by node."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._sets = _Sets()
        self._held: dict[int, str] = {}
        self._tensors: dict[str, Ids] = {}
        self._weighted: list[LayerFlow] = []
        self._shifts: list[tuple[onnx.NodeProto, int, Ids]] = []
        same = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs")
        self._readers: dict[str, Callable[[onnx.NodeProto], Ids | list[Ids] | None]] = {
            **dict.fromkeys(same, self._same),
            **dict.fromkeys(_POOLS, self._pool),
            **dict.fromkeys(_REDUCTIONS, self._reduce),
            **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), self._layer),
            **dict.fromkeys(("Add", "Sub", "Sum"), self._sum),
            **dict.fromkeys(("Mul", "Div"), self._product),
            **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), self._reshape),
            "Clip": self._clip,
            "Max": self._at_least_zero,
            "Cast": self._cast,
            "Resize": self._resize,
            "Pad": self._pad,
            "Concat": self._concat,
            "Split": self._split,
            "Slice": self._slice,
            "Transpose": self._transpose,
        }

    def read(self) -> ChannelFlow:
        """The whole graph."""
        for node in self._view.nodes:
            self._read(node)
        outputs = {value.name for value in self._view.model.graph.output}
        for name in self._view.kept:
            if name in self._tensors:
                self._hold(self._tensors[name], f"output {name}" if name in outputs else f"a subgraph reads {name}")
        roots = self._sets.roots()
        order, numbers = np.unique(roots, return_inverse=True)
        held: dict[int, str] = {}
        for variable, reason in self._held.items():
            held.setdefault(int(numbers[variable]), reason)
        weighted = [LayerFlow(one.node, one.groups, numbers[one.source], numbers[one.result]) for one in self._weighted]
        shifts = [(node, index, numbers[ids]) for node, index, ids in self._shifts]
        tensors = {name: numbers[ids] for name, ids in self._tensors.items()}
        return ChannelFlow(len(order), tensors, tuple(weighted), tuple(shifts), held)

    def _read(self, node: onnx.NodeProto) -> None:
        if all(not name or self._view.raw_constant(name) is not None for name in node.input) and node.input:
            return  # made of constants alone: whoever reads it finds no variables, and holds its own
        found = self._readers[node.op_type](node) if self._passes(node) else None
        if found is None:
            for name in node.input:
                if name in self._tensors:
                    self._hold(self._tensors[name], node.op_type)
            found = [self._fresh_held(name, node.op_type) for name in node.output]
        for name, ids in zip(node.output, found if isinstance(found, list) else [found], strict=False):
            self._tensors[name] = ids

    def _passes(self, node: onnx.NodeProto) -> bool:
        return node.op_type in self._readers and node.domain in ("", "ai.onnx")

    def _of(self, name: str) -> Ids:
        """The variables of a tensor that is no constant; an input of the graph shows its true values."""
        if name not in self._tensors:
            self._tensors[name] = self._fresh_held(name, "input of the graph")
        return self._tensors[name]

    def _fresh_held(self, name: str, reason: str) -> Ids:
        ids = self._sets.new(1).reshape((1,) * len(self._view.shape(name) or (1,)))
        self._hold(ids, reason)
        return ids

    def _hold(self, ids: Ids, reason: str) -> None:
        for variable in np.unique(ids).tolist():
            self._held.setdefault(variable, reason)

    def _is_constant(self, name: str) -> bool:
        return self._view.raw_constant(name) is not None

    def _integers(self, node: onnx.NodeProto, name: str, index: int) -> list[int] | None:
        """An attribute of older opsets that became an input; None where neither is there, or it is no constant."""
        value = attributes(node).get(name)
        if value is None and len(node.input) > index and node.input[index]:
            constant = self._view.raw_constant(node.input[index])
            value = None if constant is None else constant.ravel().tolist()
        return None if value is None else [int(item) for item in value]

    # -- one input, the same channels

    def _same(self, node: onnx.NodeProto) -> Ids | None:
        """Further inputs, as a slope, must not follow the image."""
        others = (name for name in node.input[1:] if name)
        return self._of(node.input[0]) if all(map(self._is_constant, others)) else None

    def _clip(self, node: onnx.NodeProto) -> Ids | None:
        """Only the Clip that is a ReLU."""
        named = attributes(node)
        low, high = named.get("min"), named.get("max")
        if len(node.input) > 1 and node.input[1]:
            low = self._view.constant(node.input[1])
        has_end = high is not None or (len(node.input) > 2 and bool(node.input[2]))
        return self._of(node.input[0]) if low is not None and not np.any(low) and not has_end else None

    def _at_least_zero(self, node: onnx.NodeProto) -> Ids | None:
        """Max of a tensor and zero."""
        constants = [self._view.constant(name) for name in node.input]
        if len(constants) != 2 or (constants[0] is None) == (constants[1] is None):
            return None
        index = 1 if constants[1] is not None else 0
        zero = constants[index]
        return self._of(node.input[1 - index]) if zero is not None and zero.size == 1 and not np.any(zero) else None

    def _cast(self, node: onnx.NodeProto) -> Ids | None:
        return self._of(node.input[0]) if attributes(node)["to"] in _FLOATS else None

    def _pool(self, node: onnx.NodeProto) -> Ids | list[Ids] | None:
        ids = self._of(node.input[0])
        if any(size != 1 for size in ids.shape[2:]):
            return None
        return [ids, *(self._fresh_held(name, "positions") for name in node.output[1:])]

    def _reduce(self, node: onnx.NodeProto) -> Ids | None:
        ids, axes = self._of(node.input[0]), self._integers(node, "axes", 1)
        if axes is None:
            return None
        axes = [axis % ids.ndim for axis in axes]
        if any(ids.shape[axis] != 1 for axis in axes):
            return None
        return ids if attributes(node).get("keepdims", 1) else ids.reshape(_without(ids.shape, axes))

    def _resize(self, node: onnx.NodeProto) -> Ids | None:
        ids, named = self._of(node.input[0]), attributes(node)
        before, after = self._view.shape(node.input[0]), self._view.shape(node.output[0])
        if named.get("coordinate_transformation_mode") == b"tf_crop_and_resize" or before is None or after is None:
            return None
        changing = [axis for axis, size in enumerate(ids.shape) if size != 1]
        return ids if all(before[axis] == after[axis] is not None for axis in changing) else None

    def _pad(self, node: onnx.NodeProto) -> Ids | None:
        ids, pads = self._of(node.input[0]), self._integers(node, "pads", 1)
        axes = self._integers(node, "axes", 3)
        if axes is None and len(node.input) > 3 and node.input[3]:
            return None
        axes = list(range(ids.ndim)) if axes is None else [axis % ids.ndim for axis in axes]
        if pads is None or any(pads[i] or pads[i + len(axes)] for i, axis in enumerate(axes) if ids.shape[axis] != 1):
            return None
        value: Any = attributes(node).get("value", 0.0)
        if len(node.input) > 2 and node.input[2]:
            value = self._view.constant(node.input[2])
        is_zero = value is not None and not np.any(value)
        return ids if is_zero or attributes(node).get("mode", b"constant") != b"constant" else None

    # -- several inputs or outputs

    def _sum(self, node: onnx.NodeProto) -> Ids | None:
        """Terms must be divided alike; a constant term is divided as the others are."""
        constants = [index for index, name in enumerate(node.input) if self._is_constant(name)]
        terms = [self._of(name) for name in node.input if not self._is_constant(name)]
        if len(constants) > 1 or (constants and self._view.constant(node.input[constants[0]]) is None):
            return None
        rank = max(term.ndim for term in terms)
        terms = [term.reshape((1,) * (rank - term.ndim) + term.shape) for term in terms]
        for term in terms[1:]:
            self._sets.join(terms[0], term)
        found = np.broadcast_arrays(*terms)[0]
        for index in constants:
            constant = self._view.raw_constant(node.input[index])
            assert constant is not None
            found = found.reshape((1,) * max(0, constant.ndim - found.ndim) + found.shape)
            self._shifts.append((node, index, found))
        return found

    def _product(self, node: onnx.NodeProto) -> Ids | None:
        """A constant factor lets a scale pass, and so does a gate, which shows its true values itself."""
        one, other = node.input[:2]
        constants = [index for index, name in enumerate(node.input) if self._is_constant(name)]
        if constants:
            constant = self._view.raw_constant(node.input[constants[0]])
            assert constant is not None
            if node.op_type == "Div" and constants == [0]:
                return None
            ids = self._of(node.input[1 - constants[0]])
            return ids.reshape((1,) * max(0, constant.ndim - ids.ndim) + ids.shape)
        if one == other:
            return None
        if node.op_type == "Mul" and self._is_gate(one) and not self._is_gate(other):
            one, other = other, one
        gate = self._of(other)
        self._hold(gate, "Div" if node.op_type == "Div" else "it multiplies another tensor")
        passed = self._of(one)
        return passed.reshape((1,) * max(0, gate.ndim - passed.ndim) + passed.shape)

    def _is_gate(self, name: str) -> bool:
        node = self._view.made_by.get(name)
        return node is not None and node.op_type in _GATES

    def _concat(self, node: onnx.NodeProto) -> Ids | None:
        if any(self._is_constant(name) for name in node.input):
            return None
        parts = [self._of(name) for name in node.input]
        if len({part.ndim for part in parts}) > 1:
            return None
        axis = attributes(node)["axis"] % parts[0].ndim
        if all(part.shape[axis] == 1 for part in parts) and axis != 1:
            for part in parts[1:]:
                self._sets.join(parts[0], part)
            return np.broadcast_arrays(*parts)[0]
        full = []
        for name, part in zip(node.input, parts, strict=True):
            size = (self._view.shape(name) or (None,) * part.ndim)[axis]
            if part.shape[axis] == 1 and size is None:
                return None
            full.append(np.repeat(part, size, axis) if part.shape[axis] == 1 and size is not None else part)
        others = np.broadcast_shapes(*(_without(part.shape, [axis]) for part in full))
        shapes = [(*others[:axis], part.shape[axis], *others[axis:]) for part in full]
        return np.concatenate([np.broadcast_to(p, shape) for p, shape in zip(full, shapes, strict=True)], axis)

    def _split(self, node: onnx.NodeProto) -> list[Ids] | None:
        ids = self._of(node.input[0])
        axis = attributes(node).get("axis", 0) % ids.ndim
        if ids.shape[axis] == 1:
            return [ids] * len(node.output)
        sizes = [(self._view.shape(name) or (None,) * ids.ndim)[axis] for name in node.output]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or sum(known) != ids.shape[axis]:
            return None
        return np.split(ids, np.cumsum(known)[:-1].tolist(), axis)

    def _slice(self, node: onnx.NodeProto) -> Ids | None:
        ids = self._of(node.input[0])
        starts, ends = self._integers(node, "starts", 1), self._integers(node, "ends", 2)
        axes, steps = self._integers(node, "axes", 3), self._integers(node, "steps", 4)
        unknown = [i for i, found in ((3, axes), (4, steps)) if found is None and len(node.input) > i and node.input[i]]
        if 3 in unknown or (axes is None and starts is None):
            return None
        axes = list(range(len(starts or []))) if axes is None else [axis % ids.ndim for axis in axes]
        changing = [i for i, axis in enumerate(axes) if ids.shape[axis] != 1]
        if not changing:
            return ids
        if starts is None or ends is None or unknown:
            return None
        for i in changing:
            step = steps[i] if steps else 1
            stop = None if step < 0 and ends[i] < -ids.shape[axes[i]] else ends[i]
            ids = ids.take(range(*slice(starts[i], stop, step).indices(ids.shape[axes[i]])), axes[i])
        return ids

    def _transpose(self, node: onnx.NodeProto) -> Ids:
        ids = self._of(node.input[0])
        return np.transpose(ids, attributes(node).get("perm", range(ids.ndim)[::-1]))

    def _reshape(self, node: onnx.NodeProto) -> Ids | None:
        """Where it is known which elements go where: behind axes that stay, before a last one that stays, or all."""
        ids = self._of(node.input[0])
        before, after = self._view.shape(node.input[0]), self._view.shape(node.output[0])
        if before is None or after is None or len(before) != ids.ndim or not after:
            return None
        changing = [axis for axis, size in enumerate(ids.shape) if size != 1]
        last = max(changing, default=-1)
        if changing == [ids.ndim - 1] and before[-1] == after[-1] is not None:
            return ids.reshape((*(1,) * (len(after) - 1), ids.shape[-1]))
        inner, outer = ([size or 0 for size in shape[1:]] for shape in (before, after))
        is_known = 0 not in (*inner, *outer) and math.prod(inner) == math.prod(outer)
        if not (is_known or self._keeps_first(node, before[0], after[0])):
            return None
        alike = [True, *(a == b is not None for a, b in zip(before[1:], after[1:], strict=False))]
        if last < len(alike) and all(alike[: last + 1]):
            return ids.reshape((*ids.shape[: last + 1], *(1,) * (len(after) - last - 1)))
        if not is_known or ids.shape[0] != 1:
            return None
        return _shrink(np.broadcast_to(ids, (1, *inner)).reshape((1, *outer)))

    def _keeps_first(self, node: onnx.NodeProto, before: int | None, after: int | None) -> bool:
        """Whether the first axis stays as it is, its size known or not."""
        if node.op_type == "Flatten":
            return bool(attributes(node).get("axis", 1) == 1)
        if node.op_type == "Reshape":
            shape = self._view.raw_constant(node.input[1])
            copied = shape is not None and shape.size > 0 and shape.flat[0] == 0
            return (copied and not attributes(node).get("allowzero", 0)) or before == after is not None
        axes = self._integers(node, "axes", 1)
        longer = node.input[0] if node.op_type == "Squeeze" else node.output[0]
        rank = len(self._view.shape(longer) or ())
        return axes is not None and rank > 0 and all(axis % rank for axis in axes)

    # -- layers with weights

    def _layer(self, node: onnx.NodeProto) -> Ids | None:
        weight = self._view.constant(node.input[1])
        biased = len(node.input) > 2 and bool(node.input[2])
        if weight is None or self._is_constant(node.input[0]) or (biased and not self._is_constant(node.input[2])):
            return None
        named, kind, shape = attributes(node), node.op_type, weight.shape
        groups = int(named.get("group", 1))
        if kind in ("Gemm", "MatMul"):
            if weight.ndim != 2 or named.get("transA", 0):
                return None
            inner, outer = shape[::-1] if named.get("transB", 0) else shape
        else:
            inner, outer = (shape[0], shape[1] * groups) if kind == "ConvTranspose" else (shape[1] * groups, shape[0])
        ids = self._of(node.input[0])
        axis = ids.ndim - 1 if kind in ("Gemm", "MatMul") else 1
        if ids.ndim <= axis or any(size != 1 for i, size in enumerate(ids.shape) if i != axis):
            return None
        source = np.broadcast_to(ids.ravel(), (inner,)) if ids.size in (1, inner) else None
        if source is None:
            return None
        result = self._sets.new(outer)
        self._weighted.append(LayerFlow(node, groups, source, result))
        rank = ids.ndim if kind in ("Gemm", "MatMul") else weight.ndim
        return result.reshape([outer if i == axis else 1 for i in range(rank)])


def _without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _shrink(ids: Ids) -> Ids:
    """Axes along which nothing changes are made 1 long."""
    for axis in range(ids.ndim):
        first = ids.take([0], axis)
        if np.array_equal(np.broadcast_to(first, ids.shape), ids):
            ids = first
    return ids

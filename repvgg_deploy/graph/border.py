"""Padding whose border is overwritten with one constant for each channel, however the exporter spelled it.

DBB makes a biased 1×1 convolution before a padded one exact by writing into the padding what the 1×1 gives for zeros.
In an ONNX that is a Pad and a chain of ScatterND, Transpose and Concat with indices made of shapes. Nothing of the
chain is interpreted: it is run, on numbers, and what it does to them is compared with a padding of constants.

Source: Ding et al. 2021, Diverse Branch Block, arXiv:2103.13425, appendix on padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .edit import Border, GraphView, attributes

Array = NDArray[np.generic]
_CHAIN = {"ScatterND", "ScatterElements", "Transpose", "Concat", "Identity"}
_ANY_SIZE = (7, 10)
_LONGEST = 24


def find_borders(view: GraphView) -> tuple[dict[str, Border], set[str]]:
    """By the result of each chain that pads with constants, what it is; and results of chains that may be such.

    What overwrites a padding with what cannot be computed here, such as sizes that vary, may be one.
    """
    found: dict[str, Border] = {}
    unread: set[str] = set()
    for node in view.nodes:
        readers = view.readers.get(node.output[0], []) if node.output else []
        if node.op_type in _CHAIN and not any(reader.op_type in _CHAIN for reader in readers):
            data = _walk_back(view, node)
            border = None if data is None else _run(view, data, node.output[0])
            if border is not None:
                found[node.output[0]] = border
            elif data is not None and "Scatter" in "".join(_kinds(view, node, data)):
                unread.add(node.output[0])
    return found, unread


def _kinds(view: GraphView, last: onnx.NodeProto, data: str) -> list[str]:
    """Operators of a chain, from its end to what it pads."""
    kinds, node = [last.op_type], last
    while data not in node.input:
        node = next(view.made_by[name] for name in node.input if not _is_filling(view, name))
        kinds.append(node.op_type)
    return kinds


def _walk_back(view: GraphView, last: onnx.NodeProto) -> str | None:
    """The tensor that a chain pads, found by the inputs that carry data; None where the chain pads nothing."""
    node, pads = last, False
    for _ in range(_LONGEST):
        carriers = [name for name in node.input if not _is_filling(view, name)]
        if node.op_type in ("Pad", "ScatterND", "ScatterElements"):
            carriers = carriers[:1]
        pads = pads or node.op_type in ("Pad", "Concat")
        if len(carriers) != 1:
            return None
        before = view.made_by.get(carriers[0])
        if node.op_type == "Pad" or before is None or before.op_type not in {*_CHAIN, "Pad"}:
            return carriers[0] if pads else None
        node = before
    return None


def _is_filling(view: GraphView, name: str) -> bool:
    """Whether a tensor is a constant, or one that was spread over a shape."""
    node = view.made_by.get(name)
    spread = node is not None and node.op_type in ("Expand", "Tile", "ConstantOfShape")
    return spread or view.stored(name) is not None


def _run(view: GraphView, data: str, result: str) -> Border | None:
    """What a chain does to random numbers, if that is a padding with constants."""
    shape = view.shape(data)
    if shape is None or len(shape) != 4 or shape[1] is None:
        return None
    full = (shape[0] or 1, shape[1], *(known or other for known, other in zip(shape[2:], _ANY_SIZE, strict=True)))
    extracted = _extract(view, data, result)
    if extracted is None:
        return None
    nodes, constants = extracted
    # What depends on the data, and not only on its shape elsewhere, must serve this chain alone.
    inside = {output for node in nodes for output in node.output}
    inner = (_after(view, data) & inside) - {result}
    if inner & view.kept or not all(r.output[0] in inside for name in inner for r in view.readers.get(name, [])):
        return None
    given = helper.make_tensor_value_info(data, onnx.TensorProto.FLOAT, full)
    made = helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "border", [given], [made], constants)
    model = helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=view.model.ir_version)
    x = np.random.default_rng(0).standard_normal((2, *full)).astype(np.float32)
    try:
        runs: list[Any] = [ReferenceEvaluator(model).run(None, {data: part}) for part in x]
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # what cannot be run is left alone
    return _compare(data, x, [np.asarray(run[0]) for run in runs], frozenset(inner))


def _compare(data: str, x: Array, found: list[Array], inner: frozenset[str]) -> Border | None:
    """The padding that makes both results of both images, if there is one."""
    first = np.argwhere((found[0][0, 0] == x[0, 0, 0, 0, 0]) & (found[1][0, 0] == x[1, 0, 0, 0, 0]))
    if found[0].ndim != 4 or len(first) != 1:
        return None
    (top, left), (height, width) = first[0].tolist(), x.shape[3:]
    bottom, right = found[0].shape[2] - height - top, found[0].shape[3] - width - left
    if min(top, left, bottom, right) < 0 or max(top, left, bottom, right) == 0:
        return None
    values = found[0][0, :, 0, 0] if top or left else found[0][0, :, -1, -1]
    for result, image in zip(found, x, strict=True):
        wanted = np.broadcast_to(values.reshape(1, -1, 1, 1), result.shape).copy()
        wanted[:, :, top : top + height, left : left + width] = image
        if not np.array_equal(result, wanted):
            return None
    return Border(data, (top, left), (bottom, right), values.astype(np.float64), inner)


def _after(view: GraphView, name: str) -> set[str]:
    """All tensors that depend on one."""
    found: set[str] = set()
    stack = [name]
    while stack:
        for reader in view.readers.get(stack.pop(), []):
            new = set(reader.output) - found
            found |= new
            stack += new
    return found


def _extract(view: GraphView, data: str, result: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]] | None:
    """Nodes and constants that lead from `data` to `result`; None where they read more than shapes and constants."""
    wanted: set[str] = set()
    constants: dict[str, onnx.TensorProto] = {}
    depends = _after(view, data)
    needed, seen = [result], {data, ""}
    while needed:
        name = needed.pop()
        if name in seen:
            continue
        seen.add(name)
        constant, node = view.raw_constant(name), view.made_by.get(name)
        if constant is None and node is not None and node.op_type == "Shape" and name not in depends:
            # The shape of a tensor elsewhere: its batch is that of `data`, and the rest must be known.
            dims = view.shape(node.input[0])
            named = attributes(node)
            part = None if dims is None else [dims[0] or 1, *dims[1:]][named.get("start", 0) : named.get("end")]
            constant = None if part is None or None in part else np.array(part, np.int64)
        if constant is not None:
            constants[name] = numpy_helper.from_array(np.asarray(constant), name)
        elif node is None or (node.op_type == "Shape" and name not in depends):
            return None
        else:
            wanted.update(node.output)
            needed += node.input
    return [node for node in view.nodes if wanted.intersection(node.output)], list(constants.values())

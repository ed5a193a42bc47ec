"""A fold computed beside the region that it replaces: in float64, operator by operator, by code that knows no forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .edit import Border, GraphView, attributes

Array = NDArray[np.float64]
TOLERANCE = 2.0**-22
"""Weights are rounded once to float32, an error of 2⁻²⁴ of each term; four times that is allowed."""


def measure_fold(
    view: GraphView,
    terms: Sequence[tuple[str, int]],
    source: str,
    *,
    folded: onnx.NodeProto,
    weights: tuple[Array, Array],
) -> float:
    """Largest difference of a convolution from the region it is to replace, as a share of the sum of absolute terms.

    Both run on a small map with every case of border and an inner position; its height ends in another phase of the
    stride than its width.

    Args:
        view: The original graph.
        terms: Tensors of the region, with a sign, whose sum the convolution gives.
        source: The region's source.
        folded: The convolution.
        weights: Its kernel and bias, as they are written.
    """
    kernel, bias = weights
    named = attributes(folded)
    strides, dilations, groups = (named[name] for name in ("strides", "dilations", "group"))
    extent = [(kernel.shape[2 + axis] - 1) * dilations[axis] + 1 for axis in (0, 1)]
    height, width = (extent[a] + strides[a] + a for a in (0, 1))
    x = np.random.default_rng(0).standard_normal((1, kernel.shape[1] * groups, height, width))
    plain, absolute = (_Run(view, source, array, absolute=array is not x) for array in (x, np.abs(x)))
    truth = sum(sign * plain.tensor(name) for name, sign in terms)
    scale = sum(absolute.tensor(name) for name, _ in terms)
    found = _convolve(folded, x, kernel, bias)
    if found.shape != np.shape(truth):
        return float("inf")
    return float(np.max(np.abs(found - truth) / np.maximum(scale, np.finfo(np.float32).tiny)))


class _Run:
    """A region on one input; with `absolute` the sums of the absolute values of its terms."""

    def __init__(self, view: GraphView, source: str, x: Array, *, absolute: bool) -> None:
        self._view, self._absolute = view, absolute
        self._known = {source: x}

    def tensor(self, name: str) -> Array:
        """The value of a tensor; made of the source, however deep the region is."""
        stack = [name]
        while stack:
            if stack[-1] in self._known:
                stack.pop()
                continue
            border = self._view.borders.get(stack[-1])
            if border is not None:
                if border.data in self._known:
                    self._known[stack.pop()] = self._surround(border)
                else:
                    stack.append(border.data)
                continue
            node = self._view.made_by[stack[-1]]
            missing = [i for i in node.input if i and i not in self._known and self._view.stored(i) is None]
            if missing:
                stack += missing
            else:
                self._known[stack.pop()] = self._compute(node)
        return self._known[name]

    def _compute(self, node: onnx.NodeProto) -> Array:
        value = [self._value(name) for name in node.input if name]
        kind = node.op_type
        if kind == "Conv":
            bias = value[2] if len(value) > 2 else np.zeros(len(value[1]))
            return _convolve(node, value[0], value[1], bias, size=self._size(node))
        if kind == "AveragePool":
            size = attributes(node)["kernel_shape"]
            kernel = np.full((value[0].shape[1], 1, *size), 1 / np.prod(size))
            return _convolve(node, value[0], kernel, np.zeros(len(kernel)), size=self._size(node))
        if kind == "BatchNormalization":
            scale, shift, mean, variance = (item.reshape(1, -1, 1, 1) for item in value[1:])
            factor = scale / np.sqrt(variance + float(attributes(node).get("epsilon", 1e-5)))
            return value[0] * factor + (shift + mean * factor if self._absolute else shift - mean * factor)
        if kind == "Pad":
            return _pad(self._view, node, value[0])
        if kind == "Neg":
            return value[0] if self._absolute else -value[0]
        if kind in ("Sub", "Sum", "Add"):
            if kind == "Sub" and not self._absolute:
                return value[0] - value[1]
            return np.asarray(sum(value[1:], value[0]))
        if kind == "Mul":
            return value[0] * value[1]
        if kind == "Div":
            return value[0] / value[1]
        assert kind == "Identity", kind
        return value[0]

    def _size(self, node: onnx.NodeProto) -> list[int] | None:
        """Height and width of what an operator reads in the network, by which `auto_pad` counts; None if dynamic."""
        sizes = [size for size in (self._view.shape(node.input[0]) or ())[2:] if size is not None]
        return sizes if len(sizes) == 2 else None

    def _surround(self, border: Border) -> Array:
        x, values = self._known[border.data], border.values.reshape(1, -1, 1, 1)
        (top, left), (bottom, right) = border.before, border.after
        size = (*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
        result: Array = np.broadcast_to(np.abs(values) if self._absolute else values, size).copy()
        result[:, :, top : size[2] - bottom, left : size[3] - right] = x
        return result

    def _value(self, name: str) -> Array:
        if name in self._known:
            return self._known[name]
        constant = np.asarray(self._view.raw_constant(name), np.float64)
        # A variance is no term: its root divides. Absolute values of all else.
        return np.abs(constant) if self._absolute else constant


def _convolve(
    node: onnx.NodeProto, x: Array, kernel: Array, bias: Array, *, size: Sequence[int] | None = None
) -> Array:
    named = attributes(node)
    groups = x.shape[1] // kernel.shape[1]
    strides, dilations = (tuple(named.get(name) or (1, 1)) for name in ("strides", "dilations"))
    extent = [(kernel.shape[2 + axis] - 1) * dilations[axis] + 1 for axis in (0, 1)]
    top, left, bottom, right = _window_pads(named, size or x.shape[2:], extent, strides)
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    height, width = ((x.shape[2 + axis] - extent[axis]) // strides[axis] + 1 for axis in (0, 1))
    seen = np.empty((*x.shape[:2], *kernel.shape[2:], height, width))
    for row, column in np.ndindex(*kernel.shape[2:]):
        shifted = x[:, :, row * dilations[0] :: strides[0], column * dilations[1] :: strides[1]]
        seen[:, :, row, column] = shifted[:, :, :height, :width]
    # A matrix product for each group.
    parts = kernel.reshape(groups, len(kernel) // groups, -1)
    product = parts @ seen.reshape(len(x), groups, parts.shape[2], height * width)
    return product.reshape(len(x), len(kernel), height, width) + bias.reshape(1, -1, 1, 1)


def _window_pads(
    named: dict[str, Any], size: Sequence[int], extent: Sequence[int], strides: Sequence[int]
) -> tuple[int, int, int, int]:
    auto = named.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [max((-(-size[a] // strides[a]) - 1) * strides[a] + extent[a] - size[a], 0) for a in (0, 1)]
        small, large = [value // 2 for value in total], [value - value // 2 for value in total]
        first, last = (small, large) if auto == b"SAME_UPPER" else (large, small)
        return first[0], first[1], last[0], last[1]
    pads = (0, 0, 0, 0) if auto == b"VALID" else named.get("pads") or (0, 0, 0, 0)
    top, left, bottom, right = pads
    return top, left, bottom, right


def _pad(view: GraphView, node: onnx.NodeProto, x: Array) -> Array:
    pads = np.asarray(view.raw_constant(node.input[1]))
    axes = view.raw_constant(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(x.ndim)
    widths = [(0, 0)] * x.ndim
    for index, axis in enumerate(np.asarray(axes)):
        widths[int(axis)] = (int(pads[index]), int(pads[index + len(np.asarray(axes))]))
    return np.pad(x, widths)

"""Linear operators of an ONNX graph as convolutions of one source, and their algebra: in sequence and in sum.

A `Form` says: output position i of channel o is Σ kernel[o, c, r] · source[c, i·stride + r] + bias[o], with zeros
outside the source. Rows and columns behave alike; their taps r are positions relative to i·stride, negative inside
the padding. Convolution, BatchNormalization in inference, average pooling with counted zeros, scaling, shifts and
zero padding have such a form. So have their sequences, where the second operator reads no padding that the first
would have filled with something else than zero, and their sums.

Source: Ding et al. 2021, RepVGG, arXiv:2101.03697; Ding et al. 2021, Diverse Branch Block, arXiv:2103.13425 (the six
transforms, of which these two rules are the general case).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from .edit import GraphView, attributes

Weights = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Kernel (out, in / groups, rows, columns), dense between the first tap and the last, and bias (out,)."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A form along one axis.

    Attributes:
        taps: Positions that are read, relative to the output's position times the stride; ascending.
        stride: In source pixels.
        end: Output size = ⌊(input size + end) / stride⌋ + 1.
    """

    taps: tuple[int, ...]
    stride: int = 1
    end: int = -1

    @property
    def span(self) -> int:
        """Pixels from the first tap to the last."""
        return self.taps[-1] - self.taps[0] + 1

    @property
    def step(self) -> int:
        """The largest dilation with which a kernel still reaches every tap."""
        return math.gcd(*(tap - self.taps[0] for tap in self.taps)) or 1

    @property
    def size(self) -> int:
        """Taps of a kernel of that dilation."""
        return (self.span - 1) // self.step + 1

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros before and after that a convolution needs."""
        before = -self.taps[0]
        return before, self.end + self.span - before


POINT = Axis((0,))


@dataclass(frozen=True, slots=True)
class Form:
    """A linear map from one tensor to another, as a convolution.

    Attributes:
        in_channels: How many the source has.
        out_channels: How many the result has.
        groups: As in ONNX; `in_channels` for what treats each channel alone.
        rows: Along the height.
        columns: Along the width.
        biased: Whether a constant may be added.
        weights: Makes kernel and bias; costly, so that plans are compared without.
        border: Of a padding: the constants that it writes, float64 (C,); None for zeros.
    """

    in_channels: int
    out_channels: int
    groups: int
    rows: Axis
    columns: Axis
    biased: bool
    weights: Callable[[], Weights]
    border: NDArray[np.float64] | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one output pixel."""
        return self.out_channels * (self.in_channels // self.groups) * self.rows.size * self.columns.size

    @property
    def area(self) -> int:
        """Source pixels for one output pixel."""
        return self.rows.stride * self.columns.stride

    @property
    def is_point(self) -> bool:
        """Whether it is a 1×1 convolution without padding, which gives its bias where its source is zero."""
        return all(axis.taps == (0,) and axis.pads == (0, 0) for axis in (self.rows, self.columns))

    @property
    def vanishes_outside(self) -> bool:
        """Whether it gives zeros beyond its output where its source is zero: a padded operator may follow."""
        return len(self.rows.taps) == 1 and len(self.columns.taps) == 1 and not self.biased


def identity(channels: int) -> Form:
    """A tensor as a map of itself."""
    return scaling(np.ones(channels), np.zeros(channels))


def scaling(factor: NDArray[np.float64], shift: NDArray[np.float64]) -> Form:
    """A factor and a shift for each channel."""
    channels = len(factor)
    weights = (factor.reshape(-1, 1, 1, 1), shift)
    return Form(channels, channels, channels, POINT, POINT, bool(np.any(shift)), lambda: weights)


def padding(channels: int, before: tuple[int, int], after: tuple[int, int], border: NDArray[np.float64] | None) -> Form:
    """Rows and columns of zeros, or of one constant for each channel, around an image."""
    rows, columns = (Axis((-first,), 1, first + last - 1) for first, last in zip(before, after, strict=True))
    return replace(identity(channels), rows=rows, columns=columns, border=border)


def chain(first: Form, second: Form) -> Form | str:
    """`second` applied to what `first` gives, or why that is no convolution of the source."""
    padded = any(axis.pads != (0, 0) for axis in (second.rows, second.columns))
    if second.border is not None:
        if not first.is_point or not np.allclose(first.weights()[1], second.border, rtol=1e-5, atol=1e-7):
            return "its border holds something else than what the operator before it would give for zeros"
    elif padded and not first.vanishes_outside:
        cause = "adds a constant" if first.biased else "is a spatial kernel"
        return f"a padded operator reads zeros where the one before it, which {cause}, would give something else"

    def weights() -> Weights:
        (_, a_bias), (b, b_bias) = first.weights(), second.weights()
        taps = b.sum((2, 3))  # what a constant input gives: no tap reads padding, or the constant is zero
        blocks = a_bias.reshape(second.groups, -1)
        shift = np.einsum("goi,gi->go", taps.reshape(second.groups, -1, taps.shape[1]), blocks).reshape(-1)
        kernel = _compose(first, second, math.gcd(first.groups, second.groups))
        return kernel, shift + b_bias

    return Form(
        first.in_channels,
        second.out_channels,
        math.gcd(first.groups, second.groups),
        _chain_axes(first.rows, second.rows),
        _chain_axes(first.columns, second.columns),
        first.biased or second.biased,
        functools.cache(weights),
    )


def add(forms: list[Form]) -> Form | str:
    """The sum of maps of one source, or why it is no convolution."""
    one = forms[0]
    for other in forms[1:]:
        if (one.rows.stride, one.columns.stride) != (other.rows.stride, other.columns.stride):
            return "the branches have different strides"
        if (one.rows.end, one.columns.end) != (other.rows.end, other.columns.end):
            return "the branches have outputs of different size"
        if one.out_channels != other.out_channels:
            return "a branch has one channel and is spread over all"
    groups = math.gcd(*(form.groups for form in forms))
    rows, columns = (
        replace(getattr(one, name), taps=tuple(sorted({tap for form in forms for tap in getattr(form, name).taps})))
        for name in ("rows", "columns")
    )

    def weights() -> Weights:
        kernel = np.zeros((one.out_channels, one.in_channels // groups, rows.span, columns.span))
        bias = np.zeros(one.out_channels)
        for form in forms:
            own, shift = form.weights()
            top, left = form.rows.taps[0] - rows.taps[0], form.columns.taps[0] - columns.taps[0]
            kernel[:, :, top : top + form.rows.span, left : left + form.columns.span] += _regroup(
                own, form.groups, groups
            )
            bias += shift
        return kernel, bias

    biased = any(form.biased for form in forms)
    return Form(one.in_channels, one.out_channels, groups, rows, columns, biased, functools.cache(weights))


def _chain_axes(first: Axis, second: Axis) -> Axis:
    taps = sorted({a + first.stride * b for a in first.taps for b in second.taps})
    return Axis(tuple(taps), first.stride * second.stride, first.end + first.stride * (1 + second.end))


def _regroup(kernel: NDArray[np.float64], groups: int, fewer: int) -> NDArray[np.float64]:
    """The same convolution written with fewer groups: zeros between the blocks that were apart."""
    if groups == fewer:
        return kernel
    out, width, rows, columns = kernel.shape
    ratio = groups // fewer
    result = np.zeros((fewer, ratio, out // groups, ratio, width, rows, columns))
    blocks = kernel.reshape(fewer, ratio, out // groups, width, rows, columns)
    for index in range(ratio):
        result[:, index, :, index] = blocks[:, index]
    return result.reshape(out, ratio * width, rows, columns)


def _compose(first: Form, second: Form, groups: int) -> NDArray[np.float64]:
    """The kernel of `second` after `first`; the stride of `first` spreads the taps of `second`."""
    a, b = first.weights()[0], second.weights()[0]
    row_stride, column_stride = first.rows.stride, first.columns.stride
    span = ((b.shape[2] - 1) * row_stride + a.shape[2], (b.shape[3] - 1) * column_stride + a.shape[3])
    if second.groups == second.in_channels == second.out_channels:  # a factor for each of the first's outputs

        def product(tap: NDArray[np.float64]) -> NDArray[np.float64]:
            return tap[:, 0, None, None, None] * a
    elif first.groups == first.in_channels == first.out_channels:  # and for each of the second's inputs
        per_input = a[:, 0].reshape(second.groups, 1, -1, *a.shape[2:])

        def product(tap: NDArray[np.float64]) -> NDArray[np.float64]:
            blocks = tap.reshape(second.groups, -1, tap.shape[1], 1, 1)
            return (blocks * per_input).reshape(len(tap), tap.shape[1], *a.shape[2:])
    else:
        a, b = _regroup(a, first.groups, groups), _regroup(b, second.groups, groups)
        flat = a.reshape(groups, a.shape[0] // groups, -1)

        def product(tap: NDArray[np.float64]) -> NDArray[np.float64]:
            return (tap.reshape(groups, -1, tap.shape[1]) @ flat).reshape(len(tap), *a.shape[1:])

    result = np.zeros((len(b), first.in_channels // groups, *span))
    for row in range(b.shape[2]):
        for column in range(b.shape[3]):
            top, left = row * row_stride, column * column_stride
            result[:, :, top : top + a.shape[2], left : left + a.shape[3]] += product(b[:, :, row, column])
    return result


def read_operator(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str | None:
    """A node of one data input as that input's name and its form.

    Returns:
        A text says why an operator of a linear kind is none here; None: it is of another kind.
    """
    reader = _read_identity if node.op_type == "Sum" and len(node.input) == 1 else _READERS.get(node.op_type)
    return None if reader is None or node.domain not in ("", "ai.onnx") else reader(view, node)


def _read_conv(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str:
    kernel = view.raw_constant(node.input[1])
    bias = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if kernel is None or kernel.dtype.kind != "f" or (bias is None and len(node.input) > 2 and node.input[2]):
        return "its weights are no constants"
    if kernel.ndim != 4:
        return "it is no convolution of images"
    axes = _read_window(view, node, kernel.shape[2:])
    if isinstance(axes, str):
        return axes
    groups = int(_integer(node, "group", 1))
    shift = np.zeros(len(kernel)) if bias is None else bias
    dilations = _integers(node, "dilations", (1, 1))

    def weights() -> Weights:
        spread = np.zeros((*kernel.shape[:2], axes[0].span, axes[1].span))
        spread[:, :, :: dilations[0], :: dilations[1]] = kernel
        return spread, shift

    form = Form(kernel.shape[1] * groups, len(kernel), groups, *axes, bool(np.any(shift)), functools.cache(weights))
    return node.input[0], form


def _read_pool(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str:
    size = _integers(node, "kernel_shape", ())
    channels = _channels(view, node.input[0])
    if len(size) != 2 or channels is None:
        return "its number of channels is not known"
    if _integer(node, "ceil_mode", 0):
        return "ceil_mode=1: its last windows may be cut off"
    axes = _read_window(view, node, size)
    if isinstance(axes, str):
        return axes
    if not _integer(node, "count_include_pad", 0) and any(axis.pads != (0, 0) for axis in axes):
        return "count_include_pad=0: at the border it divides by fewer pixels"
    if any(dilation != 1 for dilation in _integers(node, "dilations", (1, 1))):
        return "it is dilated"
    kernel = np.full((channels, 1, *size), 1 / math.prod(size))
    return node.input[0], Form(channels, channels, channels, *axes, False, lambda: (kernel, np.zeros(channels)))


def _read_batch_norm(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str:
    values = [view.constant(name) for name in node.input[1:5]]
    if any(value is None for value in values):
        return "its statistics are no constants"
    if _integer(node, "training_mode", 0):
        return "training_mode=1: it normalises by the batch"
    if node.input[0] not in view.channels and len(view.shape(node.input[0]) or ()) != 4:
        return "its input is no batch of images, or its shape is not known"
    scale, shift, mean, variance = (np.asarray(value, np.float64) for value in values)
    factor = scale / np.sqrt(variance + float(_number(node, "epsilon", 1e-5)))
    return node.input[0], scaling(factor, shift - mean * factor)


def _read_identity(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str:
    channels = _channels(view, node.input[0])
    return "its number of channels is not known" if channels is None else (node.input[0], identity(channels))


def _read_pad(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str:
    channels = _channels(view, node.input[0])
    pads = view.raw_constant(node.input[1]) if len(node.input) > 1 else None
    axes = view.raw_constant(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(4)
    if channels is None or pads is None or axes is None:
        return "its widths or its number of channels are not known"
    value = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if attributes(node).get("mode", b"constant") != b"constant" or value is None or np.any(value):
        return "it pads with something else than zeros"
    widths = {int(axis) % 4: (int(pads[i]), int(pads[i + len(axes)])) for i, axis in enumerate(axes)}
    if any(widths.get(axis, (0, 0)) != (0, 0) for axis in (0, 1)) or any(
        w < 0 for pair in widths.values() for w in pair
    ):
        return "it pads the batch or the channels, or cuts off"
    (top, bottom), (left, right) = widths.get(2, (0, 0)), widths.get(3, (0, 0))
    return node.input[0], padding(channels, (top, left), (bottom, right), None)


def _read_scaling(view: GraphView, node: onnx.NodeProto) -> tuple[str, Form] | str | None:
    """Mul, Div, Add or Sub of a tensor and a constant for each channel or for all; Neg."""
    kind = node.op_type
    if kind == "Neg":
        channels = _channels(view, node.input[0])
        return (
            "its number of channels is not known"
            if channels is None
            else (node.input[0], scaling(-np.ones(channels), np.zeros(channels)))
        )
    constants = [view.constant(name) for name in node.input]
    if all(constant is None for constant in constants) or (constants[0] is not None and kind == "Div"):
        return None  # a product of two that vary, such as a gate, is no scaling
    index = 0 if constants[0] is not None else 1
    data, value = node.input[1 - index], constants[index]
    channels = _channels(view, data)
    if value is None or channels is None:
        return "its number of channels is not known"
    shape = (1,) * (4 - value.ndim) + value.shape
    if value.ndim > 4 or shape[0] != 1 or shape[1] not in (1, channels) or shape[2:] != (1, 1):
        return "its constant varies over the image"
    flat = np.broadcast_to(value.reshape(-1), (channels,)).astype(np.float64)
    one, zero = np.ones(channels), np.zeros(channels)
    if kind in ("Mul", "Div"):
        return data, scaling(flat if kind == "Mul" else 1 / flat, zero)
    if kind == "Add":
        return data, scaling(one, flat)
    return data, scaling(one, -flat) if index == 1 else scaling(-one, flat)


_READERS: dict[str, Callable[[GraphView, onnx.NodeProto], tuple[str, Form] | str | None]] = {
    "Conv": _read_conv,
    "AveragePool": _read_pool,
    "BatchNormalization": _read_batch_norm,
    "Identity": _read_identity,
    "Pad": _read_pad,
    **dict.fromkeys(("Mul", "Div", "Add", "Sub", "Neg"), _read_scaling),
}


def _read_window(view: GraphView, node: onnx.NodeProto, size: tuple[int, ...]) -> tuple[Axis, Axis] | str:
    strides, dilations = _integers(node, "strides", (1, 1)), _integers(node, "dilations", (1, 1))
    pads = _integers(node, "pads", (0, 0, 0, 0))
    auto = attributes(node).get("auto_pad", b"NOTSET")
    sizes = (view.shape(node.input[0]) or (None,) * 4)[2:]
    axes = []
    for axis in (0, 1):
        before, after = pads[axis], pads[axis + 2]
        extent = (size[axis] - 1) * dilations[axis] + 1
        if auto in (b"SAME_UPPER", b"SAME_LOWER"):
            length = sizes[axis]
            if length is None and strides[axis] != 1:
                return f"auto_pad={auto.decode()} of a dynamic size"
            total = (
                extent - 1
                if length is None
                else max((-(-length // strides[axis]) - 1) * strides[axis] + extent - length, 0)
            )
            before, after = (
                (total // 2, total - total // 2) if auto == b"SAME_UPPER" else (total - total // 2, total // 2)
            )
        elif auto == b"VALID":
            before, after = 0, 0
        taps = tuple(range(-before, extent - before, dilations[axis]))
        axes.append(Axis(taps, strides[axis], before + after - extent))
    return axes[0], axes[1]


def _channels(view: GraphView, name: str) -> int | None:
    """Of a batch of images; None for a tensor of another rank, or where it is not known."""
    shape = view.shape(name)
    return view.channels.get(name, shape[1] if shape is not None and len(shape) == 4 else None)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    value = attributes(node).get(name, default)
    assert isinstance(value, int)
    return value


def _number(node: onnx.NodeProto, name: str, default: float) -> float:
    value = attributes(node).get(name, default)
    assert isinstance(value, (int, float))
    return value


def _integers(node: onnx.NodeProto, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = attributes(node).get(name, default)
    assert isinstance(value, (list, tuple))
    return tuple(int(item) for item in value) or default

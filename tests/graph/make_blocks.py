"""Blocks of re-parameterizable networks as ONNX graphs, written operator by operator with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 8


class Draw:
    """Draws a graph: every method adds an operator and returns the name of what it makes.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)
        self.channels = {"x": CHANNELS}

    def constant(self, values: Any) -> str:
        """A float32 initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
        return name

    def constant_integers(self, values: Sequence[int]) -> str:
        """An int64 initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def random_constant(self, *shape: int) -> str:
        """A constant of normally distributed values."""
        return self.constant(self.random.standard_normal(shape))

    def node(self, kind: str, inputs: Sequence[str], channels: int | None = None, **attributes: Any) -> str:
        """Any operator; as many channels as its first input, unless said otherwise."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node {name}", **attributes))
        self.channels[name] = self.channels.get(inputs[0], 0) if channels is None else channels
        return name

    def conv(
        self,
        x: str,
        out: int | None = None,
        *,
        kernel: int | tuple[int, int] = 3,
        bias: bool = False,
        **attributes: Any,
    ) -> str:
        """A convolution that keeps the size at stride 1, unless `pads` says otherwise."""
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        group, out = attributes.get("group", 1), self.channels[x] if out is None else out
        dilations = attributes.get("dilations", [1, 1])
        half = [(n - 1) * d // 2 for n, d in zip(size, dilations, strict=True)]
        attributes.setdefault("pads", [*half, *half])
        weight = self.constant(self.random.standard_normal((out, self.channels[x] // group, *size)))
        shift = [self.constant(self.random.standard_normal(out))] if bias else []
        return self.node("Conv", [x, weight, *shift], out, **attributes)

    def bn(self, x: str) -> str:
        """BatchNormalization with random statistics and affine parameters."""
        n, draw = self.channels[x], self.random
        values = [draw.uniform(0.5, 1.5, n), draw.normal(0, 0.3, n), draw.normal(0, 0.3, n), draw.uniform(0.4, 1.6, n)]
        return self.node("BatchNormalization", [x, *(self.constant(v) for v in values)], epsilon=1e-3)

    def conv_bn(self, x: str, out: int | None = None, **attributes: Any) -> str:
        """A convolution without bias and its BatchNorm."""
        return self.bn(self.conv(x, out, **attributes))

    def sum(self, *names: str) -> str:
        """Additions from left to right."""
        total = names[0]
        for name in names[1:]:
            total = self.node("Add", [total, name])
        return total

    def pool(self, x: str, size: int = 3, **attributes: Any) -> str:
        """Average pooling that keeps the size, zeros counted, unless said otherwise."""
        attributes = {"strides": [1, 1], "pads": [size // 2] * 4, "count_include_pad": 1} | attributes
        return self.node("AveragePool", [x], kernel_shape=[size, size], **attributes)

    def pooled(self, x: str) -> str:
        """Global average pooling."""
        return self.node("GlobalAveragePool", [x])

    def slice(self, x: str, start: int, end: int, channels: int, *, step: int = 1) -> str:
        """Some of the channels."""
        numbers = [self.constant_integers([value]) for value in (start, end, 1, step)]
        return self.node("Slice", [x, *numbers], channels)

    def transposed(self, x: str, out: int, *, group: int = 1) -> str:
        """A transposed convolution that doubles the size."""
        weight = self.random_constant(self.channels[x], out // group, 2, 2)
        return self.node("ConvTranspose", [x, weight, self.random_constant(out)], out, group=group, strides=[2, 2])

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The graph from `x`, (n, 8, h, w), to these tensors."""
        sizes = ["n", CHANNELS, "h", "w"]
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
        made = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", self.channels[name], None, None])
            for name in outputs
        ]
        graph = helper.make_graph(self.nodes, "block", [given], made, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _mobileone(d: Draw, x: str) -> str:
    return d.sum(d.conv_bn(x, kernel=1, group=8), d.bn(x), *(d.conv_bn(x, group=8) for _ in range(4)))


def _repmixer(d: Draw, x: str) -> str:
    mixer = d.sum(d.conv_bn(x, group=8), d.conv_bn(x, kernel=1, group=8), d.bn(x))
    scaled = d.node("Mul", [d.node("Sub", [mixer, d.bn(x)]), d.constant(d.random.uniform(0.1, 1, (8, 1, 1)))])
    return d.sum(x, scaled)


def _alpha(d: Draw, x: str) -> str:
    return d.sum(d.conv_bn(x), d.node("Mul", [d.constant([0.6]), d.conv_bn(x, kernel=1)]))


def _real_vgg(d: Draw, x: str) -> str:
    scaled = d.node("Mul", [x, d.random_constant(1, 8, 1, 1)])
    return d.bn(d.sum(d.conv(x, bias=True), d.node("Mul", [d.conv(x, kernel=1), d.constant(1.5)]), scaled))


def _zero_answer(d: Draw, name: str) -> np.ndarray:
    """What a BatchNorm that was drawn last gives for zeros: float32 (C,)."""
    scale, shift, mean, variance = (numpy_helper.to_array(tensor) for tensor in d.constants[-4:])
    assert d.nodes[-1].output[0] == name
    return np.asarray(shift - mean * scale / np.sqrt(variance + 1e-3), np.float32)


def _scattered(d: Draw, x: str, *, size: tuple[int, int] = (9, 10)) -> str:
    """A 1×1, its BatchNorm, and a border of one pixel that is overwritten with what that gives for zeros."""
    inner = d.conv_bn(x, kernel=1)
    value = _zero_answer(d, inner)
    padded = d.node("Pad", [inner, "pads"])
    rows, columns = size[0] + 2, size[1] + 2
    grid = np.stack(np.meshgrid([0], range(8), range(rows), range(columns), indexing="ij"), -1)
    for edge in (grid[:, :, :1], grid[:, :, -1:], grid[:, :, :, :1], grid[:, :, :, -1:]):
        name = f"edge{len(d.constants)}"
        d.constants.append(numpy_helper.from_array(np.ascontiguousarray(edge), name))
        filling = d.constant(np.broadcast_to(value.reshape(1, -1, 1, 1), edge.shape[:-1]))
        padded = d.node("ScatterND", [padded, name, filling], 8)
    return padded


def _concatenated(d: Draw, x: str, *, size: tuple[int, int] = (9, 10)) -> str:
    """The same border, put around by two Concat."""
    inner = d.conv_bn(x, kernel=1)
    value = _zero_answer(d, inner).reshape(1, -1, 1, 1)
    side = d.constant(np.broadcast_to(value, (1, 8, size[0], 1)))
    wide = d.node("Concat", [side, inner, side], 8, axis=3)
    edge = d.constant(np.broadcast_to(value, (1, 8, 1, size[1] + 2)))
    return d.node("Concat", [edge, wide, edge], 8, axis=2)


BLOCKS: dict[str, tuple[Callable[[Draw, str], str], str]] = {
    "RepVGG": (lambda d, x: d.sum(d.conv_bn(x), d.conv_bn(x, kernel=1), d.bn(x)), "3×3"),
    "RepVGG of stride 2 in groups": (
        lambda d, x: d.sum(
            d.conv_bn(x, 12, strides=[2, 2], group=4), d.conv_bn(x, 12, kernel=1, strides=[2, 2], group=4)
        ),
        "3×3 in 4 groups",
    ),
    "QARepVGG v2": (lambda d, x: d.bn(d.sum(d.conv_bn(x), d.conv(x, kernel=1), x, d.pool(x))), "3×3"),
    "QARepVGG GRE": (lambda d, x: d.sum(d.conv_bn(x), d.bn(d.sum(d.conv(x, kernel=1), x))), "3×3"),
    "PP-YOLOE+": (_alpha, "3×3"),
    "YOLO-NAS": (
        lambda d, x: d.bn(d.sum(d.conv_bn(x), d.node("Mul", [d.conv(x, kernel=1), d.constant([1.0])]), x)),
        "3×3",
    ),
    "RT-DETR, D-FINE": (lambda d, x: d.sum(d.conv_bn(x, 16), d.conv_bn(x, 16, kernel=1)), "3×3"),
    "YOLOv10": (lambda d, x: d.sum(d.conv_bn(x, kernel=7, group=8), d.conv_bn(x, group=8)), "7×7 depthwise"),
    "RepViT": (
        lambda d, x: d.bn(d.sum(d.conv_bn(x, group=8), d.conv(x, kernel=1, group=8, bias=True), x)),
        "3×3 depthwise",
    ),
    "MobileOne depthwise": (_mobileone, "3×3 depthwise"),
    "MobileOne pointwise": (lambda d, x: d.sum(d.bn(x), *(d.conv_bn(x, kernel=1) for _ in range(4))), "1×1"),
    "FastViT": (_repmixer, "3×3 depthwise"),
    "RepGhost": (lambda d, x: d.sum(d.conv_bn(x, group=8), d.bn(x)), "3×3 depthwise"),
    "RealVGG": (_real_vgg, "3×3"),
    "ACNet": (lambda d, x: d.sum(d.conv_bn(x), d.conv_bn(x, kernel=(3, 1)), d.conv_bn(x, kernel=(1, 3))), "3×3"),
    "UniRepLKNet": (
        lambda d, x: d.sum(
            d.conv_bn(x, kernel=9, group=8),
            d.conv_bn(x, kernel=5, group=8),
            d.conv_bn(x, kernel=5, group=8, dilations=[2, 2]),
            d.conv_bn(x, kernel=3, group=8, dilations=[4, 4]),
        ),
        "9×9 depthwise",
    ),
    "dilated alike": (lambda d, x: d.sum(d.conv_bn(x, dilations=[2, 2]), d.conv_bn(x, kernel=1)), "3×3 dilated by 2"),
    "1×1 without any bias before 3×3": (lambda d, x: d.sum(d.conv_bn(d.conv(x, kernel=1)), d.conv_bn(x)), "3×3"),
    "1×1 before average pooling": (lambda d, x: d.sum(d.bn(d.pool(d.conv(x, kernel=1))), d.conv_bn(x)), "3×3"),
    "zeros padded apart": (
        lambda d, x: d.sum(d.conv_bn(d.node("Pad", [x, "pads"]), pads=[0, 0, 0, 0]), d.conv_bn(x, kernel=1)),
        "3×3",
    ),
}
"""By the network, a block that sums branches of `x`, and the one kernel that it is."""


BORDERS: dict[str, Callable[[Draw, str], str]] = {"scattered": _scattered, "concatenated": _concatenated}


def make_border(name: str, *, seed: int = 0, spoil: float = 0.0) -> onnx.ModelProto:
    """A Diverse Branch Block for images of 9×10, batch 1; `spoil` is added to a value of its first border."""
    draw = Draw(seed)
    draw.constants.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"))
    start = draw.node("Relu", ["x"])
    branches = [draw.conv_bn(BORDERS[name](draw, start), pads=[0] * 4)]
    branches.append(draw.bn(draw.pool(BORDERS[name](draw, start), pads=[0] * 4)))
    model = draw.model(draw.node("Relu", [draw.sum(*branches, draw.conv_bn(start), draw.conv_bn(start, kernel=1))]))
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 8, 9, 10), strict=True):
        dim.dim_value = size
    if spoil:
        tensor = next(t for t in model.graph.initializer if list(t.dims) in ([1, 8, 1, 12], [1, 8, 9, 1]))
        values = numpy_helper.to_array(tensor).copy()
        values[0, 3] += spoil
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def make_block(name: str, *, seed: int = 0) -> onnx.ModelProto:
    """A block of `BLOCKS` with a ReLU before and behind it."""
    draw = Draw(seed)
    draw.constants.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"))
    start = draw.node("Relu", ["x"])
    return draw.model(draw.node("Relu", [BLOCKS[name][0](draw, start)]))

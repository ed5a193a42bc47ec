"""Networks that are no chain, small and random: a detector's neck, a mobile classifier, a transformer's block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tests.graph.make_blocks import CHANNELS, Draw

SIZE = (CHANNELS, 16, 16)


class Network(Draw):
    """Weights of the size that training gives them, so that signals neither vanish nor explode."""

    def random_constant(self, *shape: int) -> str:
        scale = np.sqrt(2 / max(1, int(np.prod(shape[1:])))) if len(shape) > 1 else 0.1
        return self.constant(self.random.standard_normal(shape) * scale)

    def layer(self, x: str, out: int, activation: str = "Relu", *, kernel: int = 3, **attributes: object) -> str:
        """A convolution with bias and its activation."""
        group = attributes.get("group", 1)
        assert isinstance(group, int)
        weight = self.random_constant(out, self.channels[x] // group, kernel, kernel)
        if not activation:  # what is exponentiated, or added again and again, stays small
            self.constants[-1].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(self.constants[-1]) / 4, weight))
        half = kernel // 2
        y = self.node("Conv", [x, weight, self.random_constant(out)], out, pads=[half] * 4, **attributes)
        if activation == "SiLU":
            return self.node("Mul", [y, self.node("Sigmoid", [y])])
        if activation == "HardSwish":
            return self.node("Mul", [y, self.node("HardSigmoid", [y], alpha=1 / 6, beta=0.5)])
        return self.node(activation, [y]) if activation else y

    def finish(self, *outputs: str, rank: int = 4) -> onnx.ModelProto:
        """The graph; outputs of another rank than 4 keep what shape inference says."""
        model = self.model(*outputs)
        for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], SIZE, strict=True):
            dim.Clear()
            dim.dim_value = size
        for value in model.graph.output if rank != 4 else ():
            value.type.tensor_type.ClearField("shape")
        return onnx.shape_inference.infer_shapes(model)


def _neck(activation: str) -> onnx.ModelProto:
    """Two scales, a residual sum, a depthwise layer, both kinds of upsampling, Concat, two heads with Sigmoid."""
    n = Network(seed=2)
    stem = n.layer("x", 16, activation)
    body = n.layer(stem, 16, "", kernel=3)
    small = n.layer(n.node("Relu", [n.sum(body, stem)]), 24, activation, strides=[2, 2])
    small = n.layer(n.layer(small, 24, activation, group=24), 24, activation, kernel=1)
    pooled = n.node("MaxPool", [small], kernel_shape=[3, 3], pads=[1] * 4)
    deep = n.layer(n.node("Concat", [small, pooled], 48, axis=1), 16, activation, kernel=1)
    up = n.node("Resize", [deep, "", n.constant([1, 1, 2, 2])], mode="nearest")
    wide = n.node("Concat", [up, stem, n.transposed(deep, 8)], 40, axis=1)
    large = n.layer(wide, 16, activation)
    heads = [n.layer(n.layer(x, 16, activation), 6, "") for x in (large, deep)]
    scores = [n.node("Sigmoid", [n.layer(x, 3, "", kernel=1)]) for x in (large, deep)]
    boxes = [n.node("Mul", [n.node("Exp", [head]), n.constant(8.0)]) for head in heads]
    return n.finish(*boxes, *scores)


def _mobile() -> onnx.ModelProto:
    """Inverted bottlenecks with squeeze and excitation, HardSwish, ReLU6, a classifier."""
    n = Network(seed=3)
    x = n.layer("x", 16, "HardSwish", strides=[2, 2])
    for _ in range(2):
        wide = n.layer(n.layer(x, 32, "Relu", kernel=1), 32, "Relu", group=32)
        gate = n.node("Relu", [n.layer(n.pooled(wide), 8, "", kernel=1)])
        gate = n.node("Sigmoid", [n.layer(gate, 32, "", kernel=1)])
        x = n.sum(x, n.layer(n.node("Mul", [wide, gate]), 16, "", kernel=1))
    last = n.layer(x, 64, "", kernel=1)
    last = n.node("Clip", [last, n.constant(0.0), n.constant(6.0)])
    flat = n.node("ReduceMean", [last], axes=[2, 3], keepdims=0)
    return n.finish(n.node("Gemm", [flat, n.random_constant(64, 10), n.random_constant(10)], 10), rank=2)


def _tokens() -> onnx.ModelProto:
    """Patches, LayerNormalization, attention, GELU of Erf, and the mean of the tokens."""
    n = Network(seed=4)
    patches = n.node("Conv", ["x", n.random_constant(16, 8, 4, 4)], 16, strides=[4, 4])
    tokens = n.node("Transpose", [n.node("Reshape", [patches, n.constant_integers([0, 16, -1])])], perm=[0, 2, 1])
    normal = n.node("LayerNormalization", [tokens, n.constant(np.ones(16)), n.constant(np.zeros(16))])
    query, key, value = (n.node("MatMul", [normal, n.random_constant(16, 16)]) for _ in range(3))
    key = n.node("Transpose", [key], perm=[0, 2, 1])
    weights = n.node("Softmax", [n.node("Mul", [n.node("MatMul", [query, key]), n.constant(0.25)])], axis=-1)
    mixed = n.node("MatMul", [n.node("MatMul", [weights, value]), n.random_constant(16, 16)])
    x = n.node("Add", [tokens, n.node("Add", [mixed, n.random_constant(16)])])
    inner = n.node("Add", [n.node("MatMul", [x, n.random_constant(16, 32)]), n.random_constant(32)])
    erf = n.node("Erf", [n.node("Mul", [inner, n.constant(2**-0.5)])])
    gelu = n.node("Mul", [n.node("Mul", [inner, n.node("Add", [erf, n.constant(1.0)])]), n.constant(0.5)])
    x = n.node("Add", [x, n.node("MatMul", [gelu, n.random_constant(32, 16)])])
    mean = n.node("ReduceMean", [x], axes=[1], keepdims=0)
    return n.finish(n.node("Gemm", [mean, n.random_constant(10, 16)], 10, transB=1), rank=2)


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "neck": lambda: _neck("Relu"),
    "neck with SiLU": lambda: _neck("SiLU"),
    "mobile": _mobile,
    "tokens": _tokens,
}


def _split(n: Network, x: str) -> str:
    a = n.node("Split", [x, n.constant_integers([6, 10])], axis=1)
    n.nodes[-1].output.append("rest")
    n.channels |= {a: 6, "rest": 10}
    return n.sum(n.layer(a, 8, kernel=1), n.layer("rest", 8, kernel=1))


def _cross_stage(n: Network, x: str) -> str:
    """Two halves, one of which goes through a residual block; all of them and its result meet (CSP, YOLOv8's C2f)."""
    left = n.node("Split", [x, n.constant_integers([8, 8])], axis=1)
    n.nodes[-1].output.append("right")
    n.channels |= {left: 8, "right": 8}
    inner = n.sum("right", n.layer(n.layer("right", 8), 8))
    return n.layer(n.node("Concat", [left, "right", inner], 24, axis=1), 16, kernel=1)


def _shuffle(n: Network, x: str) -> str:
    apart = n.node("Reshape", [x, n.constant_integers([0, 4, 4, 16, 16])])
    turned = n.node("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    return n.node("Reshape", [turned, n.constant_integers([0, 16, 16, 16])], 16)


def _resize(n: Network, x: str, mode: str) -> str:
    return n.node("Resize", [x, "", n.constant([1, 1, 2, 2])], mode=mode)


def _dilated(n: Network, x: str) -> str:
    weights = [n.random_constant(8, 16, 3, 3), n.random_constant(8)]
    return n.node("Conv", [x, *weights], 8, pads=[2] * 4, dilations=[2, 2])


_HALF = {"kernel_shape": [2, 2], "strides": [2, 2]}
OPERATORS: dict[str, Callable[[Network, str], str]] = {
    "residual": lambda n, x: n.node("Relu", [n.sum(n.layer(x, 16, ""), x)]),
    "two convolutions": lambda n, x: n.sum(n.layer(x, 16, ""), n.layer(x, 16, "")),
    "split": _split,
    "cross stage": _cross_stage,
    "slice": lambda n, x: n.slice(x, 2, 10, 8),
    "nearest": lambda n, x: _resize(n, x, "nearest"),
    "linear": lambda n, x: _resize(n, x, "linear"),
    "largest": lambda n, x: n.node("MaxPool", [x], **_HALF),
    "average": lambda n, x: n.node("AveragePool", [x], **_HALF),
    "transposed": lambda n, x: n.transposed(x, 8),
    "depthwise": lambda n, x: n.layer(x, 16, "SiLU", group=16),
    "grouped": lambda n, x: n.layer(x, 16, "SiLU", group=4),
    "dilated": _dilated,
    "pad": lambda n, x: n.node("Pad", [x, n.constant_integers([0, 0, 1, 1, 0, 0, 1, 1])]),
    "PReLU": lambda n, x: n.node("PRelu", [n.layer(x, 16, ""), n.random_constant(16, 1, 1)]),
    "LeakyReLU": lambda n, x: n.node("LeakyRelu", [n.layer(x, 16, "")], alpha=0.1),
    "gate": lambda n, x: n.node("Mul", [x, n.node("Sigmoid", [n.layer(n.pooled(x), 16, "", kernel=1)])]),
    "shuffle": _shuffle,
    "concat": lambda n, x: n.node("Concat", [x, n.layer(x, 8, "SiLU")], 24, axis=1),
}


def make_around(operator: str, activation: str = "Relu") -> onnx.ModelProto:
    """One operator between two layers."""
    n = Network(seed=5)
    return n.finish(n.layer(OPERATORS[operator](n, n.layer("x", 16, activation)), 6, ""))


def draw(count: int, *, seed: int = 0) -> list[NDArray[np.float32]]:
    """Smooth random images, in batches of 8."""
    random = np.random.default_rng(seed)
    rough = random.standard_normal((count, CHANNELS, 4, 4)) + random.standard_normal((count, CHANNELS, 1, 1))
    images = rough.repeat(4, 2).repeat(4, 3) + 0.3 * random.standard_normal((count, *SIZE))
    return list(images.astype(np.float32).reshape(-1, 8, *SIZE))


__all__ = ["GRAPHS", "OPERATORS", "Network", "draw", "make_around"]

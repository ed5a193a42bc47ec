"""Random graphs of linear operators of any geometry: strides, dilation, groups, uneven and automatic padding."""

from __future__ import annotations

import random

import onnx
from onnx import helper, shape_inference

from tests.graph.make_blocks import Draw

Shape = tuple[int, int, int]
KINDS = ["conv"] * 5 + ["point"] * 2 + ["bn"] * 2 + ["sum"] * 6 + ["difference"] * 2
KINDS += ["pool", "pad", "factor", "quotient", "shift", "minus", "Neg", "Identity", "Relu"]


def random_graph(seed: int) -> tuple[onnx.ModelProto, Shape]:
    """A graph with outputs of one or two tensors, and the (C, H, W) of its input, which it may state or not."""
    choose, draw = random.Random(seed), Draw(seed)
    shapes: dict[str, Shape] = {"x": (8, *choose.choice([(13, 16), (16, 16), (9, 11), (12, 7), (21, 10)]))}
    first = shapes["x"]
    for _ in range(choose.randint(3, 12)):
        x = choose.choice([*list(shapes)[-6:], "x"])
        kind = choose.choice(KINDS)
        made = _window(choose, draw, x, kind, shapes[x]) if kind in ("conv", "point", "pool") else None
        if kind == "pad":
            c, h, w = shapes[x]
            top, left, bottom, right = (choose.randint(0, 2) for _ in range(4))
            pads = draw.constant_integers([0, 0, top, left, 0, 0, bottom, right])
            made = draw.node("Pad", [x, pads]), (c, h + top + bottom, w + left + right)
        elif kind not in ("conv", "point", "pool"):
            same = [name for name in shapes if shapes[name] == shapes[x]]
            made = _pointwise(choose, draw, x, kind, same), shapes[x]
        if made is not None:
            shapes[made[0]] = made[1]
    names = list(shapes)[1:] or [draw.node("Relu", ["x"])]
    outputs = dict.fromkeys([names[-1], *([choose.choice(names)] if choose.random() < 0.3 else [])])
    known = choose.random() < 0.7
    image = helper.make_tensor_value_info("x", 1, ["N", 8, *(first[1:] if known else ("H", "W"))])
    made_infos = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
    graph = helper.make_graph(draw.nodes, "random", [image], made_infos, draw.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return shape_inference.infer_shapes(model), first


def _window(choose: random.Random, draw: Draw, x: str, kind: str, shape: Shape) -> tuple[str, Shape] | None:
    """A convolution or a pooling; None where the drawn one does not fit."""
    c, *sizes = shape
    kernel = {"point": (1, 1), "pool": (choose.choice([2, 3]),) * 2}.get(kind) or choose.choice(
        [(3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (2, 2)]
    )
    strides = choose.choice([(1, 1)] * 5 + [(2, 2)] * 2 + [(2, 1), (3, 3)])
    dilations = choose.choice([(1, 1)] * 4 + [(2, 2), (1, 2)]) if kind == "conv" else (1, 1)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    half = [(extent - 1) // 2 for extent in extents]
    pads = choose.choice([half * 2] * 5 + [[0] * 4] + [[choose.randint(0, 2) for _ in range(4)]])
    pads = [min(pad, k - 1) for pad, k in zip(pads, kernel * 2, strict=True)] if kind == "pool" else pads
    auto = choose.choice(["SAME_UPPER", "SAME_LOWER", "NOTSET", "NOTSET"]) if set(dilations) == {1} else "NOTSET"
    new = []
    for axis, size in enumerate(sizes):
        room = size + pads[axis] + pads[axis + 2] - extents[axis]
        if room < 0:
            return None
        new.append(room // strides[axis] + 1 if auto == "NOTSET" else -(-size // strides[axis]))
    geometry: dict[str, object] = {"strides": list(strides), "pads": pads, "auto_pad": auto}
    del geometry["auto_pad" if auto == "NOTSET" else "pads"]
    if kind == "pool":
        counted = choose.choice([0, 1, 1])
        return draw.node("AveragePool", [x], kernel_shape=kernel, count_include_pad=counted, **geometry), (
            c,
            new[0],
            new[1],
        )
    out, groups = choose.choice([c, c, 8, 16]), choose.choice([1, 1, c, 2, 4])
    groups = groups if c % groups == out % groups == 0 else 1
    weight = draw.random_constant(out, c // groups, *kernel)
    bias = [draw.random_constant(out)] if choose.random() < 0.4 else []
    made = draw.node("Conv", [x, weight, *bias], out, group=groups, dilations=list(dilations), **geometry)
    return made, (out, new[0], new[1])


def _pointwise(choose: random.Random, draw: Draw, x: str, kind: str, same: list[str]) -> str:
    channels = draw.channels[x]
    constant = draw.constant(draw.random.uniform(0.5, 2, choose.choice([(), (channels, 1, 1), (1, channels, 1, 1)])))
    pair = [x, constant] if choose.random() < 0.5 or kind == "quotient" else [constant, x]
    if kind == "bn":
        return draw.bn(x)
    if kind == "sum" and choose.random() < 0.3:
        return draw.node("Sum", [x, *(choose.choice(same) for _ in range(choose.randint(0, 4)))])
    if kind in ("sum", "difference"):
        return draw.node("Add" if kind == "sum" else "Sub", [x, choose.choice(same)])
    named = {"factor": "Mul", "quotient": "Div", "shift": "Add", "minus": "Sub"}
    return draw.node(named[kind], pair, channels) if kind in named else draw.node(kind, [x])

"""Small RepVGG graphs as repvgg-export writes them, made without torch, with the faults of trained weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from repvgg_deploy.specs.values import (
    METADATA_KEY,
    Certificate,
    Check,
    HistoryEntry,
    ModelMetadata,
    ModelSpec,
    Preprocessing,
    TensorSpec,
)
from tests.runtime.make_model import write_bound

SIZE = 16
CLASSES = 10
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ChainOptions:
    """What kind of graph to make.

    Attributes:
        widths: Channels after each convolution; the first and third have stride 2.
        groups: Of each convolution.
        se: `none`, `before` or `after` the ReLU, on every block but the first.
        uint8: NHWC bytes, cast and normalised in the graph.
        tail: `logits`, `probabilities`, `top5` or `features`.
        outliers: Octaves that the scales of channels spread over; they undo each other.
        heavy: How much heavier the centre taps are than the other weights.
    """

    widths: tuple[int, ...] = (8, 16, 16, 24, 32)
    groups: tuple[int, ...] = (1, 1, 1, 1, 1)
    se: str = "none"
    uint8: bool = False
    tail: str = "logits"
    outliers: float = 3.0
    heavy: float = 4.0


KINDS = {
    "plain": ChainOptions(),
    "grouped": ChainOptions(groups=(1, 2, 1, 4, 2)),
    "se_before": ChainOptions(se="before"),
    "se_after": ChainOptions(se="after"),
    "uint8_top5": ChainOptions(uint8=True, tail="top5"),
    "probabilities": ChainOptions(tail="probabilities"),
    "features": ChainOptions(tail="features"),
}


class _Graph:
    def __init__(self, options: ChainOptions, seed: int) -> None:
        self.options = options
        self.generator = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, NDArray[Any]] = {}

    def add(self, op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def scales(self, channels: int) -> NDArray[np.float32]:
        return np.exp2(self.generator.uniform(-self.options.outliers, self.options.outliers, channels)).astype(
            np.float32
        )

    def conv(self, x: str, name: str, shape: tuple[int, int, int, int], *, stride: int = 1, groups: int = 1) -> str:
        fan_in = int(np.prod(shape[1:]))
        weight = self.generator.standard_normal(shape) * np.sqrt(1.5 / fan_in)
        if shape[2] == 3:
            weight[:, :, 1, 1] *= self.options.heavy
        self.arrays[f"{name}.weight"] = weight.astype(np.float32)
        self.arrays[f"{name}.bias"] = (self.generator.standard_normal(shape[0]) * 0.2).astype(np.float32)
        pad = shape[2] // 2
        attributes = {
            "kernel_shape": shape[2:],
            "strides": [stride] * 2,
            "pads": [pad] * 4,
            "group": groups,
            "dilations": [1, 1],
        }
        return self.add("Conv", [x, f"{name}.weight", f"{name}.bias"], f"{name}.conv", **attributes)

    def se(self, x: str, name: str, channels: int) -> str:
        gate = self.add("GlobalAveragePool", [x], f"{name}.pool")
        gate = self.conv(gate, f"{name}.down", (channels // 4, channels, 1, 1))
        gate = self.add("Relu", [gate], f"{name}.down")
        gate = self.conv(gate, f"{name}.up", (channels, channels // 4, 1, 1))
        gate = self.add("Sigmoid", [gate], f"{name}.gate")
        return self.add("Mul", [x, gate], f"{name}.scaled")


def make_model(options: ChainOptions = ChainOptions(), *, seed: int = 0) -> onnx.ModelProto:
    """The graph, with metadata that is bound only when `save` writes it."""
    graph = _Graph(options, seed)
    x, channels, outputs = _head(graph), 3, []
    for index, (width, groups) in enumerate(zip(options.widths, options.groups, strict=True)):
        name = f"stage{index}"
        x = graph.conv(x, name, (width, channels // groups, 3, 3), stride=2 if index in (0, 2) else 1, groups=groups)
        if options.se == "before" and index:
            x = graph.se(x, f"{name}.se", width)
        x = graph.add("Relu", [x], name)
        if options.se == "after" and index:
            x = graph.se(x, f"{name}.se", width)
        outputs.append(x)
        channels = width
    _spread(graph)
    names = outputs[1:3] if options.tail == "features" else _tail(graph, x, channels)
    if options.tail == "features":
        graph.nodes = [node for node in graph.nodes if node.name < "stage3"]
    return _finish(graph, names)


def _head(graph: _Graph) -> str:
    if not graph.options.uint8:
        return "input"
    graph.arrays |= {"mean": np.float32(MEAN).reshape(1, 3, 1, 1), "std": np.float32(STD).reshape(1, 3, 1, 1)}
    x = graph.add("Cast", ["input"], "cast", to=TensorProto.FLOAT)
    x = graph.add("Transpose", [x], "nchw", perm=[0, 3, 1, 2])
    return graph.add("Div", [graph.add("Sub", [x, "mean"], "centred"), "std"], "normalised")


def _spread(graph: _Graph) -> None:
    """Channels of very different scale, as trained networks have: one scale cannot hold them."""
    names = [f"stage{index}" for index in range(len(graph.options.widths))]
    for before, after, groups in zip(names, names[1:], graph.options.groups[1:], strict=False):
        weight = graph.arrays[f"{before}.weight"]
        scale = graph.scales(len(weight))
        graph.arrays[f"{before}.weight"] = weight * scale[:, None, None, None]
        graph.arrays[f"{before}.bias"] *= scale
        following = graph.arrays[f"{after}.weight"]
        out, inner = following.shape[:2]
        divided = following.reshape(groups, out // groups, inner, 9) / scale.reshape(groups, 1, inner, 1)
        graph.arrays[f"{after}.weight"] = divided.reshape(following.shape)


def _tail(graph: _Graph, x: str, channels: int) -> list[str]:
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x], "gap")], "flatten", axis=1)
    graph.arrays["linear.weight"] = graph.generator.standard_normal((CLASSES, channels)).astype(np.float32)
    graph.arrays["linear.bias"] = graph.generator.standard_normal(CLASSES).astype(np.float32)
    graph.nodes.append(
        helper.make_node("Gemm", [x, "linear.weight", "linear.bias"], ["logits"], name="linear", transB=1)
    )
    if graph.options.tail == "logits":
        return ["logits"]
    x = graph.add("Softmax", ["logits"], "probabilities", axis=1)
    if graph.options.tail == "probabilities":
        return [x]
    graph.arrays["k"] = np.array([5], np.int64)
    graph.nodes.append(
        helper.make_node("TopK", [x, "k"], ["scores", "classes"], name="top", axis=1, largest=1, sorted=1)
    )
    return ["scores", "classes"]


def _finish(graph: _Graph, names: list[str]) -> onnx.ModelProto:
    uint8 = graph.options.uint8
    image = (
        TensorSpec("input", "uint8", ("batch", SIZE, SIZE, 3), "NHWC")
        if uint8
        else TensorSpec("input", "float32", ("batch", 3, SIZE, SIZE), "NCHW")
    )
    shapes = {
        "logits": ("batch", CLASSES),
        "probabilities": ("batch", CLASSES),
        "scores": ("batch", 5),
        "classes": ("batch", 5),
    }
    outputs = tuple(
        TensorSpec(
            n,
            "int64" if n == "classes" else "float32",
            shapes.get(n, ("batch", "channels", f"{n}_h", f"{n}_w")),
            "other",
        )
        for n in names
    )
    used = {name for node in graph.nodes for name in node.input}
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
    values = [helper.make_tensor_value_info(t.name, types[t.dtype], list(t.shape)) for t in (image, *outputs)]
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in graph.arrays.items()
        if name in used
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "repvgg", values[:1], values[1:], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        producer_name="repvgg-deploy",
    )
    model.ir_version = 8
    return model


def metadata_of(model: onnx.ModelProto) -> ModelMetadata:
    """Metadata as an export writes it."""
    names = {
        TensorProto.FLOAT: "float32",
        TensorProto.FLOAT16: "float16",
        TensorProto.UINT8: "uint8",
        TensorProto.INT64: "int64",
    }
    specs = []
    for value in (*model.graph.input, *model.graph.output):
        shape = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        specs.append(TensorSpec(value.name, names[value.type.tensor_type.elem_type], shape, "other"))
    preprocessing = Preprocessing(MEAN, STD, SIZE, (SIZE, SIZE), in_graph=specs[0].dtype == "uint8")
    spec = ModelSpec(specs[0], tuple(specs[1:]), "module", preprocessing)
    certificate = Certificate("in memory", (Check("made", 0.0, 1e-6, 1.0),), {"onnx": "1.0"})
    return ModelMetadata(
        1, spec, None, None, certificate, {}, (HistoryEntry("export", {"repvgg-deploy": "0.1.0"}, {"opset": 17}),)
    )


def save(path: Path, model: onnx.ModelProto) -> Path:
    """Writes the model with its metadata, bound to it."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return write_bound(path, bare.SerializeToString(deterministic=True), metadata_of(model))


def make_batches(
    options: ChainOptions = ChainOptions(), count: int = 64, *, seed: int = 1, size: int = 16
) -> list[NDArray[Any]]:
    """Smooth random images, as the graph takes them, in batches."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (count, SIZE // 4, SIZE // 4, 3)).repeat(4, 1).repeat(4, 2)
    pixels = np.clip(coarse + generator.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)
    images = (
        pixels
        if options.uint8
        else ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2).astype(np.float32)
    )
    return [np.ascontiguousarray(images[start : start + size]) for start in range(0, count, size)]


__all__ = ["KINDS", "METADATA_KEY", "ChainOptions", "make_batches", "make_model", "metadata_of", "save"]

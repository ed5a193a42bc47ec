"""Tiny ONNX models with our metadata, made without torch and without the exporter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from repvgg_deploy.files import onnx as onnx_file
from repvgg_deploy.files import wire
from repvgg_deploy.specs.values import (
    Certificate,
    Check,
    CheckpointSource,
    HistoryEntry,
    ModelMetadata,
    ModelSpec,
    Preprocessing,
    TensorSpec,
    VariantSpec,
)

CHANNELS = 8
IMAGENET = Preprocessing(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), resize_short=16, crop=(16, 16))


@dataclass(frozen=True)
class ModelOptions:
    """What kind of model to make.

    Attributes:
        batch: A number, or a name for a dynamic batch.
        size: Of the image; strings for dynamic ones.
        uint8: NHWC bytes, cast and normalised in the graph.
        kind: `logits`, `probabilities`, `top5`, `features` or `module`.
        classes: Rows of the classifier.
        labels: Whether the metadata names the classes.
        preprocessing: Whether the metadata says how an image becomes the input.
        half: Whether the (logits) output is float16.
    """

    batch: int | str = "batch"
    size: tuple[int | str, int | str] = (16, 16)
    uint8: bool = False
    kind: str = "logits"
    classes: int = 7
    labels: bool = True
    preprocessing: bool = True
    half: bool = False


def make_onnx(path: Path, options: ModelOptions = ModelOptions(), *, seed: int = 0) -> Path:
    """Writes Conv-Relu-GlobalAveragePool-Flatten-Gemm with random weights and bound metadata."""
    return write_bound(path, _build(options, seed).SerializeToString(), make_metadata(options))


def write_bound(path: Path, graph: bytes, metadata: ModelMetadata) -> Path:
    """Writes a serialized ModelProto and its metadata, bound to it."""
    parts = hashlib.sha256()
    for field in wire.walk(graph):
        parts.update(graph[field.start : field.end])
    path.write_bytes(graph + onnx_file.metadata_field(parts, metadata))
    return path


def make_metadata(options: ModelOptions = ModelOptions()) -> ModelMetadata:
    """The metadata of such a model."""
    height, width = options.size
    if options.uint8:
        source = TensorSpec("images", "uint8", (options.batch, height, width, 3), "NHWC")
    else:
        source = TensorSpec("images", "float32", (options.batch, 3, height, width), "NCHW")
    spec = ModelSpec(
        input=source,
        outputs=_output_specs(options),
        kind=options.kind,  # type: ignore[arg-type]
        preprocessing=_preprocessing(options) if options.preprocessing else None,
        labels=tuple(f"class {index}" for index in range(options.classes)) if options.labels else None,
    )
    return ModelMetadata(
        schema=1,
        spec=spec,
        variant=tiny_variant(options.classes) if options.kind != "module" else None,
        source=CheckpointSource("tiny.pth", "0" * 64, "official", "training"),
        certificate=Certificate(
            "tiny.pth in training form",
            (Check("training form against ONNX Runtime", 1e-7, 1e-5, 2.5),),
            {"onnx": "1.0"},
            ("stated by the user: strides 2,2,2,2,2",),
        ),
        statistics={},
        history=(HistoryEntry("export", {"repvgg_deploy": "0.1.0"}, {"opset": 17}),),
    )


def tiny_variant(classes: int = 7) -> VariantSpec:
    """A small architecture for the inspector; the tiny graph above is not it."""
    return VariantSpec("tiny", (1, 1, 2, 1), (8, 8, 16, 16, 32), (1, 1, 2, 1, 1, 1), num_classes=classes)


def random_batch(options: ModelOptions, count: int, *, seed: int = 0) -> NDArray[np.float32] | NDArray[np.uint8]:
    """N random images as the model wants them; dynamic sizes become 16."""
    generator = np.random.default_rng(seed)
    height, width = (size if isinstance(size, int) else 16 for size in options.size)
    if options.uint8:
        return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return generator.standard_normal((count, 3, height, width), dtype=np.float32)


def _preprocessing(options: ModelOptions) -> Preprocessing:
    return Preprocessing(IMAGENET.mean, IMAGENET.std, IMAGENET.resize_short, IMAGENET.crop, in_graph=options.uint8)


def _output_specs(options: ModelOptions) -> tuple[TensorSpec, ...]:
    batch, classes = options.batch, options.classes
    if options.kind == "top5":
        return (TensorSpec("scores", "float32", (batch, 5), "NK"), TensorSpec("classes", "int64", (batch, 5), "NK"))
    if options.kind == "features":
        return (
            TensorSpec("stage1", "float32", (batch, CHANNELS, *options.size), "NCHW"),
            TensorSpec("stage2", "float32", (batch, CHANNELS), "other"),
        )
    if options.kind == "module":  # one output without a row per image
        return (
            TensorSpec("logits", "float32", (batch, classes), "NC"),
            TensorSpec("mean", "float32", (1, CHANNELS), "other"),
        )
    return (TensorSpec(options.kind, "float16" if options.half else "float32", (batch, classes), "NC"),)


def _build(options: ModelOptions, seed: int) -> ModelProto:
    generator = np.random.default_rng(seed)
    weights: dict[str, NDArray[Any]] = {
        "w1": generator.standard_normal((CHANNELS, 3, 3, 3), dtype=np.float32),
        "b1": generator.standard_normal(CHANNELS, dtype=np.float32),
        "w2": generator.standard_normal((options.classes, CHANNELS), dtype=np.float32),
        "b2": generator.standard_normal(options.classes, dtype=np.float32),
    }
    nodes = []
    image = "images"
    if options.uint8:
        weights["mean"] = np.array(IMAGENET.mean, np.float32).reshape(1, 3, 1, 1)
        weights["std"] = np.array(IMAGENET.std, np.float32).reshape(1, 3, 1, 1)
        nodes += [
            helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["cast"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Sub", ["nchw", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["normalised"]),
        ]
        image = "normalised"
    nodes += [
        helper.make_node("Conv", [image, "w1", "b1"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["stage1"]),
        helper.make_node("GlobalAveragePool", ["stage1"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["stage2"], axis=1),
        helper.make_node("Gemm", ["stage2", "w2", "b2"], ["logits32" if options.half else "logits"], transB=1),
        *_tail(options, weights),
    ]
    metadata = make_metadata(options)
    spec = metadata.spec
    dtypes = {
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "uint8": TensorProto.UINT8,
        "int64": TensorProto.INT64,
    }
    values = [
        helper.make_tensor_value_info(t.name, dtypes[t.dtype], list(t.shape)) for t in (spec.input, *spec.outputs)
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="repvgg-deploy tests")
    model.ir_version = 8
    return model


def _tail(options: ModelOptions, weights: dict[str, NDArray[Any]]) -> list[NodeProto]:
    if options.kind == "top5":
        weights["k"] = np.array([5], np.int64)
        return [helper.make_node("TopK", ["logits", "k"], ["scores", "classes"])]
    if options.kind == "probabilities":
        return [helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    if options.kind == "module":
        return [helper.make_node("ReduceMean", ["stage2"], ["mean"], axes=[0])]
    if options.half:
        return [helper.make_node("Cast", ["logits32"], ["logits"], to=TensorProto.FLOAT16)]
    return []


def strip_metadata(data: bytes) -> bytes:
    """A model file without our metadata."""
    return b"".join(data[field.start : field.end] for field in wire.walk(data) if field.number != 14)


QUANTIZED = ModelOptions(classes=8)
"""Of `build_quantized`, for its metadata."""


def _pair(tensor: str, scale: str) -> list[NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [tensor, scale, "zero"], [f"{tensor}.q"]),
        helper.make_node("DequantizeLinear", [f"{tensor}.q", scale, "zero"], [f"{tensor}.dq"]),
    ]


def build_quantized() -> ModelProto:
    """Two INT8 convolutions with FP16 around their pairs."""
    generator = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "s1": np.array(0.02, np.float16),
        "s2": np.array(0.05, np.float16),
        "zero": np.array(0, np.int8),
    }
    nodes = [helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16)]
    source = "half"
    for name, channels, scale in (("c1", 3, "s1"), ("c2", 8, "s2")):
        arrays |= {
            f"{name}.w": generator.integers(-127, 128, (8, channels, 3, 3)).astype(np.int8),
            f"{name}.s": generator.uniform(0.001, 0.01, 8).astype(np.float16),
            f"{name}.z": np.zeros(8, np.int8),
            f"{name}.b": (3 * generator.standard_normal(8)).astype(np.float16),
        }
        nodes += [
            *_pair(source, scale),
            helper.make_node("DequantizeLinear", [f"{name}.w", f"{name}.s", f"{name}.z"], [f"{name}.wd"], axis=0),
            helper.make_node("Conv", [f"{source}.dq", f"{name}.wd", f"{name}.b"], [name], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [name], [f"{name}.relu"]),
        ]
        source = f"{name}.relu"
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["logits"], to=TensorProto.FLOAT),
    ]
    values = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 16, 16]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8]),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], constants), opset_imports=[helper.make_opsetid("", 19)]
    )
    model.ir_version = 9
    return model

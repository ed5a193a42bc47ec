"""Small typed ONNX files of ours, and jobs to build them, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from repvgg_deploy.build.compile import BuildJob
from repvgg_deploy.build.library import Gpu
from repvgg_deploy.build.recipes import Typing, tensor_types
from repvgg_deploy.files.onnx import graph_precision, read_graph, read_metadata, weighted_nodes
from repvgg_deploy.precision.fp16 import Fp16Options, to_fp16
from repvgg_deploy.precision.typed_model import extend, load_parent, write_typed
from repvgg_deploy.specs.values import BuildConfig
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model, save
from tests.precision.make_quantized import quantize_mixed, quantize_plainly

A10 = Gpu("NVIDIA A10", "8.6", "580.95.05")
SMALL = ChainOptions(widths=(8, 16), groups=(1, 1))


def make_typed(folder: Path, typing: str, kind: str | ChainOptions = SMALL, *, batch: int | None = None) -> Path:
    """An ONNX of ours.

    Args:
        folder: Where to write it.
        typing: `fp32`, `fp16`, `int8` (FP32 beside it, opset 17) or `mixed` (FP16 beside it, opset 19).
        kind: What graph.
        batch: Fixed, or None.
    """
    options = KINDS[kind] if isinstance(kind, str) else kind
    model = make_model(options)
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    path = save(folder / "fp32.onnx", model)
    if typing == "fp32":
        return path
    parent = load_parent(path)
    images = make_batches(options, count=batch or 2)
    target = folder / f"{typing}.onnx"
    if typing == "fp16":
        typed, _ = to_fp16(path, images, Fp16Options())
    else:
        graph = quantize_plainly(model, images) if typing == "int8" else quantize_mixed(model, images)
        typed = extend(parent, graph, stage="int8", options={})
    write_typed(target, typed)
    return target


def make_job(
    path: Path, config: BuildConfig | None = None, *, targets: tuple[str, ...] = ("8.6", "8.9"), **changes: Any
) -> BuildJob:
    """A job as `pipeline.build` makes it."""
    graph, spec = read_graph(path), read_metadata(path).spec
    types = tensor_types(graph, spec)
    typing = Typing(graph_precision(weighted_nodes(graph)), "float16" in types.values(), types)
    return BuildJob(path.read_bytes(), graph, spec, typing, config or BuildConfig(), targets, **changes)


def inferred_types(path: Path) -> dict[str, str]:
    """Types of all tensors as the onnx package infers them."""
    names = {
        TensorProto.FLOAT: "float32",
        TensorProto.FLOAT16: "float16",
        TensorProto.INT8: "int8",
        TensorProto.UINT8: "uint8",
        TensorProto.INT64: "int64",
    }
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {value.name: names[value.type.tensor_type.elem_type] for value in values}

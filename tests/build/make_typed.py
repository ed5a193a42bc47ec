"""Small typed ONNX files of ours, and requests to build them, without torch."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from repvgg_deploy.build.library import Gpu
from repvgg_deploy.build.options import BuildRequest
from repvgg_deploy.build.source import Source, read_source
from repvgg_deploy.files.plan_place import Library
from repvgg_deploy.precision.fp16 import Fp16Options, to_fp16
from repvgg_deploy.precision.typed_model import extend, load_parent, write_typed
from repvgg_deploy.specs.values import BuildConfig
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model, save
from tests.precision.make_quantized import quantize_mixed, quantize_plainly

A10 = Gpu("NVIDIA A10", "8.6", "580.95.05", "13.0")
SMALL = ChainOptions(widths=(8, 16), groups=(1, 1))


def make_typed(folder: Path, typing: str, kind: str | ChainOptions = SMALL, *, batch: int | None = None) -> Path:
    """An ONNX of ours, with the FP32 graph that it was made of beside it.

    Args:
        folder: Where to write them.
        typing: `fp32`, `fp16`, `int8` (FP32 beside it, opset 17) or `mixed` (FP16 beside it, opset 19).
        kind: What graph.
        batch: Fixed, or None.
    """
    for name, data in _typed_files(typing, KINDS[kind] if isinstance(kind, str) else kind, batch).items():
        (folder / name).write_bytes(data)
    return folder / f"{typing}.onnx"


@functools.cache
def _typed_files(typing: str, options: ChainOptions, batch: int | None) -> dict[str, bytes]:
    """By name; made once a run."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options)
        if batch is not None:
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = batch
        path = save(Path(folder) / "fp32.onnx", model)
        images = make_batches(options, count=batch or 2)
        if typing == "fp16":
            write_typed(path.with_name("fp16.onnx"), to_fp16(path, images, Fp16Options())[0])
        elif typing != "fp32":
            graph = quantize_plainly(model, images) if typing == "int8" else quantize_mixed(model, images)
            write_typed(path.with_name(f"{typing}.onnx"), extend(load_parent(path), graph, stage="int8", options={}))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def make_request(
    library: Library,
    model: Path | Source,
    config: BuildConfig | None = None,
    *,
    targets: tuple[str, ...] = ("8.6", "8.9"),
    **more: Any,
) -> BuildRequest:
    """A request as `build_plan` makes it of a typed graph.

    Args:
        library: That builds.
        model: The ONNX.
        config: None for the defaults.
        targets: Compute capabilities.
        more: Other fields of a request; `gpu` is None by default.
    """
    source = read_source(model) if isinstance(model, Path) else model
    return BuildRequest(source, config or BuildConfig(), library, **{"gpu": None, **more}, targets=targets)


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

"""A model that takes long for its size: so that requests pile up while a test looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.runtime.make_model import ModelOptions, make_metadata, write_bound

_WIDTH = 1500
_ROWS = 256  # enough for the processor to compute, not to wait for memory: how fast that is differs least between machines
_LAYERS = 40


def make_slow_onnx(path: Path) -> Path:
    """images float32 (N, 3, 16, 16) → logits float32 (N, 7): its first seven pixels, after 46 billion operations in vain, 0.2 s of a fast core."""
    options = ModelOptions()
    constants = {
        "widen": np.eye(768, _WIDTH, dtype=np.float32),
        "identity": np.eye(_WIDTH, dtype=np.float32),
        "narrow": np.eye(_WIDTH, 7, dtype=np.float32),
        "axis": np.array([1], np.int64),
        "rows": np.array([1, _ROWS, 1], np.int64),
        "first": np.array(0, np.int64),
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "widen"], ["wide"]),
        helper.make_node("Unsqueeze", ["wide", "axis"], ["one"]),
        helper.make_node("Expand", ["one", "rows"], ["x0"]),
        *(helper.make_node("MatMul", [f"x{index}", "identity"], [f"x{index + 1}"]) for index in range(_LAYERS)),
        helper.make_node("Gather", [f"x{_LAYERS}", "first"], ["last"], axis=1),
        helper.make_node("MatMul", ["last", "narrow"], ["logits"]),
    ]
    metadata = make_metadata(options)
    values = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.shape)) for t in (metadata.spec.input, *metadata.spec.outputs)]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "slow", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return write_bound(path, model.SerializeToString(), metadata)

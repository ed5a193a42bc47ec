"""ONNX Runtime up to 1.23 (the last for Python 3.10) cuts digits off in a QuantizeLinear of FP16, where ONNX rounds to nearest.

Source: https://github.com/microsoft/onnxruntime/pull/32452. An INT8 graph with FP16 scales would be judged, and look, far worse than it is.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


@functools.cache
def rounds_halves() -> bool:
    """Whether this ONNX Runtime rounds to nearest in a QuantizeLinear of FP16. Asked of it once, for no version number says it for sure."""
    values = [helper.make_tensor_value_info(name, kind, [1]) for name, kind in (("x", TensorProto.FLOAT16), ("y", TensorProto.INT8))]
    constants = [numpy_helper.from_array(np.float16(1.0), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    graph = helper.make_graph([helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], "one", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"x": np.array([1.75], np.float16)})[0][0]) == 2


def widen_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with every FP16 QuantizeLinear done in FP32, where every ONNX Runtime rounds: its input is cast, its scale stored again.

    Args:
        model: Not changed; given back as it is where it has no such node.
    """
    halves = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    if not any(node.op_type == "QuantizeLinear" and node.input[1] in halves for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes, scales = [], {}
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in halves:
            cast, scale = f"{node.output[0]}.fp32", f"{node.input[1]}.fp32"
            nodes.append(helper.make_node("Cast", [node.input[0]], [cast], name=cast, to=TensorProto.FLOAT))
            scales[scale] = numpy_helper.to_array(halves[node.input[1]]).astype(np.float32)
            node.input[0], node.input[1] = cast, scale
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in scales.items())
    return result

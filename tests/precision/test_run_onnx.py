from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.precision import run_onnx
from repvgg_deploy.precision.int8 import FAST, quantize_graph
from repvgg_deploy.precision.run_onnx import rounds_halves, widen_quantizers
from tests.precision.make_chain import make_batches, make_model


def make_quantizer(scale: np.ndarray) -> onnx.ModelProto:
    kind = TensorProto.FLOAT16 if scale.dtype == np.float16 else TensorProto.FLOAT
    values = [
        helper.make_tensor_value_info("x", kind, ["n"]),
        helper.make_tensor_value_info("y", TensorProto.INT8, ["n"]),
    ]
    constants = [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], "one", values[:1], values[1:], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    return model


def test_widened_quantizer_rounds_every_half_to_nearest_in_every_onnx_runtime() -> None:
    x = np.arange(-2000, 2000, dtype=np.float16) / np.float16(8)
    scale = np.float16(0.75)
    model = make_quantizer(scale)
    session = onnxruntime.InferenceSession(
        widen_quantizers(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    assert model.graph.node[0].input[0] == "x" and len(model.graph.initializer) == 2


def test_graph_without_fp16_scales_is_given_back_as_it_is() -> None:
    model = make_quantizer(np.float32(0.5))
    assert widen_quantizers(model) is model


def test_probe_says_what_a_session_does() -> None:
    session = onnxruntime.InferenceSession(
        make_quantizer(np.float16(1)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert rounds_halves() == (session.run(None, {"x": np.array([2.75], np.float16)})[0][0] == 3)


def test_where_onnx_runtime_truncates_graphs_are_run_widened(monkeypatch) -> None:
    model, batches = make_model(), make_batches()
    graph, _ = quantize_graph(model, batches, FAST)
    seen: list[onnx.ModelProto] = []

    def widen(given: onnx.ModelProto) -> onnx.ModelProto:
        seen.append(given)
        return widen_quantizers(given)

    monkeypatch.setattr(run_onnx, "rounds_halves", lambda: False)
    monkeypatch.setattr(run_onnx, "widen_quantizers", widen)
    widened = [values["logits"] for values in run_onnx.run_tensors(graph, ["logits"], batches)]
    monkeypatch.undo()
    assert len(seen) == 1
    if rounds_halves():
        plain = [values["logits"] for values in run_onnx.run_tensors(graph, ["logits"], batches)]
        scale = max(float(np.abs(one).max()) for one in plain)
        # A division in FP16 may round a tie another way than one in FP32: single steps of INT8, here and there.
        assert (
            max(float(np.abs(one.astype(np.float32) - two).max()) for one, two in zip(plain, widened, strict=True))
            < 0.05 * scale
        )

"""What a CPU backend is given of a typed INT8 graph, and why: by the CPU, by the graph. The answers stay those of the graph."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from repvgg_deploy.runtime.cpu import int8
from repvgg_deploy.runtime.cpu.int8 import explain_inexact_products, prepare
from repvgg_deploy.runtime.engine import Engine
from tests.precision.compare import sqnr, values
from tests.precision.make_chain import KINDS, make_batches, make_model, save
from tests.precision.make_quantized import quantize_mixed, quantize_plainly

MAKE: dict[str, Any] = {
    "INT8": quantize_plainly,
    "INT8+FP16": quantize_mixed,
    "FP16 io": lambda model, batches: quantize_mixed(model, batches, io="fp16"),
}
# Values on the edge of a rounding, which biases rounded to the step of the products move (34 dB in graphs whose
# channels differ by six octaves), and FP16 that the graph is not computed in any more; INT8 itself costs these graphs
# 10 to 15 dB.
TOLERANCE_DB = {"INT8": 30.0, "INT8+FP16": 24.0, "FP16 io": 24.0}


def pretend_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, machine: str = "x86_64", flags: str | None = None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t: none\n", encoding="utf-8")
    monkeypatch.setattr(int8, "_CPUINFO", path)


@pytest.mark.parametrize(
    ("machine", "flags", "reason"),
    [
        ("x86_64", "avx2 avx512f avx512_vnni", None),
        ("AMD64", "avx2 avx_vnni", None),
        ("x86_64", "avx2 avx512f avx512bw", "no VNNI"),
        ("x86_64", "avx2", "no VNNI"),
        ("x86_64", None, "not known"),
        ("aarch64", None, None),
        ("arm64", "", None),
    ],
)
def test_products_are_exact_with_vnni_and_on_arm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, flags: str | None, reason: str | None
) -> None:
    pretend_cpu(monkeypatch, tmp_path, machine=machine, flags=flags)
    found = explain_inexact_products()
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_graph_has_unsigned_activations_where_products_are_exact_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, target: Any
) -> None:
    path = save(tmp_path / "m.onnx", quantize_mixed(make_model(), make_batches(count=4)))
    for flags, kinds, said in (("avx_vnni", {2, 3}, "unsigned for speed"), ("avx2", {3}, "no VNNI")):
        pretend_cpu(monkeypatch, tmp_path, flags=flags)
        with caplog.at_level(logging.INFO, logger="repvgg_deploy"):
            data = prepare(path, target)
        assert isinstance(data, bytes)
        model = onnx.load_model_from_string(data)
        stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        assert {stored[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"} <= kinds
        assert 10 not in stored.values()
        assert said in caplog.text
        caplog.clear()


def test_graph_that_cannot_be_rewritten_is_run_as_it_stands_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantize_mixed(make_model(), make_batches(count=4))
    model.graph.node[-1].name = "last"
    model.graph.node.insert(1, onnx.helper.make_node("Erf", [model.graph.node[0].output[0]], ["nobody reads this"]))
    path = save(tmp_path / "m.onnx", model)
    assert prepare(path, "onnxruntime") == str(path)
    assert "slow on a CPU: it computes in FP16, with Erf" in caplog.text


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("typing", MAKE)
@pytest.mark.parametrize("kind", KINDS)
def test_engine_answers_as_the_graph_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, typing: str, backend: Any, vnni: bool
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    batches = make_batches(KINDS[kind], 16)
    graph = MAKE[typing](make_model(KINDS[kind]), batches)
    half = graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    truth = values(graph, [batch.astype(np.float16) for batch in batches] if half else batches)
    pretend_cpu(monkeypatch, tmp_path, flags="avx_vnni" if vnni else "avx2")
    with Engine(save(tmp_path / "m.onnx", graph), backend=backend) as engine:
        found = [engine.infer(batch) for batch in batches]
    parts = [scores(result) for result in found]
    assert sqnr([np.concatenate(part) for part in zip(*parts, strict=True)], truth) > TOLERANCE_DB[typing]


def scores(result: Any) -> list[np.ndarray]:
    if isinstance(result, np.ndarray):
        return [result]
    return [values for name, values in result.items() if name != "classes"]


def test_engine_rounds_to_fp16_scales_in_every_version_of_onnx_runtime(tmp_path: Path) -> None:
    """Up to 1.23 ONNX Runtime truncates there, silently; `values` does without that fault."""
    batches = make_batches(count=16)
    graph = quantize_mixed(make_model(), batches)
    with Engine(save(tmp_path / "m.onnx", graph)) as engine:
        found = np.concatenate([engine.infer(batch) for batch in batches])
    assert sqnr([found], values(graph, batches)) > TOLERANCE_DB["INT8+FP16"]

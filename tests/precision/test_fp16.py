from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from repvgg_deploy import onnx_file
from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.precision.execute import run_tensors
from repvgg_deploy.precision.fp16 import Fp16Options, to_fp16, write_halves
from repvgg_deploy.precision.typed_model import write_typed
from tests.precision.make_chain import KINDS, make_batches, make_model, save


def values(model: onnx.ModelProto, batches: list[np.ndarray]) -> list[np.ndarray]:
    names = [value.name for value in model.graph.output if value.name != "classes"]
    found = list(run_tensors(model, names, batches))
    return [np.concatenate([v[name] for v in found]) for name in names]


def stretch(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Half of the first layer's channels grown or shrunk by `factor`, and the next layer's columns the other way: the same function."""
    for tensor in model.graph.initializer:
        if tensor.name in ("stage0.weight", "stage0.bias", "stage1.weight"):
            array = numpy_helper.to_array(tensor).copy()
            if tensor.name == "stage1.weight":
                array[:, ::2] /= factor
            else:
                array[::2] *= factor
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_every_kind_of_graph_is_close_and_keeps_its_inputs_and_outputs(tmp_path: Path, kind: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind])
    path = save(tmp_path / "m.onnx", model)
    typed, report = to_fp16(path, batches)
    onnx.checker.check_model(typed.model, full_check=True)
    assert report.rescaled == {}
    for truth, found in zip(values(model, batches), values(typed.model, batches), strict=True):
        assert found.dtype == truth.dtype == np.float32
        # FP16 rounds to 5e-4; six layers and SE.
        assert np.abs(found - truth).max() <= 5e-3 * np.abs(truth).max()
    layers = {name for node in typed.model.graph.node if node.op_type in ("Conv", "Gemm") for name in node.input[1:]}
    assert all(t.data_type == TensorProto.FLOAT16 for t in typed.model.graph.initializer if t.name in layers)
    write_typed(tmp_path / "h.onnx", typed)
    assert onnx_file.read_metadata(tmp_path / "h.onnx").history[-1].stage == "fp16"


@pytest.mark.parametrize("factor", [1e6, 1e-7], ids=["overflow", "subnormal"])
@pytest.mark.parametrize("kind", ["plain", "se_before", "grouped"])
def test_fp16_network_that_naive_conversion_breaks_comes_out_right(tmp_path: Path, kind: str, factor: float) -> None:
    model, batches = stretch(make_model(KINDS[kind]), factor), make_batches(KINDS[kind])
    truth = values(model, batches)[0]
    with np.errstate(all="ignore"):
        naive = values(write_halves(model), batches)[0]
    assert not np.abs(naive - truth).max() <= 0.02 * np.abs(truth).max()  # wrong, or NaN
    typed, report = to_fp16(save(tmp_path / "m.onnx", model), batches)
    assert report.rescaled["stage0.conv"] >= 1
    assert np.abs(values(typed.model, batches)[0] - truth).max() <= 5e-3 * np.abs(truth).max()  # as above


def test_fp16_what_cannot_be_rescaled_is_refused(tmp_path: Path) -> None:
    model = make_model()
    bias = next(t for t in model.graph.initializer if t.name == "linear.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(10, 1e5, np.float32), "linear.bias"))
    path = save(tmp_path / "m.onnx", model)
    with pytest.raises(CalibrationError, match="linear: FP16 ends at 65504"):
        to_fp16(path, make_batches())
    with pytest.raises(CalibrationError, match="no images"):
        to_fp16(path, [])
    with pytest.raises(CalibrationError, match="margin"):
        Fp16Options(0.5)

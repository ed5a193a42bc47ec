from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from repvgg_deploy import Engine
from repvgg_deploy.errors import CalibrationError, ModelError
from repvgg_deploy.files import onnx as onnx_file
from repvgg_deploy.precision.check import check_types
from repvgg_deploy.precision.fp16 import Fp16Options, draw_batches, measure_ranges, to_fp16
from repvgg_deploy.precision.halves import write_halves
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.typed_model import write_typed
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import METADATA_KEY, ModelMetadata, TensorSpec
from tests.precision.compare import STRETCHED, batches_for, close, stretch, values
from tests.precision.make_chain import KINDS, make_batches, make_model, metadata_of, save
from tests.precision.make_variant import state_statistics
from tests.precision.typed_faults import put


def naive(model: onnx.ModelProto) -> onnx.ModelProto:
    """What tools do that only change types: what exceeds FP16 becomes infinite."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    with np.errstate(over="ignore"):
        for tensor in result.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and tensor.name not in ("mean", "std"):
                put(result, tensor.name, numpy_helper.to_array(tensor).astype(np.float16))
    return write_halves(result)


@pytest.mark.parametrize("io", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_every_kind_of_graph_is_close_and_its_inputs_and_outputs_are_as_asked_for(
    tmp_path: Path, kind: str, io: str
) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind])
    path = save(tmp_path / "m.onnx", model)
    typed, report = to_fp16(path, batches, Fp16Options(io=io))
    onnx.checker.check_model(typed.model, full_check=True)
    assert (report.rescaled, report.source, report.images) == ({}, "images", 64)
    found = values(typed.model, batches_for(kind, io))
    assert close(found, values(model, batches))
    assert {value.dtype.name for value in found} == {"float16" if io == "fp16" else "float32"}
    layers = {name for node in typed.model.graph.node if node.op_type in ("Conv", "Gemm") for name in node.input[1:]}
    assert all(t.data_type == TensorProto.FLOAT16 for t in typed.model.graph.initializer if t.name in layers)


@pytest.mark.parametrize("io", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["plain", "uint8_top5", "probabilities"])
def test_fp16_written_file_says_its_types_and_runs_in_the_engine(tmp_path: Path, kind: str, io: str) -> None:
    model = make_model(KINDS[kind])
    typed, _ = to_fp16(save(tmp_path / "m.onnx", model), make_batches(KINDS[kind]), Fp16Options(io=io))
    write_typed(tmp_path / "h.onnx", typed)
    metadata = onnx_file.read_metadata(tmp_path / "h.onnx")
    assert metadata.history[-1].stage == "fp16"
    assert metadata.history[-1].options == {
        "margin": 8.0,
        "io": io,
        "ranges": "images",
        "images": 64,
        "rescaled_channels": 0,
    }
    wanted = "float16" if io == "fp16" else "float32"
    assert metadata.spec.input.dtype == ("uint8" if kind == "uint8_top5" else wanted)
    assert [output.dtype for output in metadata.spec.outputs] == (
        [wanted, "int64"] if kind == "uint8_top5" else [wanted]
    )
    with Engine(tmp_path / "h.onnx") as engine:
        assert engine.spec == metadata.spec
        engine.infer(batches_for(kind, io)[0])


@pytest.mark.parametrize("factor", [1e6, 1e-7], ids=["overflow", "subnormal"])
@pytest.mark.parametrize("kind", STRETCHED)
def test_fp16_network_that_naive_conversion_breaks_comes_out_right(kind: str, factor: float) -> None:
    model, batches = stretch(make_model(KINDS[kind]), factor, STRETCHED[kind]), make_batches(KINDS[kind])
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    truth = values(model, batches)
    with np.errstate(all="ignore"):
        assert not close(values(naive(model), batches), truth)  # wrong, or NaN
    typed, report = to_fp16(model, batches)
    assert report.rescaled[f"{STRETCHED[kind]}.conv"] >= 1
    smallest, largest = report.factors[f"{STRETCHED[kind]}.conv"]
    assert np.log2([smallest, largest]).round().tolist() == np.log2([smallest, largest]).tolist()
    assert (largest > 1) if factor > 1 else (smallest < 1)
    assert close(values(typed.model, batches), truth)


@pytest.mark.parametrize("factor", [1.0, 1e6, 1e-7], ids=["as it is", "overflow", "subnormal"])
@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("source", ["statistics", "synthetic"])
def test_fp16_without_images_comes_out_right_and_says_what_it_relied_on(kind: str, factor: float, source: str) -> None:
    model, batches = stretch(make_model(KINDS[kind]), factor, STRETCHED[kind]), make_batches(KINDS[kind])
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    if source == "statistics":
        measured = measure_ranges(read_network(model), batches)
        state_statistics(
            model, {name: value * 4 for name, value in measured.items() if ".se." not in name and name != "logits"}
        )
    typed, report = to_fp16(model)
    assert (report.source, report.images) == (source, 8)
    assert typed.metadata.history[-1].options["ranges"] == source
    assert close(values(typed.model, batches), values(model, batches))


def test_fp16_statistics_that_drawn_images_do_not_reach_are_believed() -> None:
    model = make_model()
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    measured = measure_ranges(read_network(model), make_batches())
    state_statistics(model, {"stage2.conv": measured["stage2.conv"] * 1e5})
    _, report = to_fp16(model)
    assert list(report.rescaled) == ["stage2.conv"]
    assert report.largest["stage2.conv"] == pytest.approx(measured["stage2.conv"].max() * 1e5, rel=1e-5)


def test_fp16_statistics_of_another_graph_are_refused() -> None:
    model = make_model()
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    with pytest.raises(ModelError, match=r"7 channels of stage0\.conv, which has 8"):
        to_fp16(state_statistics(model, {"stage0.conv": np.ones(7)}))


def test_fp16_statistics_of_what_is_no_layer_are_left_aside() -> None:
    model = make_model()
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    alone, report = to_fp16(state_statistics(model, {}))
    more, same = to_fp16(state_statistics(model, {"stage9.conv": np.ones(8)}))
    assert report.largest == same.largest
    assert alone.model.graph == more.model.graph


def test_fp16_gate_that_overflows_is_saturated_as_in_fp32() -> None:
    model, batches = make_model(KINDS["se_after"]), make_batches(KINDS["se_after"])
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata_of(model)))
    put(model, "stage2.se.up.bias", np.where(np.arange(16) % 2, 6e4, -6e4).astype(np.float32))
    typed, _ = to_fp16(model, batches)
    assert close(values(typed.model, batches), values(model, batches))


def test_fp16_layer_that_cannot_be_rescaled_stays_in_fp32(tmp_path: Path) -> None:
    """The classifier alone: what reads it is an output of the graph."""
    model, batches = make_model(), make_batches()
    put(model, "linear.bias", np.full(10, 1e5, np.float32))
    typed, report = to_fp16(save(tmp_path / "m.onnx", model), batches)
    assert report.islands == ("logits",)
    kinds = check_types(typed.model)
    assert {kinds[name] for name in ("linear.weight", "linear.bias", "logits")} == {TensorProto.FLOAT}
    assert kinds["stage4.conv.weight" if "stage4.conv.weight" in kinds else "stage4.weight"] == TensorProto.FLOAT16
    assert close(values(typed.model, batches), values(model, batches))
    assert typed.metadata.history[-1].options["fp32"] == "logits"


def test_fp16_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", make_model())
    with pytest.raises(CalibrationError, match="no images"):
        to_fp16(path, [])
    with pytest.raises(CalibrationError, match="NaN"):
        to_fp16(path, [np.full((2, 3, 16, 16), np.nan, np.float32)])
    model = make_model()
    put(model, "linear.bias", np.full(10, 1e5, np.float32))
    with pytest.raises(CalibrationError, match=r"linear\.bias holds 1e\+05"):
        write_halves(model)


@pytest.mark.parametrize("options", [{"margin": 0.5}, {"margin": 1e6}, {"io": "bf16"}])
def test_fp16_options_that_cannot_hold_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(CalibrationError, match=next(iter(options)) if "margin" in options else "bf16"):
        Fp16Options(**options)


def test_draw_batches_are_as_the_model_takes_them_and_always_the_same() -> None:
    spec = metadata_of(make_model()).spec
    assert [batch.shape for batch in draw_batches(spec)] == [(8, 3, 16, 16)]
    assert all(np.array_equal(one, other) for one, other in zip(draw_batches(spec), draw_batches(spec), strict=True))
    assert np.abs(draw_batches(spec)[0]).max() < 3  # normalised
    fixed = dataclasses.replace(spec, input=TensorSpec("input", "float32", (3, 3, "height", "width"), "NCHW"))
    assert [batch.shape for batch in draw_batches(fixed)] == [(3, 3, 16, 16)] * 3
    uint8 = dataclasses.replace(spec, input=TensorSpec("input", "uint8", ("batch", 16, 20, 3), "NHWC"))
    (drawn,) = draw_batches(uint8)
    assert (drawn.dtype, drawn.shape, drawn.min(), drawn.max()) == (np.uint8, (8, 16, 20, 3), 0, 255)
    with pytest.raises(CalibrationError, match="none can be drawn"):
        draw_batches(dataclasses.replace(spec, preprocessing=None))


def test_draw_batches_metadata_that_is_read_back_gives_the_same_images() -> None:
    metadata = metadata_of(make_model())
    again = codec.loads(ModelMetadata, codec.dumps(metadata))
    assert np.array_equal(draw_batches(metadata.spec)[0], draw_batches(again.spec)[0])

"""Reading TensorRT's layer inspector: both shapes of its JSON, shares of the work, and engines that fell back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from repvgg_deploy.build.inspect import WeightedLayer, measure, read_layers, require_honest
from repvgg_deploy.errors import BuildError

GRAPH = (
    WeightedLayer("stage0.conv", "int8", 20),
    WeightedLayer("stage1.0.conv", "int8", 480),
    WeightedLayer("stage2.0.conv", "int8", 490),
    WeightedLayer("linear", "int8", 10),
)
TAILS: dict[str, dict[str, Any]] = {
    "8.5 to 10": {"Bindings": ["input", "logits"]},
    "11": {"I/O Tensors": [{"Name": "input", "Dimensions": [1, 3, 16, 16], "Format/Datatype": "Float"}]},
}


def layer(name: str, kind: str, *, weights: str | None = None, **more: Any) -> dict[str, Any]:
    """A layer in the words of 8.x, where a format tells the type."""
    tensor = {"Name": "x", "Dimensions": [1, 8, 16, 16], "Format/Datatype": kind}
    result = {"Name": name, "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor], **more}
    return result if weights is None else {**result, "Weights": {"Type": weights, "Count": 1}}


def answer(layers: list[Any], tail: str = "11") -> str:
    return json.dumps({"Layers": layers, **TAILS[tail]})


INT8, FP16 = (
    "Thirty-two wide channel vectorized row major Int8 format",
    "Channel major FP16 format where channel % 8 == 0",
)
ALL_INT8 = [
    layer("stage0.conv + stage0.relu", INT8),
    layer("stage1.0.conv + stage1.0.relu", INT8),
    layer("stage2.0.conv + stage2.0.relu", INT8),
    layer("linear", "Int8"),
]


@pytest.mark.parametrize("tail", TAILS)
def test_plan_as_its_graph_is_honest_in_both_shapes(tail: str) -> None:
    report = measure(read_layers(answer(ALL_INT8, tail)), GRAPH)
    assert (report.shares, report.seen, report.fallen) == ({"int8": 1.0}, 1.0, ())
    assert report.inspected and report.precision == "int8"
    require_honest(report, "TensorRT")


def test_layers_of_several_profiles_are_known_and_the_widest_counts() -> None:
    second = [{**one, "Name": f"{one['Name']} [profile 1]"} for one in ALL_INT8]
    assert measure(read_layers(answer(second)), GRAPH).seen == 1.0
    second[1] = layer("stage1.0.conv + stage1.0.relu [profile 1]", FP16)
    for texts in (
        (answer([*ALL_INT8, *second]),),
        (answer(ALL_INT8), answer(second)),
        (answer(second), answer(ALL_INT8)),
    ):
        report = measure(read_layers(*texts), GRAPH)
        assert report.fallen == (("stage1.0.conv", "int8", "fp16"),)


def test_fallback_of_most_of_the_work_is_an_error_that_names_the_layers() -> None:
    layers = [
        ALL_INT8[0],
        layer("stage1.0.conv + stage1.0.relu", FP16),
        layer("stage2.0.conv", "Row major linear FP32"),
        ALL_INT8[3],
    ]
    report = measure(read_layers(answer(layers)), GRAPH)
    assert report.shares == pytest.approx({"int8": 0.03, "fp16": 0.48, "fp32": 0.49})
    with pytest.raises(BuildError) as caught:
        require_honest(report, "TensorRT 10.9")
    assert "TensorRT 10.9 fell back: 97.0% of the multiply-accumulates" in caught.value.message
    assert "stage1.0.conv (int8 asked, fp16 built), stage2.0.conv (int8 asked, fp32 built)" in caught.value.message


def test_stem_in_a_wider_type_is_tolerated_and_counted() -> None:
    report = measure(read_layers(answer([layer("stage0.conv", "Half"), *ALL_INT8[1:]])), GRAPH)
    assert report.fallen == (("stage0.conv", "int8", "fp16"),) and report.shares == {"fp16": 0.02, "int8": 0.98}
    require_honest(report, "TensorRT")


@pytest.mark.parametrize("kind", ["Reformat", "CaskConvolution"])
def test_copy_into_a_convolution_is_not_what_it_computes_in(kind: str) -> None:
    """TensorRT 8.5 names an INT8 convolution, and the copy before it, after weights and QuantizeLinear, too."""
    name = "stage1.0.weight + stage1.0.quantize + stage1.0.conv + stage1.0.relu"
    copy = layer(f"Reformatting CopyNode for Input Tensor 0 to {name}", "Row major linear FP32", LayerType=kind)
    report = measure(read_layers(answer([ALL_INT8[0], copy, layer(name, INT8), *ALL_INT8[2:]])), GRAPH)
    assert report.fallen == () and report.shares == {"int8": 1.0}


def test_narrower_type_than_asked_is_no_fallback() -> None:
    graph = tuple(WeightedLayer(wanted.name, "fp32", wanted.macs) for wanted in GRAPH)
    report = measure(read_layers(answer(ALL_INT8)), graph)
    assert report.inspected and report.fallen == () and report.shares == {"int8": 1.0}
    require_honest(report, "TensorRT")


def test_integer_weights_that_meet_floats_are_no_int8() -> None:
    found = read_layers(answer([layer("stage1.0.conv", "Row major linear FP32", weights="Int8")]))
    assert found == {"stage1.0.conv": "fp32"}


def test_dynamic_shapes_leave_the_type_of_the_weights() -> None:
    found = read_layers(answer([layer("stage1.0.conv", "N/A due to dynamic shapes", weights="Half")], "8.5 to 10"))
    assert found == {"stage1.0.conv": "fp16"}


def test_kernel_name_is_the_last_resort() -> None:
    tactic = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs"
    assert read_layers(answer([{"Name": "stage1.0.conv", "TacticName": tactic}])) == {"stage1.0.conv": "int8"}


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("stage1.0.conv + stage1.0.relu", ""),
        ("stage1.0.conv || stage1.1.conv", ""),
        ("__myl_Conv_0x12ab", "[ONNX Layer: stage1.0.conv]\x1e[ONNX Layer: stage1.0.relu]"),
        ("PWN(stage1.0.conv)", ""),
    ],
)
def test_fused_layers_are_taken_apart(name: str, metadata: str) -> None:
    assert read_layers(answer([layer(name, INT8, Metadata=metadata)]))["stage1.0.conv"] == "int8"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Half", "fp16"),
        ("Channel major FP16 format where channel % 4 == 0", "fp16"),
        ("BFloat16", "bf16"),
        ("Four wide channel vectorized row major Int8 format", "int8"),
        ("N/A due to dynamic shapes", None),
        ("Int64", None),
    ],
)
def test_types_are_read_from_the_words_of_the_inspector(text: str, kind: str | None) -> None:
    assert read_layers(answer([layer("x", text)])).get("x") == kind


def test_plan_without_detail_is_not_inspected() -> None:
    report = measure(read_layers(answer(["stage0.conv + stage0.relu", "stage1.0.conv", "linear"], "8.5 to 10")), GRAPH)
    assert (report.seen, report.inspected, report.shares) == (0.0, False, {})
    require_honest(report, "TensorRT")


def test_half_of_the_work_must_be_seen() -> None:
    seen = measure(read_layers(answer(ALL_INT8[2:])), GRAPH)
    assert seen.seen == 0.5 and seen.inspected
    assert not measure(read_layers(answer(ALL_INT8[1:2])), GRAPH).inspected


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"Layers": 3, "Bindings": []}', '{"Layers": []}'])
def test_answer_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(BuildError, match="not understood"):
        read_layers(text)

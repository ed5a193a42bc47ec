"""Every typed graph is parsed and built by NVIDIA's own builder, and what our check refuses is shown to it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from repvgg_deploy.precision.check import check_halves, check_quantized
from repvgg_deploy.precision.fp16 import Fp16Options, to_fp16
from repvgg_deploy.precision.halves import write_halves
from repvgg_deploy.precision.int8 import FAST, quantize_graph
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.specs.values import VariantSpec
from repvgg_deploy.specs.variants import get_variant
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model
from tests.precision.make_graph import GRAPHS, OPERATORS, draw, make_around
from tests.precision.make_quantized import quantize_mixed, quantize_plainly
from tests.precision.make_variant import SMALL_G4, images_for, make_variant
from tests.precision.rtx import Built, build, needs_rtx
from tests.precision.typed_faults import BOTH_TARGETS, HALF, TRT8, TRT10, Fault

pytestmark = needs_rtx

SAMPLE = str(Path(__file__).resolve().parents[2] / "models" / "sample" / "variant.toml")
VARIANTS: dict[str, Callable[[], VariantSpec]] = {
    "A0": lambda: get_variant("A0"),
    "custom": lambda: get_variant(SAMPLE),
    "g4": lambda: SMALL_G4,
    "B1g4": lambda: get_variant("B1g4"),
    "B2": lambda: get_variant("B2"),
    "D2se": lambda: get_variant("D2se"),
}
KEPT = ("stage0.conv", "stage1.0.conv")
BIG = ("B1g4", "B2", "D2se")


@functools.lru_cache(maxsize=1)
def fp32(variant: str) -> onnx.ModelProto:
    return make_variant(VARIANTS[variant]())


def half(model: onnx.ModelProto, io: str) -> onnx.ModelProto:
    return to_fp16(model, images_for(model), Fp16Options(io=io))[0].model


TYPINGS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "FP32": lambda model: model,
    "FP16": lambda model: half(model, "fp32"),
    "FP16, FP16 inputs": lambda model: half(model, "fp16"),
    "INT8": lambda model: quantize_plainly(model, images_for(model)),
    "INT8+FP16": lambda model: quantize_mixed(model, images_for(model)),
    "INT8+FP16, FP16 inputs": lambda model: quantize_mixed(model, images_for(model), io="fp16"),
    "INT8+FP16, two layers kept": lambda model: quantize_mixed(model, images_for(model), kept=KEPT),
}


def accepted(model: onnx.ModelProto) -> Built:
    found = build(model)
    assert (found.plan_bytes > 0, found.errors) == (True, ())
    return found


@pytest.mark.parametrize("typing", TYPINGS)
@pytest.mark.parametrize(
    "variant", [*(v for v in VARIANTS if v not in BIG), *(pytest.param(v, marks=pytest.mark.slow) for v in BIG)]
)
def test_rtx_every_typed_graph_of_a_variant_is_built(variant: str, typing: str) -> None:
    found = accepted(TYPINGS[typing](fp32(variant)))
    wanted = "HALF" if typing.endswith("FP16 inputs") else "FLOAT"
    assert found.types == {"input": wanted, "logits": wanted}


@pytest.mark.parametrize("typing", ["FP16", "INT8", "INT8+FP16"])
@pytest.mark.parametrize("name", [*GRAPHS, *(pytest.param(name, marks=pytest.mark.slow) for name in OPERATORS)])
def test_rtx_every_network_that_is_no_chain_is_built(name: str, typing: str) -> None:
    model = GRAPHS[name]() if name in GRAPHS else make_around(name)
    if typing == "FP16":
        graph = write_halves(read_network(model).model)
    else:
        steps = FAST if typing == "INT8" else dataclasses.replace(FAST, target="trt10")
        graph = quantize_graph(model, draw(16), steps)[0]
    assert accepted(graph).plan_bytes > 0


def test_rtx_plans_hold_weights_of_the_type_that_the_graph_has() -> None:
    # 3×3 weights are most of A0: 25 MB in FP32. In each plan come kernels, some 2 to 4 MB.
    sizes = {
        typing: accepted(TYPINGS[typing](fp32("A0"))).plan_bytes for typing in ("FP32", "FP16", "INT8", "INT8+FP16")
    }
    assert sizes["FP16"] < 0.6 * sizes["FP32"]
    assert sizes["INT8"] < 0.8 * sizes["FP16"]
    assert sizes["INT8+FP16"] < 0.8 * sizes["FP16"]


@pytest.mark.parametrize("typing", [name for name in TYPINGS if "kept" not in name])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_rtx_every_kind_of_graph_is_built_in_every_type(kind: str, typing: str) -> None:
    model = make_model(KINDS[kind])
    images = make_batches(KINDS[kind], 2)
    io = "fp16" if typing.endswith("FP16 inputs") else "fp32"
    if typing.startswith("INT8"):
        model = quantize_mixed(model, images, io=io) if "FP16" in typing else quantize_plainly(model, images)
    elif typing != "FP32":
        model = write_halves(model, io=io)
    found = accepted(model)
    wanted = "HALF" if io == "fp16" else "FLOAT"
    assert {name for name in found.types if name not in ("input", "classes") and found.types[name] != wanted} == set()
    assert found.types["input"] == ("UINT8" if kind == "uint8_top5" else wanted)


@pytest.mark.parametrize("tail", ["top5", "features"])
def test_rtx_uint8_variant_with_other_outputs_is_built(tail: str) -> None:
    model = make_variant(SMALL_G4, ChainOptions(uint8=tail == "top5", tail=tail), size=40)
    for typing in ("FP16", "INT8", "INT8+FP16"):
        assert accepted(TYPINGS[typing](model)).types["input"] == ("UINT8" if tail == "top5" else "FLOAT")


def _assert_shown(fault: Fault, graph: onnx.ModelProto) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fault.change(graph)
    found = build(graph)
    if fault.parser is None:
        assert (found.plan_bytes > 0, bool(fault.why)) == (True, True), found.errors
    else:
        assert any(fault.parser in error for error in found.errors), found.errors


@pytest.mark.parametrize("name", [*BOTH_TARGETS, *TRT8])
def test_rtx_faults_of_int8_graphs_are_refused_or_taken_as_we_say(name: str) -> None:
    graph = quantize_plainly(make_model(), make_batches(count=2))
    check_quantized(graph)
    _assert_shown({**BOTH_TARGETS, **TRT8}[name], graph)


@pytest.mark.parametrize("name", [*BOTH_TARGETS, *TRT10])
def test_rtx_faults_of_mixed_graphs_are_refused_or_taken_as_we_say(name: str) -> None:
    graph = quantize_mixed(make_model(), make_batches(count=2))
    check_quantized(graph, target="trt10")
    _assert_shown({**BOTH_TARGETS, **TRT10}[name], graph)


@pytest.mark.parametrize("name", HALF)
def test_rtx_faults_of_fp16_graphs_are_refused_or_taken_as_we_say(name: str) -> None:
    graph = write_halves(make_model())
    check_halves(graph)
    _assert_shown(HALF[name], graph)

"""What each TensorRT version is told for the same graphs: one recipe, whose precision is the graph's."""

from __future__ import annotations

import enum
import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.build import build as build_module
from repvgg_deploy.build.build import build_plan
from repvgg_deploy.build.compile import compile_plan
from repvgg_deploy.build.library import Gpu, GpuSearch
from repvgg_deploy.build.options import BuildOptions, BuildRequest
from repvgg_deploy.build.recipes import (
    configure,
    require_fp8,
    require_gpu,
    require_int8,
    require_options,
    require_typing,
    resolve_targets,
)
from repvgg_deploy.build.source import read_source
from repvgg_deploy.errors import BuildError, CudaError
from repvgg_deploy.files.plan_place import Library
from repvgg_deploy.specs.values import BuildConfig, ShapeProfile
from tests.build.fake_trt import PLAN, FakeTrt, Faults, flags_of
from tests.build.make_typed import A10, make_request, make_typed

VERSIONS = ("8.5.3.1", "8.6.1", "10.0.1", "10.9.0.34", "10.16.1.11", "11.4.0.106")
WEAK = ("8.5.3.1", "8.6.1")
FP16_8 = {"FP16": True, "OBEY_PRECISION_CONSTRAINTS": True, "TF32": False}
OFF = {"TF32": False}


def build_fake(
    version: str, path: Path, config: BuildConfig | None = None, faults: Faults | None = None, **changes: Any
) -> tuple[FakeTrt, Any]:
    source = read_source(path)
    trt = FakeTrt(version, path, source.spec, faults)
    library = Library("tensorrt", trt, version)
    return trt, compile_plan(make_request(library, source, config, gpu=A10, **changes))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("typing", "weak_flags"),
    [("fp32", OFF), ("fp16", FP16_8), ("int8", {"INT8": True, "TF32": False}), ("mixed", None)],
    ids=lambda v: str(v)[:5],
)
def test_precision_comes_from_the_graph_on_every_version(
    tmp_path: Path, version: str, typing: str, weak_flags: dict[str, bool] | None
) -> None:
    path = make_typed(tmp_path, typing)
    if version in WEAK and weak_flags is None:
        with pytest.raises(BuildError, match="needs FP32 beside INT8") as caught:
            build_fake(version, path)
        assert "quantize --int8 --target trt8" in caught.value.remedy
        return
    trt, built = build_fake(version, path)
    networks = {8: ("EXPLICIT_BATCH",), 10: ("STRONGLY_TYPED",), 11: ()}[int(version.split(".", maxsplit=1)[0])]
    assert trt.said("network") == [networks]
    assert flags_of(trt) == (weak_flags if version in WEAK else OFF)
    assert bytes(built.data) == PLAN
    assert trt.said("profile") == [("input", (1, 3, 16, 16), (8, 3, 16, 16), (32, 3, 16, 16))]
    assert [value.name for value in trt.said("profiling_verbosity")] == ["DETAILED"]


@pytest.mark.parametrize("version", WEAK)
def test_tensorrt_8_is_given_the_type_of_every_float_layer_of_an_fp16_graph(tmp_path: Path, version: str) -> None:
    trt, _ = build_fake(version, make_typed(tmp_path, "fp16", "uint8_top5"))
    half, single = trt.DataType.HALF, trt.DataType.FLOAT
    convolutions = [layer for layer in trt.layers if layer.type == trt.LayerType.CONVOLUTION]
    assert len(convolutions) == 5 and all(
        (layer.precision, layer.output_types) == (half, {0: half}) for layer in convolutions
    )
    product, summed = (layer for layer in trt.layers if layer.name.startswith("linear"))
    assert (
        product.precision == summed.precision == half
    )  # one Gemm, two layers, and only the second has the node's output
    casts = [layer for layer in trt.layers if layer.type == trt.LayerType.CAST]
    assert casts and all(layer.precision is None for layer in casts)
    top = next(layer for layer in trt.layers if layer.type == trt.LayerType.TOPK)
    assert top.output_types == {0: single} and top.precision == single  # scores; class numbers are integers and stay


@pytest.mark.parametrize("typing", ["fp32", "int8"])
@pytest.mark.parametrize("version", WEAK)
def test_tensorrt_8_layers_of_other_graphs_are_left_alone(tmp_path: Path, version: str, typing: str) -> None:
    trt, _ = build_fake(version, make_typed(tmp_path, typing))
    assert trt.layers and all(layer.precision is None and layer.output_types == {} for layer in trt.layers)


@pytest.mark.parametrize("version", [v for v in VERSIONS if v not in WEAK])
def test_strongly_typed_versions_set_no_layer(tmp_path: Path, version: str) -> None:
    trt, _ = build_fake(version, make_typed(tmp_path, "fp16"))
    assert trt.layers and all(layer.precision is None and layer.output_types == {} for layer in trt.layers)


@pytest.mark.parametrize("version", VERSIONS)
def test_options_reach_the_builder(tmp_path: Path, version: str) -> None:
    config = BuildConfig(workspace_bytes=123, tf32=True, sparse=True, profile=ShapeProfile(2, 3, 4))
    if version != "8.5.3.1":
        config = BuildConfig(None, ShapeProfile(2, 3, 4), 123, True, 5, True, True, True)
    trt, _ = build_fake(version, make_typed(tmp_path, "fp32"), config)
    assert trt.said("memory") == [("WORKSPACE", 123)]
    assert trt.said("profile")[0][1:] == ((2, 3, 16, 16), (3, 3, 16, 16), (4, 3, 16, 16))
    wanted = {"TF32": True, "SPARSE_WEIGHTS": True}
    if version == "8.5.3.1":
        assert flags_of(trt) == wanted
        return
    assert flags_of(trt) == {**wanted, "VERSION_COMPATIBLE": True}
    assert trt.said("builder_optimization_level") == [5]
    assert [level.name for level in trt.said("hardware_compatibility_level")] == ["AMPERE_PLUS"]
    assert trt.said("host_code") == [True]  # such a plan carries code, and would not load without


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (BuildConfig(optimization_level=3), "--optimization-level"),
        (BuildConfig(version_compatible=True), "--version-compatible"),
        (BuildConfig(hardware_compatible=True), "--hardware-compatible"),
    ],
)
def test_tensorrt_8_5_refuses_what_came_later(config: BuildConfig, flag: str) -> None:
    with pytest.raises(BuildError, match=f"TensorRT 8.5.3.1 has no {flag}: it came with 8.6"):
        require_options(Library("tensorrt", None, "8.5.3.1"), config, ())


def test_tensorrt_8_refuses_an_operator_set_that_it_does_not_know(tmp_path: Path) -> None:
    source = read_source(make_typed(tmp_path, "fp32"))
    later = replace(source, graph=replace(source.graph, opset=19))
    with pytest.raises(BuildError, match="operator sets up to 17, and the graph is of 19") as caught:
        require_typing(Library("tensorrt", None, "8.6.1"), later)
    assert "--opset 17" in caught.value.remedy


def test_targets_are_of_tensorrt_rtx() -> None:
    with pytest.raises(BuildError, match="--target is of TensorRT-RTX"):
        require_options(Library("tensorrt", None, "10.9.0.34"), BuildConfig(), ("8.6",))


@pytest.mark.parametrize("config", [BuildConfig(version_compatible=True), BuildConfig(hardware_compatible=True)])
def test_tensorrt_rtx_refuses_what_it_lacks(config: BuildConfig) -> None:
    with pytest.raises(BuildError, match=r"(runs plans of its own release only|has no --hardware-compatible)"):
        require_options(rtx("SM86"), config, ())


def rtx(capabilities: str, version: str = "1.7.1.116", **more: Any) -> Library:
    known = enum.IntEnum("ComputeCapability", f"NONE CURRENT {capabilities}")
    return Library("tensorrt_rtx", types.SimpleNamespace(ComputeCapability=known, **more), version)


@pytest.mark.parametrize("version", ["1.2.0.54", "1.6.1.1", "1.7.1.116", "2.0"])
def test_int8_needs_tensorrt_rtx_1_7(version: str) -> None:
    library = Library("tensorrt_rtx", None, version)
    if version.startswith(("1.7", "2")):
        require_int8(library)
        return
    with pytest.raises(BuildError, match=f"TensorRT-RTX {version} builds no INT8: it came with 1.7") as caught:
        require_int8(library)
    assert "install 1.7" in caught.value.remedy and "--fp16" in caught.value.remedy


def test_int8_is_refused_before_anything_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "open_library", lambda _: rtx("SM86", version="1.6.0.1"))
    monkeypatch.setattr(build_module, "look_for_gpu", lambda: GpuSearch(None, "no driver"))
    options = BuildOptions(BuildConfig("int8"), backend="rtx")
    with pytest.raises(BuildError, match=r"TensorRT-RTX 1\.6\.0\.1 builds no INT8"):
        build_plan(make_typed(tmp_path, "fp32"), options=options)


@pytest.mark.parametrize("known", [True, False])
def test_rtx_plans_take_their_memory_from_the_engine_where_the_release_can(known: bool) -> None:
    told: list[str] = []
    names = ["TF32", *(["REQUIRE_USER_ALLOCATION"] if known else [])]
    flags = enum.IntEnum("BuilderFlag", names)
    pools, verbosity = types.SimpleNamespace(WORKSPACE=0), types.SimpleNamespace(DETAILED=2)
    library = rtx("SM86", BuilderFlag=flags, MemoryPoolType=pools, ProfilingVerbosity=verbosity)
    settings: Any = types.SimpleNamespace(
        set_memory_pool_limit=lambda *_: None,
        set_flag=lambda flag: told.append(flag.name),
        clear_flag=lambda _: None,
        set_compute_capability=lambda *_: None,
    )
    source: Any = None
    configure(BuildRequest(source, BuildConfig(), library, None, ("8.6",)), None, settings)
    assert told == ["REQUIRE_USER_ALLOCATION"] * known


def test_rtx_targets_by_default_are_all_that_it_knows_but_turing() -> None:
    assert resolve_targets(rtx("SM75 SM120 SM86 SM80"), (), None) == ("8.0", "8.6", "12.0")
    assert resolve_targets(rtx("SM75 SM86"), ("7.5", "8.6", "7.5"), None) == ("7.5", "8.6")
    with pytest.raises(BuildError, match=r"builds for compute capability 7\.5, 8\.6, not for 8\.9"):
        resolve_targets(rtx("SM75 SM86"), ("8.6", "8.9"), "8.9")


def test_rtx_target_current_is_the_gpu_that_is_here() -> None:
    assert resolve_targets(rtx("SM86"), ("current", "8.6"), "9.0") == ("9.0", "8.6")
    with pytest.raises(CudaError, match="the target is the current GPU"):
        resolve_targets(rtx("SM86"), ("current",), None)


def test_tensorrt_builds_for_the_gpu_that_is_here() -> None:
    assert resolve_targets(Library("tensorrt", None, "10.9.0.34"), (), "8.6") == ("8.6",)


def test_tensorrt_needs_a_gpu() -> None:
    with pytest.raises(CudaError, match="is for, and there is none here: no driver") as caught:
        require_gpu(Library("tensorrt", None, "10.9.0.34"), None, "no driver")
    assert "--backend rtx" in caught.value.remedy
    require_gpu(rtx("SM86"), None)


def test_class_numbers_of_tensorrt_8_are_int32(tmp_path: Path) -> None:
    path = make_typed(tmp_path, "fp32", "uint8_top5")
    assert build_fake("8.5.3.1", path)[1].output_types == {"scores": "float32", "classes": "int32"}
    assert build_fake("10.9.0.34", path)[1].output_types == {"scores": "float32", "classes": "int64"}


@pytest.mark.parametrize("version", VERSIONS)
def test_parser_error_names_the_node_and_quotes_tensorrt(tmp_path: Path, version: str) -> None:
    path = make_typed(tmp_path, "fp32")
    faults = Faults(parser=((2, "In node 2 (importConv): INVALID_NODE: weights are missing"),))
    with pytest.raises(BuildError) as caught:
        build_fake(version, path, faults=faults)
    name = read_source(path).graph.nodes[2].name
    assert (
        f"TensorRT {version}'s parser refuses the graph:\n    node {name} (Conv): In node 2 (importConv): INVALID_NODE"
        in caught.value.message
    )


def test_builder_error_names_the_node_and_quotes_tensorrt(tmp_path: Path) -> None:
    faults = Faults(
        builder=("[optimizer.cpp] Could not find any implementation for node stage1.conv.", "second", "second")
    )
    with pytest.raises(BuildError) as caught:
        build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), faults=faults)
    assert "could not build the plan at stage1.conv:\n    [optimizer.cpp] Could not" in caught.value.message
    assert caught.value.message.count("second") == 1


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("Requested amount of GPU memory could not be allocated: out of memory", "free memory of the GPU, or .*max-b"),
        ("[virtualMemoryBuffer.cpp::resizePhysical::127] Error Code 1: Cuda Driver (out of memory)", "^free memory"),
        (
            "IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)",
            "^give a larger --workspace, such as 8GiB, or a smaller --max-batch$",
        ),
        ("insufficient workspace for tactic", "larger --workspace"),
        ("no tactics to implement the operation within workspace limit", "larger --workspace"),
        ("CUDA initialization failure with error: 35", "nvidia-smi"),
        ("something else", "-vv"),
    ],
)
def test_builder_error_has_a_remedy_that_fits(tmp_path: Path, line: str, remedy: str) -> None:
    with pytest.raises(BuildError) as caught:
        build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), faults=Faults(builder=(line,)))
    assert re.search(remedy, caught.value.remedy)


def test_builder_that_cannot_start_quotes_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(CudaError, match="CUDA initialization failure with error: 35") as caught:
        build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), faults=Faults(no_builder=True))
    expected = (
        "TensorRT 10.9.0.34 cannot start its builder on the GPU with the NVIDIA driver 580.95.05 (CUDA 13.0):\n    CUDA"
    )
    assert expected in caught.value.message and "--backend rtx" in caught.value.remedy


def test_plan_of_a_tensorrt_whose_runtime_cannot_start_is_kept_and_not_judged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, built = build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), faults=Faults(no_runtime=True))
    assert bytes(built.data) == PLAN and built.report is None
    assert "the precision is not judged: TensorRT 10.9.0.34 cannot start its runtime" in caplog.text


def test_profiles_that_are_refused_name_their_option(tmp_path: Path) -> None:
    config = BuildConfig(profile=ShapeProfile(1, 4, 4, batches=(1, 4)))
    with pytest.raises(BuildError, match=r"refuses the shapes \(1, ") as caught:
        build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), config, faults=Faults(profile=True))
    assert caught.value.remedy == "give other --profiles"


def test_profile_that_is_refused_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="refuses the shapes"):
        build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), faults=Faults(profile=True))


def test_plan_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot load the plan that it has just built"):
        build_fake("10.9.0.34", make_typed(tmp_path, "fp32"), faults=Faults(no_engine=True))


ADA, AMPERE = Gpu("L4", "8.9", None), Gpu("A10", "8.6", None)


def test_fp8_is_built_where_it_is_taken() -> None:
    assert require_fp8(Library("tensorrt", None, "10.9.0.34"), ADA, ("8.9",), named=False) == ("8.9",)
    every = ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert require_fp8(Library("tensorrt_rtx", None, "1.7.1.116"), None, every, named=False) == ("8.9", "12.0", "12.1")
    assert require_fp8(Library("tensorrt_rtx", None, "1.5.0.1"), None, every, named=False) == ("8.9",)


@pytest.mark.parametrize(
    ("kind", "version", "gpu", "targets", "words"),
    [
        ("tensorrt", "8.6.1", ADA, ("8.9",), "knows no FP8: it came with 10"),
        ("tensorrt", "10.9.0.34", AMPERE, ("8.6",), r"A10 \(8\.6\) has no FP8"),
        ("tensorrt_rtx", "1.4.0.1", None, ("8.9",), "knows no FP8: it came with 1.5"),
        ("tensorrt_rtx", "1.6.0.1", None, ("12.0",), "compute capability 8.9 only, not for 12.0"),
        ("tensorrt_rtx", "1.7.1.116", None, ("8.6", "8.9"), "8.9 and later, not for 8.6"),
    ],
)
def test_fp8_is_refused_elsewhere_with_what_helps(
    kind: str, version: str, gpu: Gpu | None, targets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(BuildError, match=words) as caught:
        require_fp8(Library(kind, None, version), gpu, targets, named=True)
    assert "--int8 or --fp16" in caught.value.remedy

"""build_plan on a TensorRT that only records, with a GPU that is only described: passport, cache, outputs, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from repvgg_deploy.build import build as build_module
from repvgg_deploy.build import deliver as deliver_module
from repvgg_deploy.build import source
from repvgg_deploy.build.build import BuildResult, build_plan
from repvgg_deploy.build.deliver import deliver
from repvgg_deploy.build.library import Gpu, GpuSearch
from repvgg_deploy.build.options import BuildOptions, BuildRequest
from repvgg_deploy.build.source import tensor_types
from repvgg_deploy.errors import (
    ArtifactError,
    BuildError,
    CudaError,
    InputError,
    MissingDependencyError,
    ModelError,
    RepVGGDeployError,
)
from repvgg_deploy.files.onnx import read_graph, read_metadata
from repvgg_deploy.files.passport import passport_path, read_passport, require_unchanged
from repvgg_deploy.files.plan_place import Compatible, Environment, judge_plan
from repvgg_deploy.precision.int8 import FAST
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.specs.values import BuildConfig, PlanPassport, Precision, ShapeProfile
from tests.build.fake_trt import PLAN, FakeTrt, Faults, flags_of
from tests.build.make_typed import A10, make_typed
from tests.files.make_passport import make_passport

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPVGG_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch):
    """Installs a fake TensorRT for a model, and a GPU."""

    def put(model: Path, version: str = "10.9.0.34", faults: Faults | None = None, gpu: Gpu | None = A10) -> FakeTrt:
        trt = FakeTrt(version, model, read_metadata(model).spec, faults or Faults(inspector=inspect_as(model)))
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr(build_module, "look_for_gpu", lambda: GpuSearch(gpu, "" if gpu else "no driver"))
        return trt

    return put


def inspect_as(model: Path, **changed: str) -> str:
    """What the inspector says of a plan that computes as its graph, but for the layers that are named."""
    words = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}
    from repvgg_deploy.files.onnx import weighted_nodes

    layers = []
    for node in weighted_nodes(read_graph(model)):
        kind = words[changed.get(node.name.replace(".", "_"), node.precision)]
        layers.append(
            {"Name": f"{node.name} + x", "Inputs": [{"Name": "x", "Format/Datatype": kind}], "Weights": {"Type": kind}}
        )
    return json.dumps({"Layers": layers, "Bindings": ["input", "logits"]})


def config(precision: Precision | None = None, **changes: Any) -> BuildConfig:
    return BuildConfig(precision, **changes)


def read_back(result: BuildResult) -> PlanPassport:
    plan = result.output.target
    passport = read_passport(plan)
    assert passport == result.passport
    require_unchanged(plan, hashlib.sha256(plan.read_bytes()).hexdigest(), passport)
    return passport


def test_passport_says_all_that_the_plan_is(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    result = build_plan(model, options=BuildOptions(config(optimization_level=3)))
    passport, metadata = read_back(result), read_metadata(model)
    assert (result.output.target, result.output.status, result.origin) == (tmp_path / "fp16.plan", "written", "built")
    assert result.output.target.read_bytes() == PLAN
    assert passport.onnx_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (passport.spec, passport.certificate) == (metadata.spec, metadata.certificate)
    assert (passport.precision, passport.precision_shares) == ("fp16", {"fp16": 1.0})
    assert passport.config == BuildConfig("fp16", optimization_level=3)
    assert (passport.flavour, passport.tensorrt_version) == ("tensorrt", "10.9.0.34")
    assert (passport.gpu_name, passport.compute_capabilities, passport.driver_version) == (
        "NVIDIA A10",
        ("8.6",),
        "580.95.05",
    )
    assert passport.history[:-1] == metadata.history
    assert (passport.history[-1].stage, passport.history[-1].parent_sha256) == ("build", passport.onnx_sha256)
    here = Environment("tensorrt", "10.9.0.34", "NVIDIA A10", "8.6", "580.95.05", passport.platform)
    assert judge_plan(passport, here) == Compatible(())


@pytest.mark.parametrize(
    ("typing", "gpu", "said"),
    [
        ("int8", Gpu("NVIDIA B300", "10.3", None), True),
        ("int8", Gpu("NVIDIA B200", "10.0", None), False),
        ("fp16", Gpu("NVIDIA B300", "10.3", None), False),
    ],
)
def test_int8_for_a_gpu_that_hardly_has_it_is_built_with_a_warning(
    tmp_path: Path, tensorrt, caplog: pytest.LogCaptureFixture, typing: str, gpu: Gpu, said: bool
) -> None:
    model = make_typed(tmp_path, typing)
    tensorrt(model, gpu=gpu)
    assert build_plan(model).origin == "built"
    assert ("(B300 and GB300) computes INT8 at a small part of its speed in FP8" in caplog.text) == said
    assert ("--fp8" in caplog.text) == said


@pytest.mark.parametrize("version", ["8.5.3.1", "8.6.1", "10.9.0.34", "11.4.0.106"])
@pytest.mark.parametrize("typing", ["fp16", "int8"])
def test_fp32_graph_becomes_typed_and_means_the_same_on_every_version(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch, version: str, typing: Precision
) -> None:
    model = make_typed(tmp_path, "fp32")
    np.savez(tmp_path / "i.npz", images=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    quantize = QuantizeOptions(typing, tmp_path / "i.npz", min_agreement=0, int8=FAST)
    seen: list[Any] = []

    trt = tensorrt(model, version, Faults(inspector='{"Layers": [], "Bindings": []}'))
    real = build_module.compile_plan

    def spy(request: BuildRequest, **more: Any) -> Any:
        seen.append(request.source)
        request.library.trt._graph = request.source.graph
        return real(request, **more)

    monkeypatch.setattr(build_module, "compile_plan", spy)
    result = build_plan(model, options=BuildOptions(config(typing), quantize=quantize))
    (made,) = seen
    weak = version.startswith("8")
    assert made.precision == typing == result.passport.config.precision
    # INT8 stands beside FP32 where TensorRT 8 is to build it.
    assert ("float16" in tensor_types(made.graph, made.spec).values()) == (typing == "fp16" or not weak)
    assert made.graph.opset == (17 if weak or typing == "fp16" else 19)
    wanted = {"FP16": True, "OBEY_PRECISION_CONSTRAINTS": True} if typing == "fp16" else {"INT8": True}
    assert flags_of(trt) == {"TF32": False, **(wanted if weak else {})}
    assert result.typed_from_fp32 and [entry.stage for entry in result.passport.history][-2:] == [typing, "build"]
    assert result.passport.history[-2].parent_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache",
        "fp32.onnx",
        "fp32.plan",
        "fp32.plan.json",
        "i.npz",
    ]


def test_plan_that_fell_back_is_an_error_and_nothing_is_written(tmp_path: Path, tensorrt, own_cache: Path) -> None:
    model = make_typed(tmp_path, "mixed")
    tensorrt(model, faults=Faults(inspector=inspect_as(model, stage1_conv="fp16")))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BuildError, match=r"fell back: .*stage1\.conv \(int8 asked, fp16 built\)"):
        build_plan(model)
    assert [path for path in sorted(tmp_path.iterdir()) if path != own_cache] == before
    assert not (own_cache / "plans").exists()


@pytest.mark.parametrize("answer", ['{"Layers": ["stage1.conv"], "Bindings": []}', "something new"])
def test_plan_whose_layers_say_nothing_is_not_inspected(
    tmp_path: Path, tensorrt, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    model = make_typed(tmp_path, "mixed")
    tensorrt(model, faults=Faults(inspector=answer))
    passport = read_back(build_plan(model))
    assert (passport.precision, passport.precision_shares) == ("not_inspected", {})
    assert "layer inspector" in caplog.text


def test_second_identical_build_builds_nothing(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model)
    first = build_plan(model, tmp_path / "a.plan")
    assert len(trt.said("network")) == 1
    again, elsewhere = build_plan(model, tmp_path / "a.plan"), build_plan(model, tmp_path / "b.plan")
    assert len(trt.said("network")) == 1
    assert (again.origin, again.output.status, again.passport_output.status) == ("output", "up to date", "up to date")
    assert (elsewhere.origin, elsewhere.output.status) == ("cache", "written")
    assert read_back(elsewhere) == first.passport


CHANGES: dict[str, Any] = {
    "options": lambda model, tensorrt: build_plan(model, options=BuildOptions(config(sparse=True)), force=True),
    "version": lambda model, tensorrt: [tensorrt(model, "10.9.0.35"), build_plan(model, force=True)][1],
    "driver": lambda model, tensorrt: [
        tensorrt(model, gpu=Gpu("NVIDIA A10", "8.6", "600.1")),
        build_plan(model, force=True),
    ][1],
    "gpu": lambda model, tensorrt: [
        tensorrt(model, gpu=Gpu("NVIDIA A40", "8.6", "580.95.05")),
        build_plan(model, force=True),
    ][1],
    "no cache": lambda model, tensorrt: build_plan(model, options=BuildOptions(use_cache=False)),
}


def test_libraries_that_tensorrt_8_takes_kernels_from_are_part_of_the_plan(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(**found: str | None) -> None:
        monkeypatch.setattr(
            build_module, "find_tactic_libraries", lambda: {"CUDNN": None, "CUBLAS": "11.11.3", **found}
        )

    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model, "8.5.3.1")
    put()
    assert read_back(build_plan(model)).history[-1].options == {"cudnn": None, "cublas": "11.11.3"}
    for found in ({"CUDNN": "8.6.0"}, {"CUBLAS": "11.12.0"}):
        put(**found)
        with pytest.raises(ArtifactError, match="was built otherwise"):
            build_plan(model)
        assert build_plan(model, force=True).origin == "built"
    put()
    again = build_plan(model, tmp_path / "again.plan")
    assert (again.origin, again.passport.history[-1].options["cudnn"], len(trt.said("network"))) == ("cache", None, 3)


def test_libraries_that_tensorrt_10_does_not_use_are_not_even_looked_for(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "find_tactic_libraries", None)
    model = make_typed(tmp_path, "fp16")
    tensorrt(model, "10.9.0.34")
    assert read_back(build_plan(model)).history[-1].options == {}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_plan_depends_on_is_built_anew(tmp_path: Path, tensorrt, change: str) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    build_plan(model)
    assert CHANGES[change](model, tensorrt).origin == "built"


def test_identical_plan_built_anew_keeps_its_passport(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    first = build_plan(model)
    path = passport_path(first.output.target)
    path.write_text(path.read_text().replace(f'"build_seconds":{first.passport.build_seconds}', '"build_seconds":99.5'))
    again = build_plan(model, options=BuildOptions(use_cache=False))
    assert (again.output.status, again.passport_output.status, again.passport.build_seconds) == (
        "up to date",
        "up to date",
        99.5,
    )


def test_plan_that_stands_is_hashed_once(tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed = make_typed(tmp_path, "fp16"), list[Path]()
    tensorrt(model)
    build_plan(model)
    real = deliver_module.sha256_file

    def digest(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(deliver_module, "sha256_file", digest)
    shutil.rmtree(tmp_path / "cache")
    assert build_plan(model).origin == "output" and hashed == [tmp_path / "fp16.plan"]
    assert build_plan(model, force=True, options=BuildOptions(use_cache=False)).origin == "built" and len(hashed) == 2


def test_different_plan_needs_force_and_says_so_before_it_builds(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model)
    build_plan(model)
    old = passport_path(tmp_path / "fp16.plan").read_bytes()
    with pytest.raises(ArtifactError, match="was built otherwise") as caught:
        build_plan(model, options=BuildOptions(config(sparse=True)))
    assert "--force" in caught.value.remedy and len(trt.said("network")) == 1
    assert passport_path(tmp_path / "fp16.plan").read_bytes() == old
    assert build_plan(model, options=BuildOptions(config(sparse=True)), force=True).passport.config.sparse


@pytest.mark.parametrize("name", ["fp16.plan", "fp16.plan.json"])
def test_foreign_file_at_an_output_is_not_replaced(tmp_path: Path, tensorrt, name: str) -> None:
    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is no"):
        build_plan(model)
    assert (tmp_path / name).read_text() == "mine" and trt.said("network") == []
    assert build_plan(model, force=True).output.status == "written"
    read_back(build_plan(model))


def test_plan_that_changed_since_is_built_again(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    plan = build_plan(model).output.target
    plan.write_bytes(b"ftrt changed")
    with pytest.raises(ArtifactError, match="is no plan of this ONNX"):
        build_plan(model)
    read_back(build_plan(model, force=True))


def test_old_passport_never_stands_beside_a_new_plan(tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    build_plan(model)
    moments: list[tuple[bytes, bool]] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).parent == tmp_path:
            moments.append(((tmp_path / "fp16.plan").read_bytes(), passport_path(tmp_path / "fp16.plan").exists()))

    (tmp_path / "other").mkdir()
    other = make_typed(tmp_path / "other", "fp16", "grouped")
    monkeypatch.setattr("tests.build.fake_trt.PLAN", b"ftrt another plan")
    tensorrt(other)
    monkeypatch.setattr(os, "replace", replace)
    result = build_plan(other, tmp_path / "fp16.plan", force=True)
    old, new = b"ftrt a plan", b"ftrt another plan"  # the old passport goes first, the new one comes last
    assert moments == [(old, False), (new, False), (new, True)]
    read_back(result)


def test_two_builds_at_once_leave_the_plan_and_the_passport_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one is held between its two files until the other is done, or it is clear that the other waits."""
    plan, real = tmp_path / "x.plan", os.replace
    halfway, other_done = threading.Event(), threading.Event()

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if threading.current_thread().name == "slow" and Path(target) == plan:
            halfway.set()
            other_done.wait(1)

    def write(content: bytes) -> None:
        passport = make_passport(plan_sha256=hashlib.sha256(content).hexdigest())
        deliver(plan, content, passport, force=True)

    monkeypatch.setattr(os, "replace", replace)
    slow = threading.Thread(target=write, args=(b"ftrt slow",), name="slow")
    slow.start()
    assert halfway.wait(60)
    write(b"ftrt fast")
    other_done.set()
    slow.join(60)
    passport = read_passport(plan)
    assert passport is not None
    require_unchanged(plan, hashlib.sha256(plan.read_bytes()).hexdigest(), passport)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.json"]


def test_build_that_ends_after_an_identical_one_is_up_to_date(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's builds of one graph differ in their bytes: that is no reason to fail after minutes."""
    model = make_typed(tmp_path, "fp16")
    results: list[BuildResult] = []

    def build_the_other() -> None:
        faults.during = lambda: None
        results.append(build_plan(model))
        monkeypatch.setattr("tests.build.fake_trt.PLAN", b"ftrt other bytes")

    faults = Faults(inspector=inspect_as(model), during=build_the_other)
    tensorrt(model, faults=faults)
    slower = build_plan(model)
    assert (slower.origin, slower.output.status, slower.passport) == ("output", "up to date", results[0].passport)
    assert read_back(slower) and slower.output.target.read_bytes() == PLAN


def test_cached_plan_that_another_process_removes_is_no_error(
    tmp_path: Path, tensorrt, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model)
    first = build_plan(model)
    (found,) = (own_cache / "plans").iterdir()
    real = build_module.is_standing

    def remove(*arguments: Any, **named: Any) -> bool:
        shutil.rmtree(found)  # another process makes room, after it was found and before it is copied
        return real(*arguments, **named)

    monkeypatch.setattr(build_module, "is_standing", remove)
    result = build_plan(model, tmp_path / "elsewhere.plan")
    assert not found.exists() and (result.origin, read_back(result)) == ("cache", first.passport)
    assert len(trt.said("network")) == 1


@pytest.mark.parametrize("name", ["a b ü 計.plan", "計" * 80, "n" * 250], ids=["spaces", "long, not ASCII", "long"])
def test_output_of_any_name_that_the_disk_takes_is_written(tmp_path: Path, tensorrt, name: str) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    assert read_back(build_plan(model, tmp_path / name))


@pytest.mark.parametrize("name", [".", "/", "", "folder", "folder/"])
def test_output_that_is_a_folder_names_a_file_in_it(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is a folder, expected a file name") as caught:
        build_plan(model, name, force=True)
    assert caught.value.remedy == f"give a file, such as --out {Path(name) / 'fp16.plan'}"


@pytest.mark.parametrize("length", [252, 300])
def test_output_whose_name_is_too_long_is_an_error_of_ours(tmp_path: Path, tensorrt, length: int) -> None:
    """The passport's name is longer than the plan's."""
    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model)
    with pytest.raises(ArtifactError, match="File name too long"):
        build_plan(model, tmp_path / ("n" * length))
    assert trt.said("network") == []


def test_outputs_that_cannot_be_written_are_found_out_before_the_build(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp16")
    trt = tensorrt(model)
    for out in (tmp_path / "missing" / "x.plan", tmp_path):
        with pytest.raises((ArtifactError, InputError)):
            build_plan(model, out)
    with pytest.raises(InputError, match="would replace"):
        build_plan(model, model, force=True)
    with pytest.raises(ArtifactError, match=r"the folder .*missing does not exist"):
        build_plan(model, options=BuildOptions(timing_cache=tmp_path / "missing" / "t.timing"))
    assert trt.said("network") == []


def test_interrupted_build_leaves_nothing(tmp_path: Path, tensorrt, own_cache: Path) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)
    before = sorted(tmp_path.iterdir())

    def progress(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(model, progress=progress)
    assert [path for path in sorted(tmp_path.iterdir()) if path != own_cache] == before
    assert not (own_cache / "plans").exists()


CONTRADICTIONS: dict[str, tuple[str, Precision, str]] = {
    "fp32 of fp16": ("fp16", "fp32", "is typed fp16, and fp32 was asked for"),
    "fp16 of int8": ("mixed", "fp16", "is typed int8, and fp16 was asked for"),
    "int8 of fp16": ("fp16", "int8", "is typed fp16, and int8 was asked for"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_precision_that_contradicts_the_graph_is_an_error(tmp_path: Path, tensorrt, name: str) -> None:
    typing, wanted, message = CONTRADICTIONS[name]
    model = make_typed(tmp_path, typing)
    tensorrt(model)
    with pytest.raises(BuildError, match=message):
        build_plan(model, options=BuildOptions(config(wanted)))


def test_typed_graph_is_not_calibrated_again(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "mixed")
    tensorrt(model)
    assert build_plan(model, options=BuildOptions(config("int8"))).passport.precision == "int8"
    with pytest.raises(BuildError, match="is typed int8 already, so there is nothing to calibrate"):
        build_plan(model, options=BuildOptions(config("int8"), quantize=QuantizeOptions("int8")), force=True)


def test_fixed_batch_takes_the_place_of_the_usual_profile(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp32", batch=4)
    trt = tensorrt(model)
    result = build_plan(model)
    assert result.passport.config.profile == ShapeProfile(4, 4, 4)
    assert trt.said("profile")[0][1] == (4, 3, 16, 16)
    for options in (BuildOptions(profile_given=True), BuildOptions(config(profile=ShapeProfile(1, 4, 8)))):
        with pytest.raises(BuildError, match="has the fixed batch 4, and batches of 1,"):
            build_plan(model, options=options)


def test_several_profiles_are_built_and_inspected_and_the_passport_and_the_cache_know_them(
    tmp_path: Path, tensorrt
) -> None:
    model = make_typed(tmp_path, "mixed")
    trt = tensorrt(model)
    profile = ShapeProfile(1, 32, 32, batches=(1, 8, 32))
    result = build_plan(model, options=BuildOptions(config(profile=profile)))
    shapes = [("input", (1, 3, 16, 16), (batch, 3, 16, 16), (batch, 3, 16, 16)) for batch in (1, 8, 32)]
    assert trt.said("profile") == shapes
    assert trt.said("inspected") == [("input", (batch, 3, 16, 16)) for batch in (1, 8, 32)]
    assert trt.said("profile chosen") == [1, 2]
    assert result.passport.config.profile == read_passport(result.output.target).config.profile == profile
    assert build_plan(model, options=BuildOptions(config(profile=profile))).origin == "output"
    assert build_plan(model, tmp_path / "o.plan", BuildOptions(config(profile=profile))).origin == "cache"
    other = ShapeProfile(1, 32, 32)
    assert build_plan(model, tmp_path / "p.plan", BuildOptions(config(profile=other))).origin == "built"


def test_model_of_one_batch_takes_no_profiles(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp32", batch=4)
    tensorrt(model)
    for batches in ((1, 4), (4,)):
        profile = ShapeProfile(batches[0], 4, 4, batches=batches)
        with pytest.raises(BuildError, match=r"has the fixed batch 4, and profiles for .*4 are asked for") as caught:
            build_plan(model, options=BuildOptions(config(profile=profile), True))
        assert "--profiles" in caught.value.remedy


SIZES = ((8, 16), (16, 32), (64, 48))


def make_any_size(folder: Path, size: tuple[int | str, int | str] = ("height", "width"), **more: Any) -> Path:
    from tests.runtime.make_model import ModelOptions, make_onnx

    return make_onnx(folder / "m.onnx", ModelOptions(size=size, **more))


def test_model_of_any_image_size_without_a_size_is_refused(tmp_path: Path, tensorrt) -> None:
    model = make_any_size(tmp_path)
    tensorrt(model)
    with pytest.raises(BuildError, match=r"accepts any image size \(height, width\), and none is given") as caught:
        build_plan(model)
    assert "--opt-size" in caught.value.remedy and "--dynamic-size" in caught.value.remedy


@pytest.mark.parametrize("uint8", [False, True])
def test_model_of_any_image_size_gets_a_profile_of_sizes_and_its_passport_says_them(
    tmp_path: Path, tensorrt, uint8: bool
) -> None:
    model = make_any_size(tmp_path, uint8=uint8)
    trt = tensorrt(model)
    profile = ShapeProfile(1, 2, 4, *SIZES)
    result = build_plan(model, options=BuildOptions(config(profile=profile)))
    assert result.passport.config.profile == profile
    shapes = [(batch, *size, 3) if uint8 else (batch, 3, *size) for batch, size in zip((1, 2, 4), SIZES, strict=True)]
    assert trt.said("profile") == [("images", *shapes)]
    again = build_plan(model, options=BuildOptions(config(profile=profile)))
    other = dataclasses.replace(profile, max_size=(64, 64))
    assert again.origin == "output"
    built = build_plan(model, tmp_path / "o.plan", BuildOptions(config(profile=other)))
    assert built.origin == "built" and built.passport.config.profile == other


@pytest.mark.parametrize(
    ("size", "sizes"), [((16, 16), SIZES), ((16, "width"), SIZES), ((16, 16), ((16, 16), (16, 16), (16, 32)))]
)
def test_sizes_that_contradict_the_model_are_refused(tmp_path: Path, tensorrt, size: Any, sizes: Any) -> None:
    model = make_any_size(tmp_path, size)
    tensorrt(model)
    with pytest.raises(BuildError, match=r"takes images of 16×(16|any) pixels, found \d+×\d+ asked for"):
        build_plan(model, options=BuildOptions(config(profile=ShapeProfile(1, 2, 4, *sizes))))


def test_the_size_that_a_model_has_may_be_given(tmp_path: Path, tensorrt) -> None:
    model = make_any_size(tmp_path, (16, 16))
    tensorrt(model)
    result = build_plan(model, options=BuildOptions(config(profile=ShapeProfile(1, 2, 4, *((16, 16),) * 3))))
    assert result.passport.config.profile == ShapeProfile(1, 2, 4)


def test_refused_profile_of_sizes_names_their_options(tmp_path: Path, tensorrt) -> None:
    model = make_any_size(tmp_path)
    tensorrt(model, faults=Faults(profile=True))
    with pytest.raises(BuildError, match="refuses the shapes") as caught:
        build_plan(model, options=BuildOptions(config(profile=ShapeProfile(1, 2, 4, *SIZES))))
    assert "--max-size" in caught.value.remedy


def test_class_numbers_in_the_passport_are_those_of_the_plan(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp32", "uint8_top5")
    tensorrt(model, "8.5.3.1")
    assert [output.dtype for output in build_plan(model).passport.spec.outputs] == ["float32", "int32"]
    tensorrt(model, "10.9.0.34")
    result = build_plan(model, force=True)
    assert [output.dtype for output in result.passport.spec.outputs] == ["float32", "int64"]
    assert result.passport.spec.input.dtype == "uint8"


def test_what_is_no_onnx_of_ours_is_refused(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp32")
    tensorrt(model)
    bare = onnx.load(model)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    (tmp_path / "x.plan").write_bytes(PLAN)
    (tmp_path / "cut.onnx").write_bytes(model.read_bytes()[:-40])
    faults = {
        "bare.onnx": "was not written by repvgg-export",
        "x.plan": "is a TensorRT plan already",
        "cut.onnx": ".",
        "none.onnx": "no such file",
    }
    for name, message in faults.items():
        with pytest.raises(ModelError, match=message):
            build_plan(tmp_path / name, tmp_path / "out.plan")
    assert not (tmp_path / "out.plan").exists()


def test_onnx_that_is_replaced_while_it_is_read_is_not_built(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the passport would hold the certificate of one graph, and the plan another."""
    model, other = make_typed(tmp_path, "fp16"), make_typed(tmp_path, "mixed")
    trt = tensorrt(model)
    real = source.read_graph

    def replace(path: Path) -> Any:
        found = real(path)
        os.replace(other, path)
        return found

    monkeypatch.setattr(source, "read_graph", replace)
    with pytest.raises(ModelError, match="was replaced while it was read"):
        build_plan(model)
    assert trt.said("network") == [] and not (tmp_path / "fp16.plan").exists()


def test_onnx_that_cannot_be_read_to_its_end_is_said_so(
    tmp_path: Path, tensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_typed(tmp_path, "fp16")
    tensorrt(model)

    def fail(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ModelError, match=r"fp16\.onnx: cannot be read: Input/output error"):
        build_plan(model)


def test_tensorrt_without_a_gpu_says_why_before_anything_else(tmp_path: Path, tensorrt) -> None:
    model = make_typed(tmp_path, "fp32")
    tensorrt(model, gpu=None)
    with pytest.raises(CudaError, match="there is none here: no driver"):
        build_plan(model, options=BuildOptions(config("int8")))


def test_no_tensorrt_at_all_names_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match="neither TensorRT nor TensorRT-RTX is installed"):
        build_plan(make_typed(tmp_path, "fp32"))


def test_typed_graph_is_built_where_neither_torch_nor_onnx_nor_numpy_is(tmp_path: Path, own_cache: Path) -> None:
    model = make_typed(tmp_path, "fp16")
    code = f"""
import sys
for name in ("torch", "onnx", "onnxruntime", "numpy", "PIL"):
    sys.modules[name] = None  # an import of it fails
sys.path.insert(0, {str(tmp_path)!r})
from repvgg_deploy.build import build
from repvgg_deploy.errors import MissingDependencyError
from repvgg_deploy.cli.trt import main
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None
assert main(["build", {str(model)!r}, "--fp16"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and "neither TensorRT nor TensorRT-RTX is installed" in done.stderr, done.stderr


def test_timings_stand_in_the_cache_of_this_gpu(tmp_path: Path, tensorrt, own_cache: Path) -> None:
    model = make_typed(tmp_path, "fp32")
    tensorrt(model)
    build_plan(model)
    assert (own_cache / "timing" / "tensorrt-10.9.0.34-cuda13.0-nvidia-a10-sm86.timing").read_text() == "a10|conv=1ms"
    build_plan(model, tmp_path / "x.plan", BuildOptions(timing_cache=tmp_path / "my.timing", use_cache=False))
    assert (tmp_path / "my.timing").read_text() == "a10|conv=1ms"


def test_options_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(InputError, match="the plan is to be fp16, the graph int8"):
        BuildOptions(config("fp16"), quantize=QuantizeOptions("int8"))
    assert all(issubclass(kind, RepVGGDeployError) for kind in (BuildError, CudaError))
    assert dataclasses.is_dataclass(BuildOptions)

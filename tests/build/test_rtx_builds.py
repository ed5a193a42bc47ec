"""Real builds with TensorRT-RTX, which needs no GPU: every typing and kind of model, options, progress, errors."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.build import compile as compile_module
from repvgg_deploy.build.compile import BuiltPlan, _compile, compile_plan
from repvgg_deploy.build.inspect import WeightedLayer, weigh_layers
from repvgg_deploy.build.library import open_library
from repvgg_deploy.build.monitor import BuildState
from repvgg_deploy.build.recipes import resolve_targets
from repvgg_deploy.build.source import Source, read_source
from repvgg_deploy.errors import BuildError
from repvgg_deploy.files.onnx import read_metadata
from repvgg_deploy.files.signatures import PLAN_MAGICS
from repvgg_deploy.specs.values import BuildConfig, ShapeProfile
from tests.build.make_typed import make_request, make_typed
from tests.precision.rtx import needs_rtx
from tests.runtime.make_model import ModelOptions, make_onnx

pytestmark = needs_rtx
ROOT = Path(__file__).resolve().parents[2]


def build_rtx(path: Path, config: BuildConfig | None = None, **changes: Any) -> BuiltPlan:
    return compile_plan(make_request(open_library("rtx"), path, config, **changes))


def digest(path: Path, *targets: str) -> str:
    """SHA-256 of a plan from a process of its own: TensorRT-RTX numbers what it compiles through all builds of one."""
    code = (
        "import hashlib, sys; from pathlib import Path; from tests.build.test_rtx_builds import build_rtx; "
        "print(hashlib.sha256(memoryview(build_rtx(Path(sys.argv[1]), targets=tuple(sys.argv[2:])).data)).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *targets],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model, and the digest of its plan."""
    path = make_typed(tmp_path_factory.mktemp("fp16"), "fp16")
    return path, digest(path, "8.6", "8.9")


@pytest.mark.parametrize(
    "kind", ["plain", "grouped", "se_before", "se_after", "uint8_top5", "probabilities", "features"]
)
@pytest.mark.parametrize("typing", ["fp32", "fp16", "int8", "mixed"])
def test_every_typing_of_every_kind_of_model_is_built(tmp_path: Path, typing: str, kind: str) -> None:
    path = make_typed(tmp_path, typing, kind)
    built = build_rtx(path)
    assert bytes(memoryview(built.data)[:4]) in PLAN_MAGICS
    assert built.report is None  # no GPU to inspect with
    assert built.output_types == {output.name: output.dtype for output in read_metadata(path).spec.outputs}
    assert list(built.seconds) == ["parse", "build"]


def test_work_is_weighed_by_the_shapes_that_tensorrt_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted: list[WeightedLayer] = []
    monkeypatch.setattr(compile_module, "weigh_layers", lambda *found: weighted.extend(weigh_layers(*found)))
    build_rtx(make_typed(tmp_path, "int8", "grouped"))
    macs = {layer.name: layer.macs for layer in weighted}
    assert macs["stage0.conv"] == 8 * 3 * 9 * 8 * 8  # 16 px at stride 2
    assert macs["stage3.conv"] == 24 * 16 // 4 * 9 * 4 * 4 and macs["linear"] == 32 * 10
    assert {layer.precision for layer in weighted} == {"int8"}


def test_fixed_batch_is_built(tmp_path: Path) -> None:
    path = make_typed(tmp_path, "fp16", batch=4)
    assert build_rtx(path, BuildConfig(profile=ShapeProfile(4, 4, 4))).output_types


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_plan_of_several_profiles_is_built(tmp_path: Path, precision: str) -> None:
    path = make_typed(tmp_path, precision)
    one = memoryview(build_rtx(path, BuildConfig(profile=ShapeProfile(1, 32, 32))).data).tobytes()
    several = BuildConfig(profile=ShapeProfile(1, 32, 32, batches=(1, 8, 32)))
    assert memoryview(build_rtx(path, several).data).tobytes() != one


@pytest.mark.parametrize("uint8", [False, True])
def test_plan_of_several_image_sizes_is_built(tmp_path: Path, uint8: bool) -> None:
    path = make_onnx(tmp_path / "m.onnx", ModelOptions(size=("height", "width"), uint8=uint8))
    profile = ShapeProfile(1, 2, 4, (8, 16), (16, 32), (64, 48))
    assert memoryview(build_rtx(path, BuildConfig(profile=profile)).data).nbytes > 10_000


def test_two_builds_are_the_same_to_the_byte(tmp_path: Path, fp16: tuple[Path, str]) -> None:
    # Of INT8 graphs the compiler numbers its temporary values as its threads come: those plans differ in such names now
    # and then.
    assert digest(fp16[0], "8.6", "8.9") == fp16[1]
    path = make_typed(tmp_path, "fp32")
    assert digest(path, "8.6") == digest(path, "8.6")


@pytest.mark.parametrize("targets", [("7.5",), ("8.0",), ("8.6", "12.0"), ("8.0", "8.6", "8.9", "12.0", "12.1")])
def test_targets_reach_nvidias_compiler(tmp_path: Path, targets: tuple[str, ...]) -> None:
    data = bytes(memoryview(build_rtx(make_typed(tmp_path, "fp16"), targets=targets).data))
    assert set(re.findall(rb"sm_?(\d{2,3})", data)) == {target.replace(".", "").encode() for target in targets}


def test_hopper_as_a_target_is_refused_with_what_would_do() -> None:
    with pytest.raises(BuildError, match=r"builds for compute capability 7\.5, 8\.0, 8\.6, .*, not for 9\.0") as caught:
        resolve_targets(open_library("rtx"), ("8.6", "9.0"), None)
    assert "--backend tensorrt" in caught.value.remedy


OPTIONS = {
    "tf32": BuildConfig(tf32=True),
    "sparse": BuildConfig(sparse=True),
    "workspace": BuildConfig(workspace_bytes=64 << 20),
    "level": BuildConfig(optimization_level=1),
    "batches": BuildConfig(profile=ShapeProfile(2, 4, 512)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_work_without_a_gpu_are_taken(tmp_path: Path, option: str) -> None:
    assert memoryview(build_rtx(make_typed(tmp_path, "fp32"), OPTIONS[option]).data).nbytes > 10_000


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    shares: list[float] = []

    class State(BuildState):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "share":
                shares.append(value)

    _compile(make_request(open_library("rtx"), make_typed(tmp_path, "mixed", "plain")), State())
    assert len(shares) > 20 and shares == sorted(shares) and (shares[0] >= 0, shares[-1]) == (True, 1.0)


def test_build_that_is_cancelled_gives_no_plan(tmp_path: Path) -> None:
    state = BuildState()
    state.cancelled.set()
    with pytest.raises(BuildError, match="was stopped"):
        _compile(make_request(open_library("rtx"), make_typed(tmp_path, "fp16")), state)


def test_interrupted_build_raises_and_leaves_no_thread(tmp_path: Path) -> None:
    request = make_request(open_library("rtx"), make_typed(tmp_path, "fp16"))

    def report(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_plan(request, report=report)
    assert not [thread for thread in threading.enumerate() if thread.name == "repvgg-build"]


def test_parser_error_is_nvidias_own_with_the_node(tmp_path: Path) -> None:
    import onnx

    path = make_typed(tmp_path, "fp32")
    model = onnx.load(path)
    model.graph.node[2].op_type = "NoSuchOperator"
    name = model.graph.node[2].name
    with pytest.raises(BuildError) as caught:
        build_source(read_source(path), data=model.SerializeToString())
    assert (
        f"node {name} (NoSuchOperator):" in caught.value.message and "parser refuses the graph" in caught.value.message
    )
    assert "Engine" in caught.value.remedy


def test_builder_error_is_nvidias_own(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:  # the profile speaks of another image size than the graph
        build_wrong_input(make_typed(tmp_path, "fp32"), shape=("batch", 3, 99, 99))
    assert "\n    " in caught.value.message and caught.value.remedy


def test_network_that_is_not_the_specifications_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the model's metadata speaks of"):
        build_wrong_input(make_typed(tmp_path, "fp32"), name="image")


def build_wrong_input(path: Path, **changes: Any) -> None:
    source = read_source(path)
    spec = dataclasses.replace(source.spec, input=dataclasses.replace(source.spec.input, **changes))
    build_source(source, metadata=dataclasses.replace(source.metadata, spec=spec))


def build_source(source: Source, **changes: Any) -> None:
    compile_plan(make_request(open_library("rtx"), dataclasses.replace(source, **changes)))

"""Every name of TensorRT and CUDA that the runtime uses is one that the real classes have.

`tests/golden/tensorrt_api.json` was recorded from real wheels (see `record_tensorrt_api.py` beside it). TensorRT-RTX is
asked itself where it is installed; the slow test records the lean runtimes again.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import repvgg_deploy.runtime
from tests.golden.record_tensorrt_api import record

RUNTIME = Path(repvgg_deploy.runtime.__file__).parent
GOLDEN = Path(__file__).resolve().parents[2] / "golden"
APIS: dict[str, dict[str, list[str]]] = json.loads((GOLDEN / "tensorrt_api.json").read_text(encoding="utf-8"))
LEAN = [name.split()[1] for name in APIS if name.startswith("tensorrt_lean")]

RECEIVERS = {
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "runtime": "Runtime",
    "trt": "module",
}
GUARDED = {
    "ICudaEngine.device_memory_size": "until 10.x, where device_memory_size_v2 is not there",
    "ICudaEngine.create_execution_context_without_device_memory": "until 10.x, where there is no "
    "ExecutionContextAllocationStrategy",
    "IExecutionContext.is_stream_capturable": "TensorRT-RTX alone has it",
    "IExecutionContext.set_device_memory": "from 10.1 on, before it the attribute device_memory",
    "module.ExecutionContextAllocationStrategy": "from 10 on",
    "ICudaEngine.create_runtime_config": "TensorRT-RTX, where there is the next one",
    "module.DynamicShapesKernelSpecializationStrategy": "TensorRT-RTX alone has it",
    "Runtime.engine_host_code_allowed": "of version-compatible plans only, which came with 8.6",
    "module.init_libnvinfer_plugins": "the lean runtime has no plugins",
}
"""Names that some of the recorded versions lack: the code asks before it uses them."""


def used_names() -> set[str]:
    """`Class.attribute` of everything that the runtime asks of TensorRT's objects, from the source."""
    found = set()
    for path in sorted((RUNTIME / "tensorrt").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in RECEIVERS:
                found.add(f"{RECEIVERS[name]}.{node.attr}")
    return found - {"module.log"}


def test_the_names_in_use_are_found_in_the_source() -> None:
    found = used_names()
    assert {
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_profile_shape",
        "Runtime.deserialize_cuda_engine",
        "module.Runtime",
    } <= found
    assert len(found) > 18


@pytest.mark.parametrize("version", APIS)
def test_every_used_name_is_in_the_recorded_api(version: str) -> None:
    api = APIS[version]
    missing = {name for name in used_names() if name.split(".")[1] not in api.get(name.split(".")[0], [])}
    assert missing <= set(GUARDED), f"{version} lacks {missing - set(GUARDED)}"


def test_guards_are_needed_and_asked_for() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (RUNTIME / "tensorrt").glob("*.py"))
    for name in GUARDED:
        kind, attribute = name.split(".")
        assert any(attribute not in api.get(kind, []) for api in APIS.values()), f"every version has {name}"
        asked = f'"{attribute}")' in source or f'"{attribute}", None)' in source
        newer = {
            "device_memory_size": '"device_memory_size_v2", None)',
            "create_execution_context_without_device_memory": '"ExecutionContextAllocationStrategy")',
            "create_runtime_config": '"DynamicShapesKernelSpecializationStrategy")',
            "engine_host_code_allowed": "if carries_code",
        }
        assert asked or newer[attribute] in source, f"{name} is used without asking"


def test_dtypes_are_known_by_their_names() -> None:
    from repvgg_deploy.runtime.tensorrt.plan import _DTYPES

    for version, api in APIS.items():
        assert set(_DTYPES) - set(api["DataType"]) == (
            {"INT64"} if version == "tensorrt 8.5.3.1" else set()
        )  # its class numbers are INT32
        assert {"INPUT", "OUTPUT"} <= set(api["TensorIOMode"])
        assert "USER_MANAGED" in api.get("ExecutionContextAllocationStrategy", ["USER_MANAGED"])


def test_tensorrt_rtx_has_what_was_recorded() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    found = record("tensorrt_rtx")
    missing = {name for name in used_names() if name.split(".")[1] not in found.get(name.split(".")[0], [])}
    assert missing <= set(GUARDED)


def test_fakes_have_no_name_that_the_real_classes_lack() -> None:
    """A fake that knows more than the real thing would prove nothing."""
    from tests.fakes import tensorrt as fakes

    everything = {
        kind: {name for api in APIS.values() for name in api.get(kind, [])}
        for kind in ("Runtime", "ICudaEngine", "IExecutionContext")
    }
    own = {"world", "give_back_profile", "logger"}
    for fake, kind in (
        (fakes._Runtime, "Runtime"),
        (fakes._Engine, "ICudaEngine"),
        (fakes._Context, "IExecutionContext"),
    ):
        names = {name for name in vars(fake) if not name.startswith("_")} - own
        assert names <= everything[kind], names - everything[kind]


def driver_calls() -> set[str]:
    """Names of the CUDA driver API in the provider's source, as attributes and as texts."""
    found = set()
    for node in ast.walk(ast.parse((RUNTIME / "cuda" / "bindings.py").read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("cu")
            and node.value.isalnum()
        ):
            found.add(node.value)
        if (
            isinstance(node, ast.Attribute)
            and node.attr.lower().startswith("cu")
            and isinstance(node.value, ast.Attribute)
        ):
            found.add(node.attr)
    return {name for name in found if name not in ("cuda", "cuInit") and not name.startswith(("CUDA_", "CU_"))}


def test_cuda_driver_has_every_call() -> None:
    known = set(json.loads((GOLDEN / "cuda_api.json").read_text(encoding="utf-8"))["cuda-bindings 13.5.0"]["module"])
    calls = driver_calls()
    assert {"cuMemAlloc", "cuStreamBeginCapture", "cuDevicePrimaryCtxRetain"} <= calls
    assert {name for name in calls if name.startswith("cu")} <= known


@pytest.mark.slow
@pytest.mark.parametrize("version", LEAN)
def test_lean_runtime_recorded_again_is_what_stands_here(version: str, tmp_path: Path) -> None:
    packages = [f"tensorrt-lean-cu13-{part}=={version}" for part in ("bindings", "libs")]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        str(tmp_path),
        *packages,
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip(f"TensorRT's lean runtime {version} cannot be had here: {done.stderr.strip().splitlines()[-1:]}")
    command = [sys.executable, str(GOLDEN / "record_tensorrt_api.py"), "tensorrt_lean_bindings"]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=300,
    )
    assert json.loads(found.stdout) == APIS[f"tensorrt_lean {version}"]

"""Every name of TensorRT that a build uses is one that the real classes have.

Those of TensorRT 8.5.3.1 and TensorRT-RTX were recorded from their wheels.
TensorRT 10 and 11 cannot be asked: their full bindings load only beside libraries of gigabytes.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import repvgg_deploy.build

SOURCE = Path(repvgg_deploy.build.__file__).parent
GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "tensorrt_api.json"
APIS: dict[str, dict[str, list[str]]] = {
    name: api for name, api in json.loads(GOLDEN.read_text(encoding="utf-8")).items() if "Builder" in api
}
RECEIVERS = {
    "builder": "Builder", "settings": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "trt_profile": "IOptimizationProfile",
    "engine": "ICudaEngine", "inspector": "EngineInspector", "runtime": "Runtime", "measured": "ITimingCache",
    "context": "IExecutionContext",
}  # fmt: skip
ENUMS = {"BuilderFlag", "HardwareCompatibilityLevel", "LayerInformationFormat", "MemoryPoolType", "ProfilingVerbosity"}
LACKING = {
    "tensorrt 8.5.3.1": {
        "BuilderFlag.REQUIRE_USER_ALLOCATION": "asked for: TensorRT-RTX from 1.2 on",
        "BuilderFlag.VERSION_COMPATIBLE": "refused before 8.6",
        "HardwareCompatibilityLevel.AMPERE_PLUS": "refused before 8.6",
        "IBuilderConfig.builder_optimization_level": "refused before 8.6",
        "IBuilderConfig.hardware_compatibility_level": "refused before 8.6",
        "IBuilderConfig.num_compute_capabilities": "TensorRT-RTX only",
        "IBuilderConfig.set_compute_capability": "TensorRT-RTX only",
        "IBuilderConfig.progress_monitor": "asked for: from 10 on",
        "Runtime.engine_host_code_allowed": "of version-compatible plans only",
        "module.ComputeCapability": "TensorRT-RTX only",
        "module.HardwareCompatibilityLevel": "refused before 8.6",
        "module.IProgressMonitor": "asked for: from 10 on",
    },
    "tensorrt_rtx 1.7.1.116": {
        "BuilderFlag.FP16": "weakly typed networks only",
        "BuilderFlag.INT8": "weakly typed networks only",
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": "weakly typed networks only",
    },
}
"""Of each version: what it lacks, and why it is not used there."""


def used_names() -> set[str]:
    """`Class.attribute` of everything that a build asks of TensorRT's objects, from the source."""
    found = set()
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name == "trt":
                found.add(f"module.{node.attr}")
            elif name in ENUMS:
                found.add(f"{name}.{node.attr}")
            elif name in RECEIVERS:
                found.add(f"{RECEIVERS[name]}.{node.attr}")
    return found


def test_the_names_in_use_are_found_in_the_source() -> None:
    found = used_names()
    assert {
        "Builder.build_serialized_network",
        "IBuilderConfig.set_memory_pool_limit",
        "OnnxParser.parse",
        "module.OnnxParser",
        "BuilderFlag.TF32",
        "EngineInspector.get_engine_information",
        "ITimingCache.combine",
    } <= found
    assert len(found) > 45


@pytest.mark.parametrize("version", APIS)
def test_every_used_name_is_in_the_recorded_api(version: str) -> None:
    api = APIS[version]
    missing = {name for name in used_names() if name.split(".")[1] not in api.get(name.split(".")[0], [])}
    assert missing == set(LACKING[version])


def test_names_of_tactic_sources_and_layers_are_those_of_tensorrt_8() -> None:
    from repvgg_deploy.build.library import _LIBRARIES, _OTHERS

    api = APIS["tensorrt 8.5.3.1"]
    assert {*_LIBRARIES, *_OTHERS} <= set(api["TacticSource"])
    assert {"EXPLICIT_BATCH"} <= set(api["NetworkDefinitionCreationFlag"])
    assert {"precision", "set_output_type", "get_input", "get_output", "num_inputs", "num_outputs", "type"} <= set(
        api["ILayer"]
    )
    assert {"node", "desc"} <= set(api["ParserError"]) and {"CONSTANT", "SHAPE"} <= set(api["LayerType"])

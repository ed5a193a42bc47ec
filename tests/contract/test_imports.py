"""Which part may import which, and what an import costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.contract.source_tree import PACKAGE, ROOT, Module, imports, modules

# Rank of each part: it may import parts of a lower rank. Parts of equal rank are siblings and do not know each other.
RANKS = {
    "errors": 0,
    "wire": 0,
    "memory": 0,
    "tensorrt_package": 1,
    "tool_versions": 0,
    "codec": 1,
    "labels": 1,
    "specs": 1,
    "tolerance": 2,
    "variants": 2,
    "image_files": 3,
    "artifacts": 3,
    "publication": 4,
    "layer_table": 3,
    "foreign_files": 0,
    "onnx_file": 3,
    "graph_precision": 4,
    "specs_io": 3,
    "zoo": 3,
    "class_index": 3,
    "preprocess": 4,
    "image_sources": 5,
    "image_arrays": 5,
    "image_sets": 6,
    "calibration_images": 7,
    "reference": 8,
    "precision": 8,
    "verify": 8,
    "builder": 8,
    "runtime": 8,
    "serving": 8,
    "measure": 8,
    "export": 9,
    "figures": 9,
    "plots": 10,
    "speed_plots": 10,
    "pipeline": 10,
    "cli": 11,
}
TOP = "repvgg_deploy"
HEAVY = (
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "PIL",
    "safetensors",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "pycuda",
    "google",
    "tritonclient",
    "matplotlib",
    "prometheus_client",
)
# The heavy packages that each part may import, anywhere in it.
OWNED = {
    "reference": {"numpy", "torch", "safetensors"},
    "export": {"numpy", "torch", "onnx", "onnxsim"},
    "precision": {"numpy", "onnx", "onnxruntime"},
    "verify": {"numpy", "onnxruntime"},
    "builder": {"numpy", "tensorrt", "tensorrt_rtx", "cuda"},
    "runtime": {"numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "pycuda"},
    "serving": {"numpy", "google", "prometheus_client"},
    "measure": {"numpy", "onnxruntime"},
    "pipeline": {"numpy", "torch", "onnx"},
    "cli": {"numpy"},
    "tolerance": {"numpy"},
    "preprocess": {"numpy", "PIL"},
    "image_files": {"numpy", "PIL"},
    "image_sources": {"numpy"},
    "image_arrays": {"numpy"},
    "image_sets": {"numpy"},
    "calibration_images": {"numpy"},
    "figures": {"matplotlib"},
    "plots": {"matplotlib"},
    "speed_plots": {"matplotlib"},
}
MODULES = modules()


def test_package_modules_are_all_ranked() -> None:
    assert {module.layer for module in MODULES} - {""} <= set(RANKS)
    assert len(MODULES) > 10  # the walk found the package


@pytest.mark.parametrize("module", [m for m in MODULES if m.name], ids=lambda m: m.name)
def test_module_imports_only_parts_below_it(module: Module) -> None:
    wrong = []
    for name, line in imports(module):
        parts = name.split(".")
        if parts[0] != TOP or len(parts) < 2 or parts[1] in (module.layer, "__version__"):
            continue
        if parts[1] in RANKS and RANKS[parts[1]] >= RANKS[module.layer]:
            wrong.append(f"{module.path.relative_to(ROOT)}:{line}: {module.layer} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.name], ids=lambda m: m.name)
def test_module_imports_only_heavy_packages_that_its_part_owns(module: Module) -> None:
    allowed = OWNED.get(module.layer, set())
    wrong = [f"line {line}: {name}" for name, line in imports(module) if name.partition(".")[0] in set(HEAVY) - allowed]
    assert wrong == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.layer == "runtime"], ids=lambda m: m.name)
def test_runtime_never_imports_torch_or_onnx(module: Module) -> None:
    assert not {name for name, _ in imports(module)} & {"torch", "onnx"}


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh Python after `statement`."""
    code = f"{statement}\nimport sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    return set(result.stdout.splitlines()[-1].split())


def test_import_of_the_package_loads_nothing_heavy() -> None:
    new = loaded_after("import repvgg_deploy") - loaded_after("pass")
    assert not new & set(HEAVY)
    assert not new & {"dataclasses", "inspect", "argparse", "json", "logging", "subprocess", "typing_extensions"}


@pytest.mark.parametrize("name", ["errors", "wire", "codec", "specs", "variants", "artifacts", "onnx_file"])
def test_import_of_a_base_module_loads_the_standard_library_only(name: str) -> None:
    assert not loaded_after(f"import repvgg_deploy.{name}") & set(HEAVY)


@pytest.mark.parametrize("program", ["export", "trt"])
def test_help_of_a_program_loads_nothing_heavy(program: str) -> None:
    if not (PACKAGE / "cli" / f"{program}.py").exists():
        pytest.skip(f"cli/{program}.py is not there")
    statement = f"from repvgg_deploy.cli.{program} import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code"
    assert not loaded_after(statement) & set(HEAVY)


@pytest.mark.parametrize("name", [m.name for m in MODULES if m.layer == "runtime"])
def test_import_of_the_runtime_leaves_torch_and_backends_out(name: str) -> None:
    assert not loaded_after(f"import repvgg_deploy.{name}") & (set(HEAVY) - {"numpy"} - ({"onnxruntime"} if "backend" in name else set()))

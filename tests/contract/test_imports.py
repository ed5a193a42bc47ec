"""Which room may import which, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

import repvgg_deploy
from tests.contract.source_tree import PACKAGE, ROOT, Module, modules, references

# Rank of each room: it imports rooms of a lower rank only. `errors` and the version in `__init__` are free to all.
ROOMS = {
    "specs": 0,
    "files": 1,
    "images": 2,
    "graph": 3,
    "evaluate": 4,
    "model": 4,
    "upstream": 5,
    "precision": 5,
    "runtime": 5,
    "export": 6,
    "build": 7,
    "measure": 8,
    "serving": 8,
    "cli": 9,
}
ALONE = {"", "__main__", "errors"}
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
# The heavy packages that each room may import, anywhere in it.
OWNED = {
    "specs": set(),
    "files": set(),
    "images": {"numpy", "PIL"},
    "graph": {"numpy", "onnx"},
    "evaluate": {"numpy", "matplotlib", "onnxruntime"},
    "model": {"numpy", "torch", "safetensors"},
    "upstream": {"torch"},
    "precision": {"numpy", "onnx", "onnxruntime"},
    "runtime": {"numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "pycuda"},
    "export": {"numpy", "torch", "onnx", "onnxsim", "onnxruntime"},
    "build": {"numpy", "onnx", "tensorrt", "tensorrt_rtx", "cuda"},
    "measure": {"numpy", "onnxruntime", "matplotlib", "torch"},
    "serving": {"numpy", "google", "prometheus_client"},
    "cli": {"numpy", "matplotlib"},
}
MODULES = modules()
NAMES = {module.name for module in MODULES}


def test_root_of_the_package_holds_rooms_only() -> None:
    assert {module.layer for module in MODULES} == set(ROOMS) | ALONE
    assert {path.name for path in PACKAGE.iterdir()} - {*ROOMS, "__pycache__"} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "py.typed",
        "data",
    }
    assert [path.name for path in (PACKAGE / "data").iterdir() if path.suffix == ".py"] == []
    assert len(MODULES) <= 195


def known_imports(module: Module) -> set[str]:
    """The package's modules that a module names, inside functions and for types, too."""
    named = {name.removeprefix(f"{TOP}.") for name, _ in references(module) if name.startswith(f"{TOP}.")}
    # `from . import wire` names `wire`; the room's face only where it takes what is no module of the room.
    spaces = {name.rpartition(".")[0] for name in named & NAMES} - {name.rpartition(".")[0] for name in named - NAMES}
    return (named & NAMES) - spaces - {module.name}


def test_modules_import_each_other_in_no_circle() -> None:
    # A room's `__init__` counts as the rooms' face: what it imports, whoever imports the room imports.
    graph = {module.name: known_imports(module) for module in MODULES if module.name not in ALONE}
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.layer not in ALONE], ids=lambda m: m.name)
def test_module_imports_only_rooms_below_its_own(module: Module) -> None:
    rooms = {name.partition(".")[0] for name in known_imports(module)} - {module.layer, *ALONE}
    assert {room for room in rooms if ROOMS[room] >= ROOMS[module.layer]} == set()


@pytest.mark.parametrize(
    "folder", sorted({m.path.parent for m in MODULES}), ids=lambda f: f.relative_to(PACKAGE.parent).as_posix()
)
def test_no_three_modules_of_a_folder_share_a_prefix(folder: object) -> None:
    prefixes = [
        m.path.stem.partition("_")[0] for m in MODULES if m.path.parent == folder and not m.path.stem.startswith("__")
    ]
    assert [prefix for prefix in set(prefixes) if prefixes.count(prefix) > 2] == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.layer not in ALONE], ids=lambda m: m.name)
def test_module_imports_only_heavy_packages_that_its_room_owns(module: Module) -> None:
    found = {name.partition(".")[0] for name, _ in references(module, types=False)} & set(HEAVY)
    assert found - OWNED[module.layer] == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.layer == "runtime"], ids=lambda m: m.name)
def test_runtime_never_imports_torch_or_onnx(module: Module) -> None:
    assert not {name for name, _ in references(module)} & {"torch", "onnx"}


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh Python after `statement`."""
    code = f"{statement}\nimport sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300
    )
    return set(result.stdout.splitlines()[-1].split())


def test_import_of_the_package_loads_nothing_heavy() -> None:
    new = loaded_after("import repvgg_deploy") - loaded_after("pass")
    assert not new & set(HEAVY)
    assert not new & {"dataclasses", "inspect", "argparse", "json", "logging", "subprocess", "typing_extensions"}


@pytest.mark.parametrize("room", ["specs", "files"])
def test_import_of_a_base_room_loads_the_standard_library_only(room: str) -> None:
    everything = "; ".join(f"import {TOP}.{m.name}" for m in MODULES if m.layer == room)
    assert not loaded_after(everything) & set(HEAVY)


@pytest.mark.parametrize("program", ["export", "trt"])
def test_help_of_a_program_loads_nothing_heavy(program: str) -> None:
    statement = (
        f"from repvgg_deploy.cli.{program} import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n    "
        f"assert not stop.code"
    )
    assert not loaded_after(statement) & set(HEAVY)


@pytest.mark.parametrize("name", [m.name for m in MODULES if m.layer == "runtime"])
def test_import_of_the_runtime_leaves_torch_and_backends_out(name: str) -> None:
    allowed = {"numpy"} | ({"onnxruntime"} if name == "runtime.cpu.onnxruntime" else set())
    assert not loaded_after(f"import repvgg_deploy.{name}") & (set(HEAVY) - allowed)


def test_public_names_are_callable_also_after_all_modules_were_imported() -> None:
    pytest.importorskip("torch")
    fresh = (
        "import repvgg_deploy\nfor name in repvgg_deploy.__all__:\n    assert callable(getattr(repvgg_deploy, "
        "name)), name"
    )
    loaded_after(fresh)
    everything = "; ".join(f"import {TOP}.{m.name}" for m in MODULES if m.name and m.name != "__main__")
    loaded_after(f"{everything}\n{fresh}")
    assert not set(repvgg_deploy.__all__) & set(ROOMS)

"""What users may import."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import repvgg_deploy
from repvgg_deploy.errors import EXTRAS, explain_missing
from tests.contract.source_tree import ROOT, Module, modules

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.mark.parametrize("name", repvgg_deploy.__all__)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(repvgg_deploy, name)
    assert inspect.getdoc(value)
    assert name in dir(repvgg_deploy)


def faces() -> list[Module]:
    """The package's `__init__` and those of the rooms that hand names on."""
    return [
        module for module in modules() if module.path.name == "__init__.py" and "find_lazily" in ast.dump(module.tree)
    ]


@pytest.mark.parametrize("module", faces(), ids=lambda m: m.name or "repvgg_deploy")
def test_names_of_a_face_are_typed_and_loaded_from_one_home(module: Module) -> None:
    """What a type checker reads, under TYPE_CHECKING, is what a program gets."""
    package = importlib.import_module(f"repvgg_deploy.{module.name}".rstrip("."))
    typed = {
        f"{node.module}.{alias.asname}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
        if alias.asname
    }
    (call,) = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "find_lazily"
    ]
    homes = {home: names.split() for home, names in ast.literal_eval(call.args[1]).items()}
    assert typed == {f"{home}.{name}" for home, names in homes.items() for name in names}
    pytest.importorskip("torch")
    for home, names in homes.items():
        for name in names:
            value = getattr(package, name)
            assert value is getattr(importlib.import_module(f"{package.__name__}.{home}"), name)
            assert getattr(value, "__module__", "").startswith("repvgg_deploy") or not callable(value)


def test_what_the_documentation_names_as_api_is_reachable_from_a_room() -> None:
    named = {
        name
        for path in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", path.read_text("utf-8"), re.M)
    }
    known = {f"{'.'.join(filter(None, ('repvgg_deploy', face.name)))}" for face in faces()} | {"repvgg_deploy.errors"}
    assert len(named) > 100
    assert {name for name in named if name not in known and name.rpartition(".")[0] not in known} <= {
        "repvgg_deploy.evaluate.plots"  # a page of one module: it draws
    }


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        repvgg_deploy.Engin  # noqa: B018


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from repvgg_deploy import *", names)
    assert set(repvgg_deploy.__all__) <= set(names)


def test_version_is_that_of_the_installed_package_and_the_changelog() -> None:
    assert f"## {repvgg_deploy.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        installed = metadata.distribution("repvgg-deploy")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert installed.version == repvgg_deploy.__version__
    for entry in installed.entry_points:
        module, _, function = entry.value.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_extras_name_an_onnx_runtime_only_in_cpu_and_gpu() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {name for name, packages in extras.items() if any("onnxruntime" in package for package in packages)} == {
        "cpu",
        "gpu",
    }
    assert set(extras) == {
        "export",
        "quantize",
        "cpu",
        "gpu",
        "openvino",
        "tensorrt",
        "rtx",
        "pycuda",
        "serving",
        "service",
        "plot",
        "parquet",
        "completion",
        "hub",
        "ray",
        "dev",
        "docs",
    }


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name or "__init__")
def test_module_begins_with_a_docstring(module: Module) -> None:
    first = module.tree.body[0] if module.tree.body else None
    assert first is not None
    assert isinstance(getattr(getattr(first, "value", None), "value", None), str), (
        f"{module.path.name} has no docstring"
    )


def test_package_is_marked_as_typed() -> None:
    assert (Path(repvgg_deploy.__file__).parent / "py.typed").exists()


def test_package_run_as_a_program_lists_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    from repvgg_deploy.__main__ import main

    assert main() == 0
    text = capsys.readouterr().out
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert len(scripts) == 2 and all(name in text for name in scripts)
    assert repvgg_deploy.__version__ in text and max(map(len, text.splitlines())) <= 80


_WITHOUT_PACKAGES = """
import importlib, sys
from repvgg_deploy.errors import EXTRAS, MissingDependencyError
for package in EXTRAS:
    sys.modules[package] = None  # as if it were not installed
for face in sys.argv[1:]:
    module = importlib.import_module(face)
    for name in module.__all__:
        try:
            getattr(module, name)
        except MissingDependencyError as error:
            print(face, name, error.remedy)
"""


def test_public_name_whose_package_is_missing_says_which_extra_brings_it() -> None:
    names = [f"repvgg_deploy.{module.name}".rstrip(".") for module in faces()]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PACKAGES, *names], capture_output=True, text=True, cwd=ROOT, check=True
    )
    remedies = {
        (face, name): remedy for face, name, remedy in (line.split(" ", 2) for line in done.stdout.splitlines())
    }
    wanted = "pip install '.[{}]' in the repository's folder"
    assert remedies["repvgg_deploy", "export_module"] == wanted.format("export,cpu")
    assert remedies["repvgg_deploy", "quantize"] == wanted.format("quantize,cpu")
    assert {remedy.partition("[")[0] for remedy in remedies.values()} == {"pip install '."}
    assert ("repvgg_deploy", "Engine") not in remedies and ("repvgg_deploy", "build_plan") not in remedies


def test_every_optional_package_has_an_extra_that_pyproject_knows() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    distributions = {"PIL": "pillow", "google": "protobuf", "tensorrt_rtx": "tensorrt-rtx-cu13"}
    for package, extra in EXTRAS.items():
        wanted = distributions.get(package, package.replace("_", "-"))
        assert any(re.match(rf"{wanted}\b", line) for line in extras[extra]), package


def test_no_message_names_a_registry_that_the_package_is_not_in() -> None:
    named = [m.name for m in modules() if "repvgg-deploy[" in m.path.read_text(encoding="utf-8")]
    assert named == []  # say_install writes it as it works from a clone


def test_what_quantize_needs_holds_no_torch() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [line.partition(">")[0] for line in extras["quantize"]] == ["onnx"]


def test_failed_import_of_another_package_is_not_explained() -> None:
    assert explain_missing(ModuleNotFoundError("no", name="numpy")) is None
    broken = explain_missing(ImportError("libfoo.so is not there", name="onnx.onnx_cpp2py_export"))
    assert broken is not None and "cannot be imported: libfoo.so is not there" in broken.message

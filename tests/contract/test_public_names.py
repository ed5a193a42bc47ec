"""What users may import."""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib import metadata
from pathlib import Path

import pytest

import repvgg_deploy
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


def test_public_names_and_their_homes_agree() -> None:
    assert sorted(repvgg_deploy._HOMES) == sorted(repvgg_deploy.__all__)


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
        "cpu",
        "gpu",
        "openvino",
        "tensorrt",
        "rtx",
        "pycuda",
        "serving",
        "service",
        "plot",
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

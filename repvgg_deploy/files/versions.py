"""Versions of installed packages: what an artifact says of the tools that made it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from .. import __version__


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """This project's version and those of the packages, by name; packages that are not installed are left out."""
    versions = {"repvgg-deploy": __version__}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def tool_versions() -> dict[str, str]:
    """Versions of what takes part in an export."""
    return installed_versions(("torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy"))

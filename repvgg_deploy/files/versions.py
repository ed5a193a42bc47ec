"""Versions of installed packages, for what every artifact says of its making. Standard library only.

Versions of the tools that take part in an export.
"""

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


_TOOLS = ("torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy")


def tool_versions() -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    return installed_versions(_TOOLS)

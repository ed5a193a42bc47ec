"""Versions of the tools that take part in an export."""

from __future__ import annotations

import importlib.metadata

from .. import __version__

_TOOLS = ("torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy")


def tool_versions() -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    versions = {"repvgg-deploy": __version__}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

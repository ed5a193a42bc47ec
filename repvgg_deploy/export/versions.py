"""Versions of the tools that take part in an export."""

from __future__ import annotations

from ..tool_versions import installed_versions

_TOOLS = ("torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy")


def tool_versions() -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    return installed_versions(_TOOLS)

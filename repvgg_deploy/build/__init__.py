"""Typed ONNX → TensorRT plan and its passport. The entry is `build_plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .build import BuildResult as BuildResult
    from .build import build_plan as build_plan
    from .deliver import default_plan_output as default_plan_output
    from .judge import CheckResult as CheckResult
    from .judge import check_plan as check_plan
    from .options import BuildOptions as BuildOptions

__getattr__ = find_lazily(
    __name__,
    {
        "build": "BuildResult build_plan",
        "deliver": "default_plan_output",
        "judge": "CheckResult check_plan",
        "options": "BuildOptions",
    },
)

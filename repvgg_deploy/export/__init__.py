"""Checkpoint, module or ONNX in training form → verified ONNX.

The entries are `export_checkpoint`, `export_module` and `fold_onnx`. Needs torch, onnx and onnxsim; `fold_onnx` needs
onnx and ONNX Runtime only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import find_lazily

if TYPE_CHECKING:
    from .calibrate import CalibrationResult as CalibrationResult
    from .calibrate import write_calibration as write_calibration
    from .export import ExportOptions as ExportOptions
    from .export import ExportResult as ExportResult
    from .export import export_checkpoint as export_checkpoint
    from .fold import FoldOptions as FoldOptions
    from .fold import FoldResult as FoldResult
    from .fold import fold_onnx as fold_onnx
    from .module import ModuleOptions as ModuleOptions
    from .module import export_module as export_module
    from .options import GraphOptions as GraphOptions
    from .synthesize import SynthesisOptions as SynthesisOptions

__getattr__ = find_lazily(
    __name__,
    {
        "calibrate": "CalibrationResult write_calibration",
        "export": "ExportOptions ExportResult export_checkpoint",
        "fold": "FoldOptions FoldResult fold_onnx",
        "module": "ModuleOptions export_module",
        "options": "GraphOptions",
        "synthesize": "SynthesisOptions",
    },
)

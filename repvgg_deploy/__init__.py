"""repvgg-deploy: from a trained RepVGG checkpoint to a verified ONNX and a running engine.

Public names are loaded on first use (PEP 562), so that importing the package costs milliseconds and pulls in nothing
heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .build.build import build_plan
    from .build.options import BuildOptions
    from .errors import RepVGGDeployError
    from .export.export import export_checkpoint
    from .export.module import export_module
    from .model.checkpoint.load import build_model, load_checkpoint
    from .model.fold import reparameterize
    from .precision.fp16 import Fp16Options, to_fp16
    from .precision.int8 import Int8Options, to_int8
    from .precision.options import QuantizeOptions
    from .precision.quantization import quantize
    from .runtime.engine import Engine
    from .specs.values import BuildConfig, VariantSpec
    from .specs.variants import get_variant

_HOMES = {
    "BuildConfig": ".specs.values",
    "BuildOptions": ".build.options",
    "Engine": ".runtime.engine",
    "Fp16Options": ".precision.fp16",
    "Int8Options": ".precision.int8",
    "QuantizeOptions": ".precision.options",
    "RepVGGDeployError": ".errors",
    "VariantSpec": ".specs.values",
    "build_model": ".model.checkpoint.load",
    "build_plan": ".build.build",
    "export_checkpoint": ".export.export",
    "export_module": ".export.module",
    "get_variant": ".specs.variants",
    "load_checkpoint": ".model.checkpoint.load",
    "quantize": ".precision.quantization",
    "reparameterize": ".model.fold",
    "to_fp16": ".precision.fp16",
    "to_int8": ".precision.int8",
}

__all__ = [
    "BuildConfig",
    "BuildOptions",
    "Engine",
    "Fp16Options",
    "Int8Options",
    "QuantizeOptions",
    "RepVGGDeployError",
    "VariantSpec",
    "build_model",
    "build_plan",
    "export_checkpoint",
    "export_module",
    "get_variant",
    "load_checkpoint",
    "quantize",
    "reparameterize",
    "to_fp16",
    "to_int8",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

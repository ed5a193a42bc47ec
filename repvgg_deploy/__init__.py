"""repvgg-deploy: from a trained RepVGG checkpoint to a verified ONNX and a running engine.

Public names are loaded on first use (PEP 562), so that importing the package costs milliseconds and pulls in nothing
heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .build.build import build_plan as build_plan
    from .build.options import BuildOptions as BuildOptions
    from .errors import RepVGGDeployError as RepVGGDeployError
    from .export.export import export_checkpoint as export_checkpoint
    from .export.module import export_module as export_module
    from .model.checkpoint.load import build_model as build_model
    from .model.checkpoint.load import load_checkpoint as load_checkpoint
    from .model.fold import reparameterize as reparameterize
    from .precision.fp16 import Fp16Options as Fp16Options
    from .precision.fp16 import to_fp16 as to_fp16
    from .precision.int8 import Int8Options as Int8Options
    from .precision.int8 import to_int8 as to_int8
    from .precision.options import QuantizeOptions as QuantizeOptions
    from .precision.quantization import quantize as quantize
    from .runtime.engine import Engine as Engine
    from .specs.values import BuildConfig as BuildConfig
    from .specs.values import VariantSpec as VariantSpec
    from .specs.variants import get_variant as get_variant

__version__ = "0.2.0"


def find_lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports a public name when it is first asked for (PEP 562).

    Args:
        package: The package's `__name__`.
        homes: By the module below the package, its public names, apart by spaces.

    Raises:
        AttributeError: (when called) The package has no such name.
        MissingDependencyError: (when called) It needs an optional package that is not installed.
    """
    modules = {name: f"{package}.{module}" for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name == "__all__":
            return sorted(modules)
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(modules[name]), name)
        except ImportError as error:
            from .errors import explain_missing

            raise (explain_missing(error, modules[name]) or error) from error

    return find


__getattr__ = find_lazily(
    __name__,
    {
        "build.build": "build_plan",
        "build.options": "BuildOptions",
        "errors": "RepVGGDeployError",
        "export.export": "export_checkpoint",
        "export.module": "export_module",
        "model.checkpoint.load": "build_model load_checkpoint",
        "model.fold": "reparameterize",
        "precision.fp16": "Fp16Options to_fp16",
        "precision.int8": "Int8Options to_int8",
        "precision.options": "QuantizeOptions",
        "precision.quantization": "quantize",
        "runtime.engine": "Engine",
        "specs.values": "BuildConfig VariantSpec",
        "specs.variants": "get_variant",
    },
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__getattr__("__all__")])

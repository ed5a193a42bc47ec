"""A provider of CUDA calls, chosen, imported and asked whether it works."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ...errors import InputError, MissingDependencyError
from .port import CudaPort, Provider

_PROVIDERS: dict[Provider, tuple[str, str, str]] = {
    "bindings": (
        "cuda.bindings.driver",
        "cuda-bindings",
        "pip install 'repvgg-deploy[tensorrt]', which brings cuda-bindings",
    ),
    "pycuda": (
        "pycuda.driver",
        "pycuda",
        "pip install 'repvgg-deploy[pycuda]' on a machine with the CUDA toolkit, or use cuda-bindings",
    ),
}


def open_cuda(provider: Provider | None = None) -> CudaPort:
    """Imports a provider and asks the driver whether it can be used.

    Args:
        provider: None takes cuda-bindings, or pycuda where it is the only one.

    Raises:
        InputError: No such provider.
        MissingDependencyError: Its package is not installed or does not load.
        CudaError: There is no driver, it is too old, or it finds no GPU.
    """
    if provider is not None and provider not in _PROVIDERS:
        raise InputError(
            f"cuda: expected bindings, pycuda or None, found {provider!r}", remedy='give EngineOptions(cuda="bindings")'
        )
    chosen = provider or _choose()
    if chosen == "bindings":
        from .bindings import BindingsPort

        return BindingsPort(_import(chosen))
    from .pycuda import PycudaPort

    return PycudaPort(_import(chosen))


def _choose() -> Provider:
    for name, (module, _, _) in _PROVIDERS.items():
        if _is_installed(module):
            return name
    return "bindings"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _import(provider: Provider) -> Any:
    module, package, remedy = _PROVIDERS[provider]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"running on a GPU needs {package}, which is not installed ({error})", remedy=remedy
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        # pycuda is linked with the driver, so without one its import fails.
        hint = "install the NVIDIA driver" if "libcuda" in text else remedy
        raise MissingDependencyError(f"{package} is installed but cannot be imported: {text}", remedy=hint) from error

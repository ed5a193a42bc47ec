"""A provider of CUDA calls: chosen, imported and asked whether it works. Here a plan's way through the runtime begins.

The module is not called `open`: imported under that name it would hide the builtin.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

from ...errors import InputError, MissingDependencyError, say_install
from .port import CudaPort

Provider = Literal["bindings", "pycuda"]
_PROVIDERS: dict[Provider, tuple[str, str, str]] = {
    "bindings": ("cuda.bindings.driver", "cuda-bindings", f"{say_install('tensorrt')}, which brings cuda-bindings"),
    "pycuda": (
        "pycuda.driver",
        "pycuda",
        f"{say_install('pycuda')} on a machine with the CUDA toolkit, or use cuda-bindings",
    ),
}


def open_cuda(provider: Provider | None = None) -> CudaPort:
    """The port of a provider whose driver can be used.

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
    if provider is None:
        only_pycuda = _is_installed(_PROVIDERS["pycuda"][0]) and not _is_installed(_PROVIDERS["bindings"][0])
        provider = "pycuda" if only_pycuda else "bindings"
    driver = _import(provider)
    if provider == "bindings":
        from .bindings import BindingsPort

        return BindingsPort(driver)
    from .pycuda import PycudaPort

    return PycudaPort(driver)


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
        raise MissingDependencyError(
            f"{package} is installed but cannot be imported: {text}",
            remedy="install the NVIDIA driver" if "libcuda" in text else remedy,
        ) from error

"""The GPU of this machine, if there is one that can be used."""

from __future__ import annotations

import importlib
import platform
import sys
from dataclasses import dataclass

from ..builder.build import Gpu
from ..errors import CudaError, MissingDependencyError

_PORT = "repvgg_deploy.runtime.cuda.port"


@dataclass(frozen=True, slots=True)
class GpuSearch:
    """What was found.

    Attributes:
        gpu: None where there is none.
        reason: Why there is none; empty where there is one.
    """

    gpu: Gpu | None
    reason: str = ""


def look_for_gpu(index: int = 0) -> GpuSearch:
    """Asks the driver for one GPU."""
    try:
        info = importlib.import_module(_PORT).open_cuda(None).describe_device(index)
    except (CudaError, MissingDependencyError) as error:
        return GpuSearch(None, error.message)
    except ModuleNotFoundError as error:
        return GpuSearch(None, f"CUDA cannot be asked: the module {error.name} is missing")
    return GpuSearch(Gpu(info.name, _as_text(info.compute_capability), str(info.driver_version)))


def _as_text(capability: object) -> str:
    return ".".join(map(str, capability)) if isinstance(capability, tuple) else str(capability)


def platform_here() -> str:
    """Such as `linux-x86_64`: what a plan is bound to besides GPU and TensorRT."""
    return f"{sys.platform}-{platform.machine().lower()}"

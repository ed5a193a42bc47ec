"""The GPU of this machine, if there is one that can be used."""

from __future__ import annotations

from dataclasses import dataclass

from ..builder.build import Gpu
from ..errors import CudaError, MissingDependencyError


@dataclass(frozen=True, slots=True)
class GpuSearch:
    """What was found.

    Attributes:
        gpu: None where there is none.
        reason: Why there is none; empty where there is one.
        remedy: What helps.
    """

    gpu: Gpu | None
    reason: str = ""
    remedy: str = "use a machine with an NVIDIA GPU and its driver"


def look_for_gpu(index: int = 0) -> GpuSearch:
    """Asks the driver for one GPU."""
    from ..runtime.cuda.opening import open_cuda

    try:
        info = open_cuda(None).describe_device(index)
    except (CudaError, MissingDependencyError) as error:
        return GpuSearch(None, error.message, error.remedy)
    return GpuSearch(Gpu(info.name, info.compute_capability, info.driver_version or None))

"""What a run took place on."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import numpy as np

from repvgg_deploy.build.library import open_library
from repvgg_deploy.runtime.cuda.opening import open_cuda


def describe_machine() -> dict[str, Any]:
    """GPU, driver and versions.

    Raises:
        CudaError: There is no usable GPU.
        MissingDependencyError: No TensorRT or CUDA package.
    """
    cuda = open_cuda()
    gpu = cuda.describe_device(0)
    library = open_library("auto")
    versions = {"numpy": np.__version__, "cuda": cuda.provider, "tensorrt": library.version}
    for name in ("torch", "onnx", "onnxruntime"):
        try:
            versions[name] = str(__import__(name).__version__)
        except (ImportError, OSError):  # OSError: installed, and a library of it does not load
            continue
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver_version,
        "cuda": gpu.cuda_version,
        "memory_bytes": gpu.memory_bytes,
        "flavour": library.flavour,
        "python": platform.python_version(),
        "versions": versions,
        "nvidia_smi": ask_smi(),
    }


def ask_smi(program: str = "nvidia-smi") -> str:
    """Clocks, power limit and temperature, as nvidia-smi says them; empty where it does not answer."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

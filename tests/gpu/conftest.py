"""Tests that need an NVIDIA GPU, its driver, a CUDA package and a TensorRT; skipped, with the reason, without one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_parts.models import SAMPLE, find_missing, make, reference_of
from repvgg_deploy.build.library import open_library
from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.runtime.cuda.opening import open_cuda
from tests.gpu.reference import Reference, read_reference


@pytest.fixture(scope="session")
def gpu() -> Any:
    """The CUDA port of a machine with a usable GPU."""
    try:
        cuda = open_cuda()
        cuda.describe_device(0)
        open_library("auto")
    except RepVGGDeployError as error:
        pytest.skip(f"no GPU to run plans on: {error.message}")
    return cuda


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained sample, exported and typed, with what ONNX Runtime gives for 64 images.

    From the folder that REPVGG_GPU_MODELS names, which `benchmarks/gpu.py --make-models` wrote: TensorRT 8.5 has a
    Python without torch.
    """
    given = os.environ.get("REPVGG_GPU_MODELS")
    folder = Path(given) if given else tmp_path_factory.mktemp("models")
    missing = [] if reference_of(folder, SAMPLE).exists() else find_missing()
    if missing:
        pytest.skip(
            f"no models in REPVGG_GPU_MODELS ({given or 'not set'}), and {', '.join(missing)} to make them is "
            f"not installed"
        )
    make(folder, SAMPLE)
    return folder


@pytest.fixture(scope="session")
def reference(models: Path) -> Reference:
    """What is expected of every plan of the sample."""
    return read_reference(models)

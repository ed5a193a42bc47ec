"""Tests that need an NVIDIA GPU, its driver, a CUDA package and a TensorRT: skipped, with the reason, where one of them is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.builder.library import open_library
from repvgg_deploy.errors import RepVGGDeployError
from repvgg_deploy.runtime.cuda.port import open_cuda


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
def sample_onnx(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    """The trained sample, exported."""
    pytest.importorskip("torch")
    from repvgg_deploy.pipeline.checkpoint import export_checkpoint

    path = tmp_path_factory.mktemp("gpu") / "sample.onnx"
    export_checkpoint(sample_dir / "repvgg-sample.pth", path)
    return path

"""What the tests of plans run on."""

from __future__ import annotations

import numpy as np

from tests.runtime.gpu_world import Setting
from tests.runtime.make_model import ModelOptions, random_batch

PATIENCE = 300
VERSIONS = [Setting(version=version) for version in ("8.5.3.1", "8.6.1", "10.0.1", "10.16.1.11", "11.4.0.106")]
MACHINES = [*VERSIONS, Setting(version="1.7.1.116", rtx=True)]
PLAIN = ModelOptions()


def name_of(setting: Setting) -> str:
    return f"{'rtx' if setting.rtx else 'trt'}-{setting.version}"


def batch_of(count: int, options: ModelOptions = PLAIN, seed: int = 0) -> np.ndarray:
    return random_batch(options, count, seed=seed)

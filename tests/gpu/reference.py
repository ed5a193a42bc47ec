"""Batches of the sample's images with the answers that ONNX Runtime gave for them, made where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_parts.models import SAMPLE, reference_of

TOLERANCES = {"fp32": 2e-3, "fp16": 2e-2, "int8": 0.25}
"""Share of the largest logit.

FP32: other orders of sums. FP16: 5e-4 an operation over ten layers. INT8, against FP32: --fast weights; wrong scales
and layout show at once.
"""


@dataclass(frozen=True)
class Reference:
    """`images` float32 (64, 3, H, W) and `logits` float32 (64, classes) of the FP32 graph."""

    images: NDArray[np.float32]
    logits: NDArray[np.float32]

    def draw(self, count: int, start: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A batch of any size from the 64 images, and its logits."""
        rows = (start + np.arange(count)) % len(self.images)
        return self.images[rows], self.logits[rows]


def read_reference(folder: Path) -> Reference:
    """From what `models.make` wrote."""
    with np.load(reference_of(folder, SAMPLE)) as stored:
        return Reference(stored["images"], stored["fp32"])


def require_close(found: Any, expected: NDArray[np.float32], precision: str) -> None:
    """Within the tolerance of a precision."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[precision] * float(np.abs(expected).max()))

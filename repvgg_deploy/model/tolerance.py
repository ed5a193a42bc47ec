"""How large a difference of two computations may be, and the gate that refuses a larger one. Needs no torch.

A tolerance is derived from the float32 error of the reference itself, never from a wish.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ParityError
from ..specs.values import Check

# Two float32 computations of one function differ by rounding alone, but sum in different orders and with folded
# weights. On two trained networks and on A0 and B2 with random BatchNorm, the whole deploy form erred 0.8–3.8 times as
# much as the training form; ten times leaves room for other processors' kernels, and is still some hundred times below
# what a wrong BatchNorm epsilon (1e-3 for 1e-5) does.
FLOAT32_FACTOR = 10.0
FLOAT32_FLOOR = 16 * float(np.finfo(np.float32).eps)
"""Relative error that is always allowed: a few roundings, where the training-mode model happened to err less."""
FLOAT64_FLOOR = 64 * float(np.finfo(np.float64).eps)
"""The same for float64 comparisons: sums of thousands of products round more often than a handful of values shows."""
_EPS_RATIO = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)


def largest(array: NDArray[np.floating]) -> float:
    """Largest absolute value; NaN where there is one."""
    return float(np.max(np.abs(array), initial=0.0))


def relative_error(result: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Largest absolute difference, in units of the reference's largest absolute value (at least 1e-30)."""
    scale = max(largest(reference), 1e-30)
    return float(np.max(np.abs(np.subtract(result, reference, dtype=np.float64)), initial=0.0)) / scale


def allow_float32(training_error: float) -> float:
    """Tolerance of a float32 comparison, given the training-mode model's own float32 error (relative)."""
    return max(FLOAT32_FACTOR * training_error, FLOAT32_FLOOR)


def allow_float64(training_error: float) -> float:
    """Tolerance of a float64 comparison: rounding errors scale with the machine epsilon."""
    return max(FLOAT32_FACTOR * training_error * _EPS_RATIO, FLOAT64_FLOOR)


def compare(name: str, result: NDArray[np.floating], reference: NDArray[np.floating], tolerance: float) -> Check:
    """One check. A NaN in the result makes its error infinite, so that it fails and can be written as JSON."""
    error = relative_error(result, reference) if result.shape == reference.shape else float("inf")
    if not np.isfinite(error):
        error = float(np.finfo(np.float64).max)
    return Check(name, error, tolerance, largest(reference))


def require_passed(checks: Sequence[Check], what: str, *, remedy: str | None = None) -> None:
    """The gate.

    Args:
        checks: All must have passed.
        what: Was compared with what.
        remedy: None asks to report it: both are made of the same weights.

    Raises:
        ParityError: A check failed; the message names the worst.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = max(failed, key=lambda check: check.error / check.tolerance)
        raise ParityError(
            f"{what}: {len(failed)} of {len(checks)} comparisons failed; worst: {worst.name}: "
            f"relative error {worst.error:.3g}, allowed {worst.tolerance:.3g}",
            remedy=remedy or "nothing was written; report the checkpoint and the versions of the tools",
        )

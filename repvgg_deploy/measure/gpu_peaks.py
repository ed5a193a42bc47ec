"""Peaks of GPUs by name, from `data/gpus.toml`, which names the source of each. Standard library only."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..errors import InputError
from ..specs import codec
from .roofline import Ceiling


@dataclass(frozen=True, slots=True)
class GpuPeaks:
    """One GPU; None where a number is not known or there is no such unit.

    Attributes:
        names: The first for people; the others as the driver gives them.
        fp32: 1e12 operations a second on the CUDA cores.
        bandwidth: 1e9 bytes a second.
        source: Of the numbers.
        tf32: On the tensor cores, dense.
        fp16: On the tensor cores, dense, sums in float32.
        int8: On the tensor cores, dense.
    """

    names: tuple[str, ...]
    fp32: float
    bandwidth: float
    source: str
    tf32: float | None = None
    fp16: float | None = None
    int8: float | None = None

    def ceiling(self, *, tf32: bool = False) -> Ceiling:
        """As a roofline.

        Args:
            tf32: Whether FP32 convolutions may round their inputs to TF32.
        """
        first = self.tf32 if tf32 and self.tf32 is not None else self.fp32
        known = {"fp32": first, "fp16": self.fp16, "int8": self.int8}
        operations = {name: 1e12 * value for name, value in known.items() if value is not None}
        return Ceiling(self.names[0], operations, 1e9 * self.bandwidth, self.source, measured=False)


@dataclass(frozen=True, slots=True)
class _Table:
    gpu: tuple[GpuPeaks, ...]


@functools.cache
def load_gpus() -> tuple[GpuPeaks, ...]:
    """All GPUs of the table, in its order."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = resources.files("repvgg_deploy").joinpath("data/gpus.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)
    return codec.decode(_Table, table).gpu


def look_up_gpu(name: str) -> GpuPeaks | None:
    """The GPU of a name as a person or the driver writes it (`t4`, `NVIDIA A100-SXM4-80GB`), or None."""
    wanted = _squeeze(name)
    return next((gpu for gpu in load_gpus() if wanted in {_squeeze(known) for known in gpu.names}), None)


def find_gpu_peaks(name: str) -> GpuPeaks:
    """The same, or an error.

    Raises:
        InputError: No GPU of that name is in the table.
    """
    found = look_up_gpu(name)
    if found is None:
        known = ", ".join(gpu.names[0] for gpu in load_gpus())
        raise InputError(f"the peaks of a GPU {name!r} are not known", remedy=f"give one of {known}, or measure with repvgg-trt bench and --measured")
    return found


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))

"""The 8-bit numbers that weights and activations become: integers, or E4M3 floating-point numbers.

Everything else of this room knows a number format by its `Grid`: the values that it has, before a scale multiplies
them, and how ONNX stores them. E4M3 has a sign, four bits of exponent and three of mantissa: 0, subnormal numbers in
steps of 2⁻⁹, and from 2⁻⁶ on eight numbers an octave, up to 448. It knows no infinity: what is larger becomes 448.
Source: Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433; ONNX, Float stored in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..errors import CalibrationError
from .network import Layer

Format: TypeAlias = Literal["int8", "fp8"]
_MIN_EXPONENT = -5  # of frexp: the smallest normal number is 0.5 · 2⁻⁵ = 2⁻⁶
_BIAS = 7
_CANDIDATES = 64
_MOST_TAPS = 32
_FEWEST_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of one 8-bit number format.

    Attributes:
        name: As `--int8`, `--fp8`.
        largest: Of a weight, and what a scale is chosen by.
        lowest: Of an activation.
        kind: TensorProto.DataType of what is stored.
        floating: Whether the steps grow with the values: then a scale decides nothing but where its octaves end.
        spare: How many times the largest value seen a chosen scale may cover.
    """

    name: Format
    largest: float
    lowest: float
    kind: int
    floating: bool
    spare: float

    @property
    def title(self) -> str:
        """As it is written for people."""
        return self.name.upper()

    def nearest(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values of the grid nearest to given ones, ties to the even one, saturated at ±`largest`; same dtype."""
        return np.asarray(np.clip(self._round(values), -self.largest, self.largest))

    def through(self, values: NDArray[Any], scale: float) -> NDArray[np.float32]:
        """What a Q/DQ pair makes of a float32 array."""
        step = np.float32(scale)
        return np.asarray(np.clip(self._round(values / step), self.lowest, self.largest) * step, np.float32)

    def _round(self, values: NDArray[Any]) -> NDArray[Any]:
        if not self.floating:
            return np.asarray(np.rint(values))
        _, exponent = np.frexp(values)
        step = np.ldexp(values.dtype.type(1), np.maximum(exponent, _MIN_EXPONENT) - 4)
        return np.asarray(np.rint(values / step) * step)

    def pack(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the grid as they are kept in memory: int8, or float32."""
        return values.astype(np.float32 if self.floating else np.int8)

    def encode(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the grid as the bytes that ONNX stores: int8, or the bit patterns of E4M3 in uint8."""
        if not self.floating:
            return values.astype(np.int8)
        size = np.abs(values)
        mantissa, exponent = np.frexp(size)
        normal = (exponent - 1 + _BIAS) * 8 + np.rint((2 * mantissa - 1) * 8).astype(np.int32)
        code = np.where(size < 2.0**-6, np.rint(size * 2**9).astype(np.int32), normal)
        return np.asarray(code + 128 * np.signbit(values), np.uint8)

    def widths(self, clips: tuple[float, ...]) -> tuple[float, ...]:
        """Weight scales to try, in units of the one at which the largest weight is the largest value of the grid.

        Integers gain by clipping: the steps become smaller. Floating-point numbers only lose by it; there the same
        numbers of scales are tried above, which move the octaves along the weights.
        """
        return tuple(1 / clip for clip in clips) if self.floating else clips

    def limits(self, top: float, smallest_ratio: float) -> NDArray[np.float64]:
        """Candidates for what the largest value of the grid stands for, `top` being the largest that was seen."""
        lowest = 1.0 if self.floating else smallest_ratio
        return np.asarray(top * np.geomspace(lowest, self.spare, _CANDIDATES), np.float64)


INT8 = Grid("int8", 127.0, -128.0, int(TensorProto.INT8), floating=False, spare=1.0)
FP8 = Grid("fp8", 448.0, -448.0, int(TensorProto.FLOAT8E4M3FN), floating=True, spare=2.0)
GRIDS: dict[Format, Grid] = {"int8": INT8, "fp8": FP8}


def require_format(name: str, *, target: str, method: str) -> None:
    """Fails when there is no such format, or not with that target or method of choosing scales.

    Raises:
        CalibrationError: It says which.
    """
    if name not in GRIDS:
        raise CalibrationError(f"the format must be int8 or fp8, found {name!r}", remedy="give int8, or leave it out")
    if name == "fp8" and (target == "trt8" or method == "entropy"):
        why = "TensorRT 8 knows no FP8" if target == "trt8" else "entropy counts integers, and FP8 has none"
        raise CalibrationError(why, remedy="leave target and method out, or give INT8")


def find_unsuited(layers: Sequence[Layer], grid: Grid) -> dict[str, str]:
    """Layers for which TensorRT has no fast kernels of a number format, with why; by name.

    In FP8 it has them for dense convolutions of at most 32 taps with 16 channels or more on both sides, and for
    products of matrices.
    Source: NVIDIA, TensorRT 10.13 release notes, limitations; NVIDIA Model-Optimizer, which leaves the same out.
    """
    found = {}
    for layer in layers if grid.floating else ():
        taps = int(np.prod(layer.weight_shape[2:]))
        if layer.groups > 1:
            found[layer.name] = f"a convolution in {layer.groups} groups"
        elif layer.op_type == "ConvTranspose":
            found[layer.name] = "a transposed convolution"
        elif taps > _MOST_TAPS:
            found[layer.name] = f"a convolution of {' × '.join(map(str, layer.weight_shape[2:]))} taps"
        elif layer.op_type == "Conv" and min(layer.weight_shape[:2]) < _FEWEST_CHANNELS:
            found[layer.name] = f"a convolution of {layer.weight_shape[1]} to {layer.weight_shape[0]} channels"
    return found

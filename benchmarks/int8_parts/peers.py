"""What others offer, at their best settings, for the same graph and images."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ONNXRUNTIME: dict[str, dict[str, Any]] = {
    "MinMax": {},
    "MinMax, moving average": {"CalibMovingAverage": True},
    "Entropy": {"CalibNumBins": 2048},
    "Percentile 99.99": {"CalibPercentile": 99.99, "CalibNumBins": 2048},
    "Percentile 99.999": {"CalibPercentile": 99.999, "CalibNumBins": 2048},
    "MinMax, unsigned with zero points": {"ActivationSymmetric": False},
}
"""Settings of `quantize_static` that are tried.

The last one gives what TensorRT refuses, and is the tool's own recommendation for a CPU. In all of them weights are
INT8 with a scale per output channel, biases stay in floating point, and pairs stand on the inputs of Conv and Gemm
alone.
"""


def quantize_onnxruntime(source: Path, target: Path, batches: list[NDArray[np.float32]], setting: str) -> None:
    """ONNX Runtime's `quantize_static`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime is untyped
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, Any]] = iter([{"input": batch} for batch in batches])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    unsigned = "unsigned" in setting
    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, setting.split(" ", maxsplit=1)[0].rstrip(",")),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm"],
            **ONNXRUNTIME[setting],
        },
    )


def quantize_modelopt(source: Path, target: Path, batches: list[NDArray[np.float32]], how: str) -> None:
    """NVIDIA ModelOpt's PTQ with its calibration `max` or `entropy`, its default.

    Source: https://nvidia.github.io/Model-Optimizer/reference/generated/modelopt.onnx.quantization.quantize.html
    """
    modelopt = importlib.import_module("modelopt.onnx.quantization")  # by name: it is no dependency
    modelopt.quantize(
        str(source),
        quantize_mode="int8",
        calibration_data=np.concatenate(batches),
        calibration_method=how,
        calibration_eps=["cpu"],
        op_types_to_quantize=["Conv", "Gemm"],
        high_precision_dtype="fp32",
        output_path=str(target),
    )

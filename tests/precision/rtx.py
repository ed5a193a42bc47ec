"""NVIDIA's own ONNX parser and builder: TensorRT-RTX runs both without a GPU."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import Any

import onnx
import pytest

WHY_NOT = (
    ""
    if importlib.util.find_spec("tensorrt_rtx")
    else "TensorRT-RTX is not installed; the `dev` extra brings it on Linux x86-64 with Python 3.10 to 3.14, and this "
    f"is Python {platform.python_version()} on {sys.platform} {platform.machine()}"
)
needs_rtx = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
PROFILE = (1, 8, 32)


@dataclass(frozen=True)
class Built:
    """What became of a graph.

    Attributes:
        plan_bytes: Size of the plan; 0 where the graph was refused.
        errors: What the parser or the builder said.
        types: By name of inputs and outputs: type in the parsed network, such as `HALF`.
    """

    plan_bytes: int
    errors: tuple[str, ...]
    types: dict[str, str]


def build(model: onnx.ModelProto, *, plan: bool = True) -> Built:
    """Parses a graph and builds a plan of it for batches of 1 to 32.

    Args:
        model: With a dynamic batch and else fixed sizes.
        plan: False stops after the parser.
    """
    import tensorrt_rtx as trt

    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # always strongly typed
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return Built(0, tuple(parser.get_error(index).desc() for index in range(parser.num_errors)), {})
    tensors = [network.get_input(index) for index in range(network.num_inputs)] + [
        network.get_output(index) for index in range(network.num_outputs)
    ]
    types = {tensor.name: tensor.dtype.name for tensor in tensors}
    if not plan:
        return Built(0, (), types)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape(tensors[0].name, *((batch, *tuple(tensors[0].shape)[1:]) for batch in PROFILE))
    assert config.add_optimization_profile(profile) == 0
    data = builder.build_serialized_network(network, config)
    return Built(data.nbytes if data is not None else 0, tuple(logger.errors), types)


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()

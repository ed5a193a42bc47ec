"""What the layers of exported graphs give, FP32, FP16 or with Q/DQ pairs alike: for a comparison of two graphs layer by layer.

Layers are known by the names of their nodes (an unnamed one by its output), which no change of precision touches; the tensor that a node writes
may have another name and type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from ..errors import InputError, ModelError
from .execute import open_session

Pair: TypeAlias = "tuple[NDArray[Any], NDArray[Any]]"

_LAYERS = ("Conv", "Gemm")
_EXPORT = "export it again with repvgg-export"


@dataclass(frozen=True, slots=True)
class SharedLayers:
    """Layers that two graphs have in common.

    Attributes:
        names: In the order of the first.
        classifiers: Those whose channels nothing may rescale.
    """

    names: tuple[str, ...]
    classifiers: frozenset[str]


class LayerRun:
    """A graph opened so that it gives the output of each layer, before any ReLU.

    Args:
        source: File, or the model in memory; not changed.

    Raises:
        ModelError: It cannot be read or run.
    """

    def __init__(self, source: Path | onnx.ModelProto) -> None:
        model = _load(source)
        layers = [node for node in model.graph.node if node.op_type in _LAYERS]
        self.outputs = {_name(node): node.output[0] for node in layers}
        self.classifiers = frozenset(_name(node) for node in layers if node.op_type == "Gemm")
        self._shapes = _weight_shapes(model)
        self._input = model.graph.input[0].name
        self._session = _open(model, list(self.outputs.values()))

    def shared_with(self, other: LayerRun) -> SharedLayers:
        """The layers that have the same names in the same order, with weights of the same shape.

        Raises:
            InputError: The two are different networks.
        """
        if list(self.outputs) != list(other.outputs) or self._shapes != other._shapes:
            missing = next((name for name in self.outputs if self._shapes[name] != other._shapes.get(name)), "one of the other's")
            raise InputError(
                f"the layers cannot be compared: the two are different networks: {missing} is not the same in both",
                remedy="compare two graphs of one checkpoint",
            )
        return SharedLayers(tuple(self.outputs), self.classifiers)

    def run(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """By name of the layer: its output as float32, (N, C, H, W) or (N, C).

        Raises:
            ModelError: ONNX Runtime failed.
        """
        try:
            values = self._session.run(list(self.outputs.values()), {self._input: self._fit(batch)})
        except Exception as error:  # its errors share no base class
            raise ModelError(f"ONNX Runtime failed on {batch.dtype} {batch.shape}: {_first_line(error)}", remedy=_EXPORT) from error
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, values, strict=True)}

    def _fit(self, batch: NDArray[Any]) -> NDArray[Any]:
        """The batch in the type that the graph takes: float16 where float32 was given, as the Engine does."""
        half = self._session.get_inputs()[0].type == "tensor(float16)"
        return batch.astype(np.float16) if half and batch.dtype == np.float32 else batch


def run_pairs(reference: LayerRun, other: LayerRun, batches: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Iterator[Mapping[str, Pair]]:
    """By name of the layer: what both graphs give, batch by batch; one batch is in memory at a time.

    Args:
        reference: The first graph.
        other: Another of the same network; see `LayerRun.shared_with`.
        batches: The same images as each takes them.
    """
    for one, two in batches:
        truth, found = reference.run(one), other.run(two)
        yield {name: (truth[name], found[name]) for name in truth}


def _load(source: Path | onnx.ModelProto) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        return model
    try:
        return onnx.load(source)
    except Exception as error:  # protobuf's and onnx's errors share no base class
        raise ModelError(f"{source}: cannot be read as ONNX: {_first_line(error)}", remedy=_EXPORT) from error


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _weight_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """By name of the layer; weights may stand behind DequantizeLinear or Cast."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type in _LAYERS:
            weight = node.input[1]
            while weight not in shapes and weight in producers:
                weight = producers[weight].input[0]
            found[_name(node)] = shapes.get(weight, ())
    return found


def _open(model: onnx.ModelProto, outputs: list[str]) -> onnxruntime.InferenceSession:
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)  # ONNX Runtime infers the types
    return open_session(model, memory_arena=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Runs an ONNX graph on the CPU, whole with tensors of its middle given out, or layer by layer; and divides batches.

ONNX Runtime up to 1.23 (the last for Python 3.10) cuts digits off in a QuantizeLinear of FP16, where ONNX rounds to
nearest. An INT8 graph with FP16 scales would look far worse than it is, so there it is run with these operators in
FP32.
Source: https://github.com/microsoft/onnxruntime/pull/32452.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError, ModelError
from ..graph.edit import copy_model, set_nodes

Tell: TypeAlias = Callable[[int, int], None]
"""Called with steps done and steps in all."""
Tensors: TypeAlias = dict[str, NDArray[Any]]
"""Values of tensors, by name."""


def tell_nobody(done: int, total: int) -> None:
    """Progress of a caller who does not want to know."""


@functools.cache
def rounds_halves() -> bool:
    """Whether this ONNX Runtime rounds to nearest in a QuantizeLinear of FP16; no version number says it."""
    values = [
        helper.make_tensor_value_info(name, kind, [1])
        for name, kind in (("x", TensorProto.FLOAT16), ("y", TensorProto.INT8))
    ]
    constants = [numpy_helper.from_array(np.float16(1.0), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], "one", values[:1], values[1:], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"x": np.array([1.75], np.float16)})[0][0]) == 2


def widen_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with every FP16 QuantizeLinear done in FP32, where every ONNX Runtime rounds."""
    halves = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    if not any(node.op_type == "QuantizeLinear" and node.input[1] in halves for node in model.graph.node):
        return model
    result = copy_model(model)
    nodes, scales = [], {}
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in halves:
            cast, scale = f"{node.output[0]}.fp32", f"{node.input[1]}.fp32"
            nodes.append(helper.make_node("Cast", [node.input[0]], [cast], name=cast, to=TensorProto.FLOAT))
            scales[scale] = numpy_helper.to_array(halves[node.input[1]]).astype(np.float32)
            node.input[0], node.input[1] = cast, scale
        nodes.append(node)
    set_nodes(result.graph, nodes)
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in scales.items())
    return result


def open_session(model: onnx.ModelProto, *, memory_arena: bool = True) -> onnxruntime.InferenceSession:
    """A CPU session that computes every Q/DQ pair as it stands.

    Args:
        model: Not changed.
        memory_arena: Whether memory is kept from run to run: faster, and never given back.

    Raises:
        ModelError: ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    # Extended optimizations fuse Q/DQ pairs into integer kernels. WeightBiasQuantization, which the basic level has
    # too, gives every FP32 weight behind a Q/DQ pair a rounding of its own: noise at 31 dB on a trained A0, and
    # nonsense in FP16 graphs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = memory_arena
    data = (model if rounds_halves() else widen_quantizers(model)).SerializeToString()
    try:
        return onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
    except Exception as error:  # its errors share no base class
        raise ModelError(
            f"ONNX Runtime refuses the graph: {str(error).splitlines()[0]}", remedy="export it again with repvgg-export"
        ) from error


def subgraph(model: onnx.ModelProto, inputs: Iterable[str], outputs: Iterable[str]) -> onnx.ModelProto:
    """The part of a graph that computes tensors `outputs` from tensors `inputs`; those of its middle are float32."""
    given, wanted = list(inputs), list(outputs)
    producers = {name: node for node in model.graph.node for name in node.output}
    needed: set[str] = set()
    queue = [name for name in wanted if name not in given]
    while queue:
        node = producers.get(queue.pop())
        if node is not None and node.output[0] not in needed:
            needed.add(node.output[0])
            queue += [name for name in node.input if name not in given]
    known = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    values = [
        [known.get(n) or helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
        for names in (given, wanted)
    ]
    return make_part(model, [node for node in model.graph.node if node.output[0] in needed], *values)


def make_part(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A model of its own with these nodes, and those initializers of `model` that they read."""
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, "part", inputs, outputs, constants)
    part = helper.make_model(graph, opset_imports=model.opset_import)
    part.ir_version = model.ir_version
    return part


def run_tensors(model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[NDArray[Any]]) -> Iterator[Tensors]:
    """Values of `tensors` (of the graph's middle or its outputs) for each batch, one batch in memory at a time.

    Raises:
        CalibrationError: A batch is not what the graph takes.
        ModelError: ONNX Runtime refuses the graph.
    """
    yield from map(open_tensors(model, tensors), batches)


def open_tensors(model: onnx.ModelProto, tensors: Sequence[str]) -> Callable[[NDArray[Any]], Tensors]:
    """A function that computes `tensors` of a batch, in one session; it raises what `run_tensors` raises."""
    source = model.graph.input[0].name
    run = _open_part(model, [source], tensors)
    return lambda batch: run({source: batch})


def _open_part(model: onnx.ModelProto, given: Sequence[str], wanted: Sequence[str]) -> Callable[[Tensors], Tensors]:
    """A function that computes the wanted tensors from the given ones."""
    fresh = [name for name in wanted if name not in given]
    session = open_session(subgraph(model, given, fresh)) if fresh else None
    names = {value.name for value in session.get_inputs()} if session else set()

    def run(values: Tensors) -> Tensors:
        if session is not None:
            found = run_session(session, fresh, {name: values[name] for name in names})
            values = values | dict(zip(fresh, found, strict=True))
        return {name: values[name] for name in wanted}

    return run


def run_session(session: onnxruntime.InferenceSession, wanted: list[str], feed: Tensors) -> list[NDArray[Any]]:
    """Runs a session once.

    Raises:
        CalibrationError: The graph does not take the feed.
    """
    try:
        return list(session.run(wanted, feed))
    except Exception as error:  # its errors share no base class
        found = ", ".join(f"{name}: {value.dtype} {value.shape}" for name, value in feed.items())
        raise CalibrationError(
            f"the graph does not take a batch {found}: {str(error).splitlines()[0]}",
            remedy="make the batches with images.decode.load_batch",
        ) from error


class LayerWalk:
    """Runs batches through a graph from layer to layer, holding only the tensors that later layers still need.

    Where all batches together would take more than `budget_bytes` (the first layers of a large network), fewer are run,
    one at least; the others are caught up with, from the image on, as soon as the tensors are small enough. The model's
    weights may be changed between two steps: what was computed stays, what comes is computed with the new ones. Where a
    tensor is asked for more than once, `tensors` are all those to come.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        batches: Iterable[NDArray[Any]],
        *,
        tensors: Iterable[str] = (),
        budget_bytes: int = 1 << 28,
    ) -> None:
        self._model = model
        self._batches = list(batches)
        self._budget = budget_bytes
        self._source = model.graph.input[0].name
        self._asked = Counter(tensors)
        self._live: list[Tensors] = [{self._source: batch} for batch in self._batches]
        self._done: set[str] = {self._source}

    def advance(self, tensor: str) -> Iterator[NDArray[Any]]:
        """Values of `tensor`, batch by batch, the first batches first, and all where they fit; consume it wholly."""
        given, nodes = list(self._live[0]), self._model.graph.node
        producers = {name: node for node in nodes for name in node.output}
        queue = [tensor]
        while queue:
            name = queue.pop()
            if name in producers and name not in self._done:
                self._done.update(producers[name].output)
                queue += producers[name].input
        self._asked[tensor] -= 1
        needed = {name for node in nodes if node.output[0] not in self._done for name in node.input}
        needed |= {name for name, times in self._asked.items() if times > 0}
        wanted = list(dict.fromkeys([tensor, *sorted(self._done & needed)]))
        previous, self._live = self._live, []
        run, catch_up = _open_part(self._model, given, wanted), None
        used = 0
        for index, batch in enumerate(self._batches):
            if index < len(previous):
                values = run(previous[index])
                previous[index] = {}
            else:
                catch_up = catch_up or _open_part(self._model, [self._source], wanted)
                values = catch_up({self._source: batch})
            self._live.append(values)
            used += sum(value.nbytes for value in values.values())
            yield values[tensor]
            if used + used // (index + 1) > self._budget:
                break


def count_images(batches: Iterable[NDArray[Any]]) -> int:
    """How many images the batches hold."""
    return int(np.sum([len(batch) for batch in batches], dtype=np.int64))


def has_fixed_batch(model: onnx.ModelProto) -> bool:
    """Whether the model takes batches of one size only."""
    return bool(model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"))


def split_batches(model: onnx.ModelProto, batches: Iterable[NDArray[Any]], images: int) -> list[NDArray[Any]]:
    """The same images in batches of at most `images`; as they are where the model's batch size is fixed."""
    if has_fixed_batch(model):
        return list(batches)
    return [batch[start : start + images] for batch in batches for start in range(0, len(batch), images)]


def spread_images(model: onnx.ModelProto, batches: Sequence[NDArray[Any]], images: int) -> list[NDArray[Any]]:
    """About `images` images, taken evenly from all batches; whole batches where the model's batch is fixed."""
    total = count_images(batches)
    if total <= images:
        return list(batches)
    if has_fixed_batch(model) or len({batch.shape[1:] for batch in batches}) > 1:
        wanted = max(1, round(images * len(batches) / total))
        return [batches[int(index)] for index in np.linspace(0, len(batches) - 1, wanted).round()]
    picks = set(np.linspace(0, total - 1, images).round().astype(int).tolist())
    starts = np.cumsum([0, *map(len, batches)])
    kept = [
        batch[[i - start for i in range(start, start + len(batch)) if i in picks]]
        for start, batch in zip(starts, batches, strict=False)
    ]
    return [batch for batch in kept if len(batch)]

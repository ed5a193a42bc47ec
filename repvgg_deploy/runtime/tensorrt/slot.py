"""A slot: an execution context with its streams, buffers and CUDA graphs, lent to one thread at a time.

CUDA graphs of an engine: what is captured, and when it is given up.

Batches larger than the plan takes: in pieces, where copies to and from the GPU overlap its computing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CudaError, InputError
from ..cuda.port import CAPTURE_LOCK, CudaPort
from .context import Lane, changes_kernels, choose_buckets, count_scratch_bytes, make_context
from .memory import Owned, Stage
from .plan import Interface, OpenPlan, Shape

logger = logging.getLogger(__name__)
_MOST_FAILURES = 3


@dataclass(slots=True)
class GraphSwitch:
    """Whether CUDA graphs are used by an engine.

    A capture can fail because another thread of the process waited for the whole device just then
    (torch.cuda.synchronize() does), which is no reason to do without for good: the third failure turns them off, and is
    logged.
    """

    on: bool
    buckets: frozenset[int] = field(default_factory=frozenset)
    failures: int = 0

    def note_failure(self, reason: object) -> None:
        """A capture failed: its batch was run without, and another one is tried later, or none any more."""
        self.failures += 1
        text = " ".join(str(reason).split())
        if self.failures < _MOST_FAILURES:
            logger.info("a CUDA graph could not be captured, which is tried again: %s", text)
        elif self.on:
            self.on = False
            logger.warning("CUDA graphs are left out from now on, the engine runs without: %s", text)


def make_switch(plan: OpenPlan, port: CudaPort, wanted: bool) -> GraphSwitch:
    """The switch of an engine."""
    return GraphSwitch(wanted and port.has_graphs, choose_buckets(plan.interface))


def capture_graph(port: CudaPort, stream: Any, work: Callable[[], None]) -> Any:
    """The executable graph of what `work` puts on a stream.

    Raises:
        CudaError: It cannot be captured; the stream can be used again.
    """
    with CAPTURE_LOCK:
        port.begin_capture(stream)
        try:
            work()
        except BaseException:
            with contextlib.suppress(CudaError):  # of the two errors, that of the work says more
                port.destroy_graph(port.end_capture(stream))
            raise
        return port.end_capture(stream)


Arrays = list[NDArray[Any]]


class NoMoreContextsError(CudaError):
    """TensorRT makes no further context of this engine."""


class Slot:
    """See the module. Made and used inside `on_device`.

    Args:
        port: CUDA.
        plan: The deserialized plan.
        graphs: Shared by all slots of an engine.

    Raises:
        NoMoreContextsError: There are as many contexts as this TensorRT allows.
        CudaError: CUDA fails or has no memory.
    """

    def __init__(self, port: CudaPort, plan: OpenPlan, graphs: GraphSwitch) -> None:
        self.port, self.plan, self._graphs = port, plan, graphs
        self.owned = Owned()
        self._streams: list[Any] = []
        self._lanes: dict[Shape, Lane] = {}
        self._has_contexts = True
        self._busy = False
        self.main: Lane | None = None
        self.pipeline: Pipeline | None = None
        try:
            self.stream = self.make_stream()
            self.handle = port.stream_handle(self.stream)
            size = max(count_scratch_bytes(plan.engine), 256)
            self._scratch = (port.allocate(size), size)
            self.owned.add(self._scratch, lambda: port.free(self._scratch[0]))
            self._freed = port.create_event()
            self.owned.add(self._freed, lambda: port.destroy_event(self._freed))
            self.main = self._make_lane()
            if self.main is None:
                raise NoMoreContextsError(
                    "TensorRT makes no further execution context of this plan", remedy="lower EngineOptions(contexts=…)"
                )
            self.stage = Stage(port, self.owned, plan.interface)
        except BaseException:
            self.close()
            raise

    def make_stream(self) -> Any:
        """A stream that is freed with the slot."""
        stream = self.port.create_stream()
        self.owned.add(stream, lambda: self.port.destroy_stream(stream))
        self._streams.append(stream)
        return stream

    def _make_lane(self, *, one_shape: bool = False) -> Lane | None:
        plan = self.plan
        context = make_context(plan, self._scratch, stream_handle=self.handle, one_shape=one_shape)
        if context is None:
            return None
        self.port.synchronize_stream(self.stream)
        return Lane(context, plan.interface, plan.library.log, keeps_kernels=one_shape or not changes_kernels(plan))

    def run_whole(self, batch: NDArray[Any], shape: Shape) -> Arrays:
        """Runs one batch from host to host.

        Args:
            batch: (n, …) of the input's dtype, any memory order; n may be smaller than shape[0].
            shape: What the plan runs.

        Returns:
            The outputs in arrays of their own, of the engine's dtypes, with the rows of `shape`.
        """
        self.wait_for_others(self.stream)
        lane = self._choose_lane(shape)
        output_shapes = self.bind(lane, shape)
        stage = self.stage
        self.reserve([stage], shape, output_shapes)
        fill(stage, self.plan.interface, batch, shape)
        if lane.graph is not None:
            self.port.launch_graph(lane.graph, self.stream)
        elif not self._capture(lane, shape):
            self._enqueue(lane, shape)
        self.port.synchronize_stream(self.stream)
        return [view.copy() for view in views(stage, self.plan.interface, output_shapes)]

    def bind(self, lane: Lane, shape: Shape) -> tuple[Shape, ...]:
        """Sets a lane's shape; a graph of another shape goes, for it belongs to what the context was."""
        if lane.graph is not None and lane.shape != shape:
            self._drop(lane)
        return lane.bind_shape(shape)

    def wait_for_others(self, stream: Any) -> None:
        """What comes next on the stream begins after the work that was left on a caller's stream."""
        if self._busy:
            self.port.wait_event(stream, self._freed)
            self._busy = False

    def reserve(self, stages: Sequence[Stage], shape: Shape, output_shapes: tuple[Shape, ...]) -> None:
        """Makes room in the buffers; where their addresses change, graphs that hold the old ones go."""
        small = [stage for stage in stages if not stage.fits(shape, output_shapes)]
        if not small:
            return
        self.port.synchronize_event(self._freed)  # an event that was never recorded has happened
        self.drop_graphs()
        for stage in small:
            stage.reserve(shape, output_shapes)

    def leave_working(self, stream: Any) -> None:
        """Notes that work of this slot is left on a caller's stream."""
        try:
            self.port.record_event(self._freed, stream)
        except CudaError:
            # Nothing tells when the work is done: it is waited for, before what it uses can be freed or lent again.
            with contextlib.suppress(CudaError):
                self.port.synchronize_stream(stream)
            raise
        self._busy = True

    def close(self) -> CudaError | None:
        """Frees everything, also after a failure; the first error on the way."""
        waits: list[Callable[[], None]] = (
            [] if self.main is None else [functools.partial(self.port.synchronize_event, self._freed)]
        )
        # All of them: after a failure in the midst of a split batch, copies of other pieces may still be under way.
        waits += [functools.partial(self.port.synchronize_stream, stream) for stream in self._streams]
        first: CudaError | None = None
        for wait in waits:
            try:
                wait()
            except CudaError as error:
                first = first or error
        for lane in (self.main, *self._lanes.values()):
            if lane is not None:
                lane.release()
        return self.owned.free_all() or first

    def drop_graphs(self) -> None:
        """Frees all graphs."""
        for lane in (self.main, *self._lanes.values()):
            if lane is not None:
                self._drop(lane)

    def _drop(self, lane: Lane) -> None:
        graph, lane.graph = lane.graph, None
        if graph is not None:
            self.owned.free(graph)

    def _choose_lane(self, shape: Shape) -> Lane:
        """A context of its own for each batch size that gets a graph, as a graph is true only as long as its context stays as it is."""
        assert self.main is not None
        if not self._graphs.on or shape[0] not in self._graphs.buckets:
            return self.main
        found = self._lanes.get(shape)
        if found is None and self._has_contexts and len(self._lanes) < len(self._graphs.buckets):
            found = self._make_lane(one_shape=True)
            if found is None:  # TensorRT 8: the one context holds the graph of the size that it ran last
                self._has_contexts = False
                self.plan.library.log.take()
            else:
                self._lanes[shape] = found
        return found or self.main

    def _enqueue(self, lane: Lane, shape: Shape) -> None:
        port, stage, interface = self.port, self.stage, self.plan.interface
        port.copy(stage.source.device, stage.source.host, interface.source.count_bytes(shape), self.stream)
        lane.enqueue(stage.addresses, self.handle)
        for tensor, buffer, found in zip(interface.outputs, stage.outputs, lane.bind_shape(shape), strict=True):
            port.copy(buffer.host, buffer.device, tensor.count_bytes(found), self.stream)

    def _capture(self, lane: Lane, shape: Shape) -> bool:
        """Captures and runs a graph where it is time to; False: run without."""
        # TensorRT sets itself up in the first run of a shape, which must not be captured.
        if (
            not self._graphs.on
            or shape[0] not in self._graphs.buckets
            or lane.runs == 0
            or not lane.can_capture(self.handle)
        ):
            return False
        port = self.port
        try:
            graph = capture_graph(port, self.stream, lambda: self._enqueue(lane, shape))
        except CudaError as error:
            self._graphs.note_failure(error)
            return False
        self.owned.add(graph, lambda: port.destroy_graph(graph))
        lane.graph = graph
        port.launch_graph(graph, self.stream)
        return True


def fill(stage: Stage, interface: Interface, batch: NDArray[Any], shape: Shape) -> None:
    """Copies a batch to the page-locked side of the input, and zeros below it where the plan wants more rows."""
    view = stage.source.view(interface.source.dtype, shape)
    np.copyto(view[: len(batch)], batch)
    view[len(batch) :] = 0


def views(stage: Stage, interface: Interface, output_shapes: tuple[Shape, ...]) -> Arrays:
    """The page-locked sides of the outputs, which the next batch overwrites."""
    return [
        buffer.view(tensor.dtype, found)
        for tensor, buffer, found in zip(interface.outputs, stage.outputs, output_shapes, strict=True)
    ]


def split(count: int, interface: Interface) -> Iterator[tuple[int, int, int]]:
    """Pieces of a batch: first image, how many, and how many rows the plan runs for them."""
    least, most = interface.smallest[0], interface.largest[0]
    for start in range(0, count, most):
        size = min(most, count - start)
        yield start, size, max(size, least)


def require_size(shape: Shape, interface: Interface) -> None:
    """Refuses images of a size that the profile does not hold.

    Raises:
        InputError: The size is out of the profile's range.
    """
    sizes, least, most = shape[1:], interface.smallest[1:], interface.largest[1:]
    if not all(low <= size <= high for low, size, high in zip(least, sizes, most, strict=True)):
        raise InputError(
            f"batch: the plan takes images from {least} to {most}, found {sizes}",
            remedy="resize the images, or build the plan with another profile",
        )


_STAGES = 2


class Pipeline:
    """Two sets of buffers and a stream each for copies in and out, beside the slot's own, which computes.

    Args:
        slot: The slot that it belongs to.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._stages = (slot.stage, *(Stage(slot.port, slot.owned, slot.plan.interface) for _ in range(_STAGES - 1)))
        self._inward = slot.make_stream()
        self._outward = slot.make_stream()

    def run(self, batch: NDArray[Any]) -> Arrays:
        """Runs N images from host to host; the outputs have N rows each, of the engine's dtypes."""
        slot, interface = self._slot, self._slot.plan.interface
        slot.wait_for_others(slot.stream)
        results: Arrays = []
        pending: list[tuple[Stage, int, int, tuple[Shape, ...]]] = []
        assert slot.main is not None
        for index, (start, size, rows) in enumerate(split(len(batch), interface)):
            shape = (rows, *batch.shape[1:])
            output_shapes = slot.bind(slot.main, shape)
            if not results:
                results = [
                    np.empty((len(batch), *found[1:]), tensor.dtype)
                    for tensor, found in zip(interface.outputs, output_shapes, strict=True)
                ]
                # Before the first piece, so that nothing is under way when addresses change; the first is the largest.
                slot.reserve(self._stages, shape, output_shapes)
            if len(pending) == _STAGES:
                self._collect(pending.pop(0), results)
            stage = self._stages[index % _STAGES]
            fill(stage, interface, batch[start : start + size], shape)
            self._enqueue(stage, shape, output_shapes)
            pending.append((stage, start, size, output_shapes))
        for piece in pending:
            self._collect(piece, results)
        return results

    def _enqueue(self, stage: Stage, shape: Shape, output_shapes: tuple[Shape, ...]) -> None:
        slot, port, interface = self._slot, self._slot.port, self._slot.plan.interface
        assert slot.main is not None
        port.copy(stage.source.device, stage.source.host, interface.source.count_bytes(shape), self._inward)
        port.record_event(stage.arrived, self._inward)
        port.wait_event(slot.stream, stage.arrived)
        slot.main.enqueue(stage.addresses, slot.handle)
        port.record_event(stage.computed, slot.stream)
        port.wait_event(self._outward, stage.computed)
        for tensor, buffer, found in zip(interface.outputs, stage.outputs, output_shapes, strict=True):
            port.copy(buffer.host, buffer.device, tensor.count_bytes(found), self._outward)
        port.record_event(stage.done, self._outward)

    def _collect(self, piece: tuple[Stage, int, int, tuple[Shape, ...]], results: Arrays) -> None:
        """Waits for a piece; its buffers are free then, on both sides."""
        stage, start, size, output_shapes = piece
        self._slot.port.synchronize_event(stage.done)
        for result, view in zip(results, views(stage, self._slot.plan.interface, output_shapes), strict=True):
            result[start : start + size] = view[:size]

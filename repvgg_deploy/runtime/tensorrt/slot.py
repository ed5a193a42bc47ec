"""A slot: an execution context with its streams, buffers and CUDA graphs, lent to one thread at a time.

`Slot.run` takes any number of images of host memory. What the plan takes at once is one piece, as a CUDA graph where
the size is a usual one. More goes through a `Pipeline` of pieces, whose copies overlap the computing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CudaError, InputError
from ..cuda.port import CAPTURE_LOCK, CudaPort
from .context import Lane, changes_kernels, count_scratch_bytes, make_context
from .memory import HostRoom, Owned, Stage
from .plan import OpenPlan, PlanInterface, Shape

logger = logging.getLogger(__name__)
_MOST_FAILURES = 3
_STAGES = 2


class NoMoreContextsError(CudaError):
    """TensorRT makes no further context of this engine."""


class Slot:
    """One context for all shapes, further ones for shapes that have a graph. Made and used inside `on_device`.

    Attributes:
        stage: Buffers of the one piece that is under way.
        answers: Room on the host for the results of a batch that came from the device.
        stream: The slot's own.
        handle: The number of this stream.

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
        self._main: Lane | None = None
        self._pipeline: Pipeline | None = None
        try:
            self.stream = self.make_stream()
            self.handle = port.stream_handle(self.stream)
            size = max(count_scratch_bytes(plan.engine), 256)
            self._scratch = (self.owned.add(port.allocate(size), port.free), size)
            self._freed = self.owned.add(port.create_event(), port.destroy_event)
            self._main = self._make_lane()
            if self._main is None:
                raise NoMoreContextsError(
                    "TensorRT makes no further execution context of this plan", remedy="lower EngineOptions(contexts=…)"
                )
            self.stage = Stage(port, self.owned, plan.interface)
            self.answers = HostRoom(port, self.owned)
        except BaseException:
            self.close()
            raise

    @property
    def main(self) -> Lane:
        """The context for all shapes."""
        assert self._main is not None
        return self._main

    def make_stream(self) -> Any:
        """A stream that is freed with the slot."""
        stream = self.owned.add(self.port.create_stream(), self.port.destroy_stream)
        self._streams.append(stream)
        return stream

    def _make_lane(self, *, one_shape: bool = False) -> Lane | None:
        plan = self.plan
        context = make_context(plan, self._scratch, stream_handle=self.handle, one_shape=one_shape)
        if context is None:
            return None
        self.port.synchronize_stream(self.stream)
        return Lane(context, plan, keeps_kernels=one_shape or not changes_kernels(plan))

    def run(self, batch: NDArray[Any]) -> list[NDArray[Any]]:
        """Runs N images from host to host.

        Args:
            batch: (N, …) of the input's dtype, any memory order, of a size that the profile holds.

        Returns:
            The outputs in arrays of their own, of the engine's dtypes, with N rows.
        """
        count, interface = len(batch), self.plan.interface
        if count > interface.largest[0]:
            if self._pipeline is None:
                self._pipeline = Pipeline(self)
            return self._pipeline.run(batch)
        rows = max(count, interface.smallest[0])
        outputs = self._run_piece(batch, (rows, *batch.shape[1:]))
        return outputs if rows == count else [output[:count].copy() for output in outputs]

    def _run_piece(self, batch: NDArray[Any], shape: Shape) -> list[NDArray[Any]]:
        """The outputs with the rows of the shape that the plan runs, which may be more than those of the batch."""
        self.wait_for_others(self.stream)
        lane = self._choose_lane(shape)
        self.load(lane, batch, shape)
        if lane.graph is not None:
            self.port.launch_graph(lane.graph, self.stream)
        elif not self._capture(lane, shape):
            self._enqueue(lane, shape)
        self.port.synchronize_stream(self.stream)
        return [view.copy() for view in self.stage.view_outputs(lane.output_shapes)]

    def load(self, lane: Lane, batch: NDArray[Any], shape: Shape) -> None:
        """Sets a lane's shape and fills the host side of the buffers."""
        self.bind(lane, shape)
        self.reserve([self.stage], shape, lane.output_shapes)
        self.stage.fill(batch, shape)

    def bind(self, lane: Lane, shape: Shape) -> None:
        """Sets a lane's shape; a graph of another shape goes, for it belongs to what the context was."""
        if lane.graph is not None and lane.shape != shape:
            self._drop(lane)
        lane.set_shape(shape)

    def reserve(self, stages: Sequence[Stage], shape: Shape, output_shapes: tuple[Shape, ...]) -> None:
        """Makes room in the buffers; where their addresses change, graphs that hold the old ones go."""
        small = [stage for stage in stages if not stage.fits(shape, output_shapes)]
        if not small:
            return
        self.port.synchronize_event(self._freed)  # an event that was never recorded has happened
        for lane in (self.main, *self._lanes.values()):
            self._drop(lane)
        for stage in small:
            stage.reserve(shape, output_shapes)

    def _drop(self, lane: Lane) -> None:
        graph, lane.graph = lane.graph, None
        if graph is not None:
            self.owned.free(graph)

    def _enqueue(self, lane: Lane, shape: Shape) -> None:
        self.stage.copy_in(shape, self.stream)
        lane.enqueue(self.stage.addresses, self.handle)
        self.stage.copy_out(lane.output_shapes, self.stream)

    def _choose_lane(self, shape: Shape) -> Lane:
        """A context of its own for each batch size that gets a graph, which is true only while its context stays."""
        if not self._graphs.covers(shape):
            return self.main
        found = self._lanes.get(shape)
        if found is None and self._has_contexts and len(self._lanes) < len(self._graphs.buckets):
            found = self._make_lane(one_shape=True)
            if found is None:  # TensorRT 8: the one context holds the graph of the size that it ran last
                self._has_contexts = False
                self.plan.log.take()
            else:
                self._lanes[shape] = found
        return found or self.main

    def _capture(self, lane: Lane, shape: Shape) -> bool:
        """Captures and runs a graph where it is time to; False: run without."""
        if not self._graphs.covers(shape) or not lane.can_capture(self.handle):
            return False
        port = self.port
        try:
            graph = _capture_graph(port, self.stream, lambda: self._enqueue(lane, shape))
        except CudaError as error:
            self._graphs.note_failure(error)
            return False
        lane.graph = self.owned.add(graph, port.destroy_graph)
        port.launch_graph(graph, self.stream)
        return True

    def wait_for_others(self, stream: Any) -> None:
        """What comes next on the stream begins after the work that was left on a caller's stream."""
        if self._busy:
            self.port.wait_event(stream, self._freed)
            self._busy = False

    def follow(self, stream: int) -> None:
        """What comes next on the slot's own stream begins after what a caller's stream has now."""
        self.port.record_event(self.stage.arrived, stream)
        self.port.wait_event(self.stream, self.stage.arrived)

    def hold_up(self, stream: int) -> None:
        """What comes next on a caller's stream begins after the work that `leave_working` noted."""
        self.port.wait_event(stream, self._freed)

    def leave_working(self, stream: Any) -> None:
        """Notes that work of this slot is left on a stream and not waited for."""
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
            [] if self._main is None else [functools.partial(self.port.synchronize_event, self._freed)]
        )
        # All of them: after a failure in the midst of a split batch, copies of other pieces may still be under way.
        waits += [functools.partial(self.port.synchronize_stream, stream) for stream in self._streams]
        first: CudaError | None = None
        for wait in waits:
            try:
                wait()
            except CudaError as error:
                first = first or error
        for lane in (self._main, *self._lanes.values()):
            if lane is not None:
                lane.release()
        return self.owned.free_all() or first


# CUDA graphs: what is captured, and when it is given up


@dataclass(slots=True)
class GraphSwitch:
    """Whether an engine runs CUDA graphs, and of which batch sizes.

    A capture can fail because another thread of the process waited for the whole device just then
    (torch.cuda.synchronize() does), which is no reason to do without for good: the third failure turns them off, and is
    logged.
    """

    on: bool
    buckets: frozenset[int]
    failures: int = 0

    def covers(self, shape: Shape) -> bool:
        """Whether a batch of this shape is to run as a graph."""
        return self.on and shape[0] in self.buckets

    def note_failure(self, reason: object) -> None:
        """A capture failed: its batch was run without, and another one is tried later, or none any more."""
        self.failures += 1
        text = " ".join(str(reason).split())
        if self.failures < _MOST_FAILURES:
            logger.info("a CUDA graph could not be captured, which is tried again: %s", text)
        elif self.on:
            self.on = False
            logger.warning("CUDA graphs are left out from now on, the engine runs without: %s", text)


def choose_buckets(interface: PlanInterface) -> frozenset[int]:
    """Batch sizes that get a CUDA graph each: up to 8, powers of two, and the profile's own."""
    first, last = interface.smallest[0], interface.largest[0]
    powers = {1 << power for power in range(int(math.log2(last)) + 1)}
    return frozenset(size for size in {*range(1, 9), *powers, interface.usual[0], last} if first <= size <= last)


def _capture_graph(port: CudaPort, stream: Any, work: Callable[[], None]) -> Any:
    """The executable graph of what `work` puts on a stream; after a CudaError the stream can be used again."""
    with CAPTURE_LOCK:
        port.begin_capture(stream)
        try:
            work()
        except BaseException:
            with contextlib.suppress(CudaError):  # of the two errors, that of the work says more
                port.destroy_graph(port.end_capture(stream))
            raise
        return port.end_capture(stream)


# Batches larger than the plan takes


class Pipeline:
    """Two stages of buffers, and a stream each for copies in and out beside the slot's own, which computes."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._stages = (slot.stage, *(Stage(slot.port, slot.owned, slot.plan.interface) for _ in range(_STAGES - 1)))
        self._inward = slot.make_stream()
        self._outward = slot.make_stream()

    def run(self, batch: NDArray[Any]) -> list[NDArray[Any]]:
        """As `Slot.run`."""
        slot, interface, lane = self._slot, self._slot.plan.interface, self._slot.main
        slot.wait_for_others(slot.stream)
        results: list[NDArray[Any]] = []
        pending: list[tuple[Stage, int, int, tuple[Shape, ...]]] = []
        for index, (start, size, rows) in enumerate(split(len(batch), interface)):
            shape = (rows, *batch.shape[1:])
            slot.bind(lane, shape)
            if not results:
                results = [
                    np.empty((len(batch), *found[1:]), tensor.dtype)
                    for tensor, found in zip(interface.outputs, lane.output_shapes, strict=True)
                ]
                # Before the first piece, so that nothing is under way when addresses change; the first is the largest.
                slot.reserve(self._stages, shape, lane.output_shapes)
            if len(pending) == _STAGES:
                self._collect(pending.pop(0), results)
            stage = self._stages[index % _STAGES]
            stage.fill(batch[start : start + size], shape)
            self._enqueue(stage, shape)
            pending.append((stage, start, size, lane.output_shapes))
        for piece in pending:
            self._collect(piece, results)
        return results

    def _enqueue(self, stage: Stage, shape: Shape) -> None:
        slot, port = self._slot, self._slot.port
        stage.copy_in(shape, self._inward)
        port.record_event(stage.arrived, self._inward)
        port.wait_event(slot.stream, stage.arrived)
        slot.main.enqueue(stage.addresses, slot.handle)
        port.record_event(stage.computed, slot.stream)
        port.wait_event(self._outward, stage.computed)
        stage.copy_out(slot.main.output_shapes, self._outward)
        port.record_event(stage.done, self._outward)

    def _collect(self, piece: tuple[Stage, int, int, tuple[Shape, ...]], results: list[NDArray[Any]]) -> None:
        """Waits for a piece; its buffers are free then, on both sides."""
        stage, start, size, output_shapes = piece
        self._slot.port.synchronize_event(stage.done)
        for result, view in zip(results, stage.view_outputs(output_shapes), strict=True):
            result[start : start + size] = view[:size]


def split(count: int, interface: PlanInterface) -> Iterator[tuple[int, int, int]]:
    """Pieces of a batch: first image, how many, and how many rows the plan runs for them."""
    least, most = interface.smallest[0], interface.largest[0]
    for start in range(0, count, most):
        size = min(most, count - start)
        yield start, size, max(size, least)


def require_size(shape: Shape, interface: PlanInterface) -> None:
    """Refuses images of a size that the profile does not hold.

    Raises:
        InputError: The size is out of the profile's range.
    """
    sizes, least, most = shape[1:], interface.smallest[1:], interface.largest[1:]
    if not all(low <= size <= high for low, size, high in zip(least, sizes, most, strict=True)):
        raise InputError(
            f"batch: the plan takes images from {least} to {most}, found {sizes}",
            remedy="resize the images, or build the plan with another --min-size or --max-size",
        )

"""A slot: an execution context with its streams, buffers and CUDA graphs, lent to one thread at a time.

`Slot.run` takes any number of images of host memory. What the plan takes at once is one piece, computed by a CUDA graph
where the size is a usual one or near below. More goes through a `Pipeline` of pieces, whose copies overlap the
computing.

A graph holds one run between the slot's buffers, and no copies: one of a size does for images from anywhere. Images on
the GPU are copied to the buffers there, which costs little beside their network. A graph on a caller's own addresses
would save that, but it is of use only where they come again, and fatal where their memory was freed meanwhile.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
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
_PADDED_ROWS, _PADDED_SHARE = 7, 8
"""A batch may be padded by so many rows, or by one in so many: the distances between the usual sizes up to 32."""


class NoMoreContextsError(CudaError):
    """TensorRT makes no further context of this engine."""


class Slot:
    """A context for all shapes of each profile, further ones for shapes that have a graph. Used inside `on_device`.

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
        self._mains: dict[int, Lane] = {}
        self._lanes: dict[Shape, Lane] = {}
        self._full: set[int] = set()
        self._busy = False
        self._pipeline: Pipeline | None = None
        try:
            self.stream = self.make_stream()
            self.handle = port.stream_handle(self.stream)
            size = max(count_scratch_bytes(plan.engine), 256)
            self._scratch = (self.owned.add(port.allocate(size), port.free), size)
            self._freed = self.owned.add(port.create_event(), port.destroy_event)
            self.find_main(plan.interface.largest[0])
            self.stage = Stage(port, self.owned, plan.interface)
            self.answers = HostRoom(port, self.owned)
        except BaseException:
            self.close()
            raise

    def make_stream(self) -> Any:
        """A stream that is freed with the slot."""
        stream = self.owned.add(self.port.create_stream(), self.port.destroy_stream)
        self._streams.append(stream)
        return stream

    def _make_lane(self, profile: int, *, one_shape: bool = False) -> Lane | None:
        plan = self.plan
        context = (
            None
            if profile in self._full
            else make_context(plan, self._scratch, profile=profile, stream_handle=self.handle, one_shape=one_shape)
        )
        if context is None:
            self._full.add(profile)
            self.plan.log.take()
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
        stage = self.stage
        self.wait_for_others(self.stream)
        lane = self.choose_lane(count, batch.shape[1:])
        self.prepare(lane, self.stream)
        stage.fill(batch)
        stage.copy_in(batch.shape, self.stream)
        self.compute(lane, self.stream)
        # Of the rows that a graph or the plan wanted besides, nothing is copied, in or out.
        wanted = interface.keep_rows(lane.output_shapes, count)
        stage.copy_out(wanted, self.stream)
        self.port.synchronize_stream(self.stream)
        return [view.copy() for view in stage.view_outputs(wanted)]

    def choose_lane(self, count: int, sizes: Shape) -> Lane:
        """A context in the shape that runs for so many images, which may be more: of its own where that gets a graph.

        A graph is true only while the shape of its context stays.
        """
        rows = self._graphs.choose_rows(count)
        shape = (rows, *sizes)
        lane = self._find_lane(shape) if self._graphs.covers(rows) else self.find_main(rows)
        self.bind(lane, shape)
        return lane

    def find_main(self, rows: int) -> Lane:
        """The context for all shapes of the profile for so many rows.

        Where TensorRT makes none, that of the last profile does, if it takes them.
        """
        last, wanted = self.plan.interface.profiles[-1], self.plan.interface.choose_profile(rows)
        for profile in (wanted, last) if last.smallest[0] <= rows else (wanted,):
            found = self._mains.get(profile.index) or self._make_lane(profile.index)
            if found is not None:
                return self._mains.setdefault(profile.index, found)
        raise NoMoreContextsError(
            "TensorRT makes no further execution context of this plan", remedy="lower EngineOptions(contexts=…)"
        )

    def _find_lane(self, shape: Shape) -> Lane:
        found = self._lanes.get(shape)
        if found is not None:
            return found
        main = self.find_main(shape[0])  # first: TensorRT 8 lets one context at a time use a profile
        if len(self._lanes) < len(self._graphs.sizes):
            found = self._make_lane(self.plan.interface.choose_profile(shape[0]).index, one_shape=True)
            if found is not None:
                self._lanes[shape] = found
        return found or main  # which then holds the graph of the size that it ran last

    def bind(self, lane: Lane, shape: Shape) -> None:
        """Sets a lane's shape; a graph of another shape goes, for it belongs to what the context was."""
        if lane.graph is not None and lane.shape != shape:
            self._drop(lane)
        lane.set_shape(shape)

    def prepare(self, lane: Lane, stream: Any) -> bool:
        """Makes room for a lane's shape in the buffers, and captures a graph where it is time to.

        Args:
            lane: From `choose_lane`.
            stream: What uses the buffers is on it, and is waited for before a capture.

        Returns:
            Whether there is a graph.
        """
        self.reserve([self.stage], lane)
        if lane.graph is None and self._graphs.covers(lane.rows) and lane.can_capture(self.handle):
            self.port.synchronize_stream(stream)
            try:
                graph = _capture_graph(self.port, self.stream, lambda: lane.enqueue(self.stage.addresses, self.handle))
            except CudaError as error:
                self._graphs.note_failure(error)
            else:
                lane.graph = self.owned.add(graph, self.port.destroy_graph)
        return lane.graph is not None

    def compute(self, lane: Lane, stream: Any) -> None:
        """Puts one run between the buffers on a stream, after `prepare`."""
        if lane.graph is not None:
            self.port.launch_graph(lane.graph, stream)
        else:
            lane.enqueue(self.stage.addresses, self.port.stream_handle(stream))

    def may_capture(self, lane: Lane) -> bool:
        """Whether there is a graph of a lane's shape, or `prepare` will try to capture one."""
        return lane.graph is not None or (self._graphs.covers(lane.rows) and lane.can_capture(self.handle))

    def reserve(self, stages: Sequence[Stage], lane: Lane) -> None:
        """Makes room in the buffers; where their addresses change, graphs that hold the old ones go."""
        shape, output_shapes = lane.shape, lane.output_shapes
        assert shape is not None
        small = [stage for stage in stages if not stage.fits(shape, output_shapes)]
        if not small:
            return
        self.port.synchronize_event(self._freed)  # an event that was never recorded has happened
        for each in self._all_lanes():
            self._drop(each)
        for stage in small:
            stage.reserve(shape, output_shapes)

    def _all_lanes(self) -> list[Lane]:
        return [*self._mains.values(), *self._lanes.values()]

    def _drop(self, lane: Lane) -> None:
        graph, lane.graph = lane.graph, None
        if graph is not None:
            self.owned.free(graph)

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
            [functools.partial(self.port.synchronize_event, self._freed)] if self._mains else []
        )
        # All of them: after a failure in the midst of a split batch, copies of other pieces may still be under way.
        waits += [functools.partial(self.port.synchronize_stream, stream) for stream in self._streams]
        first: CudaError | None = None
        for wait in waits:
            try:
                wait()
            except CudaError as error:
                first = first or error
        for lane in self._all_lanes():
            lane.release()
        return self.owned.free_all() or first


# CUDA graphs: what is captured, and when it is given up


class GraphSwitch:
    """Whether an engine runs CUDA graphs, of which batch sizes, and which batches are padded to one of them.

    A capture can fail because another thread of the process waited for the whole device just then
    (torch.cuda.synchronize() does), which is no reason to do without for good: the third failure turns them off, and is
    logged.

    Args:
        plan: The plan.
        on: Whether they are wanted and can be had.

    Attributes:
        sizes: Batch sizes that get a graph each, ascending.
    """

    def __init__(self, plan: OpenPlan, *, on: bool) -> None:
        self._interface = plan.interface
        self.on = on
        # What a module of a caller's own does with further rows, nobody knows.
        self._pads = plan.spec.kind != "module" and plan.interface.has_rows
        self.sizes = choose_sizes(plan.interface)
        self._failures = 0

    def add(self, size: int) -> None:
        """One more size, where the plan takes it."""
        if size <= self._interface.largest[0] and self._interface.fit_rows(size) == size:
            self.sizes = tuple(sorted({*self.sizes, size}))

    def covers(self, rows: int) -> bool:
        """Whether so many rows are to run as a graph."""
        return self.on and rows in self.sizes

    def choose_rows(self, count: int) -> int:
        """How many rows run for so many images: those of the nearest graph where few are to be added, as Triton does.

        Another shape costs TensorRT a new arrangement of its memory (NVIDIA/TensorRT#881) and every kernel a launch of
        its own; each row that is added costs the work of an image.
        """
        least = self._interface.fit_rows(count)
        if not (self.on and self._pads):
            return least
        place = bisect.bisect_left(self.sizes, least)
        size = self.sizes[place] if place < len(self.sizes) else least
        return size if size - least <= max(_PADDED_ROWS, size // _PADDED_SHARE) else least

    def note_failure(self, reason: object) -> None:
        """A capture failed: its batch was run without, and another one is tried later, or none any more."""
        self._failures += 1
        text = " ".join(str(reason).split())
        if self._failures < _MOST_FAILURES:
            logger.info("a CUDA graph could not be captured, which is tried again: %s", text)
        elif self.on:
            self.on = False
            logger.warning("CUDA graphs are left out from now on, the engine runs without: %s", text)


def choose_sizes(interface: PlanInterface) -> tuple[int, ...]:
    """Batch sizes that get a CUDA graph each, ascending: 1, 2, 4, 8, 16, 24, 32, 64 …, and the profiles' own."""
    last = interface.largest[0]
    sizes = {24, *(1 << power for power in range(last.bit_length()))}
    for profile in interface.profiles:
        sizes |= {profile.smallest[0], profile.usual[0], profile.largest[0]}
    return tuple(sorted(size for size in sizes if size <= last and interface.fit_rows(size) == size))


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
        slot, interface = self._slot, self._slot.plan.interface
        slot.wait_for_others(slot.stream)
        results: list[NDArray[Any]] = []
        pending: list[tuple[Stage, slice, tuple[Shape, ...]]] = []
        for index, rows in enumerate(split(len(batch), interface)):
            piece = batch[rows]
            lane = slot.choose_lane(len(piece), batch.shape[1:])
            if not results:
                results = [
                    np.empty((len(batch), *found[1:]), tensor.dtype)
                    for tensor, found in zip(interface.outputs, lane.output_shapes, strict=True)
                ]
                # Before the first piece, so that nothing is under way when addresses change; the first is the largest.
                slot.reserve(self._stages, lane)
            if len(pending) == _STAGES:
                self._collect(pending.pop(0), results)
            stage, wanted = self._stages[index % _STAGES], interface.keep_rows(lane.output_shapes, len(piece))
            stage.fill(piece)
            self._enqueue(stage, lane, piece.shape, wanted)
            pending.append((stage, rows, wanted))
        for done in pending:
            self._collect(done, results)
        return results

    def _enqueue(self, stage: Stage, lane: Lane, shape: Shape, wanted: tuple[Shape, ...]) -> None:
        slot, port = self._slot, self._slot.port
        stage.copy_in(shape, self._inward)
        port.record_event(stage.arrived, self._inward)
        port.wait_event(slot.stream, stage.arrived)
        lane.enqueue(stage.addresses, slot.handle)  # as it is: its launches are hidden behind the piece before
        port.record_event(stage.computed, slot.stream)
        port.wait_event(self._outward, stage.computed)
        stage.copy_out(wanted, self._outward)
        port.record_event(stage.done, self._outward)

    def _collect(self, piece: tuple[Stage, slice, tuple[Shape, ...]], results: list[NDArray[Any]]) -> None:
        """Waits for a piece; its buffers are free then, on both sides."""
        stage, rows, shapes = piece
        self._slot.port.synchronize_event(stage.done)
        for result, view in zip(results, stage.view_outputs(shapes), strict=True):
            result[rows] = view


def split(count: int, interface: PlanInterface) -> Iterator[slice]:
    """The pieces of a batch, each as many images as the plan takes."""
    most = interface.largest[0]
    for start in range(0, count, most):
        yield slice(start, min(count, start + most))


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

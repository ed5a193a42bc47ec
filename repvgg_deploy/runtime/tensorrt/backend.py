"""TensorRT and TensorRT-RTX behind the Backend protocol: many threads at once on one plan, any number of images.

The pool says which slot runs a batch. A batch of host memory is run by the slot; one that is on the GPU already is run
where it lies, and its results stay there. `time_phases` times the parts of a run by events on the GPU's own clock.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CudaContextError, CudaMemoryError, InputError
from ...specs.values import ModelMetadata
from ..cuda import opening
from ..cuda.arrays import DeviceArray, DeviceArrays, DeviceView, view_device_array
from ..cuda.pool import DEFAULT_STREAMS, DevicePool, HostMemory
from ..options import EngineOptions
from ..results import PhaseTimes
from .plan import open_plan
from .slot import GraphSwitch, NoMoreContextsError, Slot, require_size, split

logger = logging.getLogger(__name__)
_WARM_UP_RUNS = 3  # as it is, captured, replayed


class TensorRtBackend:
    """A plan on one GPU.

    Raises:
        CudaError: There is no driver, no such GPU, or no memory.
        PlanIncompatibleError: The plan was built for another GPU or TensorRT.
        PlanError: The plan is changed, truncated, or refused.
        MissingDependencyError: TensorRT or a CUDA package is not installed.
    """

    def __init__(self, path: Path, device_id: int, backend: str | None, options: EngineOptions) -> None:
        # The driver comes first: without one, TensorRT ends the process.
        self._port = opening.open_cuda(options.cuda)
        self._device_id = device_id
        info = self._port.describe_device(device_id)
        with self._port.on_device(device_id):
            self._plan = open_plan(path, info, backend=backend, require_passport=options.require_passport)
            self._graphs = GraphSwitch(self._plan, on=options.cuda_graphs and self._port.has_graphs)
            self._pool = SlotPool(lambda: Slot(self._port, self._plan, self._graphs), options.contexts)
            self._memory = DevicePool(self._port, device_id)
            self._host_memory = DevicePool(self._port, device_id, page_locked=True)
            try:
                self._pool.release(self._pool.acquire())  # what cannot work fails here and not at the first request
            except BaseException:
                self._plan.release()
                raise
        self._contexts = options.contexts
        self._name = f"{self._plan.library.name}, {info.name} (GPU {device_id}), {self._port.provider}"
        logger.info("%s: opened with %s", path, self._name)

    @property
    def name(self) -> str:
        """TensorRT and its version, the GPU, the provider of CUDA."""
        return self._name

    @property
    def metadata(self) -> ModelMetadata:
        """The passport in the form of an ONNX's metadata."""
        return self._plan.describe()

    @property
    def max_batch(self) -> int:
        """The largest batch that runs as one piece."""
        return self._plan.interface.largest[0]

    @property
    def min_batch(self) -> int:
        """The smallest batch that runs without padding."""
        return self._plan.interface.smallest[0]

    @property
    def usual_sizes(self) -> tuple[int, ...]:
        """What the profile is fastest at, without the batch."""
        return self._plan.interface.usual[1:]

    def run(self, batch: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Runs any number of images from host memory, of any memory order; see Backend.

        Raises:
            InputError: The profile does not hold images of this size.
            CudaMemoryError: GPU memory ran out; the Engine stays usable.
            CudaContextError: The GPU's state in this process is lost.
            CudaError: CUDA or TensorRT failed; the Engine stays usable.
        """
        require_size(batch.shape, self._plan.interface)
        with self._lend() as slot:
            outputs = slot.run(batch)
        return [
            output.astype(wanted.dtype, copy=False)
            for output, wanted in zip(outputs, self._plan.spec.outputs, strict=True)
        ]

    def run_device(self, batch: Any, *, stream: int | None, to_host: bool) -> DeviceArrays | Sequence[NDArray[Any]]:
        """Runs a batch that is on the GPU, in place.

        Args:
            batch: An array with `__dlpack__` or `__cuda_array_interface__`.
            stream: Handle of the caller's stream, on which the results are in order; None waits for them. On a default
                stream TensorRT would wait for the whole device (NvInferRuntime.h, enqueueV3), which also ends a capture
                in another thread: the slot's own stream does the work, between two events on the caller's.
            to_host: Whether the results come back as NumPy arrays, which waits for them.

        Raises:
            InputError: Another GPU, dtype, shape, or an array with gaps.
            CudaError: As of `run`.
        """
        with self._lend() as slot:
            order: Any = slot.stream if stream is None or stream in DEFAULT_STREAMS else stream
            caller: Any = order if stream is None else stream
            view = self._view(batch, self._port.stream_handle(order))
            slot.wait_for_others(order)
            try:
                results = self._run_pieces(slot, view, order, caller=caller)
                answers = self._start_download(slot, results, order) if to_host else []
            finally:
                if stream is not None:  # also after a failure: what was put there before it may still run
                    slot.leave_working(order)
            if stream is not None and order is not caller:
                slot.hold_up(caller)
            if to_host or stream is None:
                self._port.synchronize_stream(order)
                for result in results:
                    result.settle()
            if to_host:
                wanted = self._plan.spec.outputs
                return [answer.astype(tensor.dtype) for answer, tensor in zip(answers, wanted, strict=True)]
        return DeviceArrays(tuple(output.name for output in self._plan.interface.outputs), tuple(results))

    def make_batch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in page-locked memory, which goes back when the last part of the array does."""
        size = int(np.prod(shape)) * dtype.itemsize
        with self._port.on_device(self._device_id):
            memory = HostMemory(self._host_memory, self._host_memory.take(size))
        array: NDArray[Any] = np.asarray(memory)[:size].view(dtype).reshape(shape)
        return array

    def expect_batch(self, size: int) -> None:
        """Batches of this size will be usual, too; `warm_up` makes a CUDA graph of it."""
        self._graphs.add(size)

    def warm_up(self, batch: NDArray[Any]) -> None:
        """Makes every context that may be used, and CUDA graphs of all usual sizes; runs the batch in each, too."""
        require_size(batch.shape, self._plan.interface)
        profiles = self._plan.interface.profiles
        sizes = self._graphs.sizes if self._graphs.on else [one.usual[0] for one in profiles if len(profiles) > 1]
        batches = [*(np.broadcast_to(batch[:1], (size, *batch.shape[1:])) for size in reversed(sizes)), batch]
        with self._port.on_device(self._device_id), contextlib.ExitStack() as stack:
            for _ in range(self._contexts):
                slot = self._pool.acquire_idle()
                if slot is None:
                    break
                stack.enter_context(self._pool.use(slot))
                for one in batches:
                    for _ in range(_WARM_UP_RUNS):
                        slot.run(one)
            else:  # all contexts are held here, so that none compiles meanwhile
                if self._plan.kernels is not None:
                    self._plan.kernels.save()

    def time_phases(self, batch: NDArray[Any], calls: int) -> tuple[PhaseTimes, ...]:
        """The parts of so many runs of a batch, which the profile must hold as one piece.

        Each part is between two events. One more run is made first, in which TensorRT sets itself up. None is a CUDA
        graph, in which the parts could not be told apart.
        """
        interface, port = self._plan.interface, self._port
        require_size(batch.shape, interface)
        count, most = len(batch), interface.largest[0]
        if count > most:
            raise InputError(
                f"batch: the parts of {count} images cannot be timed: the plan takes {most} at a time",
                remedy="give a smaller batch, or build the plan with a larger --max-batch",
            )
        with self._lend() as slot, contextlib.ExitStack() as stack:
            shape = (interface.fit_rows(count), *batch.shape[1:])
            lane, stage, stream = slot.find_main(shape[0]), slot.stage, slot.stream
            slot.wait_for_others(stream)
            slot.bind(lane, shape)
            slot.reserve([stage], lane)
            stage.fill(batch)
            found, events = [], []
            for _ in range(4):
                events.append(port.create_timer())
                stack.callback(port.destroy_event, events[-1])
            for _ in range(calls + 1):
                port.record_event(events[0], stream)
                stage.copy_in(shape, stream)
                port.record_event(events[1], stream)
                start = time.perf_counter()
                lane.enqueue(stage.addresses, slot.handle)
                enqueued = time.perf_counter() - start
                port.record_event(events[2], stream)
                stage.copy_out(lane.output_shapes, stream)
                port.record_event(events[3], stream)
                port.synchronize_stream(stream)
                parts = [port.elapsed_ms(first, second) for first, second in itertools.pairwise(events)]
                found.append(PhaseTimes(parts[0], parts[1], parts[2], 1e3 * enqueued))
            return tuple(found[1:])

    def close(self) -> None:
        """Frees everything; results that somebody still holds are freed when they are let go."""
        with self._port.on_device(self._device_id):
            self._pool.close()
            self._memory.close()
            self._host_memory.close()
            if self._plan.kernels is not None:
                self._plan.kernels.save()
            self._plan.release()

    @contextlib.contextmanager
    def _lend(self) -> Iterator[Slot]:
        with self._port.on_device(self._device_id), self._pool.use(self._pool.acquire()) as slot:
            yield slot

    def _view(self, batch: Any, handle: int) -> DeviceView:
        """A batch that the plan takes as it lies there, in order on the stream of the handle."""
        source = self._plan.interface.source
        view = view_device_array(batch, handle)
        expected = self._plan.spec.input
        problems = []
        if view.dtype != source.dtype.name:
            problems.append(f"expected {source.dtype.name}, found {view.dtype}")
        if len(view.shape) != len(source.shape) or 0 in view.shape:
            problems.append(f"expected shape {expected.shape}, found {view.shape}")
        elif any(want not in (-1, have) for want, have in zip(source.shape[1:], view.shape[1:], strict=True)):
            problems.append(f"expected {expected.layout} {expected.shape}, found {view.shape}")
        if not view.is_contiguous:
            problems.append("expected C-contiguous memory, found gaps or another order")
        device = view.device_id if view.device_id is not None else self._port.find_device(view.address)
        if device is not None and device != self._device_id:
            problems.append(f"expected an array on GPU {self._device_id}, found one on GPU {device}")
        elif view.device_id is None and not self._port.is_reachable(view.address):
            # A kernel that read it would end the GPU's state in this process, for everybody.
            raise InputError(
                "batch: lies in a CUDA context of its own, and not in the primary one, which the Engine shares "
                "with torch and CuPy",
                remedy="import pycuda.autoprimaryctx in place of pycuda.autoinit or make_context",
            )
        if problems:
            raise InputError(
                f"batch: {'; '.join(problems)}",
                remedy="convert it on the GPU, say with batch.to(device, dtype).contiguous()",
            )
        require_size(view.shape, self._plan.interface)
        if view.producer is not None and view.producer != handle:
            self._memory.order(handle, after=view.producer)
        return view

    def _run_pieces(self, slot: Slot, view: DeviceView, order: Any, *, caller: Any) -> list[DeviceArray]:
        """Puts all pieces of a batch on one stream, between the caller's array and blocks of the results' pool."""
        interface, reader = self._plan.interface, self._port.stream_handle(caller)
        results: list[DeviceArray] = []
        count = view.shape[0]
        row_bytes = interface.source.count_bytes(view.shape) // count
        for rows in split(count, interface):
            size = rows.stop - rows.start
            lane = slot.choose_lane(size, view.shape[1:])
            wanted = interface.keep_rows(lane.output_shapes, size)
            if not results:
                for tensor, shape in zip(interface.outputs, interface.keep_rows(wanted, count), strict=True):
                    block = self._memory.take(tensor.count_bytes(shape), reader)
                    results.append(DeviceArray(self._memory, block, shape, tensor.dtype, stream=reader))
                if order is not caller:
                    # Not before the blocks are taken: what other slots still write to them is on this stream by then.
                    slot.follow(caller)
            source = view.address + rows.start * row_bytes
            sizes = [tensor.count_bytes(shape) for tensor, shape in zip(interface.outputs, wanted, strict=True)]
            targets = [
                result.address + rows.start * (size_bytes // size)
                for result, size_bytes in zip(results, sizes, strict=True)
            ]
            if lane.rows == size and not slot.may_capture(lane):
                lane.enqueue((source, *targets), self._port.stream_handle(order))
                continue
            # Through the slot's buffers: by a graph, or with more rows than there are images, in which is whatever was.
            slot.prepare(lane, order)
            inward, *outward = slot.stage.addresses
            self._port.copy(inward, source, size * row_bytes, order)
            slot.compute(lane, order)
            for target, address, size_bytes in zip(targets, outward, sizes, strict=True):
                self._port.copy(target, address, size_bytes, order)
        return results

    def _start_download(self, slot: Slot, results: list[DeviceArray], stream: Any) -> list[NDArray[Any]]:
        """Puts the copies of results to page-locked memory of the slot on a stream."""
        sizes = [int(np.prod(result.shape)) * result.dtype.itemsize for result in results]
        views = slot.answers.view(sizes)
        for result, size, view in zip(results, sizes, views, strict=True):
            self._port.copy(view.ctypes.data, result.address, size, stream)
        return [view.view(result.dtype).reshape(result.shape) for view, result in zip(views, results, strict=True)]


class SlotPool:
    """The slots of an engine: made when they are needed, up to a limit, and lent to one thread each.

    No lock is held while a slot works.

    Args:
        make: Makes a slot; called by one thread at a time.
        limit: How many there may be. Where TensorRT or the memory allows fewer, it becomes what they allow.
    """

    def __init__(self, make: Callable[[], Slot], limit: int) -> None:
        self._make, self._limit = make, limit
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._idle: list[Slot] = []
        self._count = 0
        self._lost: CudaContextError | None = None

    def acquire(self) -> Slot:
        """The slot used last of those that are idle (its caches are warm), a new one, or the next that becomes idle.

        Raises:
            CudaContextError: The GPU's state in this process is lost.
            CudaError: The first slot cannot be made.
        """
        while True:
            found = self.acquire_idle()
            if found is not None:
                return found
            with self._changed:
                while not self._idle and self._count >= self._limit and self._lost is None:
                    self._changed.wait()

    def acquire_idle(self) -> Slot | None:
        """A slot, also a new one, if it can be had without waiting for those that are lent; raises as `acquire`."""
        with self._changed:
            if self._lost is not None:
                # A new object for each caller: each raise adds to the traceback of the one it raises.
                raise CudaContextError(
                    f"this Engine can no longer be used: {self._lost.message}", remedy=self._lost.remedy
                )
            if self._idle:
                return self._idle.pop()
            if self._count >= self._limit:
                return None
            self._count += 1
        return self._grow()

    def _grow(self) -> Slot | None:
        """A new slot; None where no more can be made and there are others to wait for."""
        try:
            with self._making:
                return self._make()
        except BaseException as error:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()
                if not isinstance(error, (CudaMemoryError, NoMoreContextsError)) or self._count == 0:
                    if isinstance(error, CudaContextError):
                        self._lost = self._lost or error
                    raise
                self._limit = self._count
            logger.warning("%d execution contexts is what there is: %s", self._limit, str(error).partition("\n")[0])
            return None

    @contextlib.contextmanager
    def use(self, slot: Slot) -> Iterator[Slot]:
        """Takes back a slot: idle again, or freed where something failed in it."""
        try:
            yield slot
        except InputError:  # refused before anything was put on a stream
            self.release(slot)
            raise
        except BaseException as error:
            self._discard(slot, error)
            raise
        else:
            self.release(slot)

    def release(self, slot: Slot) -> None:
        """Gives back a slot that is well."""
        with self._changed:
            self._idle.append(slot)
            self._changed.notify()

    def _discard(self, slot: Slot, error: BaseException) -> None:
        """The next request gets a new slot."""
        problem = slot.close()
        lost = next((one for one in (error, problem) if isinstance(one, CudaContextError)), None)
        if problem is not None and lost is None:
            logger.warning("a slot could not be freed wholly: %s", problem.message)
        with self._changed:
            self._count -= 1
            self._lost = self._lost or lost
            self._changed.notify_all()

    def close(self) -> None:
        """Frees all slots; none is lent."""
        with self._changed:
            slots, self._idle = self._idle, []
            self._count -= len(slots)
        for slot in slots:
            problem = slot.close()
            if problem is not None:
                logger.warning("a slot could not be freed wholly: %s", problem.message)

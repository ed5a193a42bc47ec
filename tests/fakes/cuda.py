"""A CudaPort without a GPU.

Streams hold work back until somebody waits for it, so that what is read too early is wrong; fresh memory is poison;
graphs replay what was captured. Every call can be made to fail, everything taken is counted, and what real CUDA leaves
undefined (freed memory in use, two streams without an event between them, a thread without a context) is an error here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.runtime.cuda.port import CAPTURE_LOCK, DeviceInfo, make_error, no_such_device

POISON = 0xFF  # NaN as a floating-point number


@dataclass(eq=False)
class Memory:
    data: NDArray[np.uint8]
    device: int  # -1: page-locked host memory

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)


@dataclass(eq=False)
class Stream:
    number: int  # below 100: somebody else's; below 0: a default stream
    device: int
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    recording: list[Callable[[], None]] | None = None
    broken_capture: bool = False
    draining: bool = False


@dataclass(eq=False)
class Ticket:
    stream: Stream
    done: bool = False
    at: float = 0.0

    def finish(self) -> None:
        self.done, self.at = True, time.perf_counter()


@dataclass(eq=False)
class Event:
    device: int
    ticket: Ticket | None = None
    timed: bool = False


@dataclass(eq=False)
class Graph:
    steps: list[Callable[[], None]]


class FakeCuda:
    """See the module.

    Args:
        devices: How many GPUs.
        memory_bytes: Of each.
        eager: Do work at once, as a fast GPU might: code must be right both ways.
    """

    provider = "fake CUDA"

    def __init__(
        self, *, devices: int = 1, memory_bytes: int = 1 << 30, capability: str = "8.6", eager: bool = False
    ) -> None:
        self.has_graphs = True
        self.info = [
            DeviceInfo(f"Fake GPU {index}", capability, "580.95.05", "13.0", memory_bytes) for index in range(devices)
        ]
        self.calls: Counter[str] = Counter()
        self.faults: dict[tuple[str, int], str] = {}
        self.always: dict[str, str] = {}
        self.lost: str | None = None
        self.eager = eager
        self.lock = threading.RLock()
        self.memory: dict[int, Memory] = {}
        self.streams: dict[int, Stream] = {}
        self.events: set[Event] = set()
        self.graphs: set[Graph] = set()
        self.launches = 0
        self.foreign: set[int] = set()  # addresses of another context
        self._numbers = 100
        self._defaults: dict[tuple[int, int, int], Stream] = {}
        self._current = threading.local()

    # what tests ask and tell

    def fail(self, call: str, *, nth: int = 1, name: str = "CUDA_ERROR_UNKNOWN") -> None:
        """The nth call from now fails with that status."""
        self.faults[call, self.calls[call] + nth] = name

    def leaks(self) -> dict[str, int]:
        """What was taken and not given back."""
        with self.lock:
            counts = {
                "device memory": sum(memory.device >= 0 for memory in self.memory.values()),
                "host memory": sum(memory.device < 0 for memory in self.memory.values()),
                "streams": sum(stream.number >= 100 for stream in self.streams.values()),
                "events": len(self.events),
                "graphs": len(self.graphs),
            }
            return {name: count for name, count in counts.items() if count}

    def used_bytes(self, device: int) -> int:
        with self.lock:
            return sum(memory.data.nbytes for memory in self.memory.values() if memory.device == device)

    def foreign_stream(self, device: int = 0) -> int:
        """A stream that a caller made with another library: known by its number."""
        with self.lock:
            number = 10 + len([number for number in self.streams if 0 < number < 100])
            self.streams[number] = Stream(number, device)
            return number

    def upload(self, array: NDArray[Any], device: int = 0) -> int:
        """An array of a caller's on a device; freed with `free`."""
        memory = self._new(array.nbytes, device)
        memory.data[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return memory.address

    def download(self, address: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """What device memory holds now, waiting for nobody."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self.lock:
            return self.find(address, size).view(dtype).reshape(shape).copy()

    def find(self, address: int, size: int) -> NDArray[np.uint8]:
        """Bytes at an address, or an illegal access."""
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + memory.data.nbytes:
                return memory.data[address - start : address - start + size]
        self.lost = "CUDA_ERROR_ILLEGAL_ADDRESS"
        raise make_error("kernel", self.lost, "an illegal memory access was encountered")

    def enqueue(self, handle: int, step: Callable[[], None]) -> None:
        """Puts work on a stream; for the fake TensorRT."""
        with self.lock:
            self._put(self._stream(handle), step)

    # CudaPort

    def count_devices(self) -> int:
        return len(self.info)

    def describe_device(self, index: int) -> DeviceInfo:
        if not 0 <= index < len(self.info):
            raise no_such_device(index, len(self.info))
        return self.info[index]

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        self.describe_device(index)
        stack = self._stack()
        stack.append(index)
        try:
            yield
        finally:
            assert stack.pop() == index

    def allocate(self, size_bytes: int) -> int:
        with self.lock:
            device = self._begin("allocate")
            self._forbid_in_capture()
            if size_bytes <= 0:
                raise make_error("cuMemAlloc", "CUDA_ERROR_INVALID_VALUE", "invalid argument")
            if self.used_bytes(device) + size_bytes > self.info[device].memory_bytes:
                raise make_error(f"cuMemAlloc({size_bytes} bytes)", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
            return self._new(size_bytes, device).address

    def free(self, address: int) -> None:
        self._free("free", address)

    def allocate_host(self, size_bytes: int) -> int:
        with self.lock:
            self._begin("allocate_host")
            self._forbid_in_capture()
            return self._new(size_bytes, -1).address

    def free_host(self, address: int) -> None:
        self._free("free_host", address)

    def copy(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        with self.lock:
            self._begin("copy")
            self.find(target, size_bytes)
            self.find(source, size_bytes)

            def step() -> None:
                self.find(target, size_bytes)[:] = self.find(source, size_bytes)

            self._put(self._stream(stream), step)

    def create_stream(self) -> Any:
        with self.lock:
            device = self._begin("create_stream")
            self._numbers += 1
            self.streams[self._numbers] = Stream(self._numbers, device)
            return self.streams[self._numbers]

    def destroy_stream(self, stream: Any) -> None:
        with self.lock:
            self._begin("destroy_stream", cleanup=True)
            if self.lost is not None:
                stream.queue.clear()  # nothing runs any more
            self._drain(stream)
            del self.streams[stream.number]

    def stream_handle(self, stream: Any) -> int:
        return stream.number if isinstance(stream, Stream) else stream

    def synchronize_stream(self, stream: Any) -> None:
        with self.lock:
            self._begin("synchronize_stream")
            found = self._stream(stream)
            if found.recording is not None:
                found.broken_capture = True
                raise make_error(
                    "cuStreamSynchronize", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted while capturing"
                )
            self._drain(found)

    def create_event(self) -> Any:
        with self.lock:
            event = Event(self._begin("create_event"))
            self.events.add(event)
            return event

    def create_timer(self) -> Any:
        event = self.create_event()
        event.timed = True
        return event

    def elapsed_ms(self, first: Any, second: Any) -> float:
        with self.lock:
            self._begin("elapsed_ms")
            assert first in self.events and second in self.events
            if not (first.timed and second.timed):
                raise make_error("cuEventElapsedTime", "CUDA_ERROR_INVALID_HANDLE", "an event without a clock")
            if first.ticket is None or second.ticket is None or not (first.ticket.done and second.ticket.done):
                raise make_error("cuEventElapsedTime", "CUDA_ERROR_NOT_READY", "an event that has not happened")
            return 1e3 * (second.ticket.at - first.ticket.at)

    def destroy_event(self, event: Any) -> None:
        with self.lock:
            self._begin("destroy_event", cleanup=True)
            self.events.remove(event)

    def record_event(self, event: Any, stream: Any) -> None:
        with self.lock:
            device = self._begin("record_event")
            found = self._stream(stream)
            assert event in self.events and event.device == device == found.device
            ticket = Ticket(found)
            event.ticket = ticket
            self._put(found, ticket.finish)

    def wait_event(self, stream: Any, event: Any) -> None:
        with self.lock:
            self._begin("wait_event")
            assert event in self.events
            ticket = event.ticket
            if ticket is not None:
                self._put(self._stream(stream), lambda: self._reach(ticket))

    def synchronize_event(self, event: Any) -> None:
        with self.lock:
            self._begin("synchronize_event")
            assert event in self.events
            if event.ticket is not None:
                self._reach(event.ticket)

    def begin_capture(self, stream: Any) -> None:
        with self.lock:
            self._begin("begin_capture")
            found = self._stream(stream)
            found.recording, found.broken_capture = [], False
            self._current.capturing = found

    def end_capture(self, stream: Any) -> Any:
        with self.lock:
            found = self._stream(stream)
            steps, found.recording = found.recording, None
            self._current.capturing = None
            self._begin("end_capture")
            if found.broken_capture:
                raise make_error(
                    "cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "the capture was invalidated"
                )
            graph = Graph(steps or [])
            self.graphs.add(graph)
            return graph

    def launch_graph(self, graph: Any, stream: Any) -> None:
        with self.lock:
            self._begin("launch_graph")
            assert graph in self.graphs
            self.launches += 1
            for step in graph.steps:
                self._put(self._stream(stream), step)

    def destroy_graph(self, graph: Any) -> None:
        with self.lock:
            self._begin("destroy_graph", cleanup=True)
            self.graphs.remove(graph)

    def find_device(self, address: int) -> int | None:
        with self.lock:
            self._begin("find_device")
            for start, memory in self.memory.items():
                if start <= address < start + memory.data.nbytes:
                    return memory.device if memory.device >= 0 else None
        return None

    def is_reachable(self, address: int) -> bool:
        with self.lock:
            self._begin("is_reachable")
        return address not in self.foreign

    def synchronize(self) -> None:
        with CAPTURE_LOCK:
            self.device_wait()

    def device_wait(self) -> None:
        """What torch.cuda.synchronize() does, and TensorRT on a default stream: they know no lock of ours."""
        with self.lock:
            device = self._begin("synchronize")
            streams = [stream for stream in self.streams.values() if stream.device == device]
            capturing = [stream for stream in streams if stream.recording is not None]
            for stream in capturing:  # a wait for the device ends every capture on it, whichever thread waits
                stream.broken_capture = True
            if capturing:
                raise make_error(
                    "cuCtxSynchronize", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "a stream of the device is capturing"
                )
            for stream in streams:
                self._drain(stream)

    def disturb(self) -> None:
        """What taking memory, loading kernels and waiting inside TensorRT do to captures, whichever thread has them."""
        with self.lock:
            device = self.current_device()
            for stream in self.streams.values():
                stream.broken_capture |= stream.device == device and stream.recording is not None

    # inside

    def current_device(self) -> int:
        stack = self._stack()
        if not stack:
            raise make_error("call", "CUDA_ERROR_INVALID_CONTEXT", "no context is current in this thread")
        return stack[-1]

    def _stack(self) -> list[int]:
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        return self._current.stack

    def _begin(self, call: str, *, cleanup: bool = False) -> int:
        device = self.current_device()
        self.calls[call] += 1
        name = self.faults.pop((call, self.calls[call]), None) or self.always.get(call)
        if name is not None:
            text = "out of memory" if "MEMORY" in name else "made to fail"
            error = make_error(call, name, text)
            if "restart" in error.remedy:
                self.lost = name
            raise error
        if self.lost is not None and not cleanup:
            raise make_error(call, self.lost, "an earlier call lost the context")
        return device

    def _forbid_in_capture(self) -> None:
        stream = getattr(self._current, "capturing", None)
        if stream is not None:
            stream.broken_capture = True
            raise make_error("cuMemAlloc", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted while capturing")

    def _new(self, size: int, device: int) -> Memory:
        with self.lock:
            memory = Memory(np.full(size, POISON, np.uint8), device)
            self.memory[memory.address] = memory
            return memory

    def _free(self, call: str, address: int) -> None:
        with self.lock:
            device = self._begin(call, cleanup=True)
            memory = self.memory[address]
            assert memory.device in (-1, device), "freed on another device"
            del self.memory[address]

    def _stream(self, stream: Any) -> Stream:
        found = stream if isinstance(stream, Stream) else self.streams.get(stream)
        if stream in (0, 1, 2):
            found = self._default_stream(stream)
        assert found is not None and self.streams.get(found.number) is found, "a stream that is not there"
        if found.device != self.current_device():
            raise make_error("call", "CUDA_ERROR_INVALID_HANDLE", "the stream is of another device")
        return found

    def _default_stream(self, handle: int) -> Stream:
        """0 and 1 are one stream of each device, 2 is one of each thread."""
        device, thread = self.current_device(), threading.get_ident() if handle == 2 else 0
        key = (max(handle, 1), device, thread)
        if key not in self._defaults:
            found = Stream(-1 - len(self._defaults), device)
            self._defaults[key] = self.streams[found.number] = found
        return self._defaults[key]

    def _put(self, stream: Stream, step: Callable[[], None]) -> None:
        if stream.recording is not None:
            stream.recording.append(step)
        else:
            stream.queue.append(step)
            if self.eager:
                self._drain(stream)

    def _reach(self, ticket: Ticket) -> None:
        while not ticket.done:
            assert ticket.stream.queue, "waits for work that was never given to a stream"
            ticket.stream.queue.popleft()()

    def _drain(self, stream: Stream) -> None:
        while stream.queue:
            try:
                stream.queue.popleft()()
            except Exception:
                stream.queue.clear()
                raise

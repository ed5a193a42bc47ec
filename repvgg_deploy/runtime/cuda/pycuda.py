"""The CUDA port over pycuda. `CudaPort` says what each call does.

Of pycuda's ways to a context only the primary ones are used, never `pycuda.autoinit` or `make_context`. pycuda frees
what its objects own when they go. It captures no graphs. Of a caller's stream it has the number, which it cannot use:
there the whole device is waited for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ...errors import CudaError
from .port import (
    CAPTURE_LOCK,
    Activation,
    DeviceInfo,
    PrimaryContexts,
    make_error,
    no_driver,
    no_such_device,
    read_driver_version,
    show_cuda_version,
)

_T = TypeVar("_T")
_NON_BLOCKING = 1
_NAMES = (
    ("out of memory", "CUDA_ERROR_OUT_OF_MEMORY"),
    ("no CUDA-capable device", "CUDA_ERROR_NO_DEVICE"),
    ("invalid device ordinal", "CUDA_ERROR_INVALID_DEVICE"),
    ("illegal memory access", "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ("unspecified launch failure", "CUDA_ERROR_LAUNCH_FAILED"),
    ("launch timed out", "CUDA_ERROR_LAUNCH_TIMEOUT"),
    ("misaligned address", "CUDA_ERROR_MISALIGNED_ADDRESS"),
    ("uncorrectable ECC", "CUDA_ERROR_ECC_UNCORRECTABLE"),
    ("initialization error", "CUDA_ERROR_NOT_INITIALIZED"),
    ("driver version is insufficient", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
)
"""pycuda gives CUDA's words and not its name of a status."""


class PycudaPort:
    """Calls through the module `pycuda.driver`.

    Raises:
        CudaError: No driver, or no GPU.
    """

    has_graphs = False

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._contexts = PrimaryContexts(self._retain)
        self._device_blocks: dict[int, Any] = {}
        self._host_blocks: dict[int, Any] = {}
        self.provider = f"pycuda {'.'.join(map(str, getattr(driver, 'get_version', tuple)()))}".strip()
        try:
            driver.init()
        except driver.Error as error:
            text = str(error)
            raise (no_driver(text) if "stub" in text else self._translate("cuInit", error)) from error
        self._cuda_version = show_cuda_version(int(driver.get_driver_version()))

    def count_devices(self) -> int:
        return int(self._ask("cuDeviceGetCount", self._driver.Device.count))

    def describe_device(self, index: int) -> DeviceInfo:
        device = self._find(index)
        major, minor = device.compute_capability()
        return DeviceInfo(
            device.name(), f"{major}.{minor}", read_driver_version(), self._cuda_version, int(device.total_memory())
        )

    def on_device(self, index: int) -> Activation:
        return self._contexts.get(index)

    def allocate(self, size_bytes: int) -> int:
        block = self._ask(f"cuMemAlloc({size_bytes} bytes)", self._driver.mem_alloc, size_bytes)
        self._device_blocks[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        self._ask("cuMemFree", self._device_blocks.pop(address).free)

    def allocate_host(self, size_bytes: int) -> int:
        make = partial(self._driver.pagelocked_empty, mem_flags=self._driver.host_alloc_flags.PORTABLE)
        array = self._ask(f"cuMemHostAlloc({size_bytes} bytes)", make, size_bytes, "uint8")
        address = int(array.ctypes.data)
        self._host_blocks[address] = array
        return address

    def free_host(self, address: int) -> None:
        self._ask("cuMemFreeHost", self._host_blocks.pop(address).base.free)

    def copy(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        if isinstance(stream, int):  # of somebody else: after everything on the device, and waited for
            self.synchronize()
            own = self.create_stream()
            self.copy(target, source, size_bytes, own)
            self.synchronize_stream(own)
            return
        if self._is_host(source):
            self._ask("cuMemcpyHtoDAsync", self._driver.memcpy_htod_async, target, _view(source, size_bytes), stream)
        elif self._is_host(target):
            self._ask("cuMemcpyDtoHAsync", self._driver.memcpy_dtoh_async, _view(target, size_bytes), source, stream)
        else:
            self._ask("cuMemcpyDtoDAsync", self._driver.memcpy_dtod_async, target, source, size_bytes, stream)

    def create_stream(self) -> Any:
        return self._ask("cuStreamCreate", self._driver.Stream, _NON_BLOCKING)

    def destroy_stream(self, stream: Any) -> None:
        """Does nothing: pycuda frees it when the last reference to it goes."""

    def stream_handle(self, stream: Any) -> int:
        return stream if isinstance(stream, int) else int(stream.handle)

    def synchronize_stream(self, stream: Any) -> None:
        if isinstance(stream, int):
            self.synchronize()
        else:
            self._ask("cuStreamSynchronize", stream.synchronize)

    def create_event(self) -> Any:
        return self._ask("cuEventCreate", self._driver.Event, self._driver.event_flags.DISABLE_TIMING)

    def create_timer(self) -> Any:
        return self._ask("cuEventCreate", self._driver.Event)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        return float(self._ask("cuEventElapsedTime", first.time_till, second))

    def destroy_event(self, event: Any) -> None:
        """Does nothing: pycuda frees it when the last reference to it goes."""

    def record_event(self, event: Any, stream: Any) -> None:
        if isinstance(stream, int):  # waiting now is enough: an event that was never recorded counts as happened
            self.synchronize()
        else:
            self._ask("cuEventRecord", event.record, stream)

    def wait_event(self, stream: Any, event: Any) -> None:
        if isinstance(stream, int):
            self.synchronize_event(event)
        else:
            self._ask("cuStreamWaitEvent", stream.wait_for_event, event)

    def synchronize_event(self, event: Any) -> None:
        self._ask("cuEventSynchronize", event.synchronize)

    def begin_capture(self, stream: Any) -> None:
        """Fails: pycuda cannot."""
        raise CudaError(
            "pycuda captures no CUDA graphs", remedy='use EngineOptions(cuda="bindings"), or cuda_graphs=False'
        )

    def end_capture(self, stream: Any) -> Any:
        return self.begin_capture(stream)

    def launch_graph(self, graph: Any, stream: Any) -> None:
        self.begin_capture(stream)

    def destroy_graph(self, graph: Any) -> None:
        """Does nothing: there are none."""

    def find_device(self, address: int) -> int | None:
        return None  # pycuda cannot say

    def is_reachable(self, address: int) -> bool:
        return True  # pycuda cannot say

    def synchronize(self) -> None:
        with CAPTURE_LOCK:  # pycuda captures nothing, but another Engine of the process may
            self._ask("cuCtxSynchronize", self._driver.Context.synchronize)

    def _retain(self, index: int) -> Activation:
        context = self._ask("cuDevicePrimaryCtxRetain", self._find(index).retain_primary_context)
        return Activation(
            partial(self._ask, "cuCtxPushCurrent", context.push), partial(self._ask, "cuCtxPopCurrent", context.pop)
        )

    def _find(self, index: int) -> Any:
        count = self.count_devices()
        if not 0 <= index < count:
            raise no_such_device(index, count)
        return self._driver.Device(index)

    def _is_host(self, address: int) -> bool:
        return any(start <= address < start + array.nbytes for start, array in list(self._host_blocks.items()))

    def _ask(self, call: str, function: Callable[..., _T], *arguments: Any) -> _T:
        """Calls pycuda; `call` is the name of CUDA's own call, for an error."""
        try:
            return function(*arguments)
        except self._driver.Error as error:
            raise self._translate(call, error) from error

    def _translate(self, call: str, error: Exception) -> CudaError:
        text = str(error).rpartition("failed: ")[2]
        name = next((name for words, name in _NAMES if words in text), type(error).__name__)
        return make_error(call, name, text)


def _view(address: int, size_bytes: int) -> Any:
    return (ctypes.c_ubyte * size_bytes).from_address(address)

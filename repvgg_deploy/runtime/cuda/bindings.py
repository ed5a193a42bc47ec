"""The CUDA port over cuda-bindings, which is the driver API itself. `CudaPort` says what each call does."""

from __future__ import annotations

from functools import partial
from importlib import metadata
from typing import Any

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

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_TIMING = 0  # CU_EVENT_DEFAULT
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE: page-locked for every device


class BindingsPort:
    """Calls through the module `cuda.bindings.driver`.

    Raises:
        CudaError: No driver, one too old, or no GPU.
    """

    has_graphs = True

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._success = driver.CUresult.CUDA_SUCCESS
        self._contexts = PrimaryContexts(self._retain)
        version = _version_of("cuda-bindings")
        self.provider = f"cuda-bindings {version}".strip()
        try:
            status, *_ = driver.cuInit(0)
        except RuntimeError as error:  # libcuda is not there
            raise no_driver(" ".join(str(error).split())) from error
        self._check("cuInit", status)
        self._cuda_version = show_cuda_version(int(self._ask("cuDriverGetVersion")))
        major = version.partition(".")[0]
        if major.isdecimal() and int(self._cuda_version.partition(".")[0]) < int(major):
            found = self._cuda_version
            raise CudaError(
                f"the NVIDIA driver is too old: cuda-bindings needs one for CUDA {major}, found one for CUDA {found} "
                f"(cudaErrorInsufficientDriver)",
                remedy="update the driver, or install a cuda-bindings (and a TensorRT) made for CUDA "
                f"{found.partition('.')[0]}",
            )

    def count_devices(self) -> int:
        return int(self._ask("cuDeviceGetCount"))

    def describe_device(self, index: int) -> DeviceInfo:
        device = self._find(index)
        kinds = self._driver.CUdevice_attribute
        major = self._ask("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._ask("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        name = self._ask("cuDeviceGetName", 256, device).split(b"\0")[0].decode("utf-8", "replace")
        size = int(self._ask("cuDeviceTotalMem", device))
        return DeviceInfo(name, f"{major}.{minor}", read_driver_version(), self._cuda_version, size)

    def on_device(self, index: int) -> Activation:
        return self._contexts.get(index)

    def allocate(self, size_bytes: int) -> int:
        return int(self._ask("cuMemAlloc", size_bytes))

    def free(self, address: int) -> None:
        self._ask("cuMemFree", address)

    def allocate_host(self, size_bytes: int) -> int:
        return int(self._ask("cuMemHostAlloc", size_bytes, _PORTABLE))

    def free_host(self, address: int) -> None:
        self._ask("cuMemFreeHost", address)

    def copy(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        self._ask("cuMemcpyAsync", target, source, size_bytes, stream)

    def create_stream(self) -> Any:
        return self._ask("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: Any) -> None:
        self._ask("cuStreamDestroy", stream)

    def stream_handle(self, stream: Any) -> int:
        return int(stream)

    def synchronize_stream(self, stream: Any) -> None:
        self._ask("cuStreamSynchronize", stream)

    def create_event(self) -> Any:
        return self._ask("cuEventCreate", _NO_TIMING)

    def create_timer(self) -> Any:
        return self._ask("cuEventCreate", _TIMING)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        return float(self._ask("cuEventElapsedTime", first, second))

    def destroy_event(self, event: Any) -> None:
        self._ask("cuEventDestroy", event)

    def record_event(self, event: Any, stream: Any) -> None:
        self._ask("cuEventRecord", event, stream)

    def wait_event(self, stream: Any, event: Any) -> None:
        self._ask("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: Any) -> None:
        self._ask("cuEventSynchronize", event)

    def begin_capture(self, stream: Any) -> None:
        # Only what this thread does is captured and forbidden: other threads go on with theirs.
        self._ask("cuStreamBeginCapture", stream, self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: Any) -> Any:
        graph = self._ask("cuStreamEndCapture", stream)
        try:
            return self._ask("cuGraphInstantiate", graph, 0)
        finally:
            self._ask("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: Any) -> None:
        self._ask("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._ask("cuGraphExecDestroy", graph)

    def find_device(self, address: int) -> int | None:
        kinds = self._driver.CUpointer_attribute
        status, memory = self._driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        if status != self._success or int(memory) != int(self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            return None
        return int(self._ask("cuPointerGetAttribute", kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address))

    def is_reachable(self, address: int) -> bool:
        status, owner = self._driver.cuPointerGetAttribute(
            self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT, address
        )
        # 0: memory of a pool, which belongs to no context
        return status != self._success or int(owner) in (0, int(self._ask("cuCtxGetCurrent")))

    def synchronize(self) -> None:
        with CAPTURE_LOCK:
            self._ask("cuCtxSynchronize")

    def _retain(self, index: int) -> Activation:
        context = self._ask("cuDevicePrimaryCtxRetain", self._find(index))
        return Activation(partial(self._ask, "cuCtxPushCurrent", context), partial(self._ask, "cuCtxPopCurrent"))

    def _find(self, index: int) -> Any:
        count = self.count_devices()
        if not 0 <= index < count:
            raise no_such_device(index, count)
        return self._ask("cuDeviceGet", index)

    def _ask(self, call: str, *arguments: Any) -> Any:
        """Calls the driver; what it gives besides the status."""
        status, *values = getattr(self._driver, call)(*arguments)
        if status != self._success:
            self._check(call, status, arguments)
        return values[0] if values else None

    def _check(self, call: str, status: Any, arguments: tuple[Any, ...] = ()) -> None:
        if status == self._success:
            return
        _, name = self._driver.cuGetErrorName(status)
        _, text = self._driver.cuGetErrorString(status)
        shown = f"{call}({arguments[0]} bytes)" if call in ("cuMemAlloc", "cuMemHostAlloc") else call
        raise make_error(shown, _decode(name) or str(status), _decode(text) or "no description")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _decode(text: object) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else ""

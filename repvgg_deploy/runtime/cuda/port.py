"""The calls that an Engine makes to CUDA. Standard library only; a provider is imported by `open_cuda`.

There is never a second context: every provider works in the primary context of a device, which torch, CuPy, TensorRT and every other user of
the CUDA runtime in the process share. Source: CUDA driver API, sections 6.7 (primary context) and 6.8 (context stack).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from ...errors import InputError, MissingDependencyError

Provider = Literal["bindings", "pycuda"]
CAPTURE_LOCK = threading.RLock()
"""Held while a graph is captured, and while the whole device is waited for: CUDA refuses the wait where any stream captures, and ends that capture.

Of the process, as the rule is: Engines that know nothing of one another share the device.
Source: CUDA driver API, cuStreamBeginCapture and cuCtxSynchronize.
"""
_C = TypeVar("_C")
_PROVIDERS: dict[Provider, tuple[str, str, str]] = {
    "bindings": ("cuda.bindings.driver", "cuda-bindings", "pip install 'repvgg-deploy[tensorrt]', which brings cuda-bindings"),
    "pycuda": ("pycuda.driver", "pycuda", "pip install 'repvgg-deploy[pycuda]' on a machine with the CUDA toolkit, or use cuda-bindings"),
}


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU.

    Attributes:
        name: Such as `NVIDIA A10`.
        compute_capability: Such as `8.6`.
        driver_version: Such as `580.95.05`; empty where the system does not say.
        cuda_version: The newest CUDA that the driver knows, such as `13.0`.
        memory_bytes: Of the whole GPU.
    """

    name: str
    compute_capability: str
    driver_version: str
    cuda_version: str
    memory_bytes: int


class CudaPort(Protocol):
    """One process's way to its GPUs. Every call may be made from any thread, inside `on_device`; every one may raise CudaError.

    Addresses are numbers; streams, events and graphs are whatever the provider gives. A stream of somebody else is the number of its handle.
    """

    @property
    def provider(self) -> str:
        """For people: the package and its version."""

    def count_devices(self) -> int:
        """How many GPUs the driver shows to this process."""

    def describe_device(self, index: int) -> DeviceInfo:
        """Name and abilities of one GPU; makes no context."""

    def on_device(self, index: int) -> AbstractContextManager[object]:
        """Makes the primary context of a GPU current in this thread, and puts back what was current before."""

    def allocate(self, size_bytes: int) -> int:
        """Memory on the current device."""

    def free(self, address: int) -> None:
        """Frees what `allocate` gave."""

    def allocate_host(self, size_bytes: int) -> int:
        """Page-locked memory of the host: copies from and to it do not hold up the caller."""

    def free_host(self, address: int) -> None:
        """Frees what `allocate_host` gave."""

    def copy(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """Copies between any two of device and page-locked memory, in the order of a stream."""

    def create_stream(self) -> Any:
        """A stream that does not wait for the default stream."""

    def destroy_stream(self, stream: Any) -> None:
        """Frees a stream of `create_stream`."""

    def stream_handle(self, stream: Any) -> int:
        """The number by which TensorRT and others know a stream."""

    def synchronize_stream(self, stream: Any) -> None:
        """Waits until all work of a stream is done."""

    def create_event(self) -> Any:
        """An event without a clock."""

    def create_timer(self) -> Any:
        """An event with a clock; in all else an event."""

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds on the device between two events with a clock that have happened."""

    def destroy_event(self, event: Any) -> None:
        """Frees an event."""

    def record_event(self, event: Any, stream: Any) -> None:
        """The event happens when the work that the stream has now is done."""

    def wait_event(self, stream: Any, event: Any) -> None:
        """What is given to the stream from now on begins after the event."""

    def synchronize_event(self, event: Any) -> None:
        """Waits for the event."""

    @property
    def has_graphs(self) -> bool:
        """Whether the provider can capture graphs."""

    def begin_capture(self, stream: Any) -> None:
        """From now on the stream's work is recorded and not done; the caller holds CAPTURE_LOCK until the end."""

    def end_capture(self, stream: Any) -> Any:
        """Ends the recording, also one that failed, and gives the executable graph."""

    def launch_graph(self, graph: Any, stream: Any) -> None:
        """Does the recorded work."""

    def destroy_graph(self, graph: Any) -> None:
        """Frees a graph."""

    def find_device(self, address: int) -> int | None:
        """Which GPU an address lies on; None where it lies on none, or the provider cannot say."""

    def is_reachable(self, address: int) -> bool:
        """False where device memory belongs to another context than the current one, which must not read it; True, too, if nobody can say."""

    def synchronize(self) -> None:
        """Waits for all work on the current device, of everybody; holds CAPTURE_LOCK."""


class ContextTable(Generic[_C]):
    """The primary context of each GPU, made current by `make`'s result; retained once, by whichever thread comes first.

    Never released: the CUDA runtimes of TensorRT and torch use these contexts, and the last release would destroy one under them.

    Args:
        make: From the index of a GPU.
    """

    def __init__(self, make: Callable[[int], _C]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._known: dict[int, _C] = {}

    def get(self, index: int) -> _C:
        """Of one GPU; without the lock once it is known."""
        found = self._known.get(index)
        if found is not None:
            return found
        with self._lock:
            if index not in self._known:
                self._known[index] = self._make(index)
            return self._known[index]


def open_cuda(provider: Provider | None = None) -> CudaPort:
    """Imports a provider and asks the driver whether it can be used.

    Args:
        provider: None takes cuda-bindings, or pycuda where it is the only one.

    Raises:
        InputError: No such provider.
        MissingDependencyError: Its package is not installed or does not load.
        CudaError: There is no driver, it is too old, or it finds no GPU.
    """
    if provider is not None and provider not in _PROVIDERS:
        raise InputError(f"cuda: expected bindings, pycuda or None, found {provider!r}", remedy='give EngineOptions(cuda="bindings")')
    chosen = provider or _choose()
    if chosen == "bindings":
        from .bindings import BindingsPort

        return BindingsPort(_import(chosen))
    from .pycuda_port import PycudaPort

    return PycudaPort(_import(chosen))


def _choose() -> Provider:
    for name, (module, _, _) in _PROVIDERS.items():
        if _is_installed(module):
            return name
    return "bindings"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _import(provider: Provider) -> Any:
    module, package, remedy = _PROVIDERS[provider]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"running on a GPU needs {package}, which is not installed ({error})", remedy=remedy) from error
    except (ImportError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        # pycuda is linked with the driver, so without one its import fails.
        hint = "install the NVIDIA driver" if "libcuda" in text else remedy
        raise MissingDependencyError(f"{package} is installed but cannot be imported: {text}", remedy=hint) from error


def read_driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of the kernel driver on Linux, or an empty text.

    Source: https://download.nvidia.com/XFree86/Linux-x86_64/580.95.05/README/procinterface.html
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""

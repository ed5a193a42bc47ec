"""CUDA as the runtime uses it: one port of calls (`CudaPort`), which two providers answer (`bindings` and `pycuda`).

Every provider works in the primary context of a device, which torch, CuPy, TensorRT and every other user of the CUDA
runtime in the process share; there is never a second context. What a failed call means is decided here, once for both.

Source: CUDA driver API, sections 6.7 (primary context) and 6.8 (context stack), and CUresult
(https://docs.nvidia.com/cuda/cuda-driver-api).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import CudaContextError, CudaError, CudaMemoryError

CAPTURE_LOCK = threading.RLock()
"""Held while a graph is captured and while the whole device is waited for, by all Engines of the process.

CUDA refuses to wait for a device on which any stream captures, and ends that capture.
Source: CUDA driver API, cuStreamBeginCapture and cuCtxSynchronize.
"""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU.

    Attributes:
        name: Such as `NVIDIA A10`.
        compute_capability: Such as `8.6`.
        driver_version: Such as `580.95.05`; empty where the system does not say.
        cuda_version: The newest CUDA that the driver knows, such as `13.0`.
    """

    name: str
    compute_capability: str
    driver_version: str
    cuda_version: str
    memory_bytes: int


class CudaPort(Protocol):
    """The calls to CUDA. Each may be made from any thread, inside `on_device`, and may raise CudaError.

    Addresses are numbers. Streams, events and graphs are whatever the provider gives; wherever a stream is taken, the
    number of a caller's own stream is taken, too.
    """

    @property
    def provider(self) -> str:
        """The package and its version, for people."""

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
        """An event without a clock. One that was never recorded counts as happened."""

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
        """False where another context owns device memory, which must not be read then; True where nobody can say."""

    def synchronize(self) -> None:
        """Waits for all work on the current device, whoever gave it; holds CAPTURE_LOCK."""


class PrimaryContexts:
    """The primary contexts of a process, each retained once, by whichever thread comes first.

    They are never released: the CUDA runtimes of TensorRT and torch use them, and the last release would destroy them.

    Args:
        retain: Gives the activation of one GPU's context.
    """

    def __init__(self, retain: Callable[[int], Activation]) -> None:
        self._retain = retain
        self._lock = threading.Lock()
        self._known: dict[int, Activation] = {}

    def get(self, index: int) -> Activation:
        """Makes a GPU's context current inside a `with` block; takes no lock once the context is known."""
        found = self._known.get(index)
        if found is not None:
            return found
        with self._lock:
            if index not in self._known:
                self._known[index] = self._retain(index)
            return self._known[index]


class Activation:
    """Pushes a context on the thread's stack and pops it; without state of its own, so that all threads share it."""

    def __init__(self, push: Callable[[], object], pop: Callable[[], object]) -> None:
        self._push, self._pop = push, pop

    def __enter__(self) -> None:
        self._push()

    def __exit__(self, *_: object) -> None:
        self._pop()


def show_cuda_version(number: int) -> str:
    """The driver's number of a version as people write it: 13000 is `13.0`."""
    return f"{number // 1000}.{number % 1000 // 10}"


def read_driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of the kernel driver on Linux; empty where the system does not say.

    Source: https://download.nvidia.com/XFree86/Linux-x86_64/580.95.05/README/procinterface.html
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


_REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "check nvidia-smi and CUDA_VISIBLE_DEVICES: the driver shows this process no GPU",
    "CUDA_ERROR_INVALID_DEVICE": "give the index of a GPU that nvidia-smi lists, counted within CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_STUB_LIBRARY": "remove the CUDA toolkit's lib64/stubs from LD_LIBRARY_PATH: that libcuda is for "
    "linking only",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "restart the machine or reload the kernel module: driver and kernel module "
    "are of different versions",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start the GPU's system services (nvidia-fabricmanager on machines with NVSwitch)",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "remove the cuda-compat package from LD_LIBRARY_PATH, or update "
    "the driver",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU alone: end it, or set nvidia-smi -c DEFAULT",
    "CUDA_ERROR_NOT_INITIALIZED": "open the Engine in the process that uses it: CUDA does not survive a fork; start "
    "workers with spawn",
    "CUDA_ERROR_UNSUPPORTED_LIMIT": "update the NVIDIA driver",
    "CUDA_ERROR_OUT_OF_MEMORY": "free GPU memory (nvidia-smi shows who has it), build the plan with a smaller "
    "--max-batch, or lower EngineOptions(contexts=…)",
}
_LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS", "LAUNCH_FAILED", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE", "INVALID_PC", "ASSERT", "LAUNCH_TIMEOUT", "ECC_UNCORRECTABLE", "NVLINK_UNCORRECTABLE",
        "CONTEXT_IS_DESTROYED", "TENSOR_MEMORY_LEAK", "MPS_CLIENT_TERMINATED", "CONTAINED",
    )
)  # fmt: skip
"""After one of these every call in the process fails with the same status."""


def make_error(call: str, name: str, text: str) -> CudaError:
    """The error of a call such as `cuMemAlloc(4096 bytes)`, by CUDA's own name of the status and its words for it."""
    message = f"{call} failed: {name}: {text}"
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        return CudaMemoryError(message, remedy=_REMEDIES[name])
    if name in _LOST:
        return CudaContextError(
            message,
            remedy="restart the process: after this error CUDA refuses every further call in it; if it comes again, "
            "look for Xid lines in dmesg",
        )
    return CudaError(
        message,
        remedy=_REMEDIES.get(
            name, "check nvidia-smi and the driver's version; set CUDA_LAUNCH_BLOCKING=1 to find the cause"
        ),
    )


def no_driver(reason: str) -> CudaError:
    """The error where libcuda is not there."""
    return CudaError(
        f"no NVIDIA driver was found: {reason}",
        remedy="install the NVIDIA driver (in a container: start it with --gpus all and the NVIDIA container toolkit), "
        "then check nvidia-smi",
    )


def no_such_device(index: int, count: int) -> CudaError:
    """The error where a GPU was asked for that is not there."""
    known = "no GPU is" if count == 0 else "only GPU 0 is" if count == 1 else f"GPUs 0 to {count - 1} are"
    return CudaError(
        f"GPU {index} was asked for (CUDA_ERROR_INVALID_DEVICE), and {known} there",
        remedy=_REMEDIES["CUDA_ERROR_INVALID_DEVICE"],
    )

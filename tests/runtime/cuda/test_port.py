"""The two providers of the CUDA port, on fake driver modules: statuses, contexts, choice, words without a GPU."""

from __future__ import annotations

import enum
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.errors import CudaContextError, CudaError, CudaMemoryError, InputError, MissingDependencyError
from repvgg_deploy.runtime.cuda import bindings, opening
from repvgg_deploy.runtime.cuda.bindings import BindingsPort
from repvgg_deploy.runtime.cuda.opening import open_cuda
from repvgg_deploy.runtime.cuda.port import make_error, read_driver_version
from repvgg_deploy.runtime.cuda.pycuda import PycudaPort

CALLS = (
    "cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuMemcpyAsync", "cuStreamCreate", "cuStreamDestroy",
    "cuStreamSynchronize", "cuEventCreate", "cuEventDestroy", "cuEventRecord", "cuStreamWaitEvent",
    "cuEventSynchronize", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy",
    "cuGraphLaunch", "cuGraphExecDestroy", "cuCtxSynchronize", "cuDeviceGet", "cuPointerGetAttribute",
    "cuEventElapsedTime",
)  # fmt: skip


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_UNKNOWN = 999


class Driver(types.ModuleType):
    """As cuda.bindings.driver: every call gives a tuple that begins with its status."""

    def __init__(self, *, devices: int = 2, version: int = 13000) -> None:
        super().__init__("cuda.bindings.driver")
        self.CUresult = Status
        self.CUdevice_attribute = types.SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
        )
        self.CUpointer_attribute = types.SimpleNamespace(
            CU_POINTER_ATTRIBUTE_MEMORY_TYPE="type",
            CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="ordinal",
            CU_POINTER_ATTRIBUTE_CONTEXT="context",
        )
        self.CUmemorytype = types.SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
        self.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")
        self.status: dict[str, Status] = {}
        self.made: list[tuple[Any, ...]] = []
        self.stacks: dict[int, list[Any]] = {}
        self.devices, self.version = devices, version
        for name in CALLS:
            setattr(self, name, self._plain(name))

    def _plain(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.made.append((name, *arguments))
            return self.status.get(
                name, Status.CUDA_SUCCESS
            ), 2 if name == "cuPointerGetAttribute" else f"{name} result" if "Alloc" not in name else 4096

        return call

    def _done(self, name: str, *values: Any) -> tuple[Any, ...]:
        return self.status.get(name, Status.CUDA_SUCCESS), *values

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return self._done("cuInit")

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return self._done("cuDriverGetVersion", self.version)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return self._done("cuDeviceGetCount", self.devices)

    def cuDeviceGetAttribute(self, kind: str, device: Any) -> tuple[Any, ...]:
        return self._done("cuDeviceGetAttribute", {"major": 8, "minor": 6}[kind])

    def cuDeviceGetName(self, size: int, device: Any) -> tuple[Any, ...]:
        return self._done("cuDeviceGetName", b"Fake A10\0\0\0")

    def cuDeviceTotalMem(self, device: Any) -> tuple[Any, ...]:
        return self._done("cuDeviceTotalMem", 24 << 30)

    def cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[Any, ...]:
        self.made.append(("cuDevicePrimaryCtxRetain", device))
        return self._done("cuDevicePrimaryCtxRetain", f"context of {device}")

    def cuCtxPushCurrent(self, context: Any) -> tuple[Any, ...]:
        self.stacks.setdefault(threading.get_ident(), []).append(context)
        return self._done("cuCtxPushCurrent")

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return self._done("cuCtxPopCurrent", self.stacks[threading.get_ident()].pop())

    def cuGetErrorName(self, status: Status) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, status.name.encode()

    def cuGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, b"what CUDA says"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(bindings, "_version_of", lambda package: "13.5.0")
    return Driver()


def test_device_is_described_without_a_context(driver: Driver) -> None:
    cuda = BindingsPort(driver)
    found = cuda.describe_device(1)
    assert (found.name, found.compute_capability, found.cuda_version, found.memory_bytes) == (
        "Fake A10",
        "8.6",
        "13.0",
        24 << 30,
    )
    assert not any(call[0] == "cuDevicePrimaryCtxRetain" for call in driver.made)
    for index in (-1, 2):
        with pytest.raises(CudaError, match="GPUs 0 to 1 are there"):
            cuda.describe_device(index)


def test_primary_context_is_retained_once_and_the_stack_is_left_as_it_was(driver: Driver) -> None:
    cuda = BindingsPort(driver)

    def work() -> None:
        with cuda.on_device(0):
            with cuda.on_device(1):
                assert len(driver.stacks[threading.get_ident()]) == 2
            with pytest.raises(ZeroDivisionError), cuda.on_device(0):
                raise ZeroDivisionError
            assert len(driver.stacks[threading.get_ident()]) == 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(not stack for stack in driver.stacks.values())
    assert len([call for call in driver.made if call[0] == "cuDevicePrimaryCtxRetain"]) == 2


def test_every_call_passes_its_status_through_one_function(driver: Driver) -> None:
    cuda = BindingsPort(driver)
    calls = {
        "cuMemAlloc": lambda: cuda.allocate(64),
        "cuMemFree": lambda: cuda.free(1),
        "cuMemHostAlloc": lambda: cuda.allocate_host(64),
        "cuMemFreeHost": lambda: cuda.free_host(1),
        "cuMemcpyAsync": lambda: cuda.copy(1, 2, 3, 4),
        "cuStreamCreate": cuda.create_stream,
        "cuStreamDestroy": lambda: cuda.destroy_stream(1),
        "cuStreamSynchronize": lambda: cuda.synchronize_stream(1),
        "cuEventCreate": cuda.create_event,
        "cuEventDestroy": lambda: cuda.destroy_event(1),
        "cuEventRecord": lambda: cuda.record_event(1, 2),
        "cuStreamWaitEvent": lambda: cuda.wait_event(1, 2),
        "cuEventSynchronize": lambda: cuda.synchronize_event(1),
        "cuStreamBeginCapture": lambda: cuda.begin_capture(1),
        "cuStreamEndCapture": lambda: cuda.end_capture(1),
        "cuGraphInstantiate": lambda: cuda.end_capture(1),
        "cuGraphLaunch": lambda: cuda.launch_graph(1, 2),
        "cuGraphExecDestroy": lambda: cuda.destroy_graph(1),
        "cuCtxSynchronize": cuda.synchronize,
    }
    for name, call in calls.items():
        call()
        assert driver.made[-1][0] == name or name in [made[0] for made in driver.made[-3:]]
        driver.status[name] = Status.CUDA_ERROR_UNKNOWN
        with pytest.raises(CudaError, match=f"^{name}.*CUDA_ERROR_UNKNOWN: what CUDA says"):
            call()
        del driver.status[name]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.CUDA_ERROR_OUT_OF_MEMORY, CudaMemoryError),
        (Status.CUDA_ERROR_ILLEGAL_ADDRESS, CudaContextError),
        (Status.CUDA_ERROR_UNKNOWN, CudaError),
    ],
)
def test_statuses_become_errors_that_callers_can_tell_apart(
    driver: Driver, status: Status, kind: type[CudaError]
) -> None:
    cuda = BindingsPort(driver)
    driver.status["cuMemAlloc"] = status
    with pytest.raises(CudaError, match=r"cuMemAlloc\(4096 bytes\)") as caught:
        cuda.allocate(4096)
    assert type(caught.value) is kind and caught.value.remedy


def test_address_of_the_host_or_of_nobody_lies_on_no_gpu(driver: Driver) -> None:
    cuda = BindingsPort(driver)
    assert cuda.find_device(4096) == 2
    driver.status["cuPointerGetAttribute"] = Status.CUDA_ERROR_UNKNOWN
    assert cuda.find_device(4096) is None


@pytest.mark.parametrize(("owner", "reachable"), [(7, True), (8, False), (0, True), (None, True)])
def test_memory_of_another_context_is_told_apart(driver: Driver, owner: int | None, reachable: bool) -> None:
    """0: memory of a pool; None: CUDA does not know."""
    driver.cuPointerGetAttribute = lambda kind, address: (
        Status.CUDA_ERROR_UNKNOWN if owner is None else Status.CUDA_SUCCESS,
        owner,
    )
    driver.cuCtxGetCurrent = lambda: (Status.CUDA_SUCCESS, 7)
    assert BindingsPort(driver).is_reachable(4096) is reachable


def test_missing_driver_and_old_driver_and_no_gpu_are_said(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(flags: int) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "cuInit", no_library)
    with pytest.raises(CudaError, match=r"no NVIDIA driver was found: Failed to dlopen libcuda.so.1") as caught:
        BindingsPort(driver)
    assert "install the NVIDIA driver" in caught.value.remedy
    monkeypatch.undo()
    monkeypatch.setattr(bindings, "_version_of", lambda package: "13.5.0")
    old = Driver(version=12040)
    with pytest.raises(CudaError, match=r"needs one for CUDA 13, found one for CUDA 12.4"):
        BindingsPort(old)
    driver.status["cuInit"] = Status.CUDA_ERROR_NO_DEVICE
    with pytest.raises(CudaError, match="CUDA_ERROR_NO_DEVICE") as caught:
        BindingsPort(driver)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy
    with pytest.raises(CudaError, match="no GPU is there"):
        BindingsPort(Driver(devices=0)).describe_device(0)


def test_provider_is_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(opening, "_is_installed", lambda module: module in installed)
    monkeypatch.setattr(
        opening.importlib, "import_module", lambda module: driver if "bindings" in module else PycudaDriver()
    )
    installed.add("pycuda.driver")
    assert isinstance(open_cuda(), PycudaPort)
    installed.add("cuda.bindings.driver")
    assert isinstance(open_cuda(), BindingsPort) and isinstance(open_cuda("pycuda"), PycudaPort)
    with pytest.raises(InputError, match="bindings, pycuda or None"):
        open_cuda("cupy")  # type: ignore[arg-type]


@pytest.mark.parametrize("provider", ["bindings", "pycuda"])
def test_missing_package_says_what_to_install(provider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="not installed") as caught:
        open_cuda(provider)
    assert "pip install" in caught.value.remedy


class PycudaDriver(types.ModuleType):
    """As pycuda.driver, with one primary context a device and nothing that would make a second one."""

    class Error(Exception):
        pass

    def __init__(self, *, devices: int = 1) -> None:
        super().__init__("pycuda.driver")
        self.host_alloc_flags, self.event_flags = (
            types.SimpleNamespace(PORTABLE=1),
            types.SimpleNamespace(DISABLE_TIMING=2),
        )
        self.stack: list[Any] = []
        self.retained = 0
        self.freed: list[object] = []
        driver = self

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            @staticmethod
            def count() -> int:
                return devices

            def name(self) -> str:
                return "Fake T4"

            def compute_capability(self) -> tuple[int, int]:
                return 7, 5

            def total_memory(self) -> int:
                return 16 << 30

            def retain_primary_context(self) -> Any:
                driver.retained += 1
                return types.SimpleNamespace(push=lambda: driver.stack.append(self.index), pop=driver.stack.pop)

        self.Device = Device
        self.Context = types.SimpleNamespace(synchronize=lambda: None)

    def init(self) -> None:
        pass

    def get_version(self) -> tuple[int, ...]:
        return 2026, 1

    def get_driver_version(self) -> int:
        return 12080

    def mem_alloc(self, size: int) -> Any:
        if size > 1 << 20:
            raise self.Error("cuMemAlloc failed: out of memory")
        block = np.zeros(size, np.uint8)
        driver = self

        class Block:
            keep = block

            def __int__(self) -> int:
                return int(block.ctypes.data)

            def free(self) -> None:
                driver.freed.append(self)

        return Block()

    def pagelocked_empty(self, size: int, dtype: str, mem_flags: int) -> Any:
        class Host(np.ndarray):
            pass

        array = np.zeros(size, dtype)
        view = array.view(Host)
        driver = self
        result = types.SimpleNamespace(
            ctypes=view.ctypes,
            nbytes=size,
            base=types.SimpleNamespace(free=lambda: driver.freed.append(array)),
            keep=array,
        )
        return result

    class Stream:
        handle = 77

        def __init__(self, flags: int) -> None:
            self.waited: list[Any] = []

        def synchronize(self) -> None:
            pass

        def wait_for_event(self, event: Any) -> None:
            self.waited.append(event)

    class Event:
        def __init__(self, flags: int = 0) -> None:
            self.flags = flags

        def time_till(self, other: Any) -> float:
            assert self.flags == other.flags == 0, "an event without a clock"
            return 1.5

        def record(self, stream: Any) -> None:
            pass

        def synchronize(self) -> None:
            pass

    def memcpy_htod_async(self, target: int, source: Any, stream: Any) -> None:
        self._move(target, bytes(source))

    def memcpy_dtoh_async(self, target: Any, source: int, stream: Any) -> None:
        import ctypes

        ctypes.memmove(target, source, len(target))

    def memcpy_dtod_async(self, target: int, source: int, size: int, stream: Any) -> None:
        import ctypes

        ctypes.memmove(target, source, size)

    @staticmethod
    def _move(target: int, content: bytes) -> None:
        import ctypes

        ctypes.memmove(target, content, len(content))


def test_timers_have_a_clock_and_events_have_none(driver: Driver) -> None:
    driver.cuEventElapsedTime = lambda first, second: (Status.CUDA_SUCCESS, 2.5)
    cuda = BindingsPort(driver)
    with cuda.on_device(0):
        cuda.create_event()
        timer = cuda.create_timer()
        assert cuda.elapsed_ms(timer, timer) == 2.5
        driver.cuEventElapsedTime = lambda first, second: (Status.CUDA_ERROR_UNKNOWN, None)
        with pytest.raises(CudaError, match="cuEventElapsedTime"):
            cuda.elapsed_ms(timer, timer)
    assert [call[1] for call in driver.made if call[0] == "cuEventCreate"] == [2, 0]


def test_pycuda_times_with_events_that_have_a_clock() -> None:
    cuda = PycudaPort(PycudaDriver())
    with cuda.on_device(0):
        assert cuda.elapsed_ms(cuda.create_timer(), cuda.create_timer()) == 1.5
        with pytest.raises(AssertionError, match="without a clock"):
            cuda.elapsed_ms(cuda.create_event(), cuda.create_event())


def test_pycuda_copies_between_host_and_device_in_the_primary_context() -> None:
    from repvgg_deploy.runtime.tensorrt.memory import view_host

    driver = PycudaDriver()
    cuda = PycudaPort(driver)
    assert (
        cuda.describe_device(0).compute_capability == "7.5" and "pycuda 2026.1" in cuda.provider and not cuda.has_graphs
    )
    with cuda.on_device(0), cuda.on_device(0):
        assert driver.stack == [0, 0] and driver.retained == 1
        stream, host, device, other = cuda.create_stream(), cuda.allocate_host(16), cuda.allocate(16), cuda.allocate(16)
        view_host(host, 16)[:] = np.arange(16)
        cuda.copy(device, host, 16, stream)
        cuda.copy(other, device, 16, stream)
        view_host(host, 16)[:] = 0
        cuda.copy(host, other, 16, 5)  # the stream of somebody else
        np.testing.assert_array_equal(view_host(host, 16), np.arange(16))
        event = cuda.create_event()
        for one in (stream, 5):
            cuda.record_event(event, one)
            cuda.wait_event(one, event)
            cuda.synchronize_stream(one)
        assert cuda.stream_handle(stream) == 77 and cuda.stream_handle(5) == 5
        cuda.free(device)
        cuda.free(other)
        cuda.free_host(host)
    assert driver.stack == [] and len(driver.freed) == 3
    with pytest.raises(CudaMemoryError, match="out of memory"):
        cuda.allocate(1 << 21)
    with pytest.raises(CudaError, match="captures no CUDA graphs"):
        cuda.begin_capture(stream)


def test_status_names_have_remedies_of_their_own() -> None:
    for name in (
        "CUDA_ERROR_NO_DEVICE",
        "CUDA_ERROR_STUB_LIBRARY",
        "CUDA_ERROR_NOT_INITIALIZED",
        "CUDA_ERROR_SYSTEM_NOT_READY",
    ):
        assert make_error("cuInit", name, "text").remedy != make_error("cuInit", "CUDA_ERROR_UNKNOWN", "text").remedy


def test_driver_version_is_read_from_proc(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2.0\n",
        encoding="utf-8",
    )
    assert read_driver_version(path) == "580.95.05"
    assert read_driver_version(tmp_path / "none") == ""

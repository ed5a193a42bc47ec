"""The bare loop that the Engine is measured against, as trtexec runs it by default.

One context, buffers that stay, no copies from or to the host, `execute_async_v3` as a CUDA graph, a wait that spins.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.errors import CudaError
from repvgg_deploy.runtime.cuda.port import CAPTURE_LOCK, CudaPort
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.tensorrt.context import count_scratch_bytes, make_context
from repvgg_deploy.runtime.tensorrt.memory import view_host
from repvgg_deploy.runtime.tensorrt.plan import open_plan


class DeviceBatch:
    """A batch on the GPU that speaks `__cuda_array_interface__`, made without torch or CuPy.

    Args:
        port: CUDA, inside `on_device`.
        batch: The numbers.
    """

    def __init__(self, port: CudaPort, batch: NDArray[Any]) -> None:
        self._port = port
        self.shape, self.dtype = batch.shape, batch.dtype
        self.address = port.allocate(batch.nbytes)
        host, stream = port.allocate_host(batch.nbytes), port.create_stream()
        view_host(host, batch.nbytes)[:] = np.ascontiguousarray(batch).reshape(-1).view(np.uint8)
        port.copy(self.address, host, batch.nbytes, stream)
        port.synchronize_stream(stream)
        port.free_host(host)
        port.destroy_stream(stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def free(self) -> None:
        """Gives the memory back."""
        self._port.free(self.address)


class BareLoop:
    """See the module. Used inside a `with` block, by one thread.

    Args:
        engine: Whose plan is run: deserialized a second time, as TensorRT 8 makes one context of each.
        source: The input, on the device.

    Attributes:
        graph_problem: Why it runs without a CUDA graph; empty where it has one.
    """

    def __init__(self, engine: Engine, source: DeviceBatch) -> None:
        backend: Any = engine._backend
        self._port: CudaPort = backend._port
        self._device = backend._port.on_device(backend._device_id)
        self._path, self._info, self._source = engine.path, backend._port.describe_device(backend._device_id), source
        self._freed: list[Any] = []
        self._addresses: dict[str, int] = {}
        self._plan: Any = None
        self._context: Any = None
        self.stream: Any = None
        self._graph: Any = None
        self.graph_problem = ""

    def __enter__(self) -> BareLoop:
        self._device.__enter__()
        try:
            self._open()
        except BaseException as error:  # the stages that come after this one need the memory
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open(self) -> None:
        port = self._port
        self._plan = plan = open_plan(self._path, self._info, backend=None, require_passport=False)
        self.stream = port.create_stream()
        self.handle = port.stream_handle(self.stream)
        size = max(count_scratch_bytes(plan.engine), 256)
        scratch = (self._take(size), size)
        self._context = make_context(
            plan,
            scratch,
            profile=plan.interface.choose_profile(self._source.shape[0]).index,
            stream_handle=self.handle,
            one_shape=True,
        )
        if self._context is None:
            raise RuntimeError(f"TensorRT makes no context for the bare loop: {plan.log.take()}")
        port.synchronize_stream(self.stream)
        if not self._context.set_input_shape(plan.interface.source.name, self._source.shape):
            raise RuntimeError(f"TensorRT refuses the shape {self._source.shape}: {plan.log.take()}")
        self._context.set_tensor_address(plan.interface.source.name, self._source.address)
        for output in plan.interface.outputs:
            shape = tuple(int(dimension) for dimension in self._context.get_tensor_shape(output.name))
            self._addresses[output.name] = self._take(output.count_bytes(shape))
            self._context.set_tensor_address(output.name, self._addresses[output.name])
        self.enqueue()
        self.wait()
        self._capture()

    def _capture(self) -> None:
        if not self._port.has_graphs:
            self.graph_problem = f"{self._port.provider} has no CUDA graphs"
            return
        try:
            with CAPTURE_LOCK:
                self._port.begin_capture(self.stream)
                try:
                    self.enqueue()
                except RuntimeError:
                    with contextlib.suppress(CudaError):
                        self._port.destroy_graph(self._port.end_capture(self.stream))
                    raise
                self._graph = self._port.end_capture(self.stream)
        except (CudaError, RuntimeError) as error:
            self.graph_problem = " ".join(str(error).split())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._graph is not None:
                self._port.destroy_graph(self._graph)
            self._context = self._graph = None
            if self._plan is not None:
                self._plan.release()
            for address in self._freed:
                self._port.free(address)
            if self.stream is not None:
                self._port.destroy_stream(self.stream)
        finally:
            self._device.__exit__(kind, error, trace)

    def enqueue(self) -> None:
        """One run, put on the stream."""
        if self._graph is not None:
            self._port.launch_graph(self._graph, self.stream)
        elif not self._context.execute_async_v3(self.handle):
            raise RuntimeError(f"execute_async_v3: {self._plan.log.take()}")

    def wait(self) -> None:
        """Until everything is done; asks again and again, where CUDA's package can be asked."""
        driver: Any = getattr(self._port, "_driver", None)
        if not hasattr(driver, "cuStreamQuery"):
            self._port.synchronize_stream(self.stream)
            return
        busy = driver.CUresult.CUDA_ERROR_NOT_READY
        while (status := driver.cuStreamQuery(self.stream)[0]) == busy:
            pass
        if status != driver.CUresult.CUDA_SUCCESS:
            self._port.synchronize_stream(self.stream)  # says what it is
            raise RuntimeError(f"cuStreamQuery: {status}")

    def _take(self, size: int) -> int:
        address = self._port.allocate(size)
        self._freed.append(address)
        return address

"""Execution contexts: the one place that runs a plan, with what differs between TensorRT 8.5 and 11."""

from __future__ import annotations

import math
from typing import Any

from ..errors import CudaError, CudaMemoryError, InputError
from ..tensorrt_package import quote
from .tensorrt_library import Library, TrtLog
from .tensorrt_tensors import Interface, Shape


def count_scratch_bytes(engine: Any) -> int:
    """Device memory that a context needs besides inputs and outputs."""
    newer = getattr(engine, "device_memory_size_v2", None)  # 10.1 and later; the other one is gone in 11
    return int(newer if newer is not None else engine.device_memory_size)


def make_context(library: Library, engine: Any, scratch: tuple[int, int], *, profile: int, stream_handle: int) -> Any | None:
    """A context that works in the given memory, or None where TensorRT makes no more of them.

    TensorRT 8 lets one context at a time use a profile; from 10 on any number may.

    Args:
        library: TensorRT.
        engine: The deserialized plan.
        scratch: Address and size of device memory; contexts that share it must not run at once.
        profile: Index of the optimization profile.
        stream_handle: Where the change of the profile is put; wait for it before another stream runs the context.
    """
    trt = library.trt
    if hasattr(trt, "ExecutionContextAllocationStrategy"):  # 10 and later
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        context = engine.create_execution_context_without_device_memory()
    if context is None:
        return None
    if hasattr(context, "set_device_memory"):  # 10.1 and later
        context.set_device_memory(*scratch)
    else:
        context.device_memory = scratch[0]
    if context.active_optimization_profile != profile and not context.set_optimization_profile_async(profile, stream_handle):
        return None
    return context


class Lane:
    """One context with the shape and the addresses that it was given last. Used by one thread at a time.

    Args:
        context: From `make_context`.
        interface: Names and types of inputs and outputs.
        log: To quote TensorRT when it refuses.
    """

    def __init__(self, context: Any, interface: Interface, log: TrtLog) -> None:
        self._context = context
        self._interface = interface
        self._log = log
        self._addresses: dict[str, int] = {}
        self._shape: Shape | None = None
        self._output_shapes: tuple[Shape, ...] = ()
        self.runs = 0
        self.graph: Any | None = None

    @property
    def shape(self) -> Shape | None:
        """The input shape in force."""
        return self._shape

    def bind_shape(self, shape: Shape) -> tuple[Shape, ...]:
        """Sets the input's shape; the outputs' shapes.

        Raises:
            InputError: The plan does not take the shape.
            CudaError: An output's shape depends on the input's values.
        """
        if shape == self._shape:
            return self._output_shapes
        # The context is in no local variable: an exception that somebody keeps would keep it, and TensorRT 8 makes no other one meanwhile.
        self._shape, self.runs = None, 0
        if not self._context.set_input_shape(self._interface.source.name, shape):
            raise InputError(f"batch: TensorRT refuses the shape {shape}:{quote(self._log.take())}", remedy=f"give {_show_range(self._interface)}")
        shapes = tuple(tuple(int(size) for size in self._context.get_tensor_shape(output.name)) for output in self._interface.outputs)
        if any(size < 0 for found in shapes for size in found):
            raise CudaError(f"the plan's outputs {shapes} are of a size that depends on the image", remedy="build a plan without such outputs")
        self._shape, self._output_shapes = shape, shapes
        return shapes

    def enqueue(self, addresses: tuple[int, ...], stream_handle: int) -> None:
        """Puts one run on a stream.

        Args:
            addresses: Of the input and the outputs, on the device.
            stream_handle: The stream.

        Raises:
            CudaError: TensorRT refuses; the context must not be used again.
        """
        for tensor, address in zip((self._interface.source, *self._interface.outputs), addresses, strict=True):
            if self._addresses.get(tensor.name) != address:
                if not self._context.set_tensor_address(tensor.name, address):
                    raise self._refusal(f"the address of {tensor.name}")
                self._addresses[tensor.name] = address
        if not self._context.execute_async_v3(stream_handle):
            raise self._refusal(f"to run a batch of {self._shape}")
        self.runs += 1

    def can_capture(self, stream_handle: int) -> bool:
        """Whether TensorRT says that a run may be captured now; TensorRT-RTX does not while it still compiles kernels."""
        context = self._context
        return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream_handle))

    def release(self) -> None:
        """Lets the context go."""
        self._context = None

    def _refusal(self, what: str) -> CudaError:
        lines = self._log.take()
        message = f"TensorRT refused {what}:{quote(lines)}"
        if any("out of memory" in line.lower() or "outofmemory" in line.lower() for line in lines):
            return CudaMemoryError(message, remedy="free GPU memory, lower EngineOptions(contexts=…), or give smaller batches")
        return CudaError(message, remedy="try again; if it comes again, build the plan anew on this machine with repvgg-trt build")


def choose_buckets(interface: Interface) -> frozenset[int]:
    """Batch sizes that get a CUDA graph each: up to 8, powers of two, and the profile's own."""
    first, last = interface.smallest[0], interface.largest[0]
    powers = {1 << power for power in range(int(math.log2(last)) + 1)}
    return frozenset(size for size in {*range(1, 9), *powers, interface.usual[0], last} if first <= size <= last)


def _show_range(interface: Interface) -> str:
    if interface.smallest == interface.largest:
        return f"{interface.largest}"
    return f"a shape from {interface.smallest} to {interface.largest}, or build the plan with another profile"

"""Execution contexts: the one place that runs a plan, with what differs between TensorRT 8.5 and 11."""

from __future__ import annotations

import contextlib
from typing import Any

from ...errors import CudaError, CudaMemoryError, InputError
from ...files.plan_place import quote
from ..cuda.port import CAPTURE_LOCK
from .plan import OpenPlan, Shape


def count_scratch_bytes(engine: Any) -> int:
    """Device memory that a context needs besides inputs and outputs."""
    newer = getattr(engine, "device_memory_size_v2", None)  # 10.1 and later; the other one is gone in 11
    return int(newer if newer is not None else engine.device_memory_size)


def changes_kernels(plan: OpenPlan) -> bool:
    """Whether a context may come to run other kernels than at first, which a CUDA graph would keep out for good.

    TensorRT-RTX compiles the kernels for a new shape in the background, and runs slower ones until they are there.
    Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-cuda-graphs.html
    """
    trt, shape = plan.library.trt, plan.interface.source.shape
    return hasattr(trt, "DynamicShapesKernelSpecializationStrategy") and min(shape) < 0


def make_context(
    plan: OpenPlan, scratch: tuple[int, int], *, profile: int, stream_handle: int, one_shape: bool = False
) -> Any | None:
    """A context that works in the given memory, or None where TensorRT makes no more of them.

    TensorRT 8 lets one context at a time use a profile; from 10 on any number may.

    Args:
        plan: The deserialized plan.
        scratch: Address and size of device memory; contexts that share it must not run at once.
        profile: The number of the context's profile, which it keeps.
        stream_handle: Where the change of the profile is put; wait for it before another stream runs the context.
        one_shape: Whether it will run one shape only: its first run then waits for the kernels of that shape.
    """
    with CAPTURE_LOCK:  # TensorRT takes memory and may wait for the device
        context = _create(plan, wait_for_kernels=one_shape and changes_kernels(plan))
        if context is None:
            return None
        if hasattr(context, "set_device_memory"):  # 10.1 and later
            context.set_device_memory(*scratch)
        else:
            context.device_memory = scratch[0]
        if context.active_optimization_profile != profile and not context.set_optimization_profile_async(
            profile, stream_handle
        ):
            return None
        return context


def _create(plan: OpenPlan, *, wait_for_kernels: bool) -> Any | None:
    trt, engine = plan.library.trt, plan.engine
    if not hasattr(trt, "ExecutionContextAllocationStrategy"):  # until 10
        return engine.create_execution_context_without_device_memory()
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if plan.kernels is None:
        return engine.create_execution_context(strategy)
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(strategy)
    if wait_for_kernels:
        settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    plan.kernels.attach(settings)
    return engine.create_execution_context(settings)


class Lane:
    """One context with the shape and the addresses that it was given last. Used by one thread at a time.

    Args:
        context: From `make_context`.
        plan: The plan of the context.
        keeps_kernels: Whether it runs the same kernels each time, so that a graph of them stays as fast as the context.

    Attributes:
        shape: The input's shape in force; None before the first one and after a refusal.
        output_shapes: Shapes of the outputs with this input.
        runs: How many runs there were in this shape.
        graph: The CUDA graph of a run in this shape, owned by the slot.
    """

    def __init__(self, context: Any, plan: OpenPlan, *, keeps_kernels: bool) -> None:
        self._context, self._keeps_kernels = context, keeps_kernels
        self._interface, self._log = plan.interface, plan.log
        self._addresses: dict[str, int] = {}
        self.shape: Shape | None = None
        self.output_shapes: tuple[Shape, ...] = ()
        self.runs = 0
        self.graph: Any | None = None

    @property
    def rows(self) -> int:
        """How many images a run computes, those that are only there to fill the shape included."""
        assert self.shape is not None
        return self.shape[0]

    def set_shape(self, shape: Shape) -> None:
        """Sets the input's shape, and with it the outputs'.

        Raises:
            InputError: The plan does not take the shape.
            CudaError: An output's shape depends on the input's values.
        """
        if shape == self.shape:
            return
        # The context is in no local variable: an exception that somebody keeps would keep it, and TensorRT 8 makes no
        # other one meanwhile.
        self.shape, self.runs = None, 0
        if not self._context.set_input_shape(self._interface.source.name, shape):
            least, most = self._interface.smallest, self._interface.largest
            remedy = f"give a shape from {least} to {most}, or build the plan with another profile"
            raise InputError(
                f"batch: TensorRT refuses the shape {shape}:{quote(self._log.take())}",
                remedy=remedy if least != most else f"give {most}",
            )
        shapes = tuple(
            tuple(int(size) for size in self._context.get_tensor_shape(output.name))
            for output in self._interface.outputs
        )
        if any(size < 0 for found in shapes for size in found):
            raise CudaError(
                f"the plan's outputs {shapes} are of a size that depends on the image",
                remedy="build a plan without such outputs",
            )
        self.shape, self.output_shapes = shape, shapes

    def enqueue(self, addresses: tuple[int, ...], stream_handle: int) -> None:
        """Puts one run on a stream.

        Args:
            addresses: Input and outputs, on the device.
            stream_handle: The stream.

        Raises:
            CudaError: TensorRT refuses; the context must not be used again.
        """
        for tensor, address in zip((self._interface.source, *self._interface.outputs), addresses, strict=True):
            if self._addresses.get(tensor.name) != address:
                if not self._context.set_tensor_address(tensor.name, address):
                    raise self._refusal(f"the address of {tensor.name}")
                self._addresses[tensor.name] = address
        # In the first run of a shape TensorRT sets itself up: takes memory, loads kernels, may wait for the device.
        with CAPTURE_LOCK if self.runs == 0 else contextlib.nullcontext():
            if not self._context.execute_async_v3(stream_handle):
                raise self._refusal(f"to run a batch of {self.shape}")
        self.runs += 1

    def can_capture(self, stream_handle: int) -> bool:
        """Whether a run may be captured now."""
        if self.runs == 0 or not self._keeps_kernels:
            return False
        context = self._context
        return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream_handle))

    def release(self) -> None:
        """Lets the context go."""
        with CAPTURE_LOCK:
            self._context = None

    def _refusal(self, what: str) -> CudaError:
        lines = self._log.take()
        message = f"TensorRT refused {what}:{quote(lines)}"
        if any("out of memory" in line.lower() or "outofmemory" in line.lower() for line in lines):
            return CudaMemoryError(
                message, remedy="free GPU memory, lower EngineOptions(contexts=…), or give smaller batches"
            )
        return CudaError(
            message, remedy="try again; if it comes again, build the plan anew on this machine with repvgg-trt build"
        )

"""How long the parts of one run take, by events on the GPU's own clock."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..errors import InputError
from .tensorrt_slots import Slot, fill


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """One run of a plan, in milliseconds.

    Attributes:
        to_device_ms: Copy of the input from page-locked memory.
        compute_ms: The network.
        to_host_ms: Copies of the outputs to page-locked memory.
        enqueue_ms: Of the CPU, to hand the network to the GPU; the GPU works meanwhile.
    """

    to_device_ms: float
    compute_ms: float
    to_host_ms: float
    enqueue_ms: float


def time_phases(slot: Slot, batch: NDArray[Any], calls: int) -> tuple[PhaseTimes, ...]:
    """Runs a batch so many times, each part between two events. Without a CUDA graph, in which the parts could not be told apart.

    Args:
        slot: Lent to this thread.
        batch: Of the input's dtype, within the profile.
        calls: To be timed; one more is made first, in which TensorRT sets itself up.

    Raises:
        InputError: The batch is larger than the profile.
        CudaError: CUDA or TensorRT failed.
    """
    interface, port, lane, stage = slot.plan.interface, slot.port, slot.main, slot.stage
    assert lane is not None
    if len(batch) > interface.largest[0]:
        remedy = "give a smaller batch, or build the plan with a larger --max-batch"
        raise InputError(f"batch: the parts of {len(batch)} images cannot be timed: the plan takes {interface.largest[0]} at a time", remedy=remedy)
    shape = (max(len(batch), interface.smallest[0]), *batch.shape[1:])
    slot.wait_for_others(slot.stream)
    output_shapes = slot.bind(lane, shape)
    slot.reserve([stage], shape, output_shapes)
    fill(stage, interface, batch, shape)
    found = []
    with contextlib.ExitStack() as stack:
        events = []
        for _ in range(4):
            events.append(port.create_timer())
            stack.callback(port.destroy_event, events[-1])
        for _ in range(calls + 1):
            port.record_event(events[0], slot.stream)
            port.copy(stage.source.device, stage.source.host, interface.source.count_bytes(shape), slot.stream)
            port.record_event(events[1], slot.stream)
            start = time.perf_counter()
            lane.enqueue(stage.addresses, slot.handle)
            enqueued = time.perf_counter() - start
            port.record_event(events[2], slot.stream)
            for tensor, buffer, output_shape in zip(interface.outputs, stage.outputs, output_shapes, strict=True):
                port.copy(buffer.host, buffer.device, tensor.count_bytes(output_shape), slot.stream)
            port.record_event(events[3], slot.stream)
            port.synchronize_stream(slot.stream)
            parts = [port.elapsed_ms(first, second) for first, second in itertools.pairwise(events)]
            found.append(PhaseTimes(parts[0], parts[1], parts[2], 1e3 * enqueued))
    return tuple(found[1:])

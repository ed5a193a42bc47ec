"""A batch that is on the GPU already: run where it lies, its results left there."""

from __future__ import annotations

from typing import Any

from .device_arrays import DeviceArray, DeviceArrays, DeviceView
from .device_memory import DevicePool
from .tensorrt_slots import Slot, split
from .tensorrt_tensors import Shape


def run_on_device(slot: Slot, memory: DevicePool, view: DeviceView, *, stream: int | None) -> DeviceArrays:
    """Puts all pieces of a batch on one stream, between the caller's array and blocks of its own.

    Args:
        slot: Lent to this thread.
        memory: Where the results lie.
        view: The batch, checked.
        stream: Handle of the caller's stream, in whose order everything happens; None takes the slot's own and waits.
    """
    interface, port = slot.plan.interface, slot.port
    order: Any = slot.stream if stream is None else stream
    slot.wait_for_others(order)
    try:
        results = _run_pieces(slot, memory, view, order=order)
    finally:
        if stream is not None:  # also after a failure: what was put there before it may still run
            slot.leave_working(order)
    if stream is None:
        port.synchronize_stream(slot.stream)
        for result in results:
            result.settle()
    return DeviceArrays(tuple(output.name for output in interface.outputs), tuple(results))


def _run_pieces(slot: Slot, memory: DevicePool, view: DeviceView, *, order: Any) -> list[DeviceArray]:
    interface, handle = slot.plan.interface, slot.port.stream_handle(order)
    lane, count = slot.main, view.shape[0]
    assert lane is not None
    results: list[DeviceArray] = []
    row_bytes = interface.source.count_bytes(view.shape) // count
    for start, size, rows in split(count, interface):
        shape: Shape = (rows, *view.shape[1:])
        output_shapes = slot.bind(lane, shape)
        if not results:
            results = _make_results(slot, memory, output_shapes, count=count, stream=handle)
        source = view.address + start * row_bytes
        targets = [
            result.address + start * (tensor.count_bytes(found) // rows)
            for result, tensor, found in zip(results, interface.outputs, output_shapes, strict=True)
        ]
        if rows == size:
            lane.enqueue((source, *targets), handle)
        else:
            _run_padded(slot, (source, size * row_bytes), targets, size=size, order=order)
    return results


def _make_results(slot: Slot, memory: DevicePool, output_shapes: tuple[Shape, ...], *, count: int, stream: int) -> list[DeviceArray]:
    results = []
    for tensor, found in zip(slot.plan.interface.outputs, output_shapes, strict=True):
        whole = (count, *found[1:]) if tensor.shape[0] == slot.plan.interface.source.shape[0] else found
        results.append(DeviceArray(memory, memory.take(tensor.count_bytes(whole), stream), whole, tensor.dtype, stream=stream))
    return results


def _run_padded(slot: Slot, source: tuple[int, int], targets: list[int], *, size: int, order: Any) -> None:
    """Fewer images than the plan takes: through buffers that are large enough; the rows below hold whatever was there."""
    lane, port, interface = slot.main, slot.port, slot.plan.interface
    assert lane is not None and lane.shape is not None
    shape, output_shapes = lane.shape, lane.bind_shape(lane.shape)
    slot.reserve([slot.stage], shape, output_shapes)
    port.copy(slot.stage.source.device, source[0], source[1], order)
    lane.enqueue(slot.stage.addresses, port.stream_handle(order))
    for target, buffer, tensor, found in zip(targets, slot.stage.outputs, interface.outputs, output_shapes, strict=True):
        port.copy(target, buffer.device, tensor.count_bytes(found) // shape[0] * size, order)

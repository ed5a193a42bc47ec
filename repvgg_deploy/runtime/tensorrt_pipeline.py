"""Batches larger than the plan takes: in pieces, where copies to and from the GPU overlap its computing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensorrt_slots import Arrays, Slot, fill, split, views
from .tensorrt_staging import Stage
from .tensorrt_tensors import Shape

_STAGES = 2


class Pipeline:
    """Two sets of buffers and a stream each for copies in and out, beside the slot's own, which computes.

    Args:
        slot: The slot that it belongs to.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._stages = (slot.stage, *(Stage(slot.port, slot.owned, slot.plan.interface) for _ in range(_STAGES - 1)))
        self._inward = slot.make_stream()
        self._outward = slot.make_stream()

    def run(self, batch: NDArray[Any]) -> Arrays:
        """Runs N images from host to host; the outputs have N rows each, of the engine's dtypes."""
        slot, interface = self._slot, self._slot.plan.interface
        slot.wait_for_others(slot.stream)
        results: Arrays = []
        pending: list[tuple[Stage, int, int, tuple[Shape, ...]]] = []
        assert slot.main is not None
        for index, (start, size, rows) in enumerate(split(len(batch), interface)):
            shape = (rows, *batch.shape[1:])
            output_shapes = slot.bind(slot.main, shape)
            if not results:
                results = [np.empty((len(batch), *found[1:]), tensor.dtype) for tensor, found in zip(interface.outputs, output_shapes, strict=True)]
                # Before the first piece, so that nothing is under way when addresses change; the first is the largest.
                slot.reserve(self._stages, shape, output_shapes)
            if len(pending) == _STAGES:
                self._collect(pending.pop(0), results)
            stage = self._stages[index % _STAGES]
            fill(stage, interface, batch[start : start + size], shape)
            self._enqueue(stage, shape, output_shapes)
            pending.append((stage, start, size, output_shapes))
        for piece in pending:
            self._collect(piece, results)
        return results

    def _enqueue(self, stage: Stage, shape: Shape, output_shapes: tuple[Shape, ...]) -> None:
        slot, port, interface = self._slot, self._slot.port, self._slot.plan.interface
        assert slot.main is not None
        port.copy(stage.source.device, stage.source.host, interface.source.count_bytes(shape), self._inward)
        port.record_event(stage.arrived, self._inward)
        port.wait_event(slot.stream, stage.arrived)
        slot.main.enqueue(stage.addresses, slot.handle)
        port.record_event(stage.computed, slot.stream)
        port.wait_event(self._outward, stage.computed)
        for tensor, buffer, found in zip(interface.outputs, stage.outputs, output_shapes, strict=True):
            port.copy(buffer.host, buffer.device, tensor.count_bytes(found), self._outward)
        port.record_event(stage.done, self._outward)

    def _collect(self, piece: tuple[Stage, int, int, tuple[Shape, ...]], results: Arrays) -> None:
        """Waits for a piece; its buffers are free then, on both sides."""
        stage, start, size, output_shapes = piece
        self._slot.port.synchronize_event(stage.done)
        for result, view in zip(results, views(stage, self._slot.plan.interface, output_shapes), strict=True):
            result[start : start + size] = view[:size]

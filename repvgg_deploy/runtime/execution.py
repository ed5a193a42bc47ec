"""Checked batches of any size → what the backend runs: pieces that it takes, padded where it takes one size only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..specs.values import ModelSpec
from .device_arrays import as_stream_handle, is_device_array, read_shape
from .opening import OpenModel
from .results import Arrays, join

if TYPE_CHECKING:
    from .tensorrt_phases import PhaseTimes


class Executor:
    """Runs batches on an opened model.

    Args:
        opened: The model.
        max_batch: Pieces of this many images, where the model itself sets no limit.
    """

    def __init__(self, opened: OpenModel, max_batch: int) -> None:
        self._spec = opened.metadata.spec
        self._backend, self._splitting = opened.backend, opened.splitting
        self._batch = self._spec.batch
        self._smallest, self.largest = (self._batch, self._batch) if self._batch is not None else (1, max_batch)
        if self._splitting is not None:
            self._smallest, self.largest = self._splitting.min_batch, self._splitting.max_batch

    @property
    def overlaps(self) -> bool:
        """Whether batches that run at once gain by it: copies of one go on beside the computation of another."""
        return self._splitting is not None

    def takes(self, batch: object) -> bool:
        """Whether an object is an array on a GPU, for a backend that can read it there."""
        return type(batch) is not np.ndarray and self._splitting is not None and is_device_array(batch)

    def run(self, batch: NDArray[Any]) -> Arrays:
        """Runs a batch that was checked, of any size and memory order."""
        count = len(batch)
        fits = self._smallest <= count <= self.largest
        if not fits:
            self._require_divisible()
        if self._splitting is not None:
            return tuple(self._splitting.run(batch))
        if fits:
            return tuple(self._backend.run(np.ascontiguousarray(batch)))
        return join([self._run_piece(piece) for piece in _split(batch, self.largest)])

    def run_device(self, batch: Any, stream: Any, *, to_host: bool) -> Any:
        """Runs a batch that lies on the GPU.

        Raises:
            InputError: It does not, or the backend cannot read it there.
        """
        if self._splitting is None or not is_device_array(batch):
            what = "arrays on a GPU run with a TensorRT plan only" if self._splitting is None else f"{type(batch).__name__} does not lie on a GPU"
            raise InputError(f"batch: {what}", remedy="call infer(array) with a NumPy array and without stream, or give a plan an array on its GPU")
        handle = None if stream is None else as_stream_handle(stream)
        shape = read_shape(batch)
        if shape and not self._smallest <= shape[0] <= self.largest:
            self._require_divisible()
        return self._splitting.run_device(batch, stream=handle, to_host=to_host)

    def warm_up(self, batch: NDArray[Any]) -> None:
        """Runs a batch of the usual kind until nothing is left to be made ready."""
        if self._splitting is not None:
            self._splitting.warm_up(batch)
        else:
            self.run(batch)

    def time_phases(self, batch: NDArray[Any], calls: int) -> tuple[PhaseTimes, ...] | None:
        """The parts of so many runs of a batch that was checked; None where the backend does not know them."""
        return None if self._splitting is None else self._splitting.time_phases(batch, calls)

    def _run_piece(self, piece: NDArray[Any]) -> Arrays:
        count = len(piece)
        if self._batch is None or count == self._batch:
            return tuple(self._backend.run(np.ascontiguousarray(piece)))
        padded = np.zeros((self._batch, *piece.shape[1:]), piece.dtype)
        padded[:count] = piece
        # Copies, so that the caller does not hold the whole padded output.
        return tuple(output[:count].copy() for output in self._backend.run(padded))

    def _require_divisible(self) -> None:
        self.require_rows(
            "a batch cannot be split or padded", remedy=f"give {'exactly' if self._batch else 'at most'} {self.largest} images at a time"
        )

    def require_rows(self, consequence: str, *, remedy: str) -> None:
        """Refuses what takes the outputs apart or puts them together by images, where an output is of the batch as a whole.

        Raises:
            InputError: An output has no row per image.
        """
        first = self._spec.input.shape[0]
        for output in self._spec.outputs:
            if not output.shape or output.shape[0] != first:
                raise InputError(f"batch: the output {output.name} {show(output.shape)} has no row per image, so {consequence}", remedy=remedy)


def usual_shape(spec: ModelSpec) -> tuple[int, ...]:
    """One image, or the fixed batch, of the size in the specification.

    Raises:
        InputError: The model accepts any size.
    """
    source, preprocessing = spec.input, spec.preprocessing
    sizes = list(source.shape)
    sizes[0] = spec.batch if spec.batch is not None else 1
    axes = {"NCHW": (2, 3), "NHWC": (1, 2)}.get(source.layout)
    if preprocessing is not None and axes is not None:
        for axis, size in zip(axes, preprocessing.crop, strict=True):
            sizes[axis] = size if isinstance(sizes[axis], str) else sizes[axis]
    known = tuple(size for size in sizes if isinstance(size, int))
    if len(known) != len(sizes):
        raise InputError(f"the model accepts any size: {show(source.shape)}", remedy="give warm_up the shape of your batches")
    return known


def show(shape: Sequence[int | str]) -> str:
    """A shape for people."""
    return f"({', '.join(map(str, shape))})"


def _split(batch: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    return (batch[start : start + size] for start in range(0, len(batch), size))

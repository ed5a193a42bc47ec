"""A checked batch → what `infer` returns: run in pieces, padded where the backend takes one size only, and packaged.

`Backend` is what a library that runs models must offer. A new one is one module and one line in `opening.open_backend`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..images.classes import best_classes, softmax
from ..specs.values import ModelMetadata, ModelSpec
from .checks import require_rows, usual_shape
from .cuda.arrays import as_stream_handle, is_device_array, read_shape

_IMAGES_AT_ONCE = 32
Arrays: TypeAlias = "tuple[NDArray[Any], ...]"


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The best classes of each image, best first.

    Attributes:
        scores: float32 (N, K).
        classes: int64 (N, K), indices into the labels.
    """

    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


Result: TypeAlias = "NDArray[np.float32] | TopK | dict[str, NDArray[Any]]"


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """One run of a plan, in milliseconds.

    Attributes:
        to_device_ms: Copy of the input from page-locked memory.
        compute_ms: The network.
        to_host_ms: Copies of the outputs to page-locked memory.
        enqueue_ms: What the CPU needs to hand the network to the GPU, which works meanwhile.
    """

    to_device_ms: float
    compute_ms: float
    to_host_ms: float
    enqueue_ms: float


class Backend(Protocol):
    """A model loaded on one device. Many threads call `run` at once; `close` is called once, after the last `run`."""

    @property
    def name(self) -> str:
        """For people: the library, its version and where it runs."""

    def run(self, batch: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Runs one batch of a size that the model accepts.

        Args:
            batch: C-contiguous, of the dtype and shape in the model's specification.

        Returns:
            The outputs in the order of the specification, in memory of their own that nothing else will write to.
        """

    def close(self) -> None:
        """Frees the model."""


class SplittingBackend(Backend, Protocol):
    """A backend that splits batches itself, in any memory order, so that copies and computing of the pieces overlap."""

    @property
    def metadata(self) -> ModelMetadata:
        """What is known of the model."""

    @property
    def min_batch(self) -> int:
        """The smallest batch that runs without padding."""

    @property
    def max_batch(self) -> int:
        """The largest batch that runs without being split."""

    @property
    def usual_sizes(self) -> tuple[int, ...]:
        """All dimensions but the batch, of what it runs fastest."""

    def run_device(self, batch: Any, *, stream: int | None, to_host: bool) -> Any:
        """Runs a batch that lies on the device."""

    def make_batch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array that is copied to the device from where it is; any numbers are in it."""

    def expect_batch(self, size: int) -> None:
        """Batches of this size will come often."""

    def warm_up(self, batch: NDArray[Any]) -> None:
        """Makes ready all that can be made ready."""

    def time_phases(self, batch: NDArray[Any], calls: int) -> tuple[PhaseTimes, ...]:
        """Times the parts of so many runs."""


class OpenModel:
    """A model that was opened: runs checked batches on its backend, split and padded as that needs them.

    Args:
        metadata: All that is known of the model.
        backend: What runs it.
        splitting: The same, if it takes any number of images itself.
        device: As the Engine names it.
        max_batch: Pieces of this many images, where the model itself sets no limit.
    """

    def __init__(
        self,
        metadata: ModelMetadata,
        backend: Backend,
        *,
        splitting: SplittingBackend | None,
        device: str,
        max_batch: int,
    ) -> None:
        self.metadata, self.backend, self.device = metadata, backend, device
        self._spec, self._splitting = metadata.spec, splitting
        if splitting is not None:
            self._smallest, self.largest = splitting.min_batch, splitting.max_batch
        else:
            fixed = self._spec.batch
            self._smallest, self.largest = (1, max_batch) if fixed is None else (fixed, fixed)

    @property
    def overlaps(self) -> bool:
        """Whether batches that run at once gain by it: copies of one go on beside the computation of another."""
        return self._splitting is not None

    def takes(self, batch: object) -> bool:
        """Whether an object is an array on a GPU, for a backend that can read it there."""
        return type(batch) is not np.ndarray and self._splitting is not None and is_device_array(batch)

    def run(self, batch: NDArray[Any]) -> Arrays:
        """Runs a batch of any size and memory order."""
        count = len(batch)
        fits = self._smallest <= count <= self.largest
        if not fits:
            self._require_divisible()
        if self._splitting is not None:
            return tuple(self._splitting.run(batch))
        if fits:
            return tuple(self.backend.run(np.ascontiguousarray(batch)))
        size = self.largest
        return join([self._run_piece(batch[start : start + size]) for start in range(0, count, size)])

    def _run_piece(self, piece: NDArray[Any]) -> Arrays:
        count = len(piece)
        if count >= self._smallest:
            return tuple(self.backend.run(np.ascontiguousarray(piece)))
        padded = np.zeros((self._smallest, *piece.shape[1:]), piece.dtype)
        padded[:count] = piece
        # Copies, so that the caller does not hold the whole padded output.
        return tuple(output[:count].copy() for output in self.backend.run(padded))

    def run_device(self, batch: Any, *, stream: Any, to_host: bool) -> Any:
        """Runs a batch that lies on the GPU.

        Raises:
            InputError: It does not, or the backend cannot read it there.
        """
        if self._splitting is None or not is_device_array(batch):
            what = f"{type(batch).__name__} does not lie on a GPU"
            if self._splitting is None:
                what = "arrays on a GPU run with a TensorRT plan only"
            raise InputError(
                f"batch: {what}",
                remedy="call infer(array) with a NumPy array and without stream, or give a plan an array on its GPU",
            )
        handle = None if stream is None else as_stream_handle(stream)
        shape = read_shape(batch)
        if shape and not self._smallest <= shape[0] <= self.largest:
            self._require_divisible()
        return self._splitting.run_device(batch, stream=handle, to_host=to_host)

    def usual_shape(self) -> tuple[int, ...]:
        """One image, or the fixed batch, of the usual size.

        Raises:
            InputError: The model accepts any size, and none is usual.
        """
        if self._splitting is not None:
            return (self._spec.batch or 1, *self._splitting.usual_sizes)
        return usual_shape(self._spec)

    def make_batch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array that the backend reads where it is; any numbers are in it."""
        return np.empty(shape, dtype) if self._splitting is None else self._splitting.make_batch(shape, dtype)

    def choose_step(self, batch_size: object) -> int:
        """Images decoded and run at a time.

        Raises:
            InputError: What was asked for is no positive number, nor None.
        """
        step = batch_size if batch_size is not None else min(self.largest, _IMAGES_AT_ONCE)
        if not isinstance(step, int) or step < 1:
            raise InputError(
                f"batch_size: expected a whole number of at least 1, found {reprlib.repr(step)}",
                remedy="leave it out, or give a positive number",
            )
        return step

    def expect_batch(self, size: int) -> None:
        """Batches of this size will come often, as from a batcher."""
        if self._splitting is not None:
            self._splitting.expect_batch(size)

    def warm_up(self, batch: NDArray[Any]) -> None:
        """Runs a batch of the usual kind until nothing is left to be made ready."""
        if self._splitting is not None:
            self._splitting.warm_up(batch)
        else:
            self.run(batch)

    def time_phases(self, batch: NDArray[Any], calls: int) -> tuple[PhaseTimes, ...] | None:
        """The parts of so many runs of a batch; None where the backend does not know them."""
        return None if self._splitting is None else self._splitting.time_phases(batch, calls)

    def _require_divisible(self) -> None:
        count = f"{'at most' if self._spec.batch is None else 'exactly'} {self.largest}"
        require_rows(self._spec, "a batch cannot be split or padded", remedy=f"give {count} images at a time")


def join(parts: Sequence[Arrays]) -> Arrays:
    """The outputs of consecutive pieces of a batch as those of the whole."""
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))


def package(outputs: Sequence[NDArray[Any]], spec: ModelSpec) -> Result:
    """Outputs in the order of the specification → what the caller gets.

    Returns:
        TopK of a top-5 model; else the array where there is one output, a dict by name where there are several.
    """
    if spec.kind == "top5":
        scores, classes = outputs
        return TopK(scores.astype(np.float32, copy=False), classes.astype(np.int64, copy=False))
    widened = [array.astype(np.float32) if array.dtype == np.float16 else array for array in outputs]
    if len(widened) == 1:
        return widened[0]
    return {output.name: array for output, array in zip(spec.outputs, widened, strict=True)}


def rank_classes(result: Result, spec: ModelSpec, top: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Classes and scores of each image, best first; of equal ones, the lower class first.

    Args:
        result: Answer of a classifier.
        spec: The specification of the same model. The scores of logits are their softmax over all classes, those of
            other models what they give.
        top: How many of each image, where there are so many.
    """
    if isinstance(result, TopK):
        return zip(result.classes[:, :top], result.scores[:, :top].astype(np.float64), strict=True)
    assert isinstance(result, np.ndarray), "a classifier has one output"
    scores = softmax(result) if spec.kind == "logits" else result.astype(np.float64)
    classes = best_classes(scores, top)
    return zip(classes, np.take_along_axis(scores, classes, axis=1), strict=True)

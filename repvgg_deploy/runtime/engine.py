"""A model file that answers batches: open → check the batch → run it, in pieces or padded → results.

`opening` finds what runs a file. `checks` judges each batch. `results` runs it in pieces and packages the outputs.
`threads` runs what `submit` hands in, and says when the model may be freed. `batcher` runs requests of many clients
together. `statistics` counts. `options` are the Engine's, and the backends are in `cpu` and `tensorrt`.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineBusyError, InputError, RepVGGDeployError
from ..specs.values import ModelMetadata, ModelSpec
from .answers import Answer, Picture, Prediction, answer_images, plan_answers
from .batcher import Batcher, BatchModel
from .checks import BatchCheck, require_rows, require_shape, show_shape
from .cuda.arrays import DeviceArrays, read_shape
from .opening import as_path, open_model
from .options import BackendName, BatcherOptions, DeviceChoice, EngineOptions
from .results import Arrays, Result, TopK, join, package
from .statistics import Recorder, Statistics
from .threads import Lease, Submissions, let_go, wait_for

if TYPE_CHECKING:
    from .results import PhaseTimes

__all__ = ["Engine", "EngineOptions", "Result", "TopK"]

_T = TypeVar("_T")


class Engine:
    """A loaded model. Use it as a context manager, or `close()` it.

    `infer` may be called from many threads at once. In a server that forks, open the Engine in each worker: the threads
    and the GPU of a process do not follow its children.

        with Engine("a0.onnx") as engine:
            logits = engine.infer(batch)

    Args:
        path: An ONNX of ours (of repvgg-export, `export_module`, `quantize` or `fold`), or a TensorRT plan.
        device: `cpu`, or `cuda`: the GPU or an error, never the CPU in its place; `cuda:1` or 1 is the second one.
            None: `cuda` for a plan, `cpu` for an ONNX.
        backend: `onnxruntime`, `openvino` (on the CPU, the fastest for typed INT8 graphs), or `fastest`: OpenVINO if
            the graph is INT8 and it is installed, else ONNX Runtime. None: ONNX Runtime. For a plan `tensorrt` or
            `rtx`; None: what its passport says.
        options: Threads, memory, GPU.

    Raises:
        ModelError: The file is missing, truncated, changed since its export, or not one of ours.
        PlanError: A plan is damaged, or was made for another GPU or TensorRT (PlanIncompatibleError).
        InputError: An argument is not what is expected.
        CudaError: `cuda` was asked for and cannot be had.
        MissingDependencyError: The backend's package is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: DeviceChoice = None,
        backend: BackendName | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self._path = as_path(path)
        if options is not None and not isinstance(options, EngineOptions):
            raise InputError(
                f"options: expected EngineOptions, found an object of type {type(options).__qualname__}",
                remedy="give options=EngineOptions(intra_op_threads=4), say",
            )
        self._options = options if options is not None else EngineOptions()
        self._process = os.getpid()  # a child of `fork` lacks the threads that finish what is under way here
        self._model = open_model(self._path, device, backend, self._options)
        self._backend, self._spec = self._model.backend, self._model.metadata.spec
        self._check = BatchCheck(self._spec, finite=self._options.check_finite)
        self._lease = Lease(self._backend.close)
        self._recorder = Recorder()
        self._submissions = Submissions(self._options.workers, self._options.max_pending)
        # An Engine that is dropped without close() gives everything back, too: else its threads, and a plan's memory on
        # the GPU, would stay as long as the process.
        weakref.finalize(self, let_go, self._lease, self._submissions, self._process).atexit = False

    @property
    def spec(self) -> ModelSpec:
        """Input, outputs, preprocessing and labels."""
        return self._spec

    @property
    def metadata(self) -> ModelMetadata:
        """All that the file says of itself: variant, checkpoint, certificate, history."""
        return self._model.metadata

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def device(self) -> str:
        """`cpu`, `cuda`, or `cuda:1`."""
        return self._model.device

    @property
    def backend_name(self) -> str:
        """What runs the model, for logs and reports."""
        return self._backend.name

    @property
    def largest_batch(self) -> int:
        """The largest batch that runs as one piece: the plan's, the model's fixed one, or `EngineOptions.max_batch`."""
        return self._model.largest

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._lease.closed

    def infer(self, batch: Any, *, stream: Any = None) -> Result:
        """Runs N images, N ≥ 1. With a fixed batch, more are split and fewer are padded; any memory order is accepted.

        Args:
            batch: What `spec.input` says: float32 (N, 3, H, W), RGB, normalised; or uint8 (N, H, W, 3), RGB, 0–255. A
                model with float16 input takes float16, and float32 too, which is rounded: it is what the model would do
                first. Do not write to it while this runs. A plan also takes arrays that lie on its GPU (torch, CuPy,
                pycuda, anything with DLPack or `__cuda_array_interface__`), C-contiguous and of just that dtype, which
                are used where they are; their numbers are not checked for NaN.
            stream: For arrays on the GPU: the stream of torch, CuPy or pycuda that the batch is ready on.

        Returns:
            float32 (N, classes) of logits or probabilities; a TopK of a top-5 model; a dict by output name where a
            model has several. The caller owns it: nothing will write to it again.

        Raises:
            InputError: The batch is not what the model expects, holds NaN or infinities, or the Engine is closed.
            ModelError: The backend failed.
            CudaError: The GPU failed.
        """
        if stream is not None or self._model.takes(batch):
            return package(self._run_device(batch, stream, to_host=True), self._spec)
        return package(self._run(self._check.check(batch)), self._spec)

    def logits(self, batch: Any) -> NDArray[np.float32]:
        """`infer` of a model that gives logits, with the one type float32 (N, classes); an InputError of others."""
        if self._spec.kind != "logits":
            raise InputError(f"{self._path}: gives {self._spec.kind}, not logits", remedy="call infer(batch)")
        result = self.infer(batch)
        assert isinstance(result, np.ndarray), "a classifier has one output"
        return result

    @overload  # a text is a sequence, too; the first that fits counts
    def classify(self, images: Picture, *, top: int = 5) -> list[Prediction]: ...  # type: ignore[overload-overlap]

    @overload
    def classify(self, images: Sequence[Picture], *, top: int = 5) -> list[list[Prediction]]: ...

    def classify(self, images: Any, *, top: int = 5) -> Any:
        """The best classes of one image, or of each of a list, best first.

            for prediction in engine.classify("photo.jpg"):
                print(prediction.label, prediction.score)

        Args:
            images: The path of an image file, what a file holds, pixels uint8 (H, W, 3) RGB 0–255 of any size, or an
                image of Pillow; or a list of them.
            top: How many classes, where the model has so many.

        Raises:
            InputError: An image cannot be read, the model gives no classes, or the Engine is closed.
            ModelError: The model answers with NaN.
            MissingDependencyError: Pillow is not installed.
        """
        several = isinstance(images, (list, tuple))
        answers = list(self.stream(images if several else [images], top=top))
        for error in (answer.error for answer in answers if answer.error is not None):
            raise error
        return [list(answer.predictions) for answer in answers] if several else list(answers[0].predictions)

    def stream(self, images: Iterable[Picture], *, top: int = 5, batch_size: int | None = None) -> Iterator[Answer]:
        """The best classes of any number of images, decoded ahead in threads, in full batches and constant memory.

            for answer in engine.stream(Path("photos").rglob("*.jpg")):
                print(answer.image, answer.error or answer.predictions[0].label)

        Args:
            images: As `classify` takes them, from a list, a generator or any other source; taken as they are needed.
            top: How many classes of each, where the model has so many.
            batch_size: Images that are run at a time; None chooses.

        Returns:
            One Answer an image, in order. An image that cannot be read is an answer with an error, and ends nothing.

        Raises:
            InputError: The model gives no classes, or the Engine is closed.
            MissingDependencyError: Pillow is not installed.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            raise InputError("images: expected many, found one", remedy="call classify(image)")
        how = plan_answers(self._spec, self._path, top=top)
        return answer_images(images, how, infer=self.infer, batch_size=self._model.choose_step(batch_size))

    def infer_device(self, batch: Any, *, stream: Any = None) -> DeviceArrays:
        """Runs images that lie on the GPU, with a plan, and leaves the results there.

        Args:
            batch: An array on the plan's GPU, as `infer` takes it.
            stream: The stream of torch, CuPy or pycuda that the batch is ready on, and on which the results will be:
                this returns at once, and what is put on that stream next finds them. None: the results are ready when
                this returns.

        Returns:
            The outputs as the plan has them (float16 stays float16), each with `__dlpack__` and
            `__cuda_array_interface__`. They own their memory.

        Raises:
            InputError: The batch is not what the model expects or not on its GPU, or the Engine runs no plan or is
                closed.
            CudaError: The GPU failed.
        """
        results: DeviceArrays = self._run_device(batch, stream, to_host=False)
        return results

    def infer_images(self, paths: Iterable[str | os.PathLike[str]], *, batch_size: int | None = None) -> Result:
        """Runs image files, prepared as the model's specification says.

        Args:
            paths: N files.
            batch_size: Files decoded and run at a time; None chooses.

        Returns:
            As `infer`.

        Raises:
            InputError: A file is not a usable image, there are none, the model does not say how an image becomes its
                input, or they are more than run at once and an output has no row per image.
            MissingDependencyError: Pillow is not installed.
        """
        from ..images.decode import load_batch

        step = self._model.choose_step(batch_size)
        if isinstance(paths, (str, os.PathLike)):
            raise InputError(
                f"paths: expected a list of image paths, found {paths!r}",
                remedy=f"call infer_images([{os.fspath(paths)!r}])",
            )
        files = list(paths)
        if not files:
            raise InputError("paths: expected at least one image, found none", remedy="give at least one path")
        if len(files) > step:
            require_rows(
                self._spec,
                f"{len(files)} images cannot be run {step} at a time",
                remedy=f"give at most {step}, or a larger batch_size",
            )
        pieces = (load_batch(files[start : start + step], self._spec) for start in range(0, len(files), step))
        return package(join([self._run(self._check.check(piece)) for piece in pieces]), self._spec)

    def pinned_batch(self, shape: int | Sequence[int]) -> NDArray[Any]:
        """An array to fill and give to `infer`, `submit` or a batcher; fill it again when the answer is there.

        Of a plan it is page-locked: the GPU reads it and its parts (`batch[:n]`) without another copy. It lives as long
        as somebody holds it, also after `close`. On a CPU it is plain memory.

        Args:
            shape: Of the batch; a number is so many images of the size that `warm_up` takes.

        Returns:
            Of the dtype in `spec.input`, with any numbers in it.

        Raises:
            InputError: The model takes no such batch, or the Engine is closed.
            CudaMemoryError: There is no memory that can be locked.
        """
        found, dtype = require_shape(shape, self._model.usual_shape), np.dtype(self._spec.input.dtype)
        self._check.check_form(np.broadcast_to(np.zeros((), dtype), found))
        self._enter()
        try:
            return self._model.make_batch(found, dtype)
        finally:
            self._lease.release()

    def submit(self, batch: NDArray[Any]) -> Future[Result]:
        """Hands in a batch of any size, to be run by a thread of this Engine, and returns at once.

        For single images of many clients see `batcher`.

        Args:
            batch: As `infer`. Do not write to it before the answer is there.

        Returns:
            What `infer` would return or raise. After `close`, what was handed in before is still run.

        Raises:
            InputError: The batch is not what the model expects, or the Engine is closed.
            EngineBusyError: `EngineOptions.max_pending` batches wait already.
        """
        checked = self._check.check(batch)
        self._enter()
        arrival = time.perf_counter()

        def work() -> Result:
            self._recorder.wait(time.perf_counter() - arrival)
            return package(self._run(checked, entered=True), self._spec)

        try:
            future = self._submissions.submit(work)
        except BaseException as error:
            self._lease.release()
            if isinstance(error, EngineBusyError):
                self._recorder.count("refused")
            raise
        future.add_done_callback(self._leave)
        return future

    async def infer_async(self, batch: NDArray[Any]) -> Result:
        """`infer` for a coroutine: the event loop is free while the batch runs.

        A task that is cancelled before it is run is not run.

        Raises:
            EngineBusyError: As `submit`; the others as `infer`.
        """
        return await wait_for(self.submit(batch))

    def batcher(
        self,
        max_batch: int = 32,
        *,
        max_delay_ms: float = 2.0,
        max_queue: int | None = None,
        timeout_ms: float | None = None,
        concurrency: int | None = None,
    ) -> Batcher:
        """Micro-batching: single requests from many clients are run together.

        Close it before the Engine; nested `with` blocks do.

        Args:
            max_batch: Images run together at most.
            max_delay_ms: How long the first request of a batch waits for others.
            max_queue: Images that may wait; None: eight batches.
            timeout_ms: What waited so long is not run any more; None: for ever.
            concurrency: Batches under way at once; None: of a plan two, where it has as many contexts, so that one is
                copied while the other is computed; of other models one, which has all the cores.

        Raises:
            InputError: An argument is out of range, the Engine is closed, or the model has an output without a row per
                image.
        """
        self._enter()
        self._lease.release()
        require_rows(
            self._spec,
            "requests cannot be run together",
            remedy="call infer, submit or infer_async, which run each batch by itself",
        )
        if concurrency is None:
            concurrency = min(self._options.contexts, 2) if self._model.overlaps else 1
        options = BatcherOptions(max_batch, max_delay_ms, max_queue, timeout_ms, concurrency)
        self._model.expect_batch(max_batch)
        finish = functools.partial(package, spec=self._spec)
        return Batcher(options, BatchModel(self._check.check, self._run, finish, self._model.make_batch))

    def statistics(self) -> Statistics:
        """What this Engine did since it was opened.

        One entry a call of `infer`, a `submit`, or a batch of a batcher, which keeps statistics of its own, too.
        """
        return self._recorder.snapshot(self._submissions.waiting)

    def warm_up(self, shape: Sequence[int] | None = None) -> None:
        """Runs batches of zeros, so that the first real one is not the slow one.

        A plan makes all its contexts and CUDA graphs for images of this size, also those for batchers that are open:
        no later request pays for them, nor captures one while another thread may wait for the whole device.

        Args:
            shape: Of the batch; None: one image (or the fixed batch) of the specification's or the plan's usual size.

        Raises:
            InputError: The shape is not one that the model accepts, or it must be given because the model accepts any
                image size.
        """
        wanted = tuple(shape) if shape is not None else self._model.usual_shape()
        zeros = self._check.check(np.zeros(wanted, self._spec.input.dtype))
        self._enter()
        try:
            self._model.warm_up(zeros)
        finally:
            self._lease.release()

    def time_phases(self, batch: NDArray[Any], calls: int = 50) -> tuple[PhaseTimes, ...] | None:
        """Times the copies to and from the GPU, the computing and its launch apart.

        One call at a time, and without CUDA graphs.

        Args:
            batch: As `infer`, within the plan's profile.
            calls: How many.

        Returns:
            The parts of each call; None where there are none: an ONNX runs as one call of its library.

        Raises:
            InputError: The batch is not what the model expects or larger than the plan takes, or the Engine is closed.
            CudaError: The GPU failed.
        """
        checked = self._check.check(batch)
        self._enter()
        try:
            return self._model.time_phases(checked, calls)
        finally:
            self._lease.release()

    def close(self, *, wait: bool = True) -> None:
        """Lets no new batch in, waits until those that run or were submitted are done, and frees the model.

        A second call waits, too. In a child of `fork` nothing is freed: the model is the parent's.

        Args:
            wait: Whether to wait; else the last batch frees the model when it is done. A thread of this Engine itself,
                in a callback of a future of `submit`, never waits: it would wait for itself.
        """
        let_go(self._lease, self._submissions, self._process)
        if wait and self._process == os.getpid() and not self._submissions.is_own_thread():
            self._lease.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"{self._path}: an Engine cannot be pickled, copied or sent to another process: its threads and the memory "
            f"of its model stay in this one",
            remedy="send the path, and open an Engine in each process",
        )

    def __repr__(self) -> str:
        source = self._spec.input
        outputs = ", ".join(f"{output.name} {show_shape(output.shape)}" for output in self._spec.outputs)
        variant = self._model.metadata.variant
        name = variant.name if variant else self._spec.kind
        state = ", closed" if self.closed else f" on {self.device}, {self.backend_name}"
        return (
            f"<Engine {str(self._path)!r}: {name}{state}, {source.dtype} {show_shape(source.shape)} {source.layout} → "
            f"{outputs}>"
        )

    def _run(self, batch: NDArray[Any], *, entered: bool = False) -> Arrays:
        """Runs a batch that was checked, and counts it; `entered`: the caller holds the lease."""
        return self._count(self._model.run, batch, images=len(batch), entered=entered)

    def _run_device(self, batch: Any, stream: Any, *, to_host: bool) -> Any:
        shape = read_shape(batch)
        run = functools.partial(self._model.run_device, stream=stream, to_host=to_host)
        return self._count(run, batch, images=shape[0] if shape else 0)

    def _count(self, run: Callable[[Any], _T], batch: Any, *, images: int, entered: bool = False) -> _T:
        if not entered:
            self._enter()
        try:
            start = time.perf_counter()
            outputs = run(batch)
            self._recorder.answer(images, time.perf_counter() - start)
            return outputs
        except RepVGGDeployError as error:
            if not isinstance(error, InputError):
                self._recorder.count("failures")
            raise
        finally:
            if not entered:
                self._lease.release()

    def _enter(self) -> None:
        if not self._lease.acquire():
            raise InputError(
                f"{self._path}: this Engine is closed",
                remedy="call infer inside the with block and before close(), or open another",
            )

    def _leave(self, future: Future[Result]) -> None:
        self._lease.release()
        if future.cancelled():
            self._recorder.count("cancelled")

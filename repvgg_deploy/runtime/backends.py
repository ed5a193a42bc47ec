"""What every backend offers the Engine, and how one is opened. A new backend is one module here and one line in `open_backend`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from ..errors import InputError
from ..files.onnx import is_quantized
from ..specs.values import ModelMetadata, ModelSpec

if TYPE_CHECKING:
    from .tensorrt_phases import PhaseTimes

logger = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
BackendName = Literal["onnxruntime", "openvino", "fastest", "tensorrt", "rtx"]
_PLAN_BACKENDS = ("tensorrt", "rtx")


MOST_THREADS = 1024
"""With some thousands ONNX Runtime answers no more, and says nothing."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an Engine runs; the defaults suit a service.

    Attributes:
        max_batch: Where a model accepts any batch, larger ones run in pieces of this many images: memory grows with it, and past a few tens
            of images speed does not.
        intra_op_threads: Threads that share one batch on the CPU; None for one a physical core. Set it in a container that may use only some
            of the machine's cores, and to 1 where many threads or processes call `infer` at once. At most MOST_THREADS.
        device_id: Which GPU, with `device="cuda"`.
        tf32: Whether FP32 convolutions on the GPU may round their inputs to TF32: faster, and an error of about 1e-3.
        workers: Threads that run what `submit` and `infer_async` hand in.
        max_pending: Batches that may wait for them; one more is refused.
        cuda: Which package calls CUDA for a plan: `bindings` (cuda-bindings) or `pycuda`; None takes the one that is installed, the first before
            the second.
        contexts: How many batches of a plan run at once on its GPU; each takes memory for one largest batch.
        cuda_graphs: Whether a plan's usual batch sizes run as CUDA graphs, which spares the CPU most of its work. While one is captured, in the
            first runs of its size, a wait for the whole device (`torch.cuda.synchronize()`) fails in every other thread: `Engine.warm_up` first.
        require_passport: Whether a plan without its `.plan.json` is refused.
    """

    max_batch: int = 64
    intra_op_threads: int | None = None
    device_id: int = 0
    tf32: bool = False
    workers: int = 2
    max_pending: int = 256
    cuda: Literal["bindings", "pycuda"] | None = None
    contexts: int = 2
    cuda_graphs: bool = True
    require_passport: bool = False

    def __post_init__(self) -> None:
        _require_count("max_batch", self.max_batch, 1)
        if self.intra_op_threads is not None:
            _require_count("intra_op_threads", self.intra_op_threads, 1)
            if self.intra_op_threads > MOST_THREADS:
                message = f"EngineOptions: intra_op_threads: expected at most {MOST_THREADS}, found {self.intra_op_threads}"
                raise InputError(message, remedy="give the number of cores, or None")
        _require_count("device_id", self.device_id, 0)
        _require_count("workers", self.workers, 1)
        _require_count("max_pending", self.max_pending, 1)
        _require_count("contexts", self.contexts, 1)


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"EngineOptions: {name}: expected a whole number of at least {least}, found {value!r}", remedy=f"correct {name}")


class Backend(Protocol):
    """A model loaded on one device. `run` is called from many threads at once; `close` once, when no `run` is under way."""

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
    """A backend that takes any number of images itself, in any memory order, so that copies and computing of the pieces overlap."""

    @property
    def metadata(self) -> ModelMetadata:
        """Of the model."""

    @property
    def min_batch(self) -> int:
        """The smallest batch that runs without padding."""

    @property
    def max_batch(self) -> int:
        """The largest batch that runs without being split."""

    def run_device(self, batch: Any, *, stream: int | None, to_host: bool) -> Any:
        """Runs a batch that lies on the device."""

    def warm_up(self, batch: NDArray[Any]) -> None:
        """Makes ready all that can be made ready."""

    def time_phases(self, batch: NDArray[Any], calls: int) -> tuple[PhaseTimes, ...]:
        """Times the parts of so many runs."""


def open_plan_backend(path: Path, options: EngineOptions, *, backend: BackendName | None) -> SplittingBackend:
    """Loads a TensorRT plan on the GPU of the options.

    Raises:
        InputError: The backend is not one for plans.
        PlanError: The plan is damaged, refused, or made for another GPU or TensorRT.
        CudaError: There is no usable GPU.
        MissingDependencyError: TensorRT or a CUDA package is not installed.
    """
    if backend is not None and backend not in _PLAN_BACKENDS:
        raise InputError(f"{path}: backend={backend!r} does not run plans", remedy='leave backend out, or give "tensorrt" or "rtx"')
    from .tensorrt_backend import TensorRtBackend

    return TensorRtBackend(path, options.device_id, backend, options)


def open_backend(path: Path, spec: ModelSpec, device: Device, options: EngineOptions, *, backend: BackendName | None = None) -> Backend:
    """Loads an ONNX whose metadata was read and checked.

    Args:
        path: The file.
        spec: From its metadata.
        device: Where it is to run.
        options: How.
        backend: With which library; None for ONNX Runtime, as installing a package must not change answers.

    Raises:
        InputError: No such device or backend, or the backend does not run on the device.
        ModelError: The backend refuses the file.
        CudaError: A GPU was asked for and cannot be used.
        MissingDependencyError: The backend's package is not installed.
    """
    if device not in get_args(Device):
        raise InputError(
            f"device: expected one of {', '.join(get_args(Device))}, found {device!r}",
            remedy='give device="cpu" or device="cuda"; choose the GPU with EngineOptions(device_id=…)',
        )
    if _choose(path, device, backend) == "openvino":
        from .openvino_backend import OpenVinoBackend

        return OpenVinoBackend(path, spec, options)
    from .onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, spec, device, options)


def _choose(path: Path, device: Device, backend: BackendName | None) -> Literal["onnxruntime", "openvino"]:
    if backend is not None and backend not in get_args(BackendName):
        raise InputError(
            f"backend: expected one of {', '.join(get_args(BackendName))}, found {backend!r}",
            remedy='leave it out for ONNX Runtime, or give backend="openvino"',
        )
    if backend in _PLAN_BACKENDS:
        raise InputError(
            f"{path}: backend={backend!r} runs plans, and this is an ONNX", remedy=f"build one: repvgg-trt build {path.name}; or leave out backend"
        )
    if backend == "openvino" and device != "cpu":
        raise InputError(f'backend="openvino" runs on the CPU, and device={device!r} was asked for', remedy="leave out one of the two")
    if backend != "fastest":
        return "openvino" if backend == "openvino" else "onnxruntime"
    chosen, reason = _find_fastest(path, device)
    logger.info("%s: the fastest backend here is %s: %s", path, chosen, reason)
    return chosen


def _find_fastest(path: Path, device: Device) -> tuple[Literal["onnxruntime", "openvino"], str]:
    if device != "cpu":
        return "onnxruntime", f"OpenVINO does not run on {device}"
    if not is_quantized(path):
        return "onnxruntime", "the graph is not INT8, and both are equally fast"
    if importlib.util.find_spec("openvino") is None:
        return "onnxruntime", "OpenVINO is not installed"
    return "openvino", "the graph is INT8"

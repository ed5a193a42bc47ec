"""What every backend offers the Engine, and how one is opened. A new backend is one module here and one line in `open_backend`.

Where an Engine runs, as its caller may write it. Standard library only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from numpy.typing import NDArray

from ..errors import InputError
from ..specs.values import ModelMetadata

if TYPE_CHECKING:
    from .results import PhaseTimes

logger = logging.getLogger(__name__)
Device = Literal["cpu", "cuda"]
BackendName = Literal["onnxruntime", "openvino", "fastest", "tensorrt", "rtx"]
MOST_THREADS = 1024
"""With some thousands ONNX Runtime answers no more, and says nothing."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an Engine runs; the defaults suit a service.

    Attributes:
        max_batch: Where a model accepts any batch, larger ones run in pieces of this many images: memory grows with it,
            and past a few tens of images speed does not.
        intra_op_threads: Threads that share one batch on the CPU; None for one a physical core. Set it in a container
            that may use only some of the machine's cores, and to 1 where many threads or processes call `infer` at
            once. At most MOST_THREADS.
        device_id: Which GPU, with `device="cuda"`.
        tf32: Whether FP32 convolutions on the GPU may round their inputs to TF32: faster, and an error of about 1e-3.
        workers: Threads that run what `submit` and `infer_async` hand in.
        max_pending: Batches that may wait for them; one more is refused.
        cuda: Which package calls CUDA for a plan: `bindings` (cuda-bindings) or `pycuda`; None takes the one that is
            installed, the first before the second.
        contexts: How many batches of a plan run at once on its GPU; each takes memory for one largest batch.
        cuda_graphs: Whether a plan's usual batch sizes run as CUDA graphs, which spares the CPU most of its work. While
            one is captured, in the first runs of its size, a wait for the whole device (`torch.cuda.synchronize()`)
            fails in every other thread: `Engine.warm_up` first.
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
                message = (
                    f"EngineOptions: intra_op_threads: expected at most {MOST_THREADS}, found {self.intra_op_threads}"
                )
                raise InputError(message, remedy="give the number of cores, or None")
        _require_count("device_id", self.device_id, 0)
        _require_count("workers", self.workers, 1)
        _require_count("max_pending", self.max_pending, 1)
        _require_count("contexts", self.contexts, 1)


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(
            f"EngineOptions: {name}: expected a whole number of at least {least}, found {value!r}",
            remedy=f"correct {name}",
        )


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


DeviceKind = Literal["cpu", "cuda"]
DeviceChoice: TypeAlias = "str | int | None"


@dataclass(frozen=True, slots=True)
class Place:
    """A device.

    Attributes:
        kind: `cpu` or `cuda`.
        index: Which GPU.
        label: As the Engine names it: `cpu`, `cuda`, `cuda:1`.
    """

    kind: DeviceKind
    index: int
    label: str

    def choose(self, options: EngineOptions) -> EngineOptions:
        """The options with this GPU."""
        return options if options.device_id == self.index else replace(options, device_id=self.index)


def find_place(device: object, options: EngineOptions, *, default: DeviceKind) -> Place:
    """What `Engine(device=…)` means.

    Args:
        device: None for the default; `cpu`; `cuda` for the GPU of the options; `cuda:1` or 1 for that GPU.
        options: Say which GPU `cuda` is.
        default: What fits the file.

    Raises:
        InputError: It is none of these.
    """
    wanted = default if device is None else device
    if wanted == "cpu":
        return Place("cpu", options.device_id, "cpu")
    if wanted == "cuda":
        return Place("cuda", options.device_id, "cuda" if options.device_id == 0 else f"cuda:{options.device_id}")
    number = re.fullmatch(r"cuda:(\d{1,4})", wanted) if isinstance(wanted, str) else None
    index = int(number[1]) if number else wanted
    if isinstance(index, int) and not isinstance(index, bool) and index >= 0:
        return Place("cuda", index, f"cuda:{index}")
    raise InputError(
        f"device: expected cpu, cuda, cuda:N or the number of a GPU, found {device!r}",
        remedy='give device="cpu", device="cuda", or device=1 for the second GPU, as EngineOptions(device_id=1) also '
        "does",
    )

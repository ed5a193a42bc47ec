"""How and where an Engine and its batcher run, as their caller may say it."""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import InputError

BackendName = Literal["onnxruntime", "openvino", "fastest", "tensorrt", "rtx"]
DeviceKind = Literal["cpu", "cuda"]
DeviceChoice: TypeAlias = "str | int | None"
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
        bfloat16: Whether OpenVINO computes in bfloat16 what is not INT8, on a CPU with AMX or AVX512-BF16: several
            times as fast as FP32 there, with eight bits of a number left (RepVGG-A0: 43 dB, and 99.8 % of FP32's best
            classes).
        tf32: Whether FP32 convolutions on the GPU may round their inputs to TF32: faster, and an error of about 1e-3.
        workers: Threads that run what `submit` and `infer_async` hand in.
        max_pending: Batches that may wait for them; one more is refused.
        cuda: Which package calls CUDA for a plan: `bindings` (cuda-bindings) or `pycuda`; None takes the one that is
            installed, the first before the second.
        contexts: How many batches of a plan run at once on its GPU; each takes memory for one largest batch.
        cuda_graphs: Whether a plan's usual batch sizes, and those that are padded to one of them, run as CUDA graphs,
            which spares the CPU most of its work. While one is captured, in the first runs of its size, a wait for the
            whole device (`torch.cuda.synchronize()`) fails in every other thread: `Engine.warm_up` first.
        require_passport: Whether a plan without its `.plan.json` is refused.
        check_finite: Whether float batches are searched for NaN and infinities, once each, when they are handed in.
            False leaves it to the caller, and spares a pass over the numbers: answers to NaN are NaN then.
    """

    max_batch: int = 64
    intra_op_threads: int | None = None
    device_id: int = 0
    bfloat16: bool = False
    tf32: bool = False
    workers: int = 2
    max_pending: int = 256
    cuda: Literal["bindings", "pycuda"] | None = None
    contexts: int = 2
    cuda_graphs: bool = True
    require_passport: bool = False
    check_finite: bool = True

    def __post_init__(self) -> None:
        threads = self.intra_op_threads
        counts = [
            "max_batch",
            "workers",
            "max_pending",
            "contexts",
            *(["intra_op_threads"] if threads is not None else []),
        ]
        for name in counts:
            _require_count(f"EngineOptions: {name}", getattr(self, name), 1)
        _require_count("EngineOptions: device_id", self.device_id, 0)
        if threads is not None and threads > MOST_THREADS:
            raise InputError(
                f"EngineOptions: intra_op_threads: expected at most {MOST_THREADS}, found {threads}",
                remedy="give the number of cores, or None",
            )


@dataclass(frozen=True, slots=True)
class BatcherOptions:
    """How requests become batches.

    Attributes:
        max_batch: Images run together at most; the profile's maximum of a plan, where throughput peaks elsewhere.
        max_delay_ms: How long the first request of a batch waits for others. Under load nothing waits for it: batches
            fill while others run.
        max_queue: Images that may wait; one more request is refused. None: eight batches.
        timeout_ms: A request that waited so long is not run any more; None: for ever. Each request may have its own.
        concurrency: Batches under way at once: 2 where copies and computation of two overlap (a GPU with two contexts),
            1 on a CPU.
    """

    max_batch: int = 32
    max_delay_ms: float = 2.0
    max_queue: int | None = None
    timeout_ms: float | None = None
    concurrency: int = 1

    def __post_init__(self) -> None:
        _require_count("batcher: max_batch", self.max_batch, 1)
        _require_count("batcher: concurrency", self.concurrency, 1)
        if self.max_queue is not None:
            _require_count("batcher: max_queue", self.max_queue, self.max_batch, meaning="max_batch, ")
        delay, timeout = self.max_delay_ms, self.timeout_ms
        if not _is_number(delay) or delay < 0:
            raise _wrong("max_delay_ms", delay, "0 or more milliseconds")
        if timeout is not None and (not _is_number(timeout) or timeout <= 0):
            raise _wrong("timeout_ms", timeout, "a positive number")

    @property
    def queue_images(self) -> int:
        """`max_queue`, or eight batches."""
        return self.max_queue if self.max_queue is not None else 8 * self.max_batch


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: object, expected: str) -> InputError:
    return InputError(f"batcher: {name}: expected {expected}, found {reprlib.repr(value)}", remedy=f"correct {name}")


def _require_count(name: str, value: object, least: int, *, meaning: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(
            f"{name}: expected a whole number of at least {meaning}{least}, found {reprlib.repr(value)}",
            remedy=f"correct {name.rpartition(': ')[2]}",
        )


def find_device(device: object, options: EngineOptions, *, default: DeviceKind) -> tuple[DeviceKind, int, str]:
    """What `Engine(device=…)` means: `cpu` or `cuda`, which GPU, and the name that the Engine gives it (`cuda:1`).

    None is the default, which fits the file; `cuda` the GPU of the options; `cuda:1` or 1 that GPU.

    Raises:
        InputError: It is none of these, nor `cpu`.
    """
    wanted = default if device is None else device
    if wanted == "cpu":
        return "cpu", options.device_id, "cpu"
    if wanted == "cuda":
        return "cuda", options.device_id, "cuda" if options.device_id == 0 else f"cuda:{options.device_id}"
    number = re.fullmatch(r"cuda:(\d{1,4})", wanted) if isinstance(wanted, str) else None
    index = int(number[1]) if number else wanted
    if isinstance(index, int) and not isinstance(index, bool) and index >= 0:
        return "cuda", index, f"cuda:{index}"
    raise InputError(
        f"device: expected cpu, cuda, cuda:N or the number of a GPU, found {reprlib.repr(device)}",
        remedy='give device="cpu", device="cuda", or device=1 for the second GPU, as EngineOptions(device_id=1) also '
        "does",
    )

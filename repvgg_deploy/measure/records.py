"""The file that `repvgg-trt bench --out` writes and `repvgg-trt advise --measured` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ArtifactError, InputError
from ..files.output import PendingOutput, write_text
from ..specs import codec
from ..specs.values import Precision
from .roofline import Ceiling, LayerCost
from .times import Latency

BENCHMARK_SCHEMA: Literal[1] = 1
Way = Literal["engine", "onnxruntime", "torch"]
_LARGEST_BYTES = 64 << 20
_REMEDY = "give a file that repvgg-trt bench --out wrote, or measure again"


@dataclass(frozen=True, slots=True)
class Device:
    """What was measured on.

    Attributes:
        kind: Processor or GPU.
        name: For people.
        cpu_threads: CPU threads that share one batch; None for the backend's default, or on a GPU.
        driver: The GPU's driver; None where it is not known.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    cpu_threads: int | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True)
class Phases:
    """Medians of the parts of one call, by CUDA events; measured apart, without CUDA graphs, one call at a time.

    Attributes:
        to_device_ms: Copy of the input from page-locked memory.
        compute_ms: The network.
        to_host_ms: Copies of the outputs.
        enqueue_ms: Time of the CPU to hand the network to the GPU.
        calls: How many were measured.
    """

    to_device_ms: float
    compute_ms: float
    to_host_ms: float
    enqueue_ms: float
    calls: int


@dataclass(frozen=True, slots=True)
class Point:
    """One way of running one model at one batch size.

    Attributes:
        way: `engine`, or what it is compared with.
        backend: Library, version and where it runs.
        batch: Images of one call.
        clients: Threads that called at once.
        latency: Of one call.
        images_per_second: Of all clients together.
        phases: None where the backend does not tell them apart.
        floor_ms: The least time of a batch by the roofline; None where it is not known.
        share: floor_ms by the time that the network took: its computing where phases are known, else the median of one
            client's calls, or a batch's part of the time of several clients.
        warnings: Why the times should not be trusted.
    """

    way: Way
    backend: str
    batch: int
    clients: int
    latency: Latency
    images_per_second: float
    phases: Phases | None = None
    floor_ms: float | None = None
    share: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model file.

    Attributes:
        sha256: Digest of its bytes.
        variant: Published name of its architecture, or what it calls itself; None where it is not known.
        published: Whether the architecture is a published one.
        classes: Width of the classifier; None where it is not known.
        precision: The lowest that its layers compute in; None for a plan without passport.
        image_size: (height, width) of the images.
        layers: What each layer costs; empty where the architecture is not known.
        notes: What could not be measured, and why.
    """

    file: str
    sha256: str
    variant: str | None
    published: bool
    classes: int | None
    precision: Precision | None
    image_size: tuple[int, int]
    points: tuple[Point, ...]
    layers: tuple[LayerCost, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One run.

    Attributes:
        device: What was measured on.
        versions: By package that took part.
        duration_s: Seconds of each point.
        clients: Threads that called at once.
        ceiling: What the device can do at most; None where it is not known.
    """

    schema: Literal[1]
    device: Device
    versions: dict[str, str]
    duration_s: float
    clients: int
    ceiling: Ceiling | None
    models: tuple[ModelResult, ...]


def write_benchmark(path: Path, result: Benchmark, *, force: bool = False) -> PendingOutput:
    """Writes the file whole or not at all.

    Raises:
        ArtifactError: It cannot be written, or another stands there and `force` is not given.
    """
    return write_text(path, codec.dumps(result) + "\n", force=force)


def require_free(path: Path, *, force: bool) -> None:
    """Refuses before the work a file that stands there already: no two measurements are equal.

    Raises:
        ArtifactError: It exists, and `force` is not given.
    """
    if path.exists() and not force:
        raise ArtifactError(
            f"{path}: exists, and a new measurement would replace it",
            remedy="give --force to replace it, or another --out",
        )


def read_benchmark(path: Path) -> Benchmark:
    """Reads a file of `write_benchmark`.

    Raises:
        InputError: It cannot be read, is no benchmark, is of another schema, or holds what no measurement gives.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
        if len(data) > _LARGEST_BYTES:
            raise InputError(f"{path}: not a benchmark: larger than {_LARGEST_BYTES >> 20} MiB", remedy=_REMEDY)
        result = codec.loads(Benchmark, data.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", remedy=_REMEDY) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a benchmark: not UTF-8", remedy=_REMEDY) from error
    except InputError as error:
        raise InputError(f"{path}: not a benchmark of this version: {error.message}", remedy=_REMEDY) from error
    points = [point for model in result.models for point in model.points]
    if any(min(point.batch, point.clients, point.latency.calls) < 1 or not _is_ordered(point) for point in points):
        raise InputError(f"{path}: holds latencies that no measurement gives", remedy=_REMEDY)
    return result


def _is_ordered(point: Point) -> bool:
    found = point.latency
    times = (found.min_ms, found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms)
    return found.min_ms > 0 and point.images_per_second > 0 and list(times) == sorted(times)

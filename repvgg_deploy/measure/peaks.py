"""What a device can do at most: a CPU is measured, GPUs are looked up in `data/gpus.toml`, which names its sources.

The CPU runs large matrix products in float32 and in uint8 · int8, and large copies. The products run in ONNX Runtime
with as many threads as compute at once in what is to be judged, because that library's kernels are what a CPU engine is
made of. Another one's might be faster still, so a share of this peak is a share of what ONNX Runtime reaches at its
best.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import wire
from ..images.ahead import count_cores
from ..specs import codec
from .roofline import Ceiling

logger = logging.getLogger(__name__)
_SIZE = 1024  # rows, columns and depth: some ms a product on one core, so that a busy machine leaves one undisturbed
_COPY_BYTES = 256 << 20  # larger than any last cache that a usual share of a server's CPU has
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # TensorProto.DataType
_OPSET = 13
_IR_VERSION = 8
_LARGEST_DIFFERENCE = 0.1


def measure_cpu(*, threads: int | None = None, seconds: float = 1.0) -> Ceiling | None:
    """The peak of this CPU; None where ONNX Runtime is not installed.

    Args:
        threads: CPU threads that share one product; None for ONNX Runtime's default.
        seconds: For each of the three measurements.
    """
    try:
        import onnxruntime
    except ImportError as error:
        logger.warning(
            "the peak of this CPU is not measured: it takes ONNX Runtime, which cannot be imported (%s)", error
        )
        return None
    products = {
        precision: _measure_product(onnxruntime, integer=precision == "int8", threads=threads, seconds=seconds)
        for precision in ("fp32", "int8")
    }
    products["fp16"] = products["fp32"]  # half precision is computed in float32 on a CPU
    return Ceiling(
        cpu_name(),
        products,
        _measure_copy(threads or count_cores(), seconds),
        f"measured on the spot: matrix products of {_SIZE}³ in ONNX Runtime {onnxruntime.__version__}, copies of "
        f"{_COPY_BYTES >> 20} MiB",
        measured=True,
    )


def cpu_name() -> str:
    """The processor and its cores that this process may use, such as `AMD EPYC 7763, 2 cores`."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        logger.debug("there is no /proc/cpuinfo")
    cores = count_cores()
    return f"{name}, {cores} core{'s' if cores > 1 else ''}"


def _measure_product(runtime: Any, *, integer: bool, threads: int | None, seconds: float) -> float:
    """Operations a second of the fastest product."""
    random = np.random.default_rng(0)
    if integer:
        left: NDArray[Any] = random.integers(0, 255, (_SIZE, _SIZE), np.uint8)
        right: NDArray[Any] = random.integers(-127, 127, (_SIZE, _SIZE), np.int8)
    else:
        left, right = (random.standard_normal((_SIZE, _SIZE), np.float32) for _ in range(2))
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        make_product(right, integer=integer), sess_options=options, providers=["CPUExecutionProvider"]
    )
    return 2 * _SIZE**3 / _fastest(lambda: session.run(None, {"left": left}), seconds)


def make_product(right: NDArray[Any], *, integer: bool) -> bytes:
    """An ONNX that multiplies its input by a constant, written without the onnx package.

    Args:
        right: float32 or int8 (n, n).
        integer: uint8 by int8, summed in int32, in place of float32.
    """
    size = right.shape[0]
    node = wire.bytes_field(1, b"left") + wire.bytes_field(1, b"right") + wire.bytes_field(2, b"product")
    node += wire.bytes_field(4, b"MatMulInteger" if integer else b"MatMul")
    dims = b"".join(wire.varint(1 << 3) + wire.varint(size) for _ in range(2))
    weight = dims + wire.varint(2 << 3) + wire.varint(_INT8 if integer else _FLOAT)
    weight += wire.bytes_field(8, b"right") + wire.bytes_field(9, right.tobytes())
    graph = wire.bytes_field(1, node) + wire.bytes_field(2, b"product") + wire.bytes_field(5, weight)
    graph += wire.bytes_field(11, _value(b"left", _UINT8 if integer else _FLOAT, size))
    graph += wire.bytes_field(12, _value(b"product", _INT32 if integer else _FLOAT, size))
    opset = wire.bytes_field(8, wire.varint(2 << 3) + wire.varint(_OPSET))
    return wire.varint(1 << 3) + wire.varint(_IR_VERSION) + wire.bytes_field(7, graph) + opset


def _value(name: bytes, kind: int, size: int) -> bytes:
    """A ValueInfoProto of a square matrix."""
    dimension = wire.bytes_field(1, wire.varint(1 << 3) + wire.varint(size))
    tensor = wire.varint(1 << 3) + wire.varint(kind) + wire.bytes_field(2, 2 * dimension)
    return wire.bytes_field(1, name) + wire.bytes_field(2, wire.bytes_field(1, tensor))


def _measure_copy(threads: int, seconds: float) -> float:
    """Bytes a second, read and written, of the fastest copy that all threads share."""
    source = np.ones(_COPY_BYTES // threads * threads, np.uint8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def copy(part: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
        np.copyto(part[1], part[0])  # without the interpreter's lock

    with ThreadPoolExecutor(threads) as pool:
        return 2 * source.nbytes / _fastest(lambda: list(pool.map(copy, parts)), seconds)


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call: a peak is what nothing disturbed."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def combine(first: Ceiling | None, second: Ceiling | None) -> Ceiling | None:
    """The higher of two measurements of one device, number by number: what disturbs one only ever lowers it."""
    if first is None or second is None:
        return first or second
    rates, others = first.operations_per_second, second.operations_per_second
    if max(rates["fp32"], others["fp32"]) > (1 + _LARGEST_DIFFERENCE) * min(rates["fp32"], others["fp32"]):
        logger.warning(
            "the CPU's peak was %s Gop/s in fp32 before and after: other programs run here; the higher counts, and may "
            "be too low",
            f"{rates['fp32'] / 1e9:,.0f} and {others['fp32'] / 1e9:,.0f}",
        )
    return dataclasses.replace(
        first,
        operations_per_second={name: max(value, others[name]) for name, value in rates.items()},
        bytes_per_second=max(first.bytes_per_second, second.bytes_per_second),
    )


@dataclass(frozen=True, slots=True)
class GpuPeaks:
    """One GPU; None where a number is not known or there is no such unit.

    Attributes:
        names: The first for people; the others as the driver gives them.
        fp32: 1e12 operations a second on the CUDA cores.
        bandwidth: 1e9 bytes a second.
        source: Where the numbers come from.
        tf32: 1e12 operations a second on the tensor cores, dense.
        fp16: The same, with sums in float32.
        int8: The same.
    """

    names: tuple[str, ...]
    fp32: float
    bandwidth: float
    source: str
    tf32: float | None = None
    fp16: float | None = None
    int8: float | None = None

    def ceiling(self, *, tf32: bool = False) -> Ceiling:
        """As a roofline; `tf32`: FP32 convolutions may round their inputs to TF32."""
        first = self.tf32 if tf32 and self.tf32 is not None else self.fp32
        known = {"fp32": first, "fp16": self.fp16, "int8": self.int8}
        operations = {name: 1e12 * value for name, value in known.items() if value is not None}
        return Ceiling(self.names[0], operations, 1e9 * self.bandwidth, self.source, measured=False)


@functools.cache
def load_gpus() -> tuple[GpuPeaks, ...]:
    """All GPUs of the table, in its order."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = resources.files("repvgg_deploy").joinpath("data/gpus.toml").read_text(encoding="utf-8")
    return tuple(codec.decode(GpuPeaks, entry) for entry in tomllib.loads(text)["gpu"])


def look_up_gpu(name: str) -> GpuPeaks | None:
    """The GPU of a name as a person or the driver writes it (`t4`, `NVIDIA A100-SXM4-80GB`), or None."""
    wanted = _squeeze(name)
    return next((gpu for gpu in load_gpus() if wanted in {_squeeze(known) for known in gpu.names}), None)


def find_gpu_peaks(name: str) -> GpuPeaks:
    """The GPU of a name, as `look_up_gpu`.

    Raises:
        InputError: No GPU of that name is in the table.
    """
    found = look_up_gpu(name)
    if found is None:
        known = ", ".join(gpu.names[0] for gpu in load_gpus())
        raise InputError(
            f"the peaks of a GPU {name!r} are not known",
            remedy=f"give one of {known}, or measure with repvgg-trt bench and --measured",
        )
    return found


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))

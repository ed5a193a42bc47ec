"""What is asked for and what is served, Triton's names of data types, and which of its containers has which TensorRT.

A plan runs on the TensorRT that built it, so the container must have that very version. Releases whose TensorRT could
be confirmed are listed; for every other version the user is told where NVIDIA publishes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from ..specs.values import ModelSpec, TensorSpec

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """How a model is to be served.

    Attributes:
        name: The model's name in Triton; None takes the file's.
        version: Number of the version folder; None: one more than the highest, or the highest if that holds the same
            files.
        max_batch: Largest batch that Triton may make; None: the plan's own, 32 for an ONNX.
        instances: Copies of the model that run at once, for each GPU.
        max_queue_delay_us: How long a request may wait for company.
        preferred_batch: Batch sizes that are sent off at once; None: the plan's usual and largest, none for an ONNX.
        max_queue: Requests that may wait before further ones are refused; None: eight of the largest batches.
        queue_timeout_us: How long a request may wait in all before it is refused.
        cuda_graphs: Let Triton's TensorRT backend capture CUDA graphs.
        ensemble: `jpeg` adds a model that decodes and one that takes JPEG files.
        written_by: Who writes it, kept in the parameters of each of the models: `find_stale` finds only what carries
            the same name.
    """

    name: str | None = None
    version: int | None = None
    max_batch: int | None = None
    instances: int = 1
    max_queue_delay_us: int = 1000
    preferred_batch: tuple[int, ...] | None = None
    max_queue: int | None = None
    queue_timeout_us: int = 1_000_000
    cuda_graphs: bool = False
    ensemble: Literal["jpeg"] | None = None
    written_by: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            require_name(self.name)
        counts = {name: getattr(self, name) for name in ("version", "max_batch", "instances", "max_queue")}
        delays = {name: getattr(self, name) for name in ("max_queue_delay_us", "queue_timeout_us")}
        wrong = [f"{name} {value}" for name, value in counts.items() if value is not None and value < 1]
        wrong += [f"{name} {value}" for name, value in delays.items() if value < 0]
        wrong += [f"preferred_batch {value}" for value in self.preferred_batch or () if value < 1]
        if wrong:
            raise InputError(
                f"expected at least 1 (a delay: at least 0), found {', '.join(wrong)}", remedy="give a larger number"
            )


@dataclass(frozen=True, slots=True)
class ServedFile:
    """One file of a version folder: its name there, such as `model.plan`, and where it is copied from, or its bytes."""

    name: str
    source: Path | bytes


@dataclass(frozen=True, slots=True)
class Servable:
    """A model as Triton gets it: all that the configuration is made of.

    Attributes:
        name: Its name in Triton.
        platform: What Triton runs it with.
        spec: Inputs, outputs and labels.
        files: What the version folder holds.
        max_batch: Largest batch that the model takes; None for any.
        opt_batch: The batch that it is tuned for; None where it is tuned for none.
        opt_size: (height, width) in pixels that it is tuned for, where it takes several.
        profile_batches: Batches that a plan has an optimization profile for each; empty where it has one for all.
        capability_files: File by compute capability, where there are several GPU types; else empty.
        provenance: What goes into `parameters`, by name.
    """

    name: str
    platform: Literal["tensorrt_plan", "onnxruntime_onnx"]
    spec: ModelSpec
    files: tuple[ServedFile, ...]
    max_batch: int | None
    opt_batch: int | None
    capability_files: dict[str, str]
    provenance: dict[str, str]
    opt_size: tuple[int, int] | None = None
    profile_batches: tuple[int, ...] = ()

    @property
    def batches(self) -> bool:
        """Whether Triton may put requests together: every tensor begins with the same dynamic dimension."""
        first = self.spec.input.shape[0] if self.spec.input.shape else 0
        return isinstance(first, str) and all(tensor.shape and tensor.shape[0] == first for tensor in self.spec.outputs)


def require_name(name: str) -> str:
    """A name that Triton's URLs and every file system take.

    Raises:
        InputError: It is another.
    """
    if not _NAME.fullmatch(name) or len(name) > 128:
        raise InputError(
            f"model name {name!r}: expected letters, digits, '_', '-' and '.', no more than 128",
            remedy="give another with --name",
        )
    return name


DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int32": "INT32", "int64": "INT64"}
"""The protocol's name of each NumPy type; Triton's configuration has `TYPE_` before it."""


def wire_shape(tensor: TensorSpec, *, batched: bool = False) -> list[int]:
    """A shape as Triton writes it: -1 for a dynamic size; `batched`: without the first dimension, which Triton adds."""
    shape = tensor.shape[1:] if batched else tensor.shape
    return [size if isinstance(size, int) else -1 for size in shape]


CONTAINERS = {
    "22.11": "8.5.1",  # release notes of Triton
    "23.04": "8.6.1.2",  # issue 5812
    "23.05": "8.6.1.2",  # issue 5975
    "24.02": "8.6.3",  # issues 6959 and 7221
    "24.03": "8.6.3",  # issue 7221
    "24.04": "8.6.3",  # issue 7221
    "24.05": "10.0.1.6",  # issue 7374
    "24.08": "10.3.0.26",  # release notes of the containers that share its base image, as those below
    "24.10": "10.5",
    "24.12": "10.7.0.23",
    "25.06": "10.11.0.33",
}
"""TensorRT by release of the container `RELEASE-py3`, each with its source. Not complete: no others could be confirmed.

Issues are those of https://github.com/triton-inference-server/server/issues, whose reporters saw the version in that
very container. The `trtllm` containers of the same releases hold other versions (docs/introduction/compatibility.md
there), and so may the TensorRT containers (issue 5975).
"""
_MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"


def find_container(tensorrt_version: str) -> str | None:
    """The newest listed image with this TensorRT, such as `nvcr.io/nvidia/tritonserver:24.12-py3`, or None.

    Args:
        tensorrt_version: Such as `10.7.0.23`. Where a release is only known as `10.5`, the numbers that are known must
            agree. The Python packages of 10.0 to 10.7 call themselves `10.7.0`, and each was built once: the three
            numbers are enough.
    """
    wanted = tensorrt_version.split(".")
    for release, version in sorted(CONTAINERS.items(), reverse=True):
        known = version.split(".")
        if wanted[: len(known)] == known or (len(wanted) == 3 and wanted[0] == "10" and known[:3] == wanted):
            return f"nvcr.io/nvidia/tritonserver:{release}-py3"
    return None


def describe_container(tensorrt_version: str) -> str:
    """The image to use, or how to find it."""
    found = find_container(tensorrt_version)
    return found or f"the tritonserver image with TensorRT {tensorrt_version} (not listed here; see {_MATRIX})"

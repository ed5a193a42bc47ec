"""What this machine has, which commands work on it, and what installs the rest: `repvgg-trt doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..build.library import BackendChoice, open_library
from ..errors import CudaError, InputError, MissingDependencyError, RepVGGDeployError, say_install
from ..files.cache import cache_folder
from ..runtime.cpu.processor import read_features
from ..runtime.cuda.opening import open_cuda
from .peaks import cpu_name

_FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI (fast INT8)": ("avx512_vnni", "avx_vnni"),
    "AMX INT8": ("amx_int8",),
    "bfloat16": ("amx_bf16", "avx512_bf16"),
}
_PACKAGES = (
    "numpy", "torch", "onnx", "onnxscript", "onnxsim", "safetensors", "onnxruntime", "onnxruntime-gpu", "openvino",
    "pillow", "tensorrt", "tensorrt-lean", "tensorrt-rtx", "tensorrt-rtx-cu13", "cuda-bindings", "pycuda", "protobuf",
    "tritonclient", "fastapi", "uvicorn", "prometheus-client", "matplotlib", "pyarrow", "ray", "huggingface-hub",
    "shtab",
)  # fmt: skip
_NEEDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("repvgg-export", ("torch", "onnx", "onnxscript", "onnxsim", "safetensors", "onnxruntime", "PIL"), "export,cpu"),
    ("fold, quantize", ("onnx", "onnxruntime", "PIL"), "quantize,cpu"),
    ("infer, eval, compare, bench of an ONNX", ("onnxruntime", "PIL"), "cpu"),
    ("the fastest INT8 on a CPU", ("openvino",), "openvino"),
    ("infer --out x.parquet", ("pyarrow",), "parquet"),
    ("repvgg-export of a name on the hub", ("huggingface_hub", "torch", "onnxruntime"), "hub,export,cpu"),
    ("scoring on Ray", ("ray", "pyarrow", "onnxruntime", "PIL"), "ray,cpu"),
    ("triton", ("google.protobuf", "tritonclient"), "serving"),
    ("the example service", ("fastapi", "uvicorn", "prometheus_client", "onnxruntime", "PIL"), "service,cpu"),
    ("--plot", ("matplotlib",), "plot"),
    ("--print-completion", ("shtab",), "completion"),
)
"""What a person does, the modules that it needs, and the extras that bring them."""
_REINSTALL = "pip install --force-reinstall onnxruntime, or onnxruntime-gpu where that is listed"


@dataclass(frozen=True, slots=True)
class Ability:
    """Something that one does with this project.

    Attributes:
        name: Commands, or half a sentence.
        missing: Why it does not work here; empty where it does.
        remedy: What helps; empty where it works.
    """

    name: str
    missing: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU and its driver, as the driver tells."""

    name: str
    compute_capability: str
    driver_version: str
    cuda_version: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class EnvironmentReport:
    """What was found.

    Attributes:
        version: Of this project.
        python: Version and where it runs from.
        system: Operating system and machine.
        processor: Its name and cores.
        features: Those of the processor that make a model faster.
        gpus: As the driver lists them.
        no_gpu: Why there is none; empty where there is one.
        providers: What ONNX Runtime can run on; empty where it is not installed.
        packages: Versions of what is installed, by the name of the distribution.
        cache: The folder of plans and timings, and whether it can be written to.
        abilities: What works here and what does not.
        problems: What is installed and wrong.
    """

    version: str
    python: str
    system: str
    processor: str
    features: tuple[str, ...]
    gpus: tuple[GpuFacts, ...]
    no_gpu: str
    providers: tuple[str, ...]
    packages: dict[str, str]
    cache: str
    abilities: tuple[Ability, ...]
    problems: tuple[str, ...]


def examine() -> EnvironmentReport:
    """Looks at this machine; nothing is built, run or installed.

    Whether a package is there is looked up; ONNX Runtime is the one that is loaded.
    """
    packages = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    gpus, no_gpu, remedy = _find_gpus()
    providers, broken = _find_providers()
    problems = (f"onnxruntime {broken}",) if broken else ()
    if {"onnxruntime", "onnxruntime-gpu"} <= set(packages):
        problems = (
            *problems,
            "onnxruntime and onnxruntime-gpu are both installed and share one folder: uninstall both, then install one",
        )
    features = read_features()
    known = tuple(name for name, flags in _FEATURES.items() if features is not None and features & set(flags))
    abilities = (
        *(_judge(name, modules, extras, broken) for name, modules, extras in _NEEDS),
        *_judge_builds(),
        *_judge_gpus(gpus, providers, no_gpu, remedy),
    )
    return EnvironmentReport(
        __version__,
        f"{platform.python_version()} ({sys.executable})",
        f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu_name(),
        known,
        gpus,
        no_gpu,
        providers,
        packages,
        _describe_cache(),
        abilities,
        problems,
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_gpus() -> tuple[tuple[GpuFacts, ...], str, str]:
    """The GPUs, or why there is none and what helps."""
    driver = "install NVIDIA's driver on a machine with its GPU; nvidia-smi must list it"
    try:
        port = open_cuda(None)
        found = [port.describe_device(index) for index in range(port.count_devices())]
    except (CudaError, MissingDependencyError) as error:
        return (), error.message, error.remedy
    facts = tuple(
        GpuFacts(info.name, info.compute_capability, info.driver_version, info.cuda_version, info.memory_bytes)
        for info in found
    )
    return (facts, "", "") if facts else ((), "the driver lists no GPU", driver)


def _find_providers() -> tuple[tuple[str, ...], str]:
    """What ONNX Runtime can run on, or what is wrong with it; nothing of either where it is not installed."""
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers()), ""
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            return (), ""
        reason: Exception = error
    except Exception as error:  # noqa: BLE001 - a damaged installation raises anything, and is what is looked for
        reason = error
    return (), f"is installed but cannot be imported: {' '.join(str(reason).split())}"


def _judge(name: str, modules: Sequence[str], extras: str, broken: str) -> Ability:
    missing = [module.partition(".")[0] for module in modules if not _is_there(module)]
    if missing:
        return Ability(name, f"{', '.join(missing)} not installed", say_install(extras))
    if broken and "onnxruntime" in modules:
        return Ability(name, f"onnxruntime {broken}", _REINSTALL)
    return Ability(name)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _judge_builds() -> Iterator[Ability]:
    names: tuple[tuple[BackendChoice, str], ...] = (
        ("tensorrt", "build with TensorRT"), ("rtx", "build with TensorRT-RTX"),
    )  # fmt: skip
    for backend, name in names:
        try:
            library = open_library(backend)
        except RepVGGDeployError as error:
            yield Ability(name, error.message.removeprefix("no plan can be built: "), error.remedy)
        else:
            yield Ability(f"{name} ({library.version})")


def _judge_gpus(gpus: Sequence[GpuFacts], providers: Sequence[str], no_gpu: str, remedy: str) -> Iterator[Ability]:
    plan, model = "run a plan", "Engine(…, device='cuda') of an ONNX"
    if not gpus:
        yield Ability(f"{plan}; {model}", no_gpu, remedy)
        return
    yield Ability(plan)
    known = "CUDAExecutionProvider" in providers
    yield Ability(model) if known else Ability(model, "this ONNX Runtime knows no CUDA", say_install("gpu"))


def _describe_cache() -> str:
    try:
        folder = cache_folder()
    except InputError as error:
        return error.message
    place = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    writable = os.access(place, os.W_OK)
    return f"{folder} ({'can be written to' if writable else 'cannot be written to'})"

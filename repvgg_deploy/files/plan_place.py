"""Where a plan can run: judged from its passport, without a GPU, and before TensorRT sees a byte.

First what building and running share of TensorRT: its flavours, its import (when it is asked for) and its log. Then the
compute capabilities of GPUs by name, for a verdict on a GPU that is not here. Then the verdict.

Sources: the support matrix and the engine compatibility pages of TensorRT 8.6 to 11.4
(https://docs.nvidia.com/deeplearning/tensorrt) and of TensorRT-RTX (https://docs.nvidia.com/deeplearning/tensorrt-rtx);
NVIDIA's lists of GPUs, https://developer.nvidia.com/cuda-gpus and https://developer.nvidia.com/cuda/gpus/legacy.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CudaError, InputError, MissingDependencyError, say_install
from ..specs.values import PlanPassport

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL: dict[Flavour, str] = {"tensorrt": say_install("tensorrt"), "tensorrt_rtx": say_install("rtx")}
BROKEN_VERSION = (10, 2)
LEAN = "tensorrt_lean"
"""The module of TensorRT's lean runtime: it runs version-compatible plans, and builds none."""
SLOW_INT8 = frozenset({"10.3"})
"""Compute capabilities that hardly have INT8: B300 and GB300, with 0.15 POPS beside B200's 4.5, and FP8 in its place.

Source: NVIDIA's data sheets of HGX B200 and B300.
"""
_QUOTED = 5
_QUOTED_CHARACTERS = 400


def import_tensorrt(module: str, name: str, *, remedy: str) -> Any:
    """Imports a module of TensorRT; None where it is not installed.

    Args:
        module: Such as `tensorrt_rtx`.
        name: For people.
        remedy: Where it is installed and does not load.

    Raises:
        MissingDependencyError: It is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return None
        # Ctrl-C, which its C++ makes an ImportError of.
        if error.__cause__ is not None and not isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        said = " ".join(str(error).split())
        raise MissingDependencyError(f"{name} is installed but cannot be imported: {said}", remedy=remedy) from error


@dataclass(frozen=True, slots=True)
class Library:
    """An imported TensorRT or TensorRT-RTX.

    Attributes:
        flavour: Which of the two.
        trt: The module.
        version: Such as `10.9.0.34`.
        is_lean: Whether it is TensorRT's lean runtime, which builds no plans and runs version-compatible ones only.
    """

    flavour: Flavour
    trt: Any
    version: str
    is_lean: bool = False

    @property
    def name(self) -> str:
        """For people: `TensorRT 10.9.0.34`."""
        return f"{name_library(self.flavour, self.is_lean)} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.flavour == "tensorrt_rtx"

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor, *_ = (*parse_version(self.version), 0, 0)
        return major, minor


def name_library(flavour: Flavour, is_lean: bool = False) -> str:
    """What people call it, without its version."""
    return f"{FLAVOURS[flavour]} (lean runtime)" if is_lean else FLAVOURS[flavour]


def judge_library(library: Library) -> Incompatible | None:
    """Why plans are neither built nor run with this version; None where they are."""
    number = library.number
    if library.is_rtx:
        if number >= (1, 0):
            return None
        return Incompatible(f"{library.name} is not supported: expected TensorRT-RTX 1.x", INSTALL["tensorrt_rtx"])
    if number < (8, 5) or number[0] == 9:
        reason = f"{library.name} is not supported: expected 8.5, 8.6, 10.x or 11.x"
    elif number == BROKEN_VERSION:
        reason = f"{library.name} is known to be broken"
    else:
        return None
    return Incompatible(reason, "install TensorRT 10.3 or later")


def is_installed(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    return sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None


def make_trt_logger(trt: Any, hear: Callable[[str, str], None]) -> Any:
    """An object of TensorRT's logger class.

    Args:
        trt: The module.
        hear: Called with the name of the severity (`ERROR`; internal errors too) and the message, from TensorRT's own
            threads; not with VERBOSE. What it raises would end the process.
    """
    severity = trt.ILogger.Severity
    names = {
        severity.INTERNAL_ERROR: "ERROR",
        severity.ERROR: "ERROR",
        severity.WARNING: "WARNING",
        severity.INFO: "INFO",
    }

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            name = names.get(level)
            if name is not None:
                # TensorRT 8.6 and 10 say it as a warning, and then give no object.
                hear("ERROR" if "CUDA initialization failure" in message else name, message)

    return TrtLogger()


def start_tensorrt(
    library: Library,
    kind: Literal["builder", "runtime"],
    make: Callable[[], Any],
    *,
    lines: Callable[[], Iterable[str]],
    on: str,
) -> Any:
    """One of the two objects with which TensorRT begins.

    A TensorRT that cannot start CUDA (the driver is older than its CUDA, say) gives no object, or one that ends the
    process when it is used or let go (the lean runtime of 10.16 and 11.4): that one is kept for ever.

    Args:
        library: TensorRT.
        kind: Which of them, for the message.
        make: Makes it with a logger from `make_trt_logger`.
        lines: Gives the errors that were logged meanwhile.
        on: The driver, from `name_driver`.

    Raises:
        CudaError: TensorRT cannot use the GPU.
    """
    found, cause = None, None
    try:
        found = make()
    except (TypeError, RuntimeError) as error:  # how the bindings say that C++ gave no object
        cause = error
    said = list(lines())
    needs_gpu = kind == "runtime" or not library.is_rtx
    if found is not None and not (needs_gpu and any("cuda" in line.lower() for line in said)):
        return found
    if found is not None:
        for kept in (found, make):  # the latter refers to its logger
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    raise CudaError(
        f"{library.name} cannot start its {kind} on the GPU with {on}:{quote(said)}",
        remedy="update the NVIDIA driver, or install a TensorRT that was made for the driver's CUDA; nvidia-smi shows "
        "both" + ("" if kind == "runtime" or library.is_rtx else "; --backend rtx builds without a GPU"),
    ) from cause


def name_driver(version: str | None, cuda_version: str | None) -> str:
    """For people: `the NVIDIA driver 580.95.05 (CUDA 13.0)`, as far as it is known."""
    cuda = f" (CUDA {cuda_version})" if cuda_version else ""
    return f"the NVIDIA driver {version}{cuda}" if version else f"the NVIDIA driver{cuda}"


def quote(lines: Iterable[str]) -> str:
    """The first lines as they may stand in a message: without repetitions, each on a line of its own."""
    different = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    shown = [
        line if len(line) <= _QUOTED_CHARACTERS else f"{line[:_QUOTED_CHARACTERS]}…" for line in different[:_QUOTED]
    ]
    more = [f"and {len(different) - _QUOTED} more"] if len(different) > _QUOTED else []
    return "".join(f"\n    {line}" for line in [*shown, *more]) or "\n    (it logged nothing)"


_NAMES: dict[str, tuple[str, ...]] = {
    "7.0": ("V100", "TITAN V", "Quadro GV100"),
    "7.2": ("Jetson AGX Xavier", "Jetson Xavier NX", "Xavier"),
    "7.5": ("T4", "TITAN RTX", "Quadro RTX 4000", "Quadro RTX 5000", "Quadro RTX 6000", "Quadro RTX 8000", "T1000",
            "RTX 2060", "RTX 2070", "RTX 2080", "RTX 2080 Ti", "GTX 1650", "GTX 1660", "GTX 1660 Ti"),
    "8.0": ("A100", "A30"),
    "8.6": ("A10", "A10G", "A16", "A2", "A40", "RTX A2000", "RTX A4000", "RTX A4500", "RTX A5000", "RTX A6000",
            "RTX 3050", "RTX 3060", "RTX 3060 Ti", "RTX 3070", "RTX 3070 Ti", "RTX 3080", "RTX 3080 Ti", "RTX 3090",
            "RTX 3090 Ti"),
    "8.7": ("Jetson AGX Orin", "Jetson Orin NX", "Jetson Orin Nano", "Orin"),
    "8.9": ("L4", "L40", "L40S", "RTX 2000 Ada", "RTX 4000 Ada", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 6000 Ada",
            "RTX 4050", "RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 Super", "RTX 4070 Ti", "RTX 4080",
            "RTX 4080 Super", "RTX 4090"),
    "9.0": ("H100", "H200", "H20", "GH200"),
    "10.0": ("B200", "GB200"),
    "10.3": ("B300", "GB300"),
    "11.0": ("Jetson AGX Thor", "Jetson T5000", "Jetson T4000", "Thor"),
    "12.0": ("RTX 5050", "RTX 5060", "RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090",
            "RTX PRO 4000 Blackwell", "RTX PRO 4500 Blackwell", "RTX PRO 5000 Blackwell", "RTX PRO 6000 Blackwell"),
    "12.1": ("GB10", "DGX Spark"),
}  # fmt: skip
JETSON = frozenset({"7.2", "8.7", "11.0"})
"""Compute capabilities of boards with an Arm processor: TensorRT's hardware compatibility does not reach them."""


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))


_BY_NAME = {_squeeze(name): (name, capability) for capability, names in _NAMES.items() for name in names}


def find_gpu(text: str) -> tuple[str | None, str]:
    """Name and compute capability of what a person wrote: `a10`, `RTX 4090`, `sm_86` or `8.6` (these two name no GPU).

    Raises:
        InputError: No such GPU is known.
    """
    number = re.fullmatch(r"(?:sm_?|cc)?(\d{1,2})\.?(\d)", text.strip().lower())
    capability = f"{int(number[1])}.{number[2]}" if number is not None else ""
    if capability in _NAMES or capability == "8.8":  # of boards without a name here
        return None, capability
    found = _BY_NAME.get(_squeeze(text))
    if found is None:
        raise InputError(
            f"no GPU is known by the name {text!r}",
            remedy="give its compute capability from https://developer.nvidia.com/cuda-gpus, such as gpu=8.6, or a "
            "name such as gpu=a10",
        )
    return found


_LATER_MAJOR = {8: 10, 10: 11}
"""Version-compatible plans may cross from one major version to this other one, no further."""
_REBUILD = "build it again there from its ONNX"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a plan is to run; what is None is not known, and is not judged.

    Attributes:
        tensorrt_version: Such as `10.9.0.34`; a part of it (`10.9`) is compared as far as it goes.
        gpu_name: Such as `NVIDIA A10`.
        compute_capability: Such as `8.6`.
        driver_version: Such as `580.95.05`.
        platform: Such as `linux-x86_64`.
        lean: Whether of TensorRT only its lean runtime is there.
    """

    flavour: Flavour | None
    tensorrt_version: str | None
    gpu_name: str | None
    compute_capability: str | None
    driver_version: str | None
    platform: str | None = None
    lean: bool = False


@dataclass(frozen=True, slots=True)
class Compatible:
    """The plan will run, as far as is known.

    Attributes:
        warnings: What speaks against it without forbidding it, or was not judged.
    """

    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Incompatible:
    """The plan will not run.

    Attributes:
        reason: What the plan needs and what is there.
        remedy: What to do.
    """

    reason: str
    remedy: str


def judge_plan(passport: PlanPassport, environment: Environment) -> Compatible | Incompatible:
    """Compares what a plan was built for with where it is to run."""
    wanted, found = passport.flavour, environment.flavour
    if found is not None and found != wanted:
        backend = "rtx" if found == "tensorrt_rtx" else "tensorrt"
        return Incompatible(
            f"the plan is of {FLAVOURS[wanted]}, and here is {FLAVOURS[found]}: neither reads the other's plans",
            f"run it with {FLAVOURS[wanted]}, or build it again with --backend {backend}",
        )
    built_on, here = passport.platform, environment.platform
    if built_on is not None and here is not None and built_on != here:
        reason = f"the plan was built on {built_on}, and here is {here}: plans do not cross platforms"
        return Incompatible(reason, _REBUILD)
    warnings: list[str] = []
    for judge in (_judge_lean, _judge_version, _judge_gpu):
        verdict = judge(passport, environment, warnings)
        if verdict is not None:
            return verdict
    built, driver = passport.driver_version, environment.driver_version
    if built and driver and parse_version(driver)[:1] < parse_version(built)[:1]:
        warnings.append(f"the driver {driver} is older than {built}, with which the plan was built")
    if passport.config.precision == "int8" and environment.compute_capability in SLOW_INT8:
        warnings.append(warn_of_int8(environment.compute_capability))
    return Compatible(tuple(warnings))


def warn_of_int8(capability: str) -> str:
    """Why an INT8 plan is the wrong one for a GPU of `SLOW_INT8`."""
    return (
        f"compute capability {capability} ({' and '.join(_NAMES[capability])}) computes INT8 at a small part of its "
        f"speed in FP8: build the plan from the FP32 ONNX with --fp8"
    )


def platform_here() -> str:
    """What a plan is bound to besides GPU and TensorRT, such as `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers of a version, up to the first part that is none: `10.9.0.34` → (10, 9, 0, 34)."""
    numbers = []
    for part in re.split(r"[.+-]", text):
        if not (part.isascii() and part.isdecimal()):
            break
        numbers.append(int(part))
    return tuple(numbers)


def _judge_lean(passport: PlanPassport, environment: Environment, _: list[str]) -> Incompatible | None:
    if not environment.lean or passport.config.version_compatible:
        return None
    library = FLAVOURS[passport.flavour]
    here = f"{library} {environment.tensorrt_version}" if environment.tensorrt_version else library
    return Incompatible(
        f"here is only the lean runtime of {here}, which runs version-compatible plans and no others, and the "
        f"plan is not version-compatible",
        f"build it again with --version-compatible where the whole {library} is; or install the whole {library} "
        f"{passport.tensorrt_version} here: {INSTALL[passport.flavour]}",
    )


def _judge_version(passport: PlanPassport, environment: Environment, warnings: list[str]) -> Incompatible | None:
    library, wanted, found = FLAVOURS[passport.flavour], passport.tensorrt_version, environment.tensorrt_version
    if found is None:
        warnings.append(f"the version of {library} was not judged: the plan is of {wanted}")
        return None
    built, here = parse_version(wanted), parse_version(found)
    flexible = passport.config.version_compatible and passport.flavour == "tensorrt"
    if built == here:
        return None
    if here == built[: len(here)]:
        needed = f"{wanted} or later" if flexible else f"{wanted} exactly"
        warnings.append(f"{library} {found} is only a part of a version: the plan needs {needed}")
        return None
    if not flexible:
        remedy = f"install {library} {wanted} there, or {_REBUILD}"
        if passport.flavour == "tensorrt" and here > built:
            remedy += "; --version-compatible makes plans that later versions of the same major version run, too"
        reason = f"the plan was built with {library} {wanted}, and {found} runs plans of its own version only"
        return Incompatible(reason, remedy)
    if here[0] == built[0] and here > built[: len(here)]:
        return None
    if _LATER_MAJOR.get(built[0]) == here[0]:
        warnings.append(
            f"a version-compatible plan of {wanted} on {found} crosses a major version: read the known issues of "
            f"{found}'s release"
        )
        return None
    distance = "older" if here < built else "too far ahead"
    return Incompatible(
        f"the plan is version-compatible from {library} {wanted} on, and {found} is {distance}",
        f"install {library} {wanted} or a later {built[0]}.x there, or {_REBUILD}",
    )


def _judge_gpu(passport: PlanPassport, environment: Environment, warnings: list[str]) -> Incompatible | None:
    found, wanted = environment.compute_capability, ", ".join(passport.compute_capabilities)
    built_on, here = passport.gpu_name, environment.gpu_name
    hardware_compatible = passport.config.hardware_compatible
    if found is None:
        warnings.append(f"the GPU was not judged: the plan is for compute capability {wanted or 'unknown'}")
        return None
    if found in passport.compute_capabilities:
        is_tuned = passport.flavour != "tensorrt_rtx" and not hardware_compatible
        if is_tuned and built_on and here and _model(here) != _model(built_on):
            warnings.append(
                f"the plan was tuned on {built_on}: on {here} it may be slower than one built there, or need more "
                f"memory than there is"
            )
        return None
    name = f"{here} (compute capability {found})" if here else f"a GPU of compute capability {found}"
    if passport.flavour == "tensorrt_rtx":
        return Incompatible(
            f"the plan is for compute capability {wanted}, and here is {name}",
            f"build it again with --target sm_{found.replace('.', '')} or, on such a GPU, with --target current or "
            f"--backend tensorrt",
        )
    if not hardware_compatible:
        remedy = f"{_REBUILD}; --hardware-compatible makes plans that run on every GPU from Ampere (8.0) on, if slower"
        gpu = f" ({built_on})" if built_on else ""
        return Incompatible(f"the plan is for compute capability {wanted}{gpu}, and here is {name}", remedy)
    if found in JETSON:
        reason = f"here is {name}, and hardware compatibility does not reach Jetson and DRIVE boards"
        return Incompatible(reason, _REBUILD)
    if parse_version(found) < (8, 0):
        return Incompatible(f"the plan runs on every GPU from Ampere (8.0) on, and here is {name}", _REBUILD)
    return None


def _model(name: str) -> list[str]:
    """The words that tell one model from another: `NVIDIA A100-SXM4-80GB` → `a100`."""
    ignored = r"|nvidia|geforce|tesla|jetson|laptop|gpu|sxm\d?|pcie|nvl|hbm\w+|\d+g[bi]?b?"
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if not re.fullmatch(ignored, word)]

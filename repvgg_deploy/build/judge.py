"""Whether a plan will run, here or in a place that is described; without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingDependencyError, PlanError
from ..files.output import sha256_file
from ..files.passport import passport_path, read_passport, require_unchanged
from ..files.plan_place import (
    JETSON,
    Compatible,
    Environment,
    Flavour,
    Incompatible,
    find_gpu,
    judge_plan,
    platform_here,
)
from ..runtime.tensorrt.plan import find_library
from ..specs.values import PlanPassport
from .library import look_for_gpu


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A verdict and what it rests on.

    Attributes:
        passport: Of the plan, whose digest was compared with it.
        plan_bytes: Size of the plan.
        environment: Where it is to run.
        is_here: Whether that is this machine.
        verdict: The answer.
    """

    passport: PlanPassport
    plan_bytes: int
    environment: Environment
    is_here: bool
    verdict: Compatible | Incompatible


def check_plan(plan: Path | str, target: Mapping[str, str] | None = None) -> CheckResult:
    """Judges a plan.

    Args:
        plan: The file, with its passport beside it.
        target: `gpu`, `trt` or `rtx`, and `driver` of another place; None: this machine.

    Raises:
        PlanError: The plan or its passport is missing, damaged, or they do not belong together.
        InputError: The target names no known GPU.
    """
    path = Path(plan)
    passport = _read(path)
    if target is not None:
        environment = _read_target(target)
        return CheckResult(passport, path.stat().st_size, environment, False, judge_plan(passport, environment))
    environment, lacking = _look_here(passport.flavour)
    verdict = judge_plan(passport, environment)
    if lacking is not None and isinstance(verdict, Compatible):
        verdict = lacking
    return CheckResult(passport, path.stat().st_size, environment, True, verdict)


def _read(path: Path) -> PlanPassport:
    if not path.is_file():
        raise PlanError(
            f"{path}: {'is no file' if path.exists() else 'no such file'}",
            remedy="check the path, or build it with repvgg-trt build",
        )
    passport = read_passport(path)
    if passport is None and path.suffix.lower() == ".onnx":
        raise PlanError(
            f"{path}: is an ONNX file by its name, expected a plan",
            remedy=f"repvgg-trt inspect {path} says what it is; it needs no GPU to run",
        )
    if passport is None:
        raise PlanError(
            f"{path}: has no passport {passport_path(path).name} beside it, so nothing is known of it",
            remedy="copy the passport together with the plan, or build the plan with repvgg-trt build",
        )
    try:
        require_unchanged(path, sha256_file(path), passport)
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read"
        ) from error
    return passport


def _look_here(flavour: Flavour) -> tuple[Environment, Incompatible | None]:
    """This machine, and what it lacks to run any plan of this flavour. TensorRT is found as the Engine finds it."""
    search, lacking, version, lean = look_for_gpu(), None, None, False
    try:
        library = find_library((flavour,))
        version, lean = library.version, library.is_lean
    except (MissingDependencyError, PlanError) as error:
        lacking = Incompatible(error.message, error.remedy)
    gpu = search.gpu
    if gpu is None:
        remedy = f"{search.remedy}; or give --target gpu=…,trt=… to ask about another machine"
        lacking = lacking or Incompatible(f"there is no GPU here that can be used: {search.reason}", remedy)
        return Environment(flavour, version, None, None, None, platform_here(), lean), lacking
    return Environment(
        flavour, version, gpu.name, gpu.compute_capability, gpu.driver_version, platform_here(), lean
    ), lacking


def _read_target(target: Mapping[str, str]) -> Environment:
    """A place that is described, such as `{"gpu": "a10", "trt": "10.9"}`.

    Raises:
        InputError: No such GPU is known.
    """
    name, capability = find_gpu(target["gpu"]) if "gpu" in target else (None, None)
    flavour: Flavour | None = "tensorrt" if "trt" in target else "tensorrt_rtx" if "rtx" in target else None
    platform = "linux-aarch64" if capability in JETSON else None
    return Environment(
        flavour, target.get("trt") or target.get("rtx"), name, capability, target.get("driver"), platform
    )

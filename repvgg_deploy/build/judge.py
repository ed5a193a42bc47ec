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
        passport: The plan's, whose digest was compared with it.
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
    environment, lacking = _look_here(passport.flavour) if target is None else (_read_target(target), None)
    verdict = judge_plan(passport, environment)
    if lacking is not None and isinstance(verdict, Compatible):
        verdict = lacking
    return CheckResult(passport, path.stat().st_size, environment, target is None, verdict)


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
    if gpu is None and lacking is None:
        remedy = f"{search.remedy}; or give --target gpu=…,trt=… to ask about another machine"
        lacking = Incompatible(f"there is no GPU here that can be used: {search.reason}", remedy)
    name, capability, driver = (gpu.name, gpu.compute_capability, gpu.driver_version) if gpu else (None, None, None)
    return Environment(flavour, version, name, capability, driver, platform_here(), lean), lacking


def _read_target(target: Mapping[str, str]) -> Environment:
    """A place that is described, such as `{"gpu": "a10", "trt": "10.9"}`."""
    name, capability = find_gpu(target["gpu"]) if "gpu" in target else (None, None)
    flavour: Flavour | None = None
    if "trt" in target or "rtx" in target:
        flavour = "tensorrt" if "trt" in target else "tensorrt_rtx"
    version, driver = target.get("trt") or target.get("rtx"), target.get("driver")
    return Environment(flavour, version, name, capability, driver, "linux-aarch64" if capability in JETSON else None)

"""`repvgg-trt check`: will a plan run here, or there?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import PlanIncompatibleError
from ..files.plan_place import FLAVOURS, Compatible
from ..specs.values import PlanPassport, ShapeProfile
from .common import Output, format_pairs, show_bytes

if TYPE_CHECKING:
    from ..build.judge import CheckResult


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        PlanError: The plan or its passport is missing, damaged, or they do not belong together.
        InputError: The target names no known GPU.
    """
    from ..build.judge import check_plan

    result = check_plan(args.plan, args.target)
    verdict = result.verdict
    errors = (
        ()
        if isinstance(verdict, Compatible)
        else (PlanIncompatibleError(f"{args.plan}: {verdict.reason}", remedy=verdict.remedy),)
    )
    return Output(data=_as_json(args, result), text=_as_text(args, result), errors=errors)


def describe_precision(passport: PlanPassport) -> str:
    """`int8 97.1 %, fp16 2.9 % of the multiply-accumulates`, or why that is not known."""
    if passport.precision == "not_inspected":
        return (
            f"{passport.config.precision or 'as its graph'}; its layers were not inspected: there was no GPU to load it"
        )
    shares = sorted(passport.precision_shares.items(), key=lambda item: -item[1])
    seen = ", ".join(f"{name} {share:.1%}" for name, share in shares)
    return f"{passport.precision}: {seen} of the multiply-accumulates" if len(shares) > 1 else passport.precision


def describe_batches(profile: ShapeProfile) -> str:
    """`1 to 32, tuned for 8`."""
    if profile.min_batch == profile.max_batch:
        return f"{profile.max_batch} and no other"
    return f"{profile.min_batch} to {profile.max_batch}, tuned for {profile.opt_batch}"


def describe_place(passport: PlanPassport) -> str:
    """Where a plan runs."""
    library, config = FLAVOURS[passport.flavour], passport.config
    flexible = config.version_compatible and passport.flavour == "tensorrt"
    version = (
        f"{library} "
        f"{passport.tensorrt_version}{' and later of the same major version' if flexible else ' and no other'}"
    )
    if config.hardware_compatible and passport.flavour == "tensorrt":
        return f"every GPU from Ampere (8.0) on, with {version}"
    name = f" ({passport.gpu_name})" if passport.gpu_name and passport.flavour == "tensorrt" else ""
    return f"compute capability {', '.join(passport.compute_capabilities)}{name}, with {version}"


def _as_text(args: argparse.Namespace, result: CheckResult) -> str:
    passport, verdict = result.passport, result.verdict
    pairs = [
        ("plan", f"{args.plan}, {show_bytes(result.plan_bytes)}, as it was built"),
        ("precision", describe_precision(passport)),
        ("batches", describe_batches(passport.config.profile)),
        ("runs on", describe_place(passport)),
        ("here" if result.is_here else "target", _describe_environment(result)),
    ]
    if isinstance(verdict, Compatible):
        pairs.append(("verdict", "it will run, as far as that is known" if verdict.warnings else "it will run"))
        pairs += [("warning", warning) for warning in verdict.warnings]
    else:
        pairs.append(("verdict", "it will not run"))
    return format_pairs(pairs)


def _describe_environment(result: CheckResult) -> str:
    environment = result.environment
    library = FLAVOURS[environment.flavour] if environment.flavour else "any TensorRT"
    if result.is_here and environment.tensorrt_version is None:
        library = f"no {library}"
    elif environment.lean:
        library += " (lean runtime)"
    capability = f"compute capability {environment.compute_capability}" if environment.compute_capability else ""
    gpu = f"{environment.gpu_name} ({capability})" if environment.gpu_name else capability or "no GPU"
    driver = f", driver {environment.driver_version}" if environment.driver_version else ""
    return f"{gpu}{driver}, {library}{f' {environment.tensorrt_version}' if environment.tensorrt_version else ''}"


def _as_json(args: argparse.Namespace, result: CheckResult) -> dict[str, object]:
    verdict = result.verdict
    compatible = isinstance(verdict, Compatible)
    return {
        "plan": str(args.plan),
        "compatible": compatible,
        "reason": None if isinstance(verdict, Compatible) else verdict.reason,
        "remedy": None if isinstance(verdict, Compatible) else verdict.remedy,
        "warnings": verdict.warnings if isinstance(verdict, Compatible) else (),
        "here": result.is_here,
        "environment": result.environment,
        "passport": result.passport,
    }

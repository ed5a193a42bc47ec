"""`repvgg-trt check`: will a plan run here, or there? `build` describes a new plan in the same words."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PlanIncompatibleError
from .common import Command, Output, show_bytes
from .terminal import format_pairs, paint

if TYPE_CHECKING:
    from ..build.judge import CheckResult
    from ..specs.values import PlanPassport

EXAMPLES = """examples:
  repvgg-trt check b2.plan                         (on this machine)
  repvgg-trt check b2.plan --target gpu=a10,trt=10.9
  repvgg-trt check b2.plan --target gpu=sm_120,rtx=1.7.1.116
"""


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The plan and the place."""
    parser.add_argument("plan", metavar="PLAN", type=Path, help="a plan with its passport PLAN.json beside it")
    parser.add_argument("--target", metavar="KEY=VALUE,…", type=_read_target,
                        help="another place: gpu=NAME or compute capability, trt=VERSION or rtx=VERSION, "
                             "driver=VERSION (default: this machine)")
# fmt: on


def _read_target(text: str) -> dict[str, str]:
    """`gpu=a10,trt=10.9` as a dict."""
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in ("gpu", "trt", "rtx", "driver") or not equals or not value or key in found:
            raise argparse.ArgumentTypeError(
                f"expected gpu=…, trt=… or rtx=…, driver=…, each once and apart by commas, found {part!r}"
            )
        found[key] = value
    if {"trt", "rtx"} <= set(found):
        raise argparse.ArgumentTypeError("trt=… and rtx=… cannot hold together: a plan is of one of the two")
    for key in set(found) - {"gpu"}:
        if not re.fullmatch(r"\d+(\.\d+)*", found[key]):
            raise argparse.ArgumentTypeError(f"expected a version such as {key}=10.9, found {found[key]!r}")
    return found


def execute(args: argparse.Namespace) -> Output:
    """Compares the plan's passport with this machine or the target; a plan that will not run is an error."""
    from ..build.judge import check_plan
    from ..files.plan_place import Compatible

    result = check_plan(args.plan, args.target)
    verdict = result.verdict
    pairs = [
        ("plan", f"{args.plan}, {show_bytes(result.plan_bytes)}, as it was built"),
        *describe_plan(result.passport),
        ("here" if result.is_here else "target", _describe_environment(result)),
    ]
    data: dict[str, object] = {"plan": str(args.plan), "compatible": isinstance(verdict, Compatible)}
    errors: tuple[PlanIncompatibleError, ...] = ()
    if isinstance(verdict, Compatible):
        said = "it will run, as far as that is known" if verdict.warnings else "it will run"
        pairs.append(("verdict", paint(said, "warn" if verdict.warnings else "good")))
        pairs += [("warning", warning) for warning in verdict.warnings]
        data |= {"reason": None, "remedy": None, "warnings": verdict.warnings}
    else:
        pairs.append(("verdict", paint("it will not run", "bad")))
        data |= {"reason": verdict.reason, "remedy": verdict.remedy, "warnings": ()}
        errors = (PlanIncompatibleError(f"{args.plan}: {verdict.reason}", remedy=verdict.remedy),)
    data |= {"here": result.is_here, "environment": result.environment, "passport": result.passport}
    return Output(data=data, text=format_pairs(pairs), errors=errors)


def describe_plan(passport: PlanPassport) -> list[tuple[str, str]]:
    """The precision, the batch and image sizes and the place of a plan, in words."""
    from ..files.plan_place import FLAVOURS

    config, profile = passport.config, passport.config.profile
    shares = sorted(passport.precision_shares.items(), key=lambda item: -item[1])
    precision: str = passport.precision
    if precision == "not_inspected":
        typed = config.precision or "as its graph"
        precision = f"{typed}; its layers were not inspected: there was no GPU to load it"
    elif len(shares) > 1:
        seen = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        precision = f"{precision}: {seen} of the multiply-accumulates"
    batches = f"{profile.min_batch} to {profile.max_batch}, tuned for {profile.opt_batch}"
    if profile.batches:
        kernels = ", ".join(map(str, profile.batches))
        batches = f"{profile.min_batch} to {profile.max_batch}, with kernels of their own for {kernels}"
    elif profile.min_batch == profile.max_batch:
        batches = f"{profile.max_batch} and no other"
    is_tensorrt = passport.flavour == "tensorrt"
    pairs = [("precision", precision), ("batches", batches)]
    if profile.min_size and profile.opt_size and profile.max_size:
        smallest, usual, largest = (f"{h}×{w}" for h, w in (profile.min_size, profile.opt_size, profile.max_size))
        sizes = f"{smallest} to {largest} pixels, tuned for {usual}"
        pairs.append(("images", f"{usual} pixels and no other" if smallest == largest else sizes))
    later = "and later of the same major version" if is_tensorrt and config.version_compatible else "and no other"
    place = f"compute capability {', '.join(passport.compute_capabilities)}"
    if is_tensorrt and config.hardware_compatible:
        place = "every GPU from Ampere (8.0) on"
    elif is_tensorrt and passport.gpu_name:
        place += f" ({passport.gpu_name})"
    place += f", with {FLAVOURS[passport.flavour]} {passport.tensorrt_version} {later}"
    return [*pairs, ("runs on", place)]


def _describe_environment(result: CheckResult) -> str:
    from ..files.plan_place import FLAVOURS

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


COMMAND = Command(
    "check",
    "say whether a plan will run here, or on another GPU and TensorRT",
    "Compares a plan's passport with this machine, or with another that --target describes. Needs no GPU. Exit code 0: "
    "it will run; 1: it will not, and why.",
    add_options,
    execute,
    examples=EXAMPLES,
)

"""The two files of a build, the plan and its passport: read where they stand, delivered both or not at all.

What a passport says of a plan: all that is known when it is built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import __version__
from ..errors import ArtifactError, InputError, PlanError
from ..files.output import (
    PendingOutput,
    explain_os_errors,
    locked,
    pending_output,
    publish_pair,
    put_in_place,
    require_replaceable,
    require_writable,
    settle,
    sha256_file,
)
from ..files.passport import passport_path, read_passport
from ..files.plan_place import platform_here
from ..specs import codec
from ..specs.values import PASSPORT_SCHEMA, HistoryEntry, ModelSpec, PlanPassport
from .cache import PlanRequest, comes_from
from .compile import BuiltPlan
from .inspect import PrecisionReport
from .source import Source


def make_passport(source: Source, request: PlanRequest, built: BuiltPlan, seconds: float) -> PlanPassport:
    """Of a plan that was built now.

    Args:
        source: The typed ONNX.
        request: What was asked for.
        built: What came of it.
        seconds: That it took.
    """
    metadata, library, gpu = source.metadata, request.library, request.gpu
    entry = HistoryEntry(
        "build",
        {"repvgg-deploy": __version__, library.flavour: library.version},
        request.build_options(),
        source.sha256,
    )
    return PlanPassport(
        schema=PASSPORT_SCHEMA,
        plan_sha256=hashlib.sha256(memoryview(built.data)).hexdigest(),
        onnx_sha256=source.sha256,
        spec=_with_types(metadata.spec, built.output_types),
        certificate=metadata.certificate,
        precision=_seen(built.report),
        config=request.config,
        flavour=library.flavour,
        tensorrt_version=library.version,
        gpu_name=None if gpu is None else gpu.name,
        compute_capabilities=request.capabilities,
        driver_version=None if gpu is None else gpu.driver_version,
        build_seconds=round(seconds, 2),
        history=(*metadata.history, entry),
        precision_shares={} if built.report is None else built.report.shares,
        platform=platform_here(),
        variant=metadata.variant,
    )


def _seen(report: PrecisionReport | None) -> Literal["fp32", "fp16", "int8", "not_inspected"]:
    known: dict[str, Literal["fp32", "fp16", "int8"]] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
    return "not_inspected" if report is None else known.get(report.precision, "not_inspected")


def _with_types(spec: ModelSpec, types: Mapping[str, str]) -> ModelSpec:
    """The specification as the plan has it: TensorRT 8 gives class numbers as int32."""
    changed = [
        dataclasses.replace(output, dtype="int32") if types.get(output.name) == "int32" else output
        for output in spec.outputs
    ]
    return dataclasses.replace(spec, outputs=tuple(changed))


def complete_passport(passport: PlanPassport, source: Source) -> PlanPassport:
    """With the architecture, which passports of before do not name.

    Args:
        passport: Of a plan that was built of `source`, or of what that was quantized to.
        source: An ONNX.
    """
    return passport if passport.variant is not None else dataclasses.replace(passport, variant=source.metadata.variant)


_PLAN_SUFFIX = ".plan"
_REPLACE = "give --force to replace it, or another --out"
Fill = Callable[[Path], None]
"""Writes the bytes of a plan to a path."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands at an output.

    Attributes:
        plan: The output.
        exists: Whether there is a file.
        passport: The one beside it, if it is readable and speaks of this very plan.
    """

    plan: Path
    exists: bool
    passport: PlanPassport | None


def choose_output(model: Path, out: Path | str | None) -> Path:
    """Where the plan will stand.

    Raises:
        InputError: The model's path has no file name.
        ArtifactError: `out` is a folder, or a name that the disk does not take.
    """
    usual = default_plan_output(model)
    target = usual if out is None else Path(out)
    with explain_os_errors(target):
        if not target.name or target.is_dir():
            example = shlex.quote(str(target / usual.name))
            raise ArtifactError(
                f"{target}: is a folder, expected a file name", remedy=f"give a file, such as --out {example}"
            )
        passport_path(target).exists()  # of a name that is too long even this cannot be told
    return target


def default_plan_output(model: Path) -> Path:
    """`b2.plan` beside `b2.onnx`.

    Raises:
        InputError: The path has no file name.
    """
    if not model.name:
        raise InputError(f"{str(model)!r} is no file", remedy="give an .onnx file")
    return (
        model.with_suffix(_PLAN_SUFFIX)
        if model.suffix.lower() == ".onnx"
        else model.with_name(f"{model.name}{_PLAN_SUFFIX}")
    )


def look_at(plan: Path) -> Standing:
    """What stands at an output; its digest is compared with its passport."""
    if not plan.is_file():
        return Standing(plan, plan.exists(), None)
    try:
        passport = read_passport(plan)
        whole = passport is not None and sha256_file(plan) == passport.plan_sha256
    except (PlanError, OSError):
        return Standing(plan, True, None)
    return Standing(plan, True, passport if whole else None)


def require_room(standing: Standing, onnx_sha256: str, *, force: bool) -> None:
    """Refuses before minutes of work what could not be written after them.

    Raises:
        ArtifactError: A file stands there, no plan of this ONNX, and `force` is not given; or the folder cannot be
            written to.
    """
    for path in (standing.plan, passport_path(standing.plan)):
        require_writable(path)
    ours = standing.passport is not None and comes_from(standing.passport, onnx_sha256)
    if standing.exists and not force and not ours:
        raise ArtifactError(f"{standing.plan}: exists and is no plan of this ONNX", remedy=_REPLACE)
    if not standing.exists and not force:
        beside = passport_path(standing.plan)
        try:
            read_passport(standing.plan)  # one that lost its plan may go
        except PlanError as error:
            raise ArtifactError(
                f"{beside}: exists and is no passport, which is to be written there", remedy=_REPLACE
            ) from error


def require_same(standing: Standing, request: PlanRequest, *, force: bool) -> bool:
    """Whether the very plan that is asked for stands there already.

    Raises:
        ArtifactError: Another stands there, and `force` is not given.
    """
    if standing.passport is not None and request.describes(standing.passport):
        return True
    if standing.exists and not force:
        raise ArtifactError(
            f"{standing.plan}: exists and was built otherwise: of another ONNX, with other options, or for "
            f"another TensorRT or GPU",
            remedy=_REPLACE,
        )
    return False


def deliver(
    plan: Path, passport: PlanPassport, fill: Fill, *, force: bool
) -> tuple[PendingOutput, PendingOutput, PlanPassport]:
    """Writes the plan and its passport. Builds that write to the same place at once come one after the other, so that the two files belong together.

    Of an identical plan the old passport stays: it says when and with what effort this plan was built.

    Args:
        plan: The output.
        passport: Of it.
        fill: Writes the plan's bytes to a path.
        force: Replace different files.

    Returns:
        The plan, the passport's file, and the passport in it.

    Raises:
        ArtifactError: A file cannot be written, or a different one stands there.
    """
    beside = passport_path(plan)
    with pending_output(beside) as paper, pending_output(plan) as output:
        fill(output.partial)
        with locked(plan):
            require_replaceable(output, force=force)
            kept = _keep(plan, passport)
            _write(paper, kept)
            publish_pair(output, paper)
    return output, paper, kept


def refresh_passport(plan: Path, passport: PlanPassport) -> PendingOutput:
    """Gives a plan that stands a passport that says more of it.

    Returns:
        The passport's file; `up to date` where another plan has come meanwhile, whose passport stays.

    Raises:
        ArtifactError: It cannot be written.
    """
    with pending_output(passport_path(plan)) as paper, locked(plan):
        standing = look_at(plan).passport
        if standing is None or standing.plan_sha256 != passport.plan_sha256:
            paper.status = "up to date"
            return paper
        _write(paper, passport)
        settle(paper)
        put_in_place(paper)
    return paper


def _write(paper: PendingOutput, passport: PlanPassport) -> None:
    paper.partial.write_text(codec.dumps(passport) + "\n", encoding="utf-8")


def _keep(plan: Path, passport: PlanPassport) -> PlanPassport:
    """The passport that stands beside an identical plan, if all but the effort is the same."""
    old = look_at(plan).passport
    if old is None:
        return passport
    return old if dataclasses.replace(old, build_seconds=passport.build_seconds) == passport else passport

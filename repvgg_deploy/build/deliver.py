"""The two files of a build: what stands at their places, what the passport says, both written or neither."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Mapping
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
    require_replaceable,
    require_writable,
    sha256_file,
)
from ..files.passport import passport_path, read_passport
from ..files.plan_place import platform_here
from ..specs import codec
from ..specs.values import PASSPORT_SCHEMA, HistoryEntry, ModelSpec, PlanPassport, Precision
from .compile import BuiltPlan
from .inspect import PrecisionReport
from .options import BuildRequest

_PLAN_SUFFIX = ".plan"
Delivered = tuple[PendingOutput, PendingOutput, PlanPassport]
"""The plan, its passport's file, and the passport in it."""
_REPLACE = "give --force to replace it, or another --out"


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands at an output.

    Attributes:
        plan: The output.
        exists: Whether there is a file.
        passport: The one beside it, if it is readable and speaks of this very plan.
        stamp: Tells whether the plan has been replaced since; None where it is no file.
    """

    plan: Path
    exists: bool
    passport: PlanPassport | None
    stamp: tuple[int, ...] | None


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
        passport_path(target).exists()  # raises where the name is too long
    return target


def default_plan_output(model: Path) -> Path:
    """`b2.plan` beside `b2.onnx`.

    Raises:
        InputError: The path has no file name.
    """
    if not model.name:
        raise InputError(f"{str(model)!r} is no file", remedy="give an .onnx file")
    if model.suffix.lower() == ".onnx":
        return model.with_suffix(_PLAN_SUFFIX)
    return model.with_name(f"{model.name}{_PLAN_SUFFIX}")


def look_at(plan: Path, before: Standing | None = None) -> Standing:
    """What stands at an output. The plan is hashed for its passport, unless it still is the file that `before` saw."""
    try:
        found = plan.stat() if plan.is_file() else None
        stamp = None if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if before is not None and stamp is not None and stamp == before.stamp:
            return before
        passport = None if stamp is None else read_passport(plan)
        whole = passport is not None and sha256_file(plan) == passport.plan_sha256
    except (PlanError, OSError):
        return Standing(plan, plan.exists(), None, None)
    return Standing(plan, plan.exists(), passport if whole else None, stamp)


def require_room(standing: Standing, onnx_sha256: str, *, force: bool) -> None:
    """Refuses before minutes of work what could not be written after them.

    Raises:
        ArtifactError: A file stands there, no plan of this ONNX, and `force` is not given; or the folder cannot be
            written to.
    """
    plan, passport, beside = standing.plan, standing.passport, passport_path(standing.plan)
    for path in (plan, beside):
        require_writable(path)
    if force:
        return
    if standing.exists:
        # The digests of the ONNX that it was built of, and of those which that was made of.
        known = [] if passport is None else [passport.onnx_sha256, *(step.parent_sha256 for step in passport.history)]
        if onnx_sha256 not in known:
            raise ArtifactError(f"{plan}: exists and is no plan of this ONNX", remedy=_REPLACE)
        return
    try:
        read_passport(plan)  # one that lost its plan may go
    except PlanError as error:
        raise ArtifactError(
            f"{beside}: exists and is no passport, which is to be written there", remedy=_REPLACE
        ) from error


def is_standing(standing: Standing, request: BuildRequest, onnx_sha256: str, *, force: bool) -> bool:
    """Whether the very plan that is asked for, of a typed ONNX of this digest, stands there already.

    Raises:
        ArtifactError: Another stands there, and `force` is not given.
    """
    if standing.passport is not None and request.describes(standing.passport, onnx_sha256):
        return True
    if standing.exists and not force:
        raise ArtifactError(
            f"{standing.plan}: exists and was built otherwise: of another ONNX, with other options, or for "
            f"another TensorRT or GPU",
            remedy=_REPLACE,
        )
    return False


def make_passport(request: BuildRequest, built: BuiltPlan) -> PlanPassport:
    """All that is known of a plan that was built now of a typed ONNX."""
    source, library, gpu, report = request.source, request.library, request.gpu, built.report
    tools = {"repvgg-deploy": __version__, library.flavour: library.version}
    return PlanPassport(
        schema=PASSPORT_SCHEMA,
        plan_sha256=hashlib.sha256(memoryview(built.data)).hexdigest(),
        onnx_sha256=source.sha256,
        spec=_with_types(source.spec, built.output_types),
        certificate=source.metadata.certificate,
        precision=_stated_precision(report),
        config=request.config,
        flavour=library.flavour,
        tensorrt_version=library.version,
        gpu_name=None if gpu is None else gpu.name,
        compute_capabilities=request.targets,
        driver_version=None if gpu is None else gpu.driver_version,
        build_seconds=round(sum(built.seconds.values()), 2),
        history=(*source.metadata.history, HistoryEntry("build", tools, request.history_options(), source.sha256)),
        precision_shares={} if report is None else report.shares,
        platform=platform_here(),
        variant=source.metadata.variant,
    )


def _stated_precision(report: PrecisionReport | None) -> Literal["fp32", "fp16", "fp8", "int8", "not_inspected"]:
    known: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "fp8": "fp8", "int8": "int8"}
    return "not_inspected" if report is None else known.get(report.precision, "not_inspected")


def _with_types(spec: ModelSpec, types: Mapping[str, str]) -> ModelSpec:
    """The specification as the plan has it: TensorRT 8 gives class numbers as int32."""
    changed = [
        dataclasses.replace(output, dtype="int32") if types.get(output.name) == "int32" else output
        for output in spec.outputs
    ]
    return dataclasses.replace(spec, outputs=tuple(changed))


def leave(standing: Standing) -> Delivered:
    """The files of the very plan that is asked for, as they stand."""
    plan, passport = standing.plan, standing.passport
    assert passport is not None, "what stands there was compared with its passport"
    output, beside = (PendingOutput(path, path, "up to date") for path in (plan, passport_path(plan)))
    return output, beside, passport


def deliver(plan: Path, data: bytes | memoryview, passport: PlanPassport, *, force: bool) -> Delivered:
    """Writes a plan and its passport.

    Builds that write to one place at once come one after the other, so that the two files belong together. The old
    passport of an identical plan stays: it says when and with what effort this plan was built.

    Raises:
        ArtifactError: A file cannot be written, or a different one stands there.
    """
    with pending_output(passport_path(plan)) as beside, pending_output(plan) as output:
        with output.partial.open("wb") as file:
            file.write(data)
        with locked(plan):
            require_replaceable(output, force=force)
            kept = _keep(plan, passport)
            with explain_os_errors(beside.target):
                beside.partial.write_text(codec.dumps(kept) + "\n", encoding="utf-8")
            publish_pair(output, beside)
    return output, beside, kept


def _keep(plan: Path, passport: PlanPassport) -> PlanPassport:
    """The passport that stands there, if it says the same of the same plan but for the effort."""
    try:
        old = read_passport(plan, finish=False)
    except PlanError:
        return passport
    same = old is not None and dataclasses.replace(old, build_seconds=passport.build_seconds) == passport
    return old if old is not None and same else passport

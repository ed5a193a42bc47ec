"""The passport of a plan: `NAME.plan.json` beside `NAME.plan`.

Nothing is put into a plan, which trtexec and Triton must still load: what is known of it stands beside it, bound to its
bytes by SHA-256.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from ..errors import ArtifactError, InputError, PlanError
from ..specs import codec
from ..specs.values import PlanPassport
from .output import find_partials, locked, sha256_file

logger = logging.getLogger(__name__)
_LARGEST_BYTES = 64 << 20  # labels of 21,000 classes are 1 MB; what is larger is no passport
_REBUILD = "build the plan again with repvgg-trt build, or copy it again together with its .json"


def passport_path(plan: Path) -> Path:
    """Where the passport of a plan stands: `b2.plan.json` for `b2.plan`."""
    return plan.with_name(f"{plan.name}.json")


def read_passport(plan: Path, *, finish: bool = True) -> PlanPassport | None:
    """The passport beside a plan, or None where none is there.

    Args:
        plan: The plan.
        finish: Whether a passport that its writer could not put in its place any more, because it was killed between
            the two files, is put there. Not for who holds the plan's lock.

    Raises:
        PlanError: It cannot be read, or is not a passport of this version.
    """
    path = passport_path(plan)
    try:
        return read_passport_file(path)
    except FileNotFoundError:
        return _finish(plan) if finish else None
    except OSError as error:
        remedy = "check that it is a file that you may read"
        raise PlanError(f"{path}: cannot be read: {error.strerror}", remedy=remedy) from error


def _finish(plan: Path) -> PlanPassport | None:
    """The passport in a hidden file that speaks of this very plan, put in its place; None where there is none."""
    path = passport_path(plan)
    if not find_partials(path) or not plan.is_file():
        return None
    with contextlib.ExitStack() as stack:
        # A writer that lives is between its two files, too: it ends first. In a folder of others there is no lock.
        with contextlib.suppress(ArtifactError):
            stack.enter_context(locked(plan))
        if path.exists():
            return read_passport(plan, finish=False)
        for hidden in find_partials(path):
            with contextlib.suppress(OSError, PlanError):
                passport = read_passport_file(hidden)
                if passport.plan_sha256 != sha256_file(plan):
                    continue
                logger.warning("%s: the passport that %s lost when its build was killed is used", hidden, plan.name)
                with contextlib.suppress(OSError):  # a folder that may not be written to: it is used where it is
                    os.replace(hidden, path)
                return passport
    return None


def read_passport_file(path: Path) -> PlanPassport:
    """The passport in a file of any name.

    Raises:
        PlanError: It is no passport of this version.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise PlanError(f"{path}: not a passport: larger than {_LARGEST_BYTES >> 20} MiB", remedy=_REBUILD)
    try:
        return codec.loads(PlanPassport, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not a passport: not UTF-8", remedy=_REBUILD) from error
    except InputError as error:
        raise PlanError(
            f"{path}: damaged, or of another version of repvgg-deploy: {error.message}", remedy=_REBUILD
        ) from error


def require_unchanged(plan: Path, content_sha256: str, passport: PlanPassport) -> None:
    """Refuses a plan that is not the one its passport describes.

    Args:
        plan: For the message.
        content_sha256: Digest of the bytes that are to be loaded.
        passport: The passport beside them.

    Raises:
        PlanError: They differ.
    """
    if content_sha256 != passport.plan_sha256:
        raise PlanError(
            f"{plan}: is not the plan of its passport {passport_path(plan).name}: expected sha256 "
            f"{passport.plan_sha256[:16]}…, found {content_sha256[:16]}…: truncated, changed, or replaced without its "
            f"passport",
            remedy=_REBUILD,
        )

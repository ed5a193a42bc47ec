"""Plans that were built before, by the content that they were built from. Standard library only.

An entry is a folder that appears whole (`plans/KEY/plan`, `passport.json`) and is checked whenever it is used, so that processes may share the
cache. The folder is `$REPVGG_DEPLOY_CACHE`, else `$XDG_CACHE_HOME/repvgg-deploy`, else `~/.cache/repvgg-deploy`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError, InputError
from ..files.output import explain_os_errors, write_text
from ..specs import codec
from ..specs.values import PlanPassport

logger = logging.getLogger(__name__)

VARIABLE = "REPVGG_DEPLOY_CACHE"
_LIMIT_BYTES = 16 << 30
_PLAN, _PASSPORT, _PARTIAL = "plan", "passport.json", ".partial-"
_ABANDONED_NS = 24 * 3600 * 10**9


def cache_folder() -> Path:
    """Where plans and timings are kept; it need not exist.

    Raises:
        InputError: The environment names no folder, not even a home.
    """
    own, general = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return (Path(general) if general else Path.home() / ".cache") / "repvgg-deploy"
    except RuntimeError as error:
        raise InputError(f"no folder for the cache: {error}", remedy=f"set {VARIABLE} to a folder, or give --no-cache") from error


def make_key(parts: Mapping[str, object]) -> str:
    """The name of an entry: SHA-256 of all that the plan depends on, in canonical JSON."""
    return hashlib.sha256(codec.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class CachedPlan:
    """An entry whose content is what its passport says. It is in memory: the files may go at any time, when another process makes room.

    Attributes:
        data: The plan's bytes.
        passport: Of it.
    """

    data: bytes
    passport: PlanPassport


@dataclass(frozen=True, slots=True)
class PlanCache:
    """The cache in one folder. A folder that cannot be written to costs time and no build: it is logged.

    Attributes:
        folder: See `cache_folder`.
        limit_bytes: Beyond it, the entries that were not used for longest are removed.
    """

    folder: Path
    limit_bytes: int = _LIMIT_BYTES

    def find(self, key: str) -> CachedPlan | None:
        """The entry of a key; None where there is none. A damaged one is removed."""
        entry = self.folder / "plans" / key
        try:
            passport = codec.loads(PlanPassport, (entry / _PASSPORT).read_text(encoding="utf-8"))
            data = (entry / _PLAN).read_bytes()
            if hashlib.sha256(data).hexdigest() == passport.plan_sha256:
                with contextlib.suppress(OSError):  # of another user, on a disk that is only read, or gone by now: it is good all the same
                    os.utime(entry)
                return CachedPlan(data, passport)
            logger.warning("%s: a cached plan has changed: it is removed and built again", entry)
        except FileNotFoundError:  # there is none, or another process is removing it
            if not entry.exists():
                return None
        except (InputError, OSError, UnicodeDecodeError) as error:
            logger.warning("%s: a cached plan cannot be used: %s", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def store(self, key: str, data: bytes | memoryview, passport: PlanPassport) -> None:
        """Keeps a plan; another process that was faster is left its entry."""
        plans = self.folder / "plans"
        partial: Path | None = None
        try:
            with explain_os_errors(plans):
                plans.mkdir(parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=plans))
                partial.chmod(plans.stat().st_mode & 0o777)  # mkdtemp's is for nobody else, and users may share the folder
                (partial / _PLAN).write_bytes(data)
                (partial / _PASSPORT).write_text(codec.dumps(passport), encoding="utf-8")
                if not (plans / key).exists():
                    with contextlib.suppress(OSError):  # the other process has just put it there
                        partial.rename(plans / key)
                self._prune(keep=key)
        except ArtifactError as error:
            logger.warning("the plan was not put into the cache: %s", error.message)
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def find_request(self, key: str) -> str | None:
        """The key of the plan that a request (an FP32 ONNX, and how to quantize it) led to."""
        try:
            text = (self.folder / "requests" / key).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return None
        return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else None

    def store_request(self, key: str, plan_key: str) -> None:
        """Remembers it."""
        target = self.folder / "requests" / key
        try:
            with explain_os_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, plan_key, force=True)
        except ArtifactError as error:
            logger.warning("the request was not put into the cache: %s", error.message)

    def _prune(self, keep: str) -> None:
        entries = []
        for entry in (self.folder / "plans").iterdir():
            with contextlib.suppress(OSError):  # another process may be removing it
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime_ns, size, entry))
        total = sum(size for _, size, _ in entries)
        for changed, size, entry in entries:
            if entry.name.startswith(_PARTIAL) and changed < time.time_ns() - _ABANDONED_NS:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size
        for _, size, entry in sorted(entries):
            if total <= self.limit_bytes:
                return
            if entry.name != keep and not entry.name.startswith(_PARTIAL):
                shutil.rmtree(entry, ignore_errors=True)
                total -= size

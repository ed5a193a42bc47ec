"""Plans that were built before, by the content that they were built from.

An entry is a folder that appears whole (`plans/KEY/plan`, `passport.json`) and is checked whenever it is used, so that
processes may share the cache. The folder is `$REPVGG_DEPLOY_CACHE`, else `$XDG_CACHE_HOME/repvgg-deploy` where that is
absolute, else `~/.cache/repvgg-deploy`. One key leads to one plan: it names the ONNX that the caller gave, and how it
becomes typed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import ArtifactError, InputError, PlanError
from ..files.output import explain_os_errors, sha256_file
from ..files.passport import read_passport_file
from ..files.plan_place import platform_here
from ..files.versions import installed_versions
from ..specs import codec
from ..specs.values import PlanPassport
from .options import BuildRequest

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions

logger = logging.getLogger(__name__)
_LIMIT_BYTES = 16 << 30
_PLAN, _PASSPORT, _PARTIAL = "plan", "passport.json", ".partial-"
_ABANDONED_NS = 24 * 3600 * 10**9
_TOOLS = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "pillow")
_LISTS = (".txt", ".csv", ".tsv", ".lst")


@dataclass(frozen=True, slots=True)
class PlanCache:
    """The cache in one folder. A folder that cannot be written to is logged: it costs time and no build.

    Attributes:
        folder: See `files.download.cache_folder`; None for a cache that keeps nothing.
        limit_bytes: Beyond it, the entries that were not used for longest are removed.
    """

    folder: Path | None
    limit_bytes: int = _LIMIT_BYTES

    def find(self, key: str | None) -> tuple[bytes, PlanPassport] | None:
        """The plan of a key and its passport; None where there is none. A damaged entry is removed.

        The plan is read whole: its file may go at any time, when another process makes room.
        """
        if self.folder is None or key is None:
            return None
        entry = self.folder / "plans" / key
        try:
            passport = read_passport_file(entry / _PASSPORT)
            data = (entry / _PLAN).read_bytes()
            if hashlib.sha256(data).hexdigest() == passport.plan_sha256:
                with contextlib.suppress(
                    OSError
                ):  # of another user, read-only, or gone by now: it is good all the same
                    os.utime(entry)
                return data, passport
            logger.warning("%s: a cached plan has changed: it is removed and built again", entry)
        except FileNotFoundError:  # there is none, or another process is removing it
            if not entry.exists():
                return None
        except (PlanError, OSError) as error:
            logger.warning("%s: a cached plan cannot be used: %s", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def store(self, key: str | None, data: bytes | memoryview, passport: PlanPassport) -> None:
        """Keeps a plan; another process that was faster is left its entry."""
        if self.folder is None or key is None:
            return
        plans = self.folder / "plans"
        partial: Path | None = None
        try:
            with explain_os_errors(plans):
                plans.mkdir(parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=plans))
                partial.chmod(plans.stat().st_mode & 0o777)  # mkdtemp gives it to one user; users may share the folder
                (partial / _PLAN).write_bytes(data)
                (partial / _PASSPORT).write_text(codec.dumps(passport), encoding="utf-8")
                if not (plans / key).exists():
                    with contextlib.suppress(OSError):  # the other process has just put it there
                        partial.rename(plans / key)
                self._prune(plans, keep=key)
        except ArtifactError as error:
            logger.warning("the plan was not put into the cache: %s", error.message)
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def _prune(self, plans: Path, *, keep: str) -> None:
        entries = []
        for entry in plans.iterdir():
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


def plan_key(request: BuildRequest) -> str | None:
    """The name of a plan's entry: SHA-256 of all that the plan depends on, in canonical JSON.

    Returns:
        None where the images that an FP32 graph is calibrated with cannot be told from others without reading them
        all, or where quantizing is to write a file of its own.
    """
    quantize = request.quantize
    if quantize is not None and quantize.save_scales is not None:
        return None
    gpu = (
        None if request.gpu is None else [request.gpu.name, request.gpu.compute_capability, request.gpu.driver_version]
    )
    parts: dict[str, object] = {
        "onnx": request.source.sha256,
        "config": request.config,
        "targets": request.targets,
        "library": [request.library.flavour, request.library.version],
        "tactic_libraries": request.tactic_libraries,
        "gpu": gpu,
        "platform": platform_here(),
        "project": __version__,
    }
    if quantize is not None:
        try:
            images = _fingerprint(request.source.path, quantize)
            scales = None if quantize.scales is None else sha256_file(quantize.scales)
        except (OSError, InputError):
            return None  # quantize says what is wrong with them
        if images is None:
            return None
        options = dataclasses.replace(quantize, calibration=None, scales=None)
        parts["quantize"] = {
            "options": options,
            "images": images,
            "scales": scales,
            "tools": installed_versions(_TOOLS),
        }
    return hashlib.sha256(codec.dumps(parts).encode()).hexdigest()


def _fingerprint(model: Path, options: QuantizeOptions) -> list[str] | None:
    """What tells the calibration images from others; None where there are none that could be told."""
    if options.from_statistics:
        return ["statistics"]
    if options.calibration is None:
        if options.precision == "fp16":
            return ["none"]
        from ..images.calibration import find_calibration_file

        beside = find_calibration_file(model)
        return None if beside is None else [sha256_file(beside)]
    source = Path(options.calibration)
    if source.is_dir():
        from ..images.listing import find_images

        return _stats(find_images(source).files)
    from ..images.lists import LIST_SUFFIXES, read_list

    if not source.is_file():
        return None  # a pipe, a device or nothing: it is refused where it is to be read
    listed = read_list(source).paths if source.suffix.lower() in LIST_SUFFIXES else ()
    return [sha256_file(source), *_stats(listed)]


def _stats(paths: Iterable[Path]) -> list[str]:
    """Name, size and time of each file, as make does it: to read them all would take as long as to use them."""
    return [f"{path}:{found.st_size}:{found.st_mtime_ns}" for path in paths for found in [_stat(path)]]


def _stat(path: Path) -> os.stat_result:
    """Of a broken link its own: it is an error where it is read."""
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)

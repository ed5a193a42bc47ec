"""Plans that were built before, by the content that they were built from. Standard library only.

An entry is a folder that appears whole (`plans/KEY/plan`, `passport.json`) and is checked whenever it is used, so that
processes may share the cache. The folder is `$REPVGG_DEPLOY_CACHE`, else `$XDG_CACHE_HOME/repvgg-deploy`, else
`~/.cache/repvgg-deploy`.

What a build depends on, as keys of the plan cache, so that an identical one is recognised.
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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import ArtifactError, InputError
from ..files.output import explain_os_errors, sha256_file, write_text
from ..files.plan_place import platform_here
from ..files.versions import installed_versions
from ..specs import codec
from ..specs.values import BuildConfig, PlanPassport
from .library import Gpu, Library, TacticLibraries

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions

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
        raise InputError(
            f"no folder for the cache: {error}", remedy=f"set {VARIABLE} to a folder, or give --no-cache"
        ) from error


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
                with contextlib.suppress(
                    OSError
                ):  # of another user, on a disk that is only read, or gone by now: it is good all the same
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
                partial.chmod(
                    plans.stat().st_mode & 0o777
                )  # mkdtemp's is for nobody else, and users may share the folder
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


_TOOLS = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "pillow")
_LISTS = (".txt", ".csv", ".tsv", ".lst")


@dataclasses.dataclass(frozen=True, slots=True)
class PlanRequest:
    """All that a plan of a typed ONNX depends on.

    Attributes:
        onnx_sha256: Of the typed ONNX.
        config: With the profile that suits it.
        capabilities: Compute capabilities that the plan is for.
        library: Which TensorRT.
        gpu: None where there is none.
        tactic_libraries: That TensorRT 8 takes kernels from; empty for the others.
    """

    onnx_sha256: str
    config: BuildConfig
    capabilities: tuple[str, ...]
    library: Library
    gpu: Gpu | None
    tactic_libraries: TacticLibraries = dataclasses.field(default_factory=dict)

    def key(self) -> str:
        """Of the plan cache."""
        gpu = None if self.gpu is None else [self.gpu.name, self.gpu.compute_capability, self.gpu.driver_version]
        parts: dict[str, object] = {
            "onnx": self.onnx_sha256,
            "config": self.config,
            "capabilities": self.capabilities,
            "library": [self.library.flavour, self.library.version],
            "gpu": gpu,
            "platform": platform_here(),
            "project": __version__,
        }
        if self.tactic_libraries:  # where there are none, plans that were cached before stay valid
            parts["tactic_libraries"] = self.tactic_libraries
        return make_key(parts)

    def build_options(self) -> dict[str, str | int | float | bool | None]:
        """What the last entry of a passport's history says of the build, besides the passport's own fields."""
        return {name.lower(): version for name, version in self.tactic_libraries.items()}

    def describes(self, passport: PlanPassport) -> bool:
        """Whether a plan was built of the same ONNX in the same way, with the same TensorRT and libraries, for the same GPU."""
        name, driver = (None, None) if self.gpu is None else (self.gpu.name, self.gpu.driver_version)
        same = (passport.onnx_sha256, passport.config, passport.compute_capabilities) == (
            self.onnx_sha256,
            self.config,
            self.capabilities,
        )
        here = (
            passport.flavour,
            passport.tensorrt_version,
            passport.gpu_name,
            passport.driver_version,
            passport.platform,
        )
        options = passport.history[-1].options if passport.history else {}
        return (
            same
            and options == self.build_options()
            and here == (self.library.flavour, self.library.version, name, driver, platform_here())
        )


def comes_from(passport: PlanPassport, onnx_sha256: str) -> bool:
    """Whether an ONNX is what a plan was built of, or what that was made of."""
    return onnx_sha256 in {passport.onnx_sha256, *(entry.parent_sha256 for entry in passport.history)}


def quantize_key(onnx_sha256: str, model: Path, options: QuantizeOptions, plan: PlanRequest) -> str | None:
    """Key of a build that begins with an FP32 ONNX; None where its images cannot be told from others without reading them all.

    Args:
        onnx_sha256: Of the FP32 ONNX.
        model: Its file; calibration images may stand beside it.
        options: How it becomes typed.
        plan: Of the plan, its `onnx_sha256` empty.
    """
    try:
        images = _fingerprint(model, options)
        scales = None if options.scales is None else sha256_file(options.scales)
    except (OSError, InputError):
        return None  # quantize says what is wrong with them
    rest = dataclasses.replace(options, calibration=None, scales=None, save_scales=None)
    parts = {
        "onnx": onnx_sha256,
        "options": codec.encode(rest),
        "images": images,
        "scales": scales,
        "plan": plan.key(),
        "tools": installed_versions(_TOOLS),
    }
    return None if images is None or options.save_scales is not None else make_key(parts)


def _fingerprint(model: Path, options: QuantizeOptions) -> list[str] | None:
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
        from ..images.sources import find_images

        return _stats(find_images(source))
    listed: tuple[Path, ...] = ()
    if source.suffix.lower() in _LISTS:
        from ..images.sources import read_list

        listed = read_list(source).paths
    return [sha256_file(source), *_stats(listed)]


def _stats(paths: Iterable[Path]) -> list[str]:
    """Name, size and time of files, as make does it: to read them all would take as long as to use them."""
    return [f"{path}:{found.st_size}:{found.st_mtime_ns}" for path in paths for found in [os.stat(path)]]

"""What a build depends on, as keys of the plan cache, so that an identical one is recognised."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..builder.build import Gpu
from ..builder.library import Library
from ..builder.plan_cache import make_key
from ..builder.tactic_sources import TacticLibraries
from ..errors import InputError
from ..files.output import sha256_file
from ..files.plan_place import platform_here
from ..files.versions import installed_versions
from ..specs import codec
from ..specs.values import BuildConfig, PlanPassport

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions

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
        same = (passport.onnx_sha256, passport.config, passport.compute_capabilities) == (self.onnx_sha256, self.config, self.capabilities)
        here = (passport.flavour, passport.tensorrt_version, passport.gpu_name, passport.driver_version, passport.platform)
        options = passport.history[-1].options if passport.history else {}
        return same and options == self.build_options() and here == (self.library.flavour, self.library.version, name, driver, platform_here())


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

"""What a caller asks of a build, which options contradict the graph, and the request that follows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BuildError, InputError
from ..files.plan_place import Library, platform_here
from ..specs.values import BuildConfig, PlanPassport, ShapeProfile
from .library import BackendChoice, Gpu, TacticLibraries
from .source import Source

if TYPE_CHECKING:
    from ..precision.options import QuantizeOptions

_USUAL = ShapeProfile()


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build a plan.

    Attributes:
        config: Precision, batch sizes, memory and flags.
        profile_given: Whether the profile was asked for: else the default one gives way to a model's fixed batch.
        backend: `auto`: TensorRT where it is installed, else TensorRT-RTX.
        targets: Compute capabilities (`8.6`, or `current`) that a TensorRT-RTX plan is for; empty for all from Ampere
            on that it knows.
        timing_cache: TensorRT's timings; None: a file of this GPU, CUDA and TensorRT in the cache folder.
        quantize: How an FP32 ONNX becomes FP16, FP8 or INT8; None: as `quantize` does by default. What stands beside
            INT8 follows from the version of TensorRT: FP32 for 8, FP16 for all later ones.
        use_cache: Take an identical plan that was built before, and keep this one.
    """

    config: BuildConfig = field(default_factory=BuildConfig)
    profile_given: bool = False
    backend: BackendChoice = "auto"
    targets: tuple[str, ...] = ()
    timing_cache: Path | None = None
    quantize: QuantizeOptions | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize.precision != self.config.precision:
            plan = self.config.precision or "as the graph is typed"
            raise InputError(
                f"the plan is to be {plan}, the graph {self.quantize.precision}", remedy="give both the same precision"
            )


@dataclass(frozen=True, slots=True, eq=False)
class BuildRequest:
    """One build, with all that its plan depends on.

    Attributes:
        source: The ONNX.
        config: With the profile that suits it, and the precision of the plan.
        library: The TensorRT that builds.
        gpu: The GPU that it builds on; None where there is none.
        targets: Compute capabilities that the plan is for.
        tactic_libraries: Libraries that TensorRT 8 takes kernels from; empty for later ones.
        quantize: How `source` becomes typed first; None where it is built as it is.
        timing_cache: The file that the caller names for TensorRT's timings.
    """

    source: Source
    config: BuildConfig
    library: Library
    gpu: Gpu | None
    targets: tuple[str, ...]
    tactic_libraries: TacticLibraries = field(default_factory=dict)
    quantize: QuantizeOptions | None = None
    timing_cache: Path | None = None

    def history_options(self) -> dict[str, str | int | float | bool | None]:
        """What the last entry of a passport's history says of the build, besides the passport's own fields."""
        return {name.lower(): version for name, version in self.tactic_libraries.items()}

    def describes(self, passport: PlanPassport, onnx_sha256: str) -> bool:
        """Whether a plan was built of this typed ONNX in the same way, by the same TensorRT, for the same GPU."""
        name, driver = (None, None) if self.gpu is None else (self.gpu.name, self.gpu.driver_version)
        options = passport.history[-1].options if passport.history else {}
        return (
            (passport.onnx_sha256, passport.config) == (onnx_sha256, self.config)
            and (passport.compute_capabilities, passport.gpu_name, passport.driver_version)
            == (self.targets, name, driver)
            and (passport.flavour, passport.tensorrt_version) == (self.library.flavour, self.library.version)
            and (passport.platform, options) == (platform_here(), self.history_options())
        )


def must_type(source: Source, options: BuildOptions) -> bool:
    """Whether the graph is FP32 and is to become another.

    Raises:
        BuildError: The graph is typed already, and as something else, or is to be calibrated again.
    """
    graph, wanted = source.precision, options.config.precision
    if wanted is None or wanted == graph:
        if options.quantize is not None:
            raise BuildError(
                f"{source.path}: is typed {graph} already, so there is nothing to calibrate",
                remedy="leave --calib and the other options of quantize out, or give the FP32 ONNX",
            )
        return False
    if graph != "fp32":
        raise BuildError(
            f"{source.path}: is typed {graph}, and {wanted} was asked for: a plan has the precision of its graph",
            remedy=f"leave --{wanted} out to build it as it is, or give the FP32 ONNX"
            + ("" if wanted == "fp32" else " that it was made of"),
        )
    return True


def choose_profile(source: Source, options: BuildOptions) -> ShapeProfile:
    """The batch and image sizes for a model: its fixed ones, where it has such.

    Raises:
        BuildError: What is fixed and the profile contradict each other, or the image size varies and none is given.
    """
    profile, spec = _choose_sizes(source, options.config.profile), source.spec
    batches = (profile.min_batch, profile.opt_batch, profile.max_batch)
    if spec.batch is None or (batches == (spec.batch,) * 3 and not profile.batches):
        return profile
    if profile.batches:
        raise BuildError(
            f"{source.path}: has the fixed batch {spec.batch}, and profiles for {', '.join(map(str, profile.batches))} "
            "are asked for",
            remedy="leave --profiles out; or export it again without --batch",
        )
    if options.profile_given or batches != (_USUAL.min_batch, _USUAL.opt_batch, _USUAL.max_batch):
        raise BuildError(
            f"{source.path}: has the fixed batch {spec.batch}, and batches of {profile.min_batch}, "
            f"{profile.opt_batch}, {profile.max_batch} are asked for",
            remedy=f"leave --min-batch, --opt-batch and --max-batch out, or give {spec.batch}; or export it again "
            f"without --batch",
        )
    return replace(profile, min_batch=spec.batch, opt_batch=spec.batch, max_batch=spec.batch)


def _choose_sizes(source: Source, profile: ShapeProfile) -> ShapeProfile:
    """The profile with sizes where the model's image size varies, without where it does not."""
    image, sizes = source.spec.input, (profile.min_size, profile.opt_size, profile.max_size)
    axes = image.image_axes or ()
    fixed = [size if isinstance(size := image.shape[axis], int) else None for axis in axes]
    varying = [str(size) for size in image.shape[1:] if not isinstance(size, int)]
    if len(varying) > fixed.count(None):
        raise BuildError(
            f"{source.path}: its input {image.shape} varies in more than batch, height and width",
            remedy="export it again with fixed sizes",
        )
    if varying and profile.opt_size is None:
        raise BuildError(
            f"{source.path}: accepts any image size ({', '.join(varying)}), and none is given",
            remedy="give --opt-size, and --min-size and --max-size where images of other sizes will come; or export it "
            "again without --dynamic-size",
        )
    wrong = [
        size
        for size in sizes
        if size and any(want not in (None, have) for want, have in zip(fixed, size, strict=False))
    ]
    if wrong:
        raise BuildError(
            f"{source.path}: takes images of {'×'.join(str(size or 'any') for size in fixed)} pixels, found "
            f"{wrong[0][0]}×{wrong[0][1]} asked for",
            remedy="leave --min-size, --opt-size and --max-size out, or export it again with --dynamic-size",
        )
    return profile if varying else replace(profile, min_size=None, opt_size=None, max_size=None)

"""How a plan is built, and which of these wishes contradict the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BuildError, InputError
from ..specs.values import BuildConfig, ModelSpec, Precision, ShapeProfile
from .library import BackendChoice

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
        timing_cache: TensorRT's timings; None: a file of this GPU and TensorRT in the cache folder.
        quantize: How an FP32 ONNX becomes FP16 or INT8; None: as `quantize` does by default. What stands beside INT8
            follows from the version of TensorRT: FP32 for 8, FP16 for all later ones.
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


def must_type(graph: Precision, options: BuildOptions, model: Path) -> bool:
    """Whether the graph is FP32 and is to become another.

    Args:
        graph: What it is typed as.
        options: What is asked for.
        model: For the message.

    Raises:
        BuildError: The graph is typed already, and as something else, or is to be calibrated again.
    """
    wanted = options.config.precision
    if wanted is None or wanted == graph:
        if options.quantize is not None:
            raise BuildError(
                f"{model}: is typed {graph} already, so there is nothing to calibrate",
                remedy="leave --calib and the other options of quantize out, or give the FP32 ONNX",
            )
        return False
    if graph != "fp32":
        raise BuildError(
            f"{model}: is typed {graph}, and {wanted} was asked for: a plan has the precision of its graph",
            remedy=f"leave --{wanted} out to build it as it is, or give the FP32 ONNX"
            + ("" if wanted == "fp32" else " that it was made of"),
        )
    return True


def choose_profile(spec: ModelSpec, options: BuildOptions, model: Path) -> ShapeProfile:
    """The profile for a model: its fixed batch, where it has one.

    Raises:
        BuildError: A fixed batch and the profile contradict each other, or the image size varies.
    """
    profile = options.config.profile
    varying = [str(size) for size in spec.input.shape[1:] if not isinstance(size, int)]
    if varying:
        raise BuildError(
            f"{model}: accepts any image size ({', '.join(varying)}), and a plan is built for one",
            remedy="export it again with --image-size and without --dynamic-size",
        )
    if spec.batch is None or profile == ShapeProfile(spec.batch, spec.batch, spec.batch):
        return profile
    if options.profile_given or profile != _USUAL:
        raise BuildError(
            f"{model}: has the fixed batch {spec.batch}, and batches of {profile.min_batch}, "
            f"{profile.opt_batch}, {profile.max_batch} are asked for",
            remedy=f"leave --min-batch, --opt-batch and --max-batch out, or give {spec.batch}; or export it again "
            f"without --batch",
        )
    return ShapeProfile(spec.batch, spec.batch, spec.batch)

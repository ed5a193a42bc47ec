"""The typed values that pass between stages, and the schemas of the artifacts.

A value is validated once, when it is made; the code that takes it trusts it. `docs/schemas/` has an example of every
artifact schema; `codec.decode` reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import InputError

METADATA_KEY = "repvgg_deploy"
"""Key of the one JSON value that an ONNX carries in `metadata_props`."""
METADATA_SCHEMA: Literal[1] = 1
PASSPORT_SCHEMA: Literal[1] = 1
CALIBRATION_SCHEMA: Literal[1] = 1
BlockKind = Literal["repvgg", "qarepvgg_v1", "qarepvgg_v2", "plain"]
SePosition = Literal["none", "before_relu", "after_relu"]
Form = Literal["training", "deploy"]
InputKind = Literal["float32", "uint8"]
OutputKind = Literal["logits", "probabilities", "top5"]
Precision = Literal["fp32", "fp16", "fp8", "int8"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


_MOST_PIXELS = 1 << 26  # of an input: what a file says of its images is never the measure of an allocation
_MOST_NUMBERS = 1 << 31  # of a tensor, where its metadata states every size


def _require(condition: bool, message: str, remedy: str) -> None:
    if not condition:
        raise InputError(message, remedy=remedy)


@dataclass(frozen=True, slots=True)
class VariantSpec:
    """The architecture of one RepVGG.

    Attributes:
        name: For people, such as `B2`.
        depths: Blocks of stages 1 to 4.
        widths: Channels of the stem and of stages 1 to 4.
        groups: Groups of each 3×3 convolution, stem first; length 1 + sum(depths).
        se: Where a squeeze-and-excitation block stands, if there is one.
        se_reduction: Channels divided by hidden channels of that block.
        strides: Strides of the stem and of the first block of stages 1 to 4.
        block: Kind of the training-form block: `repvgg` (Ding et al. 2021), `qarepvgg_v1` and `qarepvgg_v2`
            (Chu et al. 2024, https://arxiv.org/abs/2212.01593), `plain` (one Conv+BatchNorm, RepOpt-VGG,
            https://arxiv.org/abs/2205.15242).
        bn_eps: Epsilon of every BatchNorm.
        auxiliary_heads: Whether the training form has the three auxiliary classifiers of RepVGGplus.
    """

    name: str
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int, int]
    groups: tuple[int, ...]
    se: SePosition = "none"
    se_reduction: int = 16
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    block: BlockKind = "repvgg"
    num_classes: int = 1000
    bn_eps: float = 1e-5
    auxiliary_heads: bool = False

    def __post_init__(self) -> None:
        where, remedy = f"variant {self.name!r}: ", f"correct the definition of the variant {self.name!r}"
        positive = all(n >= 1 for n in (*self.depths, *self.widths, *self.groups, self.num_classes, self.se_reduction))
        _require(positive, f"{where}depths, widths, groups, num_classes and se_reduction must be at least 1", remedy)
        count = 1 + sum(self.depths)
        _require(
            len(self.groups) == count,
            f"{where}expected {count} groups (stem and {count - 1} blocks), found {len(self.groups)}",
            remedy,
        )
        _require(all(s in (1, 2) for s in self.strides), f"{where}strides must be 1 or 2, found {self.strides}", remedy)
        _require(0 < self.bn_eps < 1, f"{where}bn_eps must lie between 0 and 1, found {self.bn_eps}", remedy)
        for layer in self.layers():
            divides = layer.in_channels % layer.groups == 0 and layer.out_channels % layer.groups == 0
            channels = f"{layer.in_channels} → {layer.out_channels} channels of {layer.name}"
            _require(divides, f"{where}{layer.groups} groups do not divide {channels}", remedy)
        enough = self.se == "none" or min(self.widths) >= self.se_reduction
        _require(
            enough,
            f"{where}se_reduction {self.se_reduction} leaves no channel of the narrowest width {min(self.widths)}",
            remedy,
        )

    def layers(self) -> tuple[LayerSpec, ...]:
        """The 3×3 layers in order, stem first."""
        result = [LayerSpec("stage0", 0, 3, self.widths[0], self.strides[0], self.groups[0])]
        for stage, depth in enumerate(self.depths, start=1):
            for index in range(depth):
                stride = self.strides[stage] if index == 0 else 1
                groups = self.groups[len(result)]
                name, channels = f"stage{stage}.{index}", result[-1].out_channels
                result.append(LayerSpec(name, stage, channels, self.widths[stage], stride, groups))
        return tuple(result)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One 3×3 layer of a variant: its name in the official checkpoints, and its stage, where the stem is stage 0."""

    name: str
    stage: int
    in_channels: int
    out_channels: int
    stride: int
    groups: int

    @property
    def has_identity(self) -> bool:
        """Whether the training form has an identity branch: same channels and stride 1."""
        return self.in_channels == self.out_channels and self.stride == 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: Name in the ONNX graph and in the plan.
        dtype: As NumPy calls it.
        shape: One entry a dimension; a string names a dynamic one (`batch`).
        layout: `NCHW`, `NHWC`, `NC` (class scores), `NK` (top-k) or `other`.
    """

    name: str
    dtype: Literal["float32", "float16", "uint8", "int64", "int32"]
    shape: tuple[int | str, ...]
    layout: Literal["NCHW", "NHWC", "NC", "NK", "other"]

    def __post_init__(self) -> None:
        sizes = [size for size in self.shape if isinstance(size, int)]
        found = f"{self.name}: the shape {self.shape} has a size below 1, or more than 2^31 numbers"
        sound = min(sizes, default=1) >= 1 and math.prod(sizes) <= _MOST_NUMBERS
        _require(sound, found, "state sizes of at least 1, and name those that are dynamic")

    @property
    def image_axes(self) -> tuple[int, int] | None:
        """Where height and width stand in `shape`; None where the tensor is no image."""
        return {"NCHW": (2, 3), "NHWC": (1, 2)}.get(self.layout)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image file becomes the model's input.

    Attributes:
        mean: Per RGB channel, in 0–255 units.
        std: Per RGB channel, in 0–255 units.
        resize_short: The short side is resized to this many pixels first.
        crop: (height, width) of the centre crop, the model's input size.
        interpolation: The filter, as Pillow, timm and torchvision call it; always antialiased.
        in_graph: True: the graph casts and normalises itself (uint8 input); False: the caller gives normalised float32.
        box: (height, width) that the image is fitted to, no smaller than the crop; None: `resize_short`, for both.
        max_value: The value that is white in images of more than 8 bits: 4095 for 12-bit data in 16.
        fit: `cover`: the image keeps its shape and is resized until it just covers the box; `stretch`: both sides are
            resized to the box; `letterbox`: the image keeps its shape and is resized until it just fits into `crop`, in
            whose middle it stands (`resize_short` says nothing then).
        pad: Colour around a letterboxed image, RGB, 0–255.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_short: int
    crop: tuple[int, int]
    interpolation: Interpolation = "bilinear"
    in_graph: bool = False
    box: tuple[int, int] | None = None
    fit: Literal["cover", "stretch", "letterbox"] = "cover"
    max_value: int = 65535
    pad: tuple[int, int, int] = (114, 114, 114)

    def __post_init__(self) -> None:
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        found = f"mean and standard deviation must be finite, found {self.mean} and {self.std}"
        _require(finite, found, "give numbers in 0–255 units")
        found = f"standard deviation must be positive, found {self.std}"
        _require(all(s > 0 for s in self.std), found, "give --std in 0–255 units, such as 58.395")
        for size in (self.crop, self.box or self.crop):
            found = f"an image of {size[0]}×{size[1]} has more than {_MOST_PIXELS:,} pixels"
            _require(size[0] * size[1] <= _MOST_PIXELS, found, "give a smaller --image-size or --resize")
        positive = min(self.crop) >= 1 and self.resize_short >= 1
        _require(positive, f"image size must be positive, found {self.crop}", "give --image-size in pixels")
        found = f"the value that is white must be 1 to 65535, found {self.max_value}"
        _require(1 <= self.max_value <= 65535, found, "give --max-value 4095 for 12-bit data in 16 bits")
        covers = self.box is None or all(have >= want for have, want in zip(self.box, self.crop, strict=True))
        _require(
            covers,
            f"images are fitted to {self.box}, which is smaller than the crop {self.crop}",
            "give a larger --resize, or a smaller --image-size",
        )
        _require(self.fit != "stretch" or self.box is not None, "stretched to nothing", "give --resize HxW")
        letterboxed = self.fit == "letterbox"
        _require(not letterboxed or self.box is None, "letterboxed into crop, not into a box", "leave the box out")
        known = all(0 <= value <= 255 for value in self.pad)
        _require(known, f"the colour around a letterboxed image must be 0 to 255, found {self.pad}", "give 114,114,114")


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Mean and standard deviation of what the stem saw in training, per RGB channel, as it is normalised."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a caller must know of a model: `Engine.spec`.

    Attributes:
        input: The image input.
        outputs: One output (`logits` or `probabilities`), two (`scores`, `classes` of a top-5 model), or the stage
            outputs.
        kind: What the outputs are.
        preprocessing: How an image becomes the input; None where it is not known (a module of the user's own).
        labels: Names of the classes in order, or None.
        trained_on: What images are compared with; None where no BatchNorm told (deploy form).
    """

    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    kind: Literal["logits", "probabilities", "top5", "features", "module"]
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    trained_on: InputStatistics | None = None

    @property
    def batch(self) -> int | None:
        """The fixed batch size, or None where any batch is accepted."""
        size = self.input.shape[0]
        return size if isinstance(size, int) else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the input in pixels, the usual ones where any is accepted; None where none is known."""
        usual: tuple[int | None, int | None] = self.preprocessing.crop if self.preprocessing else (None, None)
        if self.input.image_axes is None:
            return None
        sizes = (self.input.shape[axis] for axis in self.input.image_axes)
        height, width = (size if isinstance(size, int) else own for size, own in zip(sizes, usual, strict=True))
        return None if height is None or width is None else (height, width)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a certificate.

    Attributes:
        name: What was compared with what, on which batch.
        error: Largest absolute difference, in units of `scale`.
        tolerance: What the error was allowed to be, in the same units.
        scale: Largest absolute value of the reference, in its own units.
    """

    name: str
    error: float
    tolerance: float
    scale: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its tolerance; False for NaN."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was verified before an ONNX was written.

    Attributes:
        reference: What the model was compared with.
        versions: Version of each tool that took part.
        facts: What the tensors of a checkpoint do not tell (strides, activation, pooling, epsilon), and who said it:
            the comparison takes it as given.
    """

    reference: str
    checks: tuple[Check, ...]
    versions: dict[str, str]
    facts: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there was at least one check and all passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where the weights came from: `weights` is their place in the file (`.`: all of it), `origin` the fetched name."""

    file: str
    sha256: str
    family: str
    form: Form
    weights: str | None = None
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What the BatchNorm layers say of each channel of one tensor: base64 of little-endian float32 (C,)."""

    mean: str
    std: str


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One stage that an ONNX went through. No clock time: equal inputs give equal files."""

    stage: str
    versions: dict[str, str]
    options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    parent_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The JSON value under `repvgg_deploy` in an ONNX's `metadata_props`; every stage copies and extends it.

    Attributes:
        schema: METADATA_SCHEMA.
        variant: The architecture, or None for a module of the user's own.
        source: The checkpoint, or None where the weights came from memory.
        statistics: By name of a tensor before its ReLU (`stage1.0.conv`) and of what a block reads (`stage1.0.input`,
            standard deviation 0 where it is not known); empty where the checkpoint was in deploy form.
        history: The stages, oldest first.
        notes: What was chosen or assumed of the checkpoint, such as strides, in sentences.
        content_sha256: Binds this value to the graph: see `files.onnx`.
    """

    schema: Literal[1]
    spec: ModelSpec
    variant: VariantSpec | None
    source: CheckpointSource | None
    certificate: Certificate
    statistics: dict[str, ChannelStatistics]
    history: tuple[HistoryEntry, ...]
    notes: tuple[str, ...] = ()
    content_sha256: str = ""


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """Smallest, usual and largest batch that a plan accepts, and the same of its images where their size varies.

    Attributes:
        min_size: (height, width) in pixels; None where the model has one size, as the next two are then.
        opt_size: What the plan is tuned for.
        max_size: Each side by itself: no image is higher or wider.
        batches: Up to `max_batch`; each has a profile and kernels of its own. Empty: one profile, for `opt_batch`.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32
    min_size: tuple[int, int] | None = None
    opt_size: tuple[int, int] | None = None
    max_size: tuple[int, int] | None = None
    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(
            1 <= self.min_batch <= self.opt_batch <= self.max_batch,
            f"profile: expected 1 ≤ min ≤ opt ≤ max, found {self.min_batch}, {self.opt_batch}, {self.max_batch}",
            "order --min-batch, --opt-batch and --max-batch",
        )
        batches = self.batches or (self.max_batch,)
        _require(
            list(batches) == sorted({*batches}) and batches[0] >= self.min_batch and batches[-1] == self.max_batch,
            f"profile: expected ascending batches from min up to max, {self.max_batch}, found {self.batches}",
            "give --profiles such as 1,8,32, or max_batch the last of batches",
        )
        sizes = (self.min_size, self.opt_size, self.max_size)
        sides = zip(*(size or (0, 0) for size in sizes), strict=True)
        found = ", ".join("none" if size is None else f"{size[0]}×{size[1]}" for size in sizes)
        _require(
            not any(sizes) or all(1 <= a <= b <= c for a, b, c in sides),
            f"profile: expected 1 ≤ min ≤ opt ≤ max of height and of width, found {found}",
            "give --min-size, --opt-size and --max-size in this order, as N or HxW",
        )

    def split(self) -> tuple[ShapeProfile, ...]:
        """One of each optimization profile."""
        return tuple(replace(self, opt_batch=one, max_batch=one, batches=()) for one in self.batches) or (self,)

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """The smallest, the usual and the largest shape of an input."""
        found = [[batch, *tensor.shape[1:]] for batch in (self.min_batch, self.opt_batch, self.max_batch)]
        for shape, size in zip(found, (self.min_size, self.opt_size, self.max_size), strict=True):
            for axis, side in zip(tensor.image_axes or (), size or (), strict=False):
                shape[axis] = side
            assert all(isinstance(side, int) for side in shape), "`build.options.choose_profile` asked for the sizes"
        return tuple(tuple(int(side) for side in shape) for shape in found)


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """All that the plan builder is given: one file of `engines/configs/`.

    Attributes:
        precision: None builds the graph as it is typed.
        workspace_bytes: Scratch memory that the builder may use.
        tf32: Whether FP32 convolutions may round their inputs to TF32.
        optimization_level: TensorRT's 0–5, None for its default.
        version_compatible: Plan runs on later TensorRT of the same major version.
        hardware_compatible: Plan runs on other GPUs of Ampere and later.
        sparse: Allow 2:4 sparse weights.
    """

    precision: Precision | None = None
    profile: ShapeProfile = ShapeProfile()
    workspace_bytes: int = 4 << 30
    tf32: bool = False
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        found = f"workspace_bytes must be positive, found {self.workspace_bytes}"
        _require(self.workspace_bytes > 0, found, "give --workspace such as 4GiB")
        known = self.optimization_level is None or 0 <= self.optimization_level <= 5
        found = f"optimization_level must be 0 to 5, found {self.optimization_level}"
        _require(known, found, "give --optimization-level 0 to 5")


@dataclass(frozen=True, slots=True)
class PlanPassport:
    """`NAME.plan.json`, beside a plan that stays as TensorRT wrote it.

    Attributes:
        schema: PASSPORT_SCHEMA.
        plan_sha256: Digest of the plan.
        onnx_sha256: Digest of the ONNX that it was built from.
        certificate: The ONNX's own.
        precision: What the layer inspector saw, or `not_inspected` where no GPU was there to ask.
        config: What the builder was given.
        tensorrt_version: Such as `10.9.0.34`.
        gpu_name: None where the build needed no GPU.
        compute_capabilities: GPUs that the plan was made for, such as `8.6`.
        driver_version: None where there was no driver.
        build_seconds: Wall time of the build.
        history: The ONNX's own, extended by the build.
        precision_shares: Of the multiply-accumulates by precision, 0 to 1, as the inspector saw; empty where none did.
        platform: Where it was built, such as `linux-x86_64`: plans do not cross platforms.
        variant: The architecture, or None for a module of the user's own.
    """

    schema: Literal[1]
    plan_sha256: str
    onnx_sha256: str
    spec: ModelSpec
    certificate: Certificate
    precision: Literal["fp32", "fp16", "fp8", "int8", "not_inspected"]
    config: BuildConfig
    flavour: Literal["tensorrt", "tensorrt_rtx"]
    tensorrt_version: str
    gpu_name: str | None
    compute_capabilities: tuple[str, ...]
    driver_version: str | None
    build_seconds: float
    history: tuple[HistoryEntry, ...] = ()
    precision_shares: dict[str, float] = field(default_factory=dict)
    platform: str | None = None
    variant: VariantSpec | None = None


@dataclass(frozen=True, slots=True)
class CalibrationProvenance:
    """Where synthetic calibration images come from: the JSON text in the array `provenance` of `NAME.calib.npz`.

    Attributes:
        schema: CALIBRATION_SCHEMA.
        onnx_sha256: The ONNX that the images were made for.
        checkpoint_sha256: The training-form checkpoint whose BatchNorm statistics they match; of a module in memory,
            its parameters and buffers.
        images: How many.
        seed: Seed of the random generator.
        steps: Optimisation steps per batch.
        loss: Final mean BatchNorm mismatch.
    """

    schema: Literal[1]
    onnx_sha256: str
    checkpoint_sha256: str
    method: Literal["bn_statistics"]
    images: int
    seed: int
    steps: int
    loss: float
    versions: dict[str, str]

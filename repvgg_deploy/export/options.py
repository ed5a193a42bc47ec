"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..specs.values import InputKind, ModelSpec, OutputKind, Preprocessing, TensorSpec, VariantSpec

OPSETS = (17, 18, 19, 20)
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9}
"""The IR version that came with each operator set. Source: the version table of https://github.com/onnx/onnx/blob/main/docs/Versioning.md."""
TOP_K = 5


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """The shape of the exported graph.

    Attributes:
        opset: 17 to 20.
        batch: A fixed batch size, or None for any.
        image_size: (height, width) in pixels; None takes the checkpoint's own, else 224 × 224.
        dynamic_size: Accept any height and width; `image_size` is then only the usual one.
        input: `float32`: normalised NCHW; `uint8`: NHWC RGB 0–255, cast and normalised in the graph.
        output: What is computed of the logits.
        features: Give the outputs of the four stages in place of the classifier's.
    """

    opset: int = 17
    batch: int | None = None
    image_size: tuple[int, int] | None = None
    dynamic_size: bool = False
    input: InputKind = "float32"
    output: OutputKind = "logits"
    features: bool = False

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise InputError(
                f"opset must be one of {', '.join(map(str, OPSETS))}, found {self.opset}",
                remedy="give --opset 17 (the default)",
            )
        if self.batch is not None and self.batch < 1:
            raise InputError(
                f"the fixed batch must be at least 1, found {self.batch}", remedy="give --batch 8, or --batch dynamic"
            )
        if self.image_size is not None and min(self.image_size) < 1:
            raise InputError(
                f"the image size must be positive, found {self.image_size}",
                remedy="give --image-size 224 or HEIGHTxWIDTH",
            )
        if self.features and self.output != "logits":
            raise InputError(
                f"--features gives stage outputs, so --output {self.output} cannot hold",
                remedy="leave one of the two out",
            )

    @property
    def kind(self) -> Literal["logits", "probabilities", "top5", "features"]:
        """What the outputs are."""
        return "features" if self.features else self.output


def model_spec(
    variant: VariantSpec, options: GraphOptions, preprocessing: Preprocessing, labels: tuple[str, ...] | None
) -> ModelSpec:
    """The inputs and outputs that an export with these options has.

    Raises:
        InputError: Probabilities of one class are asked for.
    """
    if variant.num_classes == 1 and options.output != "logits":
        raise InputError(
            f"{variant.name} has one class: its {options.output} are always 1",
            remedy="export with --output logits and apply the sigmoid that it was trained with",
        )
    batch: int | str = "batch" if options.batch is None else options.batch
    height, width = ("height", "width") if options.dynamic_size else preprocessing.crop
    if options.input == "uint8":
        image = TensorSpec("input", "uint8", (batch, height, width, 3), "NHWC")
    else:
        image = TensorSpec("input", "float32", (batch, 3, height, width), "NCHW")
    return ModelSpec(image, _outputs(variant, options, batch, preprocessing.crop), options.kind, preprocessing, labels)


def _outputs(
    variant: VariantSpec, options: GraphOptions, batch: int | str, size: tuple[int, int]
) -> tuple[TensorSpec, ...]:
    if options.features:
        return tuple(
            _stage_output(variant, None if options.dynamic_size else size, batch, stage) for stage in (1, 2, 3, 4)
        )
    if options.output == "top5":
        k = min(TOP_K, variant.num_classes)
        return (TensorSpec("scores", "float32", (batch, k), "NK"), TensorSpec("classes", "int64", (batch, k), "NK"))
    return (TensorSpec(options.output, "float32", (batch, variant.num_classes), "NC"),)


def _stage_output(variant: VariantSpec, size: tuple[int, int] | None, batch: int | str, stage: int) -> TensorSpec:
    name, channels = f"stage{stage}", variant.widths[stage]
    if size is None:
        return TensorSpec(name, "float32", (batch, channels, f"{name}_height", f"{name}_width"), "NCHW")
    height, width = size
    for stride in variant.strides[: stage + 1]:
        height, width = -(-height // stride), -(-width // stride)
    return TensorSpec(name, "float32", (batch, channels, height, width), "NCHW")

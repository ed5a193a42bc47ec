"""What an export is asked for, and which inputs and outputs that gives."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, replace

from ..errors import InputError
from ..specs.values import InputKind, Interpolation, ModelSpec, OutputKind, Preprocessing, TensorSpec, VariantSpec

IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9}
"""The operator sets that are exported to, and the IR version that came with each.

Source: the version table of https://github.com/onnx/onnx/blob/main/docs/Versioning.md
"""
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
        require_opset(self.opset)
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


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """How images are resized before the centre crop, stated by the user; what is None is as it was.

    Attributes:
        resize: The short side in pixels, or (height, width) to which both sides are stretched: torchvision's
            `Resize(256)` and `Resize((256, 256))`.
        crop_pct: The share of the resized image that is kept, more than 0 and at most 1: timm's. Both sides of the crop
            divided by it, rounded down, are covered.
        interpolation: Pillow's filter of that name.
        max_value: What is white in images of more than 8 bits.
        letterbox: The image keeps its shape and stands in the middle of the input, as detectors are trained; RGB,
            0–255: the colour around it.

    Raises:
        InputError: One is out of range, or more than one of `resize`, `crop_pct` and `letterbox` is given.

    Source: `transforms_imagenet_eval` of https://github.com/huggingface/pytorch-image-models; `Resize` of torchvision.
    """

    resize: int | tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    max_value: int | None = None
    letterbox: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        sizes = {"--resize": self.resize, "--crop-pct": self.crop_pct, "--letterbox": self.letterbox}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} cannot both hold", remedy="leave one of the two out")
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize,)
        if any(side is not None and side < 1 for side in sides):
            raise InputError(f"images cannot be resized to {self.resize}", remedy="give --resize 256 or 256x256")
        if self.crop_pct is not None and not 0.01 <= self.crop_pct <= 1:
            raise InputError(
                f"crop_pct is the share of the image that is kept, 0.01 to 1, found {self.crop_pct}",
                remedy="give --crop-pct 0.875, or --resize in pixels",
            )
        known = typing.get_args(Interpolation)
        if self.interpolation is not None and self.interpolation not in known:
            raise InputError(
                f"interpolation must be one of {', '.join(known)}, found {self.interpolation!r}",
                remedy="give the filter that the model was evaluated with, such as --interpolation bicubic",
            )

    def restate(self, preprocessing: Preprocessing) -> Preprocessing:
        """The preprocessing with what is stated here.

        Raises:
            InputError: The images would be smaller than the crop.
        """
        crop = preprocessing.crop
        if self.interpolation is not None:
            preprocessing = replace(preprocessing, interpolation=self.interpolation)
        if self.max_value is not None:
            preprocessing = replace(preprocessing, max_value=self.max_value)
        if self.letterbox is not None:
            return replace(preprocessing, resize_short=min(crop), box=None, fit="letterbox", pad=self.letterbox)
        if isinstance(self.resize, tuple):
            return replace(preprocessing, resize_short=min(self.resize), box=self.resize, fit="stretch")
        if self.crop_pct is not None:
            box = (math.floor(crop[0] / self.crop_pct), math.floor(crop[1] / self.crop_pct))
            shape = None if box[0] == box[1] else box
            return replace(preprocessing, resize_short=min(box), box=shape, fit="cover")
        if self.resize is not None:
            if self.resize < min(crop):
                raise InputError(
                    f"the short side would be resized to {self.resize}, which is smaller than the crop {crop}",
                    remedy=f"give --resize {min(crop)} or more, or a smaller --image-size",
                )
            return replace(preprocessing, resize_short=self.resize, box=None, fit="cover")
        return preprocessing


def require_opset(opset: int) -> None:
    """Refuses an operator set that is not exported to.

    Raises:
        InputError: It is another than 17 to 20.
    """
    if opset not in IR_VERSIONS:
        raise InputError(
            f"opset must be one of {', '.join(map(str, IR_VERSIONS))}, found {opset}",
            remedy="give 17, the default (--opset 17)",
        )


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
    kind = "features" if options.features else options.output
    outputs = _outputs(variant, options, batch, preprocessing.crop)
    return ModelSpec(image, outputs, kind, preprocessing, labels)


def _outputs(
    variant: VariantSpec, options: GraphOptions, batch: int | str, size: tuple[int, int]
) -> tuple[TensorSpec, ...]:
    if options.output == "top5":
        k = min(TOP_K, variant.num_classes)
        return (TensorSpec("scores", "float32", (batch, k), "NK"), TensorSpec("classes", "int64", (batch, k), "NK"))
    if not options.features:
        return (TensorSpec(options.output, "float32", (batch, variant.num_classes), "NC"),)
    height, width = (-(-side // variant.strides[0]) for side in size)
    outputs = []
    for stage in (1, 2, 3, 4):
        height, width = (-(-side // variant.strides[stage]) for side in (height, width))
        name = f"stage{stage}"
        sides = (f"{name}_height", f"{name}_width") if options.dynamic_size else (height, width)
        outputs.append(TensorSpec(name, "float32", (batch, variant.widths[stage], *sides), "NCHW"))
    return tuple(outputs)


def require_units_of_255(mean: tuple[float, float, float] | None, std: tuple[float, float, float] | None) -> None:
    """Refuses a mean or standard deviation of pixels from 0 to 1.

    torchvision and timm write 0.485 for 123.675: no gate could see it, for both forms would get the same wrong pixels.

    Raises:
        InputError: One is in units of 0–1.
    """
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and 0 < max(values) < 1:
            scaled = ",".join(f"{255 * value:.6g}" for value in values)
            raise InputError(
                f"{name} {values} is in units of 0–1, expected 0–255",
                remedy=f"give --{name} {scaled}, which is 255 times as much",
            )

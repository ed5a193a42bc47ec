"""Networks of the INT8 benchmark that are no chain, in training form: the sample detector, and A0 under a pyramid."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repvgg_deploy.export.module import ModuleOptions, export_module
from repvgg_deploy.images.decode import default_preprocessing, normalize
from repvgg_deploy.model.checkpoint.load import build_model, load_checkpoint
from repvgg_deploy.specs.values import Preprocessing

from .places import Subject

SEED = 0
CHANNELS = 64
CLASSES = 10


class Joint(nn.Module):
    """A 3×3 and a 1×1 branch, summed, then SiLU; of two maps, joined."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.square = nn.Sequential(nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS))
        self.point = nn.Sequential(nn.Conv2d(inputs, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS))

    def forward(self, *maps: Tensor) -> Tensor:
        x = torch.cat(maps, 1)
        return nn.functional.silu(self.square(x) + self.point(x))


class Head(nn.Module):
    """Four distances and a score for each class at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = Joint(CHANNELS)
        self.boxes, self.scores = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.joint(x)
        return self.boxes(x), self.scores(x)


class Pyramid(nn.Module):
    """The last three stages of a trained RepVGG, brought to one width, joined from coarse to fine; raw maps by name."""

    def __init__(self, backbone: nn.Module, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.SiLU())
            for width in widths
        )
        self.enlarge = nn.Upsample(scale_factor=2)
        self.joints = nn.ModuleList(Joint(2 * CHANNELS) for _ in range(2))
        self.heads = nn.ModuleList(Head() for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = self.backbone.stage_outputs(x)  # type: ignore[operator]  # torch takes it for a Tensor
        names = ("stage2", "stage3", "stage4")
        fine, middle, coarse = (lateral(stages[name]) for lateral, name in zip(self.laterals, names, strict=True))
        middle = self.joints[0](self.enlarge(coarse), middle)
        fine = self.joints[1](self.enlarge(middle), fine)
        outputs = {}
        for stride, head, features in zip((8, 16), self.heads, (fine, middle), strict=True):
            outputs[f"boxes_{stride}"], outputs[f"scores_{stride}"] = head(features)
        return outputs


def make_pyramid(subject: Subject, images: NDArray[np.uint8]) -> tuple[nn.Module, Preprocessing]:
    """Weights of pyramid and heads are drawn; their BatchNorms have seen these images, uint8 (N, H, W, 3)."""
    torch.manual_seed(SEED)
    checkpoint, preprocessing = load_checkpoint(subject.checkpoint), default_preprocessing(subject.size, subject.size)
    widths = checkpoint.spec.widths
    model = Pyramid(build_model(checkpoint), (widths[2], widths[3], widths[4])).eval()
    for module in (*model.laterals, *model.joints, *model.heads):
        module.train()
        for norm in (norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)):
            norm.momentum = None  # the mean over all batches
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.5)
    with torch.no_grad():
        for start in range(0, len(images), 64):
            model(torch.from_numpy(normalize(images[start : start + 64], preprocessing)))
    return model.eval(), preprocessing


def make_detector(subject: Subject) -> tuple[nn.Module, Preprocessing]:
    """The sample detector, as the example loads it."""
    from examples import detect

    activation = cast("detect.Activation", subject.checkpoint.stem.removeprefix("detector-"))
    return detect.load_network(activation), detect.PREPROCESSING


def make_network(subject: Subject, folder: Path) -> tuple[nn.Module, Preprocessing]:
    """A subject that is no chain, in training form; always the same of the same `calibration-0.npy`."""
    if subject.kind == "detector":
        return make_detector(subject)
    return make_pyramid(subject, np.load(folder / "calibration-0.npy"))


def export(subject: Subject, folder: Path) -> None:
    """Writes `fp32.onnx`; images must be there."""
    model, preprocessing = make_network(subject, folder)
    example = torch.from_numpy(normalize(np.load(folder / "evaluation.npy")[:1], preprocessing))
    options = ModuleOptions(preprocessing=preprocessing, force=True)
    export_module(model, example, folder / "fp32.onnx", options=options)

"""A small anchor-free detector in today's style, in training form: re-parameterizable blocks, a neck, two scales.

Written as such networks are written elsewhere, with names of its own: nothing here knows of this package.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

Activation: TypeAlias = Literal["silu", "relu"]
STRIDES = (8, 16)


def batch_normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, and its BatchNorm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def activate(activation: Activation) -> nn.Module:
    return nn.SiLU() if activation == "silu" else nn.ReLU()


class RepBlock(nn.Module):
    """3×3, 1×1 and, where the shape stays, identity: summed, then activated (Ding et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, activation: Activation, stride: int = 1) -> None:
        super().__init__()
        self.square = batch_normed(inputs, outputs, 3, stride)
        self.point = batch_normed(inputs, outputs, 1, stride)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.activation = activate(activation)

    def forward(self, x: Tensor) -> Tensor:
        total = self.square(x) + self.point(x)
        return cast(Tensor, self.activation(total if self.skip is None else total + self.skip(x)))


class DepthwiseBlock(nn.Module):
    """Depthwise 5×5, 3×3 and identity, summed and activated (as RepVGGDW of YOLOv10 and RepViT), then a 1×1."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        self.large = batch_normed(channels, channels, 5, groups=channels)
        self.small = batch_normed(channels, channels, 3, groups=channels)
        self.mix = batch_normed(channels, channels, 1)
        self.activation = activate(activation)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.activation(self.large(x) + self.small(x) + x)
        return cast(Tensor, self.activation(self.mix(spread)))


class Head(nn.Module):
    """One scale: four distances and a score for each class at each position."""

    def __init__(self, channels: int, classes: int, activation: Activation) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DepthwiseBlock(channels, activation) for _ in range(2))
        self.distances = nn.Conv2d(channels, 4, 1)
        self.scores = nn.Conv2d(channels, classes, 1)
        nn.init.constant_(cast(Tensor, self.scores.bias), -4.0)  # few positions hold anything

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.distances(self.blocks[0](x)), self.scores(self.blocks[1](x))


class Detector(nn.Module):
    """Float32 (N, 3, H, W), H and W multiples of 16 → raw maps by name, for strides 8 and 16.

    `boxes_8` (N, 4, H/8, W/8): logarithms of the distances from a position to left, top, right and bottom of its box,
    in strides; `scores_8` (N, classes, H/8, W/8): logits; `boxes_16` and `scores_16` likewise.

    Exponential, anchor points, suppression of doubles come after the network (`examples/detect.py`): what is left is
    convolutions, takes any size, and quantizes well; at this size NumPy does the rest in a tenth of a millisecond.
    """

    def __init__(self, classes: int = 10, activation: Activation = "silu") -> None:
        super().__init__()
        self.stem = nn.Sequential(RepBlock(3, 16, activation, 2), RepBlock(16, 32, activation, 2),
                                  RepBlock(32, 32, activation))  # fmt: skip
        self.fine = nn.Sequential(RepBlock(32, 48, activation, 2), *(RepBlock(48, 48, activation) for _ in range(2)))
        self.coarse = nn.Sequential(RepBlock(48, 64, activation, 2), RepBlock(64, 64, activation),
                                    DepthwiseBlock(64, activation))  # fmt: skip
        self.reduce = nn.Sequential(batch_normed(64, 48, 1), activate(activation))
        self.enlarge = nn.Upsample(scale_factor=2)
        self.merge_up = RepBlock(96, 48, activation)
        self.shrink = RepBlock(48, 48, activation, 2)
        self.merge_down = RepBlock(112, 64, activation)
        self.heads = nn.ModuleList(Head(channels, classes, activation) for channels in (48, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        fine = self.merge_up(torch.cat((self.enlarge(self.reduce(coarse)), fine), 1))
        coarse = self.merge_down(torch.cat((self.shrink(fine), coarse), 1))
        outputs = {}
        for stride, head, features in zip(STRIDES, self.heads, (fine, coarse), strict=True):
            outputs[f"boxes_{stride}"], outputs[f"scores_{stride}"] = head(features)
        return outputs

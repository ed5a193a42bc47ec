"""Blocks of re-parameterizable networks as torch modules, small, with names that mean nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHANNELS = 8


def conv_bn(kernel: int | tuple[int, int], *, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, and its BatchNorm."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = ((size[0] - 1) * dilation // 2, (size[1] - 1) * dilation // 2)
    conv = nn.Conv2d(CHANNELS, CHANNELS, size, stride, pads, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(CHANNELS))


class Sum(nn.Module):
    """Branches of one input, added."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.parts[0](x)
        for part in self.parts[1:]:
            total = total + part(x)
        return total


class Scaled(nn.Module):
    """A factor for all channels (of shape (1,)) or for each ((C, 1, 1)) behind a module."""

    def __init__(self, inner: nn.Module, *shape: int) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x)


class Mixer(nn.Module):
    """x + scale · (mixer(x) − norm(x)), as in FastViT."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Sum(conv_bn(3, groups=CHANNELS), conv_bn(1, groups=CHANNELS), nn.BatchNorm2d(CHANNELS))
        self.norm, self.scale = nn.BatchNorm2d(CHANNELS), nn.Parameter(torch.rand(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (self.mixer(x) - self.norm(x))


class BorderedNorm(nn.Module):
    """BatchNorm, then a border of what it gives for zeros, as in Diverse Branch Blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        x = nn.functional.pad(norm(x), (1, 1, 1, 1))
        value = border.view(1, -1, 1, 1)
        x[:, :, :1, :] = value
        x[:, :, -1:, :] = value
        x[:, :, :, :1] = value
        x[:, :, :, -1:] = value
        return x


class Gate(nn.Module):
    """Squeeze-and-excitation: not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.wide(torch.relu(self.narrow(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


def point(*, bias: bool = False) -> nn.Conv2d:
    """A 1×1 convolution."""
    return nn.Conv2d(CHANNELS, CHANNELS, 1, bias=bias)


def bn() -> nn.BatchNorm2d:
    """A BatchNorm."""
    return nn.BatchNorm2d(CHANNELS)


def diverse() -> nn.Module:
    """A Diverse Branch Block."""
    inner = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False)
    return Sum(
        conv_bn(3),
        conv_bn(1),
        nn.Sequential(point(), BorderedNorm(), inner, bn()),
        nn.Sequential(point(), BorderedNorm(), nn.AvgPool2d(3, 1), bn()),
    )


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "YOLOv6 QARepVGG v2": (
        lambda: nn.Sequential(Sum(conv_bn(3), point(), nn.Identity(), nn.AvgPool2d(3, 1, 1)), bn()),
        "3×3",
    ),
    "QARepVGG GRE": (lambda: Sum(conv_bn(3), nn.Sequential(Sum(point(), nn.Identity()), bn())), "3×3"),
    "PP-YOLOE+": (lambda: Sum(conv_bn(3), Scaled(conv_bn(1), 1)), "3×3"),
    "YOLO-NAS": (lambda: nn.Sequential(Sum(conv_bn(3), Scaled(point(bias=True), 1), nn.Identity()), bn()), "3×3"),
    "yolov7": (lambda: Sum(conv_bn(3), conv_bn(1), bn()), "3×3"),
    "RT-DETR of stride 2": (lambda: Sum(conv_bn(3, stride=2), conv_bn(1, stride=2)), "3×3"),
    "RepVGG in groups": (lambda: Sum(conv_bn(3, groups=4), conv_bn(1, groups=4), bn()), "3×3 in 4 groups"),
    "YOLOv10, RepViT": (
        lambda: nn.Sequential(Sum(conv_bn(7, groups=CHANNELS), conv_bn(3, groups=CHANNELS), nn.Identity()), bn()),
        "7×7 depthwise",
    ),
    "MobileOne depthwise": (
        lambda: Sum(*(conv_bn(3, groups=CHANNELS) for _ in range(3)), conv_bn(1, groups=CHANNELS), bn()),
        "3×3 depthwise",
    ),
    "MobileOne pointwise": (lambda: Sum(*(conv_bn(1) for _ in range(4)), bn()), "1×1"),
    "FastViT": (Mixer, "3×3 depthwise"),
    "RepGhost": (lambda: Sum(conv_bn(3, groups=CHANNELS), bn()), "3×3 depthwise"),
    "YOLOv6 LinearAdd": (
        lambda: nn.Sequential(
            Sum(
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                Scaled(point(), CHANNELS, 1, 1),
                Scaled(nn.Identity(), 1, CHANNELS, 1, 1),
            ),
            bn(),
        ),
        "3×3",
    ),
    "ACNet": (lambda: Sum(conv_bn(3), conv_bn((3, 1)), conv_bn((1, 3))), "3×3"),
    "UniRepLKNet": (
        lambda: Sum(
            conv_bn(9, groups=CHANNELS),
            conv_bn(5, groups=CHANNELS, dilation=2),
            conv_bn(3, groups=CHANNELS, dilation=4),
        ),
        "9×9 depthwise",
    ),
    "Diverse Branch Block": (diverse, "3×3"),
}
"""By the network, a block and the one kernel that it is."""


def make_module(block: nn.Module) -> nn.Module:
    """A block behind a convolution with a ReLU, and a SiLU behind it."""
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), block, nn.SiLU())

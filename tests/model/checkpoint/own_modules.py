"""A user's own RepVGG with the official names, whose every fact can be another; classes at the top, to be pickled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(ins: int, outs: int, size: int, stride: int, **options: object) -> nn.Sequential:
    """A convolution without bias, then BatchNorm, under the official names."""
    eps = options.pop("eps", 1e-5)
    module = nn.Sequential()
    options = {"padding": size // 2, "bias": False, **options}
    module.add_module("conv", nn.Conv2d(ins, outs, size, stride, **options))  # type: ignore[arg-type]
    module.add_module("bn", nn.BatchNorm2d(outs, eps=eps))  # type: ignore[arg-type]
    return module


class OwnBlock(nn.Module):
    """As the original's block."""

    def __init__(self, ins: int, outs: int, stride: int, act: nn.Module | None, **options: object) -> None:
        super().__init__()
        if act is not None:
            self.nonlinearity = act
        eps = options.get("eps", 1e-5)
        self.rbr_identity = nn.BatchNorm2d(ins, eps=eps) if ins == outs and stride == 1 else None  # type: ignore[arg-type]
        self.rbr_dense = conv_bn(ins, outs, 3, stride, **options)
        self.rbr_1x1 = conv_bn(ins, outs, 1, stride, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """float (N, C, H, W) → float (N, C', H', W')."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        y = y if self.rbr_identity is None else y + self.rbr_identity(x)
        act: Callable[[Tensor], Tensor] = getattr(self, "nonlinearity", functional.relu)
        return act(y)


class OwnRepVGG(nn.Module):
    """As the original's network, of six blocks."""

    def __init__(
        self,
        *,
        act: Callable[[], nn.Module | None] = nn.ReLU,
        strides: tuple[int, ...] = (2, 2, 2, 2, 2),
        pool: nn.Module | None = None,
        classes: int = 5,
        **options: object,
    ) -> None:
        super().__init__()
        widths, depths = (8, 8, 16, 16, 32), (1, 2, 2, 1)
        self.stage0 = OwnBlock(3, widths[0], strides[0], act(), **options)
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths[1:], depths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                blocks.append(OwnBlock(channels, width, strides[stage] if index == 0 else 1, act(), **options))
                channels = width
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2d(1) if pool is None else pool
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """float (N, 3, H, W) → float (N, classes)."""
        for name in ("stage0", "stage1", "stage2", "stage3", "stage4"):
            x = self.get_submodule(name)(x)
        result: Tensor = self.linear(self.gap(x).flatten(1))
        return result


class PyramidPool(nn.Module):
    """Means over grids of 1 and 2, summed: a pooling without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """float (N, C, H, W) → float (N, C, 1, 1)."""
        return functional.adaptive_avg_pool2d(x, 1) + functional.adaptive_max_pool2d(x, 2).mean((2, 3), keepdim=True)


class OwnConv(nn.Conv2d):
    """A convolution of the user's own: what it computes is not in the file."""


class InstanceNorm(nn.InstanceNorm2d):
    """Has the tensors of a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True, track_running_stats=True)


def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """The module in `eval()`, its weights and BatchNorm not the initial ones; variances as small as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(1e-3 + torch.rand(tensor.shape, generator=generator) * 1e-2)
        elif name.endswith(("bn.weight", "identity.weight")):
            tensor.copy_(0.05 + 0.05 * torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.2 if tensor.ndim < 2 else 0.1))
    return model.eval()

"""What the BatchNorm layers of a training form say of each convolution's output; after reparameterization it would be gone.

A BatchNorm's output has mean β and standard deviation |γ| over the training data. A block sums one such output a branch, so before the ReLU
mean = Σ β and, taking branches as independent, std = √Σ γ². QARepVGG states it directly: its last BatchNorm stands on the sum.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor, nn

from ..reference.block import TrainingBlock
from ..reference.network import RepVGG
from ..specs import ChannelStatistics


@torch.no_grad()
def collect_statistics(model: RepVGG) -> dict[str, ChannelStatistics]:
    """Per-channel mean and standard deviation before each ReLU (before SE), by the tensor's name in the exported graph (`stage1.0.conv`).

    Args:
        model: In training form.
    """
    found = {}
    for name, block in model.blocks().items():
        if isinstance(block, TrainingBlock):
            norms = [block.post_bn] if block.post_bn is not None else [branch.bn for branch in block.branches()]
            found[f"{name}.conv"] = _encode([norm for norm in norms if norm is not None])
    return found


def _encode(norms: list[nn.BatchNorm2d]) -> ChannelStatistics:
    mean = torch.stack([_or(norm.bias, 0.0, norm.num_features) for norm in norms]).sum(0)
    std = torch.stack([_or(norm.weight, 1.0, norm.num_features) ** 2 for norm in norms]).sum(0).sqrt()
    return ChannelStatistics(_base64(mean), _base64(std))


def _or(parameter: Tensor | None, default: float, size: int) -> Tensor:
    return torch.full((size,), default, dtype=torch.float64) if parameter is None else parameter.double()


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")

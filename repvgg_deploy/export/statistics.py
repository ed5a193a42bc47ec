"""What BatchNorm says of each convolution's output in a training form; after reparameterization it would be gone.

A BatchNorm's output has mean β and standard deviation |γ| over the training data. A block sums one such output a
branch, so before the ReLU mean = Σ β and, taking branches as independent, std = √Σ γ². QARepVGG states it directly: its
last BatchNorm stands on the sum.

Of a block's input more is known than those sums say: the identity branch's BatchNorm has seen it, so that its running
mean and variance are the input's own. Where there is no identity branch, the running mean of the 1×1 branch is the
convolution of the input's mean, and can be solved for it.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from ..model.block import ConvBN, TrainingBlock
from ..model.network import RepVGG
from ..specs.values import ChannelStatistics


@torch.no_grad()
def collect_statistics(model: RepVGG) -> dict[str, ChannelStatistics]:
    """Per-channel mean and standard deviation before each ReLU (before SE), and of each block's input.

    Args:
        model: In training form.

    Returns:
        By the tensor's name in the exported graph (`stage1.0.conv`), and `stage1.0.input` for what that convolution
        reads. An input's standard deviation is 0 where it is not known; an input of which nothing is known is left out.
    """
    found = {}
    for name, block in model.blocks().items():
        if isinstance(block, TrainingBlock):
            found[f"{name}.conv"] = _read_output(block)
            seen = _read_input(block)
            if seen is not None:
                found[f"{name}.input"] = seen
    return found


def _read_output(block: TrainingBlock) -> ChannelStatistics:
    norms = [block.post_bn] if block.post_bn is not None else [branch.bn for branch in block.branches()]
    known = [norm for norm in norms if norm is not None]
    mean = torch.stack([_or(norm.bias, 0.0, norm.num_features) for norm in known]).sum(0)
    std = torch.stack([_or(norm.weight, 1.0, norm.num_features) ** 2 for norm in known]).sum(0).sqrt()
    return ChannelStatistics(_base64(mean), _base64(std))


def _read_input(block: TrainingBlock) -> ChannelStatistics | None:
    norm = block.rbr_identity
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        return ChannelStatistics(_base64(norm.running_mean.double()), _base64(norm.running_var.double().sqrt()))
    branch, spec = block.rbr_1x1, block.spec
    if not isinstance(branch, ConvBN) or branch.bn.running_mean is None or spec.out_channels < spec.in_channels:
        return None
    weight = branch.conv.weight.double().reshape(spec.groups, -1, spec.in_channels // spec.groups)
    means = torch.linalg.lstsq(weight, branch.bn.running_mean.double().reshape(spec.groups, -1, 1)).solution
    if not torch.isfinite(means).all():  # a branch of zeros says nothing
        return None
    unknown = torch.zeros(spec.in_channels, dtype=torch.float64)
    return ChannelStatistics(_base64(means.reshape(-1)), _base64(unknown))


def _or(parameter: Tensor | None, default: float, size: int) -> Tensor:
    return torch.full((size,), default, dtype=torch.float64) if parameter is None else parameter.double()


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")

"""What BatchNorm says of each convolution's output in a training form; after reparameterization it would be gone.

A BatchNorm's output has mean β and standard deviation |γ| over the training data. A block sums one such output a
branch, so before the ReLU mean = Σ β and, taking branches as independent, std = √Σ γ². QARepVGG states it directly: its
last BatchNorm stands on the sum.

Of a block's input more is known than those sums say: the identity branch's BatchNorm has seen it, so that its running
mean and variance are the input's own. Where there is no identity branch, the running mean of the 1×1 branch is the
convolution of the input's mean, and can be solved for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.batchnorm import encode_channels, solve_images
from ..model.block import ConvBN, TrainingBlock
from ..model.network import RepVGG
from ..specs.values import ChannelStatistics, InputStatistics


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
    return ChannelStatistics(_encode(mean), _encode(std))


def _read_input(block: TrainingBlock) -> ChannelStatistics | None:
    norm = block.rbr_identity
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        return ChannelStatistics(_encode(norm.running_mean.double()), _encode(norm.running_var.double().sqrt()))
    branch, spec = block.rbr_1x1, block.spec
    if not isinstance(branch, ConvBN) or branch.bn.running_mean is None or spec.out_channels < spec.in_channels:
        return None
    weight = branch.conv.weight.double().reshape(spec.groups, -1, spec.in_channels // spec.groups)
    means = torch.linalg.lstsq(weight, branch.bn.running_mean.double().reshape(spec.groups, -1, 1)).solution
    if not torch.isfinite(means).all():  # a branch of zeros says nothing
        return None
    unknown = torch.zeros(spec.in_channels, dtype=torch.float64)
    return ChannelStatistics(_encode(means.reshape(-1)), _encode(unknown))


def read_trained_on(model: RepVGG) -> InputStatistics | None:
    """What the stem's BatchNorms have seen of the images, see `solve_images`; None where they do not tell."""
    stem = model.blocks()["stage0"]
    if not isinstance(stem, TrainingBlock):
        return None
    branch = stem.rbr_1x1 if isinstance(stem.rbr_1x1, ConvBN) else stem.rbr_dense
    if branch.bn.running_mean is None or branch.bn.running_var is None:
        return None
    seen = (branch.conv.weight.detach(), branch.bn.running_mean, branch.bn.running_var)
    return solve_images(*(tensor.double().numpy() for tensor in seen))


def _or(parameter: Tensor | None, default: float, size: int) -> Tensor:
    return torch.full((size,), default, dtype=torch.float64) if parameter is None else parameter.double()


def _encode(values: Tensor) -> str:
    return encode_channels(values.numpy())

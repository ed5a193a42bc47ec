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
from ..specs.values import ChannelStatistics, InputStatistics

_LEAST_CHANNELS = 12  # twice the numbers in the covariance of three channels: fewer equations would fit anything
_DECAYS = tuple(0.7 + 0.02 * step for step in range(15))
# Of what was never trained, or whose BatchNorms saw something else, nothing is told. Measured: the mean within 0.01 of
# a channel's deviation (0.07 without a 1×1 branch, of small images), the variances within 0.02 (0.09); of random
# numbers 0.1 and 0.2 at least.
_WORST_MEAN, _WORST_FIT = 0.08, 0.2
_DECIMALS = 6


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


@torch.no_grad()
def read_trained_on(model: RepVGG) -> InputStatistics | None:
    """What the stem's BatchNorms have seen of the images: mean and deviation per channel; None where they do not tell.

    A running mean is the convolution of the images' mean, and a running variance that of their covariance: equations
    for three and six numbers, one for each output channel, solved by least squares. The 1×1 branch gives them exactly;
    without one, the 3×3 branch does if the correlation of pixels falls with their distance d as ρ^d, with the ρ that
    fits best (0.9 to 1 of photographs). Measured in tests/export/test_statistics.py.
    """
    stem = model.blocks()["stage0"]
    if not isinstance(stem, TrainingBlock):
        return None
    branch = stem.rbr_1x1 if isinstance(stem.rbr_1x1, ConvBN) else stem.rbr_dense
    if branch.bn.running_mean is None or branch.bn.running_var is None:
        return None
    weight, variance = branch.conv.weight.double(), branch.bn.running_var.double()
    if weight.shape[1] != 3 or len(weight) < _LEAST_CHANNELS or not bool((variance > 0).all()):
        return None
    sums, means = weight.sum((2, 3)), branch.bn.running_mean.double().unsqueeze(1)
    mean = torch.linalg.lstsq(sums, means).solution
    if not float(((sums @ mean - means).flatten().abs() / variance.sqrt()).mean()) < _WORST_MEAN:
        return None
    tried = [_fit_covariance(weight, variance, decay) for decay in (_DECAYS if weight.shape[2] > 1 else (1.0,))]
    error, found = min(tried, key=lambda pair: pair[0])
    if not (error < _WORST_FIT and bool((found > 0).all())):
        return None
    # Least squares give other last digits where memory lies otherwise, and equal exports must be equal files.
    first, second, third = (
        (round(one, _DECIMALS), round(two, _DECIMALS))
        for one, two in zip(mean.flatten().tolist(), found.sqrt().tolist(), strict=True)
    )
    return InputStatistics((first[0], second[0], third[0]), (first[1], second[1], third[1]))


def _fit_covariance(weight: Tensor, variance: Tensor, decay: float) -> tuple[float, Tensor]:
    """Mean relative error of the fit, and the variance of each input channel, float64 (3,)."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in weight.shape[2:]))
    correlation = decay ** torch.cdist(places.reshape(-1, 2), places.reshape(-1, 2))
    flat = weight.reshape(len(weight), 3, -1)
    products = torch.einsum("cik,kl,cjl->cij", flat, correlation, flat)
    rows, columns = torch.triu_indices(3, 3)
    factors = torch.where(rows == columns, 1.0, 2.0).double()
    system = products[:, rows, columns] * factors / variance.unsqueeze(1)
    solution = torch.linalg.lstsq(system, torch.ones_like(variance).unsqueeze(1)).solution
    error = float((system @ solution - 1).abs().mean())
    return error, solution.flatten()[rows == columns]


def _or(parameter: Tensor | None, default: float, size: int) -> Tensor:
    return torch.full((size,), default, dtype=torch.float64) if parameter is None else parameter.double()


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")

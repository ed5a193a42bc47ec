"""The arithmetic of reparameterization: pure, differentiable functions on kernels and biases, in their dtype.

A convolution W·x + b, then a BatchNorm γ·(x − µ)/σ + β with σ = √(var + ε), equals (γ/σ)·W · x + β + (b − µ)·γ/σ.
Source: Ding et al. 2021, https://arxiv.org/abs/2101.03697, equations 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALL_ROWS = slice(None)
_CHUNK_ELEMENTS = 1 << 21  # float64 scratch of a few times 16 MiB, whatever the size of the layer


class KernelBias(NamedTuple):
    """A convolution as data: kernel (C', C/groups, kh, kw) and bias (C') or None for zero."""

    kernel: Tensor
    bias: Tensor | None


class Branch(NamedTuple):
    """One linear branch of a block, in this order.

    Attributes:
        kernel: (C', C/groups, kh, kw), or None for the identity.
        bias: (C').
        bn: BatchNorm.
        scale: What the branch is multiplied with: () or (1) for all channels, or (C').
    """

    kernel: Tensor | None
    bias: Tensor | None = None
    bn: nn.BatchNorm2d | None = None
    scale: Tensor | None = None


def fuse_bn(conv: KernelBias, bn: nn.BatchNorm2d, rows: slice = ALL_ROWS) -> KernelBias:
    """The convolution that equals `conv`, the output channels `rows` of one, followed by `bn` in `eval()`.

    A BatchNorm without affine parameters has γ = 1 and β = 0.
    """
    assert bn.running_mean is not None and bn.running_var is not None, (
        "a BatchNorm without running statistics has no eval() form"
    )
    dtype = conv.kernel.dtype
    mean = bn.running_mean[rows].to(dtype)
    scale = 1.0 / torch.sqrt(bn.running_var[rows].to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = bn.weight[rows].to(dtype) * scale
    bias = (-mean if conv.bias is None else conv.bias - mean) * scale
    if bn.bias is not None:
        bias = bn.bias[rows].to(dtype) + bias
    return KernelBias(conv.kernel * scale.reshape(-1, 1, 1, 1), bias)


def identity_kernel(channels: int, groups: int, like: Tensor, rows: slice = ALL_ROWS) -> KernelBias:
    """The output channels `rows` of the 1×1 kernel (channels, channels/groups, 1, 1) that returns its input.

    It has the dtype and the device of `like`. In a group, output channel i reads input channel i mod (channels/groups).
    """
    width = channels // groups
    index = torch.arange(channels, device=like.device)[rows]
    kernel = like.new_zeros((len(index), width, 1, 1))
    kernel[torch.arange(len(index), device=like.device), index % width, 0, 0] = 1.0
    return KernelBias(kernel, None)


def add_at_centre(kernel: Tensor, smaller: Tensor) -> Tensor:
    """A kernel plus a smaller one at its centre; where no gradient is recorded, `kernel` itself, changed."""
    (height, width), size = smaller.shape[2:], kernel.shape[2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    if torch.is_grad_enabled():
        return kernel + nn.functional.pad(smaller, [left, left, top, top])
    kernel[:, :, top : top + height, left : left + width] += smaller
    return kernel


def fold_branches(
    branches: Sequence[Branch],
    post_bn: nn.BatchNorm2d | None,
    *,
    groups: int,
    rows: slice = ALL_ROWS,
    dtype: torch.dtype,
) -> KernelBias:
    """The one convolution that the sum of `branches`, then `post_bn`, equals in `eval()`; its output channels `rows`.

    Args:
        branches: The first has the largest kernel (C', C/groups, kh, kw); all sizes are odd.
        post_bn: BatchNorm after the sum (QARepVGG), or None.
        groups: Of all branches.
        rows: Output channels, for work in pieces.
        dtype: In which to compute; the result has it.
    """
    dense = branches[0].kernel
    assert dense is not None, "the first branch is the convolution with the largest kernel"
    kernel, bias = _fold_branch(branches[0], dense, groups=groups, rows=rows, dtype=dtype)
    for branch in branches[1:]:
        part = _fold_branch(branch, dense, groups=groups, rows=rows, dtype=dtype)
        kernel = add_at_centre(kernel, part.kernel)
        bias = part.bias if bias is None else bias if part.bias is None else bias + part.bias
    total = KernelBias(kernel, bias)
    return total if post_bn is None else fuse_bn(total, post_bn, rows)


def _fold_branch(branch: Branch, dense: Tensor, *, groups: int, rows: slice, dtype: torch.dtype) -> KernelBias:
    if branch.kernel is None:
        part = identity_kernel(dense.shape[0], groups, dense.new_empty((), dtype=dtype), rows)
    else:
        part = KernelBias(branch.kernel[rows].to(dtype), None if branch.bias is None else branch.bias[rows].to(dtype))
    if branch.bn is None:
        part = KernelBias(part.kernel.clone(), part.bias)  # fresh memory, because add_at_centre may write to it
    else:
        part = fuse_bn(part, branch.bn, rows)
    if branch.scale is None:
        return part
    scale = branch.scale.to(dtype).flatten()
    scale = scale if scale.numel() == 1 else scale[rows]
    return KernelBias(part.kernel * scale.reshape(-1, 1, 1, 1), None if part.bias is None else part.bias * scale)


@torch.no_grad()
def fold_in_float64(
    branches: Sequence[Branch], post_bn: nn.BatchNorm2d | None, groups: int, *, result: torch.dtype = torch.float32
) -> KernelBias:
    """As `fold_branches` for all channels, computed in float64 piece by piece and rounded once to `result`.

    Returns:
        Kernel (C', C/groups, kh, kw) and bias (C'), fresh memory.
    """
    dense = branches[0].kernel
    assert dense is not None
    kernel = torch.empty(dense.shape, dtype=result, device=dense.device)
    bias = torch.zeros(dense.shape[0], dtype=result, device=dense.device)
    step = max(1, _CHUNK_ELEMENTS // dense[0].numel())
    for start in range(0, dense.shape[0], step):
        rows = slice(start, min(start + step, dense.shape[0]))
        piece = fold_branches(branches, post_bn, groups=groups, rows=rows, dtype=torch.float64)
        kernel[rows] = piece.kernel.to(result)
        if piece.bias is not None:
            bias[rows] = piece.bias.to(result)
    return KernelBias(kernel, bias)

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
    """A convolution as data: kernel (C', C/groups, k, k) and bias (C') or None for zero."""

    kernel: Tensor
    bias: Tensor | None


class Branch(NamedTuple):
    """One linear branch of a block: a 3×3 or 1×1 kernel (None: the identity), its bias, and the BatchNorm after it."""

    kernel: Tensor | None
    bias: Tensor | None = None
    bn: nn.BatchNorm2d | None = None


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


def add_at_centre(kernel: Tensor, pointwise: Tensor) -> Tensor:
    """A 3×3 kernel plus a 1×1 kernel at its centre tap; where no gradient is recorded, `kernel` itself, changed."""
    if torch.is_grad_enabled():
        return kernel + nn.functional.pad(pointwise, [1, 1, 1, 1])
    kernel[:, :, 1, 1] += pointwise[:, :, 0, 0]
    return kernel


def fold_branches(
    branches: Sequence[Branch],
    post_bn: nn.BatchNorm2d | None,
    *,
    groups: int,
    rows: slice = ALL_ROWS,
    dtype: torch.dtype,
) -> KernelBias:
    """The 3×3 convolution that the sum of `branches`, then `post_bn`, equals in `eval()`; its output channels `rows`.

    Args:
        branches: The first has a 3×3 kernel (C', C/groups, 3, 3).
        post_bn: BatchNorm after the sum (QARepVGG), or None.
        groups: Of all branches.
        rows: Output channels, for work in pieces.
        dtype: In which to compute; the result has it.
    """
    dense = branches[0].kernel
    assert dense is not None and dense.shape[-1] == 3, "the first branch is the 3×3 convolution"
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
        return KernelBias(part.kernel.clone(), part.bias)  # fresh memory, because add_at_centre may write to it
    return fuse_bn(part, branch.bn, rows)


@torch.no_grad()
def fold_in_float64(
    branches: Sequence[Branch], post_bn: nn.BatchNorm2d | None, groups: int, *, result: torch.dtype = torch.float32
) -> KernelBias:
    """As `fold_branches` for all channels, computed in float64 piece by piece and rounded once to `result`.

    Returns:
        Kernel (C', C/groups, 3, 3) and bias (C'), fresh memory.
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

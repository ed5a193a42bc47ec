"""The arithmetic of folding: property tests against the operations that it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repvgg_deploy.model import arithmetic
from repvgg_deploy.model.arithmetic import (
    Branch,
    KernelBias,
    add_at_centre,
    fold_branches,
    fold_in_float64,
    fuse_bn,
    identity_kernel,
)
from repvgg_deploy.model.block import BlockSpec
from tests.model.random_blocks import block_specs, build_block, randomise, relative_error

# Float64 rounds at 1e-16; sums of up to 9 · 16 products and three BatchNorms lose about two digits, cancellation two
# more.
FLOAT64_TOLERANCE = 1e-12


def bn(channels: int, seed: int = 0, *, affine: bool = True) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels, affine=affine).double().eval()
    if affine:
        randomise(module, seed)
    else:
        assert module.running_mean is not None and module.running_var is not None
        module.running_mean.normal_()
        module.running_var.uniform_(0.3, 3)
    return module


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    channels=st.integers(1, 6),
    width=st.integers(1, 6),
    size=st.sampled_from([1, 3]),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fuse_bn_equals_convolution_then_batchnorm(
    channels: int, width: int, size: int, bias: bool, affine: bool, seed: int
) -> None:
    kernel, offset = rand(channels, width, size, size, seed=seed), rand(channels, seed=seed + 1) if bias else None
    norm, x = bn(channels, seed, affine=affine), rand(2, width, 5, 4, seed=seed + 2)
    fused = fuse_bn(KernelBias(kernel, offset), norm)
    expected = norm(nn.functional.conv2d(x, kernel, offset, padding=size // 2))
    assert (
        relative_error(nn.functional.conv2d(x, fused.kernel, fused.bias, padding=size // 2), expected)
        < FLOAT64_TOLERANCE
    )


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_identity_kernel_returns_its_input(groups: int, width: int, seed: int) -> None:
    channels = groups * width
    x = rand(2, channels, 4, 5, seed=seed)
    kernel, bias = identity_kernel(channels, groups, x)
    assert bias is None
    assert torch.equal(nn.functional.conv2d(x, kernel, groups=groups), x)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_identity_kernel_of_some_rows_is_those_rows_of_the_whole(groups: int, width: int, data: st.DataObject) -> None:
    channels = groups * width
    start = data.draw(st.integers(0, channels - 1))
    rows = slice(start, data.draw(st.integers(start + 1, channels)))
    like = torch.zeros((), dtype=torch.float64)
    assert torch.equal(
        identity_kernel(channels, groups, like, rows).kernel, identity_kernel(channels, groups, like).kernel[rows]
    )


@pytest.mark.parametrize("recording", [True, False])
def test_add_at_centre_computes_the_sum_of_both_convolutions(recording: bool) -> None:
    kernel, pointwise, x = rand(4, 2, 3, 3), rand(4, 2, 1, 1, seed=2), rand(1, 4, 5, 5, seed=4)
    expected = nn.functional.conv2d(x, kernel, padding=1, groups=2) + nn.functional.conv2d(x, pointwise, groups=2)
    before = kernel.clone()
    with torch.set_grad_enabled(recording):
        total = add_at_centre(kernel, pointwise)
    assert relative_error(nn.functional.conv2d(x, total, padding=1, groups=2), expected) < FLOAT64_TOLERANCE
    assert torch.equal(kernel, before if recording else total)


@pytest.mark.parametrize("recording", [True, False])
@settings(max_examples=40)
@given(spec=block_specs())
def test_fold_never_changes_the_parameters_that_it_reads(spec: BlockSpec, recording: bool) -> None:
    block = build_block(spec)
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    with torch.set_grad_enabled(recording):
        fold_branches(block.branches(), block.post_bn, groups=spec.groups, dtype=torch.float64)
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())


@settings(max_examples=50)
@given(block_specs(), st.data())
def test_fold_of_some_rows_is_those_rows_of_the_whole(spec: BlockSpec, data: st.DataObject) -> None:
    block = build_block(spec)
    channels = block.spec.out_channels
    start = data.draw(st.integers(0, channels - 1))
    rows = slice(start, data.draw(st.integers(start + 1, channels)))
    whole, part = (
        fold_branches(block.branches(), block.post_bn, groups=block.spec.groups, rows=r, dtype=torch.float64)
        for r in (arithmetic.ALL_ROWS, rows)
    )
    assert part.bias is not None and whole.bias is not None
    assert torch.equal(part.kernel, whole.kernel[rows])
    assert torch.equal(part.bias, whole.bias[rows])


@settings(max_examples=50)
@given(block_specs(), st.integers(1, 40))
def test_fold_in_float64_in_any_piece_size_gives_the_same(spec: BlockSpec, chunk: int) -> None:
    block = build_block(spec, dtype=torch.float32)
    whole = fold_branches(block.branches(), block.post_bn, groups=block.spec.groups, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "_CHUNK_ELEMENTS", chunk)
        found = fold_in_float64(block.branches(), block.post_bn, block.spec.groups)
    assert found.kernel.dtype == torch.float32
    assert found.bias is not None and whole.bias is not None
    assert torch.equal(found.kernel, whole.kernel.float())
    assert torch.equal(found.bias, whole.bias.float())
    assert not found.kernel.requires_grad


def test_fold_in_float64_rounds_once_and_is_closer_than_float32() -> None:
    """Scales that cancel: the 3×3 branch and the identity nearly undo each other, which float32 folding loses."""
    torch.manual_seed(0)
    dense = rand(8, 8, 3, 3).float()
    dense[:, :, 1, 1] = -1e4 * torch.eye(8)
    one = (1e4 * torch.eye(8) + rand(8, 8, seed=5).float()).reshape(8, 8, 1, 1)
    norms = [bn(8, seed).float() for seed in (1, 1, 2)]
    branches = [Branch(dense, bn=norms[0]), Branch(one, bn=norms[1]), Branch(None, bn=norms[2])]
    truth = fold_branches(branches, None, groups=1, dtype=torch.float64).kernel
    once = relative_error(fold_in_float64(branches, None, 1).kernel.double(), truth)
    throughout = relative_error(fold_branches(branches, None, groups=1, dtype=torch.float32).kernel.double(), truth)
    assert once < 6e-8  # half a unit in the last place of float32
    assert throughout > 10 * once


def test_fold_of_a_lone_kernel_without_batchnorm_is_that_kernel() -> None:
    dense = rand(4, 2, 3, 3).float()
    folded = fold_in_float64([Branch(dense)], None, 2)
    assert torch.equal(folded.kernel, dense)
    assert folded.kernel.data_ptr() != dense.data_ptr()
    assert folded.bias is not None and torch.equal(folded.bias, torch.zeros(4))


def test_fold_into_half_precision_has_its_dtype() -> None:
    folded = fold_in_float64([Branch(rand(4, 2, 3, 3), bn=bn(4))], None, 2, result=torch.float16)
    assert folded.kernel.dtype == torch.float16
    assert folded.bias is not None and folded.bias.dtype == torch.float16


def test_batchnorm_without_running_statistics_is_our_own_bug() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(AssertionError, match="running statistics"):
        fuse_bn(KernelBias(rand(4, 4, 3, 3), None), norm)

"""One block: training form equals deploy form, gradients reach every branch, the custom L2 is the paper's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repvgg_deploy.model.block import BlockSpec, DeployBlock, SEBlock, TrainingBlock, fold_block
from tests.model.random_blocks import KINDS, block_specs, build_block, random_input, relative_error

# Float64 rounds at 1e-16; sums of up to 9 · 16 products and four BatchNorms, one with a scale of up to 1/√0.3, lose up
# to four digits.
FLOAT64_TOLERANCE = 1e-12
# Float32 rounds at 6e-8; the same loss.
FLOAT32_TOLERANCE = 5e-6


@torch.no_grad()
@settings(max_examples=80)
@given(spec=block_specs(), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 9))
def test_deploy_block_equals_training_block_in_float64(spec: BlockSpec, height: int, width: int, seed: int) -> None:
    block, x = build_block(spec, seed=seed), random_input(spec, height, width)
    deploy = fold_block(block)
    assert deploy.rbr_reparam.weight.dtype == torch.float64
    assert relative_error(deploy.linear(x), block.linear(x)) < FLOAT64_TOLERANCE
    # ReLU and sigmoid do not enlarge a difference, but may shrink what it is relative to: the scale is that of the
    # linear part.
    scale = float(block.linear(x).abs().max())
    assert float((deploy(x) - block(x)).abs().max()) < FLOAT64_TOLERANCE * max(scale, 1)


@torch.no_grad()
@settings(max_examples=40)
@given(spec=block_specs(), height=st.integers(1, 9), width=st.integers(1, 9))
def test_deploy_block_equals_training_block_in_float32(spec: BlockSpec, height: int, width: int) -> None:
    block, x = build_block(spec, dtype=torch.float32), random_input(spec, height, width, dtype=torch.float32)
    assert relative_error(fold_block(block).linear(x), block.linear(x)) < FLOAT32_TOLERANCE


@settings(max_examples=40)
@given(block_specs())
def test_equivalent_kernel_is_that_of_the_deploy_block(spec: BlockSpec) -> None:
    block = build_block(spec)
    kernel, bias = block.equivalent_kernel_bias()
    deploy = fold_block(block).rbr_reparam
    assert bias is not None and deploy.bias is not None
    assert torch.equal(kernel.detach(), deploy.weight)
    assert torch.equal(bias.detach(), deploy.bias)


@given(block_specs())
def test_gradient_of_the_equivalent_kernel_reaches_every_branch_parameter(spec: BlockSpec) -> None:
    block = build_block(spec)
    kernel, bias = block.equivalent_kernel_bias()
    assert bias is not None
    ((kernel**2).sum() + (bias**2).sum()).backward()
    for name, parameter in block.named_parameters():
        if not name.startswith(("se.", "post_se.")):
            assert parameter.grad is not None, name
            assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("kind", KINDS)
def test_equivalent_kernel_passes_gradcheck(kind: str) -> None:
    block = build_block(BlockSpec(2, 2, groups=2, has_identity=True, kind=kind))  # type: ignore[arg-type]
    names, values = zip(*block.named_parameters(), strict=True)

    def fold(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.func.functional_call(
            _Fold(block), {f"block.{n}": p for n, p in zip(names, parameters, strict=True)}, ()
        )
        return tuple(found)

    assert torch.autograd.gradcheck(fold, tuple(v.detach().clone().requires_grad_() for v in values))


class _Fold(nn.Module):
    """`equivalent_kernel_bias` as a forward, which is what `functional_call` calls."""

    def __init__(self, block: TrainingBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return tuple(self.block.equivalent_kernel_bias())  # type: ignore[return-value]


def custom_l2_in_numpy(block: Any) -> float:
    """The penalty as section 4.1 of the paper and the original's comments describe it, filter by filter."""
    k3, k1 = (branch.conv.weight.detach().numpy() for branch in (block.rbr_dense, block.rbr_1x1))
    t3, t1 = (
        bn.weight.detach().numpy() / np.sqrt(bn.running_var.numpy() + bn.eps)
        for bn in (block.rbr_dense.bn, block.rbr_1x1.bn)
    )
    total = 0.0
    for out in range(k3.shape[0]):
        for channel in range(k3.shape[1]):
            for i in range(3):
                for j in range(3):
                    if (i, j) != (1, 1):
                        total += k3[out, channel, i, j] ** 2
            equivalent = k3[out, channel, 1, 1] * t3[out] + k1[out, channel, 0, 0] * t1[out]
            total += equivalent**2 / (t3[out] ** 2 + t1[out] ** 2)
    return float(total)


@given(block_specs(kinds=("repvgg",)))
def test_custom_l2_equals_the_plain_formula(spec: BlockSpec) -> None:
    block = build_block(spec)
    # Two orders of summation in float64.
    assert block.custom_l2().item() == pytest.approx(custom_l2_in_numpy(block), rel=1e-12)


def test_custom_l2_gives_gradients_to_kernels_and_none_to_scales() -> None:
    block = build_block(BlockSpec(4, 4, has_identity=True))
    block.custom_l2().backward()
    with_gradient = {name for name, parameter in block.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"rbr_dense.conv.weight", "rbr_1x1.conv.weight"}


@pytest.mark.parametrize("kind", ["qarepvgg_v2", "plain"])
def test_custom_l2_of_other_kinds_is_the_plain_l2_of_their_kernels(kind: str) -> None:
    block = build_block(BlockSpec(4, 4, has_identity=True, kind=kind))  # type: ignore[arg-type]
    kernels = [parameter for parameter in block.parameters() if parameter.ndim == 4]
    assert block.custom_l2().item() == pytest.approx(
        sum(float((kernel.detach() ** 2).sum()) for kernel in kernels), rel=1e-12
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 7), (3, 9), (9, 3), (8, 4), (1, 1)])
def test_se_averages_the_whole_map_whatever_its_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    se, x = SEBlock(6, 2).double(), torch.randn(3, 6, *size, dtype=torch.float64)
    pooled = x.numpy().mean(axis=(2, 3))
    down, up = (conv.weight.numpy()[:, :, 0, 0] for conv in (se.down, se.up))
    hidden = np.maximum(pooled @ down.T + se.down.bias.numpy(), 0)  # type: ignore[union-attr]
    gate = 1 / (1 + np.exp(-(hidden @ up.T + se.up.bias.numpy())))  # type: ignore[union-attr]
    assert relative_error(se(x), x * torch.from_numpy(gate)[:, :, None, None]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("se", ["before_relu", "after_relu"])
def test_se_stands_where_it_is_said_to(se: str) -> None:
    spec = BlockSpec(4, 4, has_identity=True, se=se, se_channels=2)  # type: ignore[arg-type]
    block, x = build_block(spec), random_input(spec, 5, 6)
    linear = block.linear(x)
    expected = torch.relu(block.se(linear)) if se == "before_relu" else block.post_se(torch.relu(linear))
    assert torch.equal(block(x), expected)
    wrong = block.post_se(torch.relu(linear)) if se == "before_relu" else torch.relu(block.se(linear))
    assert relative_error(wrong, expected) > 1e-3


def test_qarepvgg_v2_has_a_bare_identity_and_a_last_batchnorm() -> None:
    spec = BlockSpec(4, 4, has_identity=True, kind="qarepvgg_v2")
    block, x = build_block(spec), random_input(spec, 5, 6)
    assert block.rbr_1x1 is not None
    expected = block.bn(block.rbr_dense(x) + block.rbr_1x1(x) + x)
    assert relative_error(block.linear(x), expected) < FLOAT64_TOLERANCE
    assert "rbr_identity.weight" not in block.state_dict()
    assert "rbr_1x1.weight" in block.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_deploy_block_has_the_same_keys_whatever_was_folded(kind: str) -> None:
    assert list(DeployBlock(BlockSpec(4, 4, kind=kind)).state_dict()) == ["rbr_reparam.weight", "rbr_reparam.bias"]  # type: ignore[arg-type]

"""Blocks and networks with random BatchNorm statistics and scales: with the initial ones an equality proves nothing."""

from __future__ import annotations

from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg_deploy.model.block import BlockSpec, TrainingBlock
from repvgg_deploy.specs.values import BlockKind, SePosition, VariantSpec

Module = TypeVar("Module", bound=nn.Module)
KINDS: tuple[BlockKind, ...] = ("repvgg", "qarepvgg_v1", "qarepvgg_v2", "plain")


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random statistics and scales, negative ones too, for every BatchNorm, and kernels that keep a signal alive."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.5, generator=generator)
            part.running_var.uniform_(0.3, 3, generator=generator)
            part.weight.uniform_(0.3, 1.3, generator=generator).mul_(
                torch.where(torch.rand(part.weight.shape, generator=generator) < 0.2, -1, 1)
            )
            part.bias.normal_(0, 0.3, generator=generator)
        elif isinstance(part, nn.Conv2d):
            # PyTorch's own initial weights let the signal die out within nine layers.
            part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5, generator=generator)


@torch.no_grad()
def train_on(model: Module, images: Tensor, *, draw_affine: bool = False) -> Module:
    """The model in `eval()`, running statistics those of one batch; with `draw_affine` no BatchNorm is the identity."""
    for part in model.train().modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
            if draw_affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias)
    model(images)
    return model.eval()


def build_block(spec: BlockSpec, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> TrainingBlock:
    """A block in `eval()` with random everything."""
    torch.manual_seed(seed)
    block = TrainingBlock(spec).to(dtype)
    randomise(block, seed)
    return block.eval()


@st.composite
def block_specs(draw: st.DrawFn, *, kinds: tuple[BlockKind, ...] = KINDS) -> BlockSpec:
    """Any block that a network can hold: groups, strides, dilation, identity, SE before and after the ReLU."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    before, after = (groups * draw(st.integers(1, 4)) for _ in range(2))
    stride, same = draw(st.sampled_from([1, 1, 2])), draw(st.booleans())
    after = before if same else after
    kind = draw(st.sampled_from(kinds))
    positions: list[SePosition] = ["none"] if kind.startswith("qarepvgg") else ["none", "before_relu", "after_relu"]
    return BlockSpec(
        in_channels=before,
        out_channels=after,
        stride=stride,
        dilation=draw(st.sampled_from([1, 1, 2, 4])),
        groups=groups,
        has_identity=before == after and stride == 1,
        kind=kind,
        se=draw(st.sampled_from(positions)),
        se_channels=draw(st.integers(1, 3)),
        bn_eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])),
    )


def random_input(
    spec: BlockSpec, height: int, width: int, *, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """float (2, C, height, width)."""
    return torch.randn(
        2, spec.in_channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference in units of the largest absolute expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-300))


def small_variant(kind: BlockKind = "repvgg", se: SePosition = "none", **changes: object) -> VariantSpec:
    """A network of nine layers with groups and odd widths."""
    fields: dict[str, object] = {
        "name": "small",
        "depths": (1, 2, 4, 1),
        "widths": (8, 8, 12, 16, 20),
        "groups": (1, 1, 2, 1, 2, 1, 4, 1, 1),
    }
    fields |= {"se": se, "se_reduction": 4, "block": kind, "num_classes": 5, **changes}
    return VariantSpec(**fields)  # type: ignore[arg-type]

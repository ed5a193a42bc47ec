from __future__ import annotations

import base64

import numpy as np
import torch

from repvgg_deploy.export.statistics import collect_statistics
from repvgg_deploy.model.block import TrainingBlock
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import BlockKind, ChannelStatistics
from tests.model.generated import random_model
from tests.model.random_blocks import KINDS, small_variant


def decode(statistics: ChannelStatistics) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.frombuffer(base64.b64decode(text), "<f4") for text in (statistics.mean, statistics.std))
    return mean, std


def test_collect_statistics_are_sums_of_the_branches() -> None:
    model = random_model(small_variant())
    found = collect_statistics(model)
    assert [name for name in found if name.endswith(".conv")] == [f"{name}.conv" for name in model.blocks()]
    block = model.blocks()["stage3.1"]
    assert isinstance(block, TrainingBlock) and block.rbr_identity is not None
    norms = [block.rbr_dense.bn, block.rbr_1x1.bn, block.rbr_identity]  # type: ignore[union-attr]
    mean, std = decode(found["stage3.1.conv"])
    np.testing.assert_allclose(mean, sum(n.bias.detach().numpy() for n in norms), rtol=1e-6)  # type: ignore[union-attr]
    np.testing.assert_allclose(std, np.sqrt(sum(n.weight.detach().numpy() ** 2 for n in norms)), rtol=1e-6)  # type: ignore[union-attr]


def test_collect_statistics_every_kind_has_every_channel() -> None:
    kinds: tuple[BlockKind, ...] = KINDS
    for kind in kinds:
        model = RepVGG(small_variant(kind))
        for name, block in model.blocks().items():
            mean, std = decode(collect_statistics(model)[f"{name}.conv"])
            assert mean.shape == std.shape == (block.spec.out_channels,)
            assert (std > 0).all()


def test_collect_statistics_describe_a_network_in_train_mode() -> None:
    """In train() each branch has mean β and standard deviation |γ| by construction; so has their sum, in the mean."""
    model = random_model(small_variant()).train()
    block = model.blocks()["stage2.0"]
    assert isinstance(block, TrainingBlock)
    with torch.no_grad():
        out = block.linear(torch.randn(16, block.spec.in_channels, 16, 16))
    mean, std = decode(collect_statistics(model)["stage2.0.conv"])
    np.testing.assert_allclose(out.mean((0, 2, 3)).numpy(), mean, atol=1e-4)
    # Branches that read the same input are correlated, so the spread is only near.
    ratio = out.std((0, 2, 3)).numpy() / std
    assert 0.5 < ratio.min() and ratio.max() < 1.5


def test_collect_statistics_of_an_input_are_its_own() -> None:
    """With running statistics taken from one batch, what is stated of each block's input is what that batch was."""
    model = random_model(small_variant())
    blocks = [block for block in model.blocks().values() if isinstance(block, TrainingBlock)]
    seen: dict[int, torch.Tensor] = {}
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: seen.__setitem__(id(module), args[0].detach()))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    found = collect_statistics(model)
    names = {id(block): name for name, block in model.blocks().items()}
    identities = 0
    for block in blocks:
        stated = found.get(f"{names[id(block)]}.input")
        if stated is None:
            assert block.spec.out_channels < block.spec.in_channels
            continue
        mean, std = decode(stated)
        truth = seen[id(block)].double()
        if block.rbr_identity is None:
            assert not std.any()
            # The 1×1 branch of stride 2 sees every other pixel.
            truth = truth[:, :, :: block.spec.stride, :: block.spec.stride]
            np.testing.assert_allclose(mean, truth.mean((0, 2, 3)).numpy(), atol=2e-3)
        else:
            identities += 1
            np.testing.assert_allclose(mean, truth.mean((0, 2, 3)).numpy(), atol=1e-5)
            np.testing.assert_allclose(std, truth.var((0, 2, 3)).sqrt().numpy(), rtol=1e-4, atol=1e-5)
    assert identities > 0

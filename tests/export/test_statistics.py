from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch

from repvgg_deploy.export.statistics import collect_statistics, read_trained_on
from repvgg_deploy.model.block import TrainingBlock
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import BlockKind, ChannelStatistics
from tests.model.generated import random_model
from tests.model.random_blocks import KINDS, small_variant, train_on


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
    train_on(model, torch.randn(4, 3, 64, 64))
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


def trained_stem(kind: BlockKind, images: torch.Tensor, width: int = 16) -> RepVGG:
    """Whose BatchNorms have seen these images."""
    model = random_model(replace(small_variant(block=kind), widths=(width, 16, 16, 24, 32)))
    return train_on(model, images)


def photos(count: int, size: int) -> torch.Tensor:
    """Smooth, as photographs are: neighbours alike, channels too; float32 (N, 3, H, W), no unit deviation."""
    rough = torch.randn(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(rough, size=(size, size), mode="bicubic")
    mixed = torch.einsum("dc,nchw->ndhw", torch.tensor([[1.0, 0.5, 0.1], [0.3, 1.0, 0.4], [0.2, 0.6, 0.7]]), smooth)
    return mixed * torch.tensor([0.5, 1.2, 2.0]).reshape(1, 3, 1, 1) + torch.tensor([0.4, -0.8, 1.5]).reshape(
        1, 3, 1, 1
    )


# The 1×1 branch is exact but for the pixels that its stride leaves out; without one, the correlation of neighbours is a
# model of photographs, and the border is zero: within a quarter, where a wrong range is off by a factor of four.
@pytest.mark.parametrize(
    ("kind", "near"), [("repvgg", 0.05), ("qarepvgg_v1", 0.05), ("qarepvgg_v2", 0.25), ("plain", 0.25)]
)
def test_read_trained_on_is_the_mean_and_deviation_of_the_images(kind: BlockKind, near: float) -> None:
    images = photos(8, 64)
    found = read_trained_on(trained_stem(kind, images))
    assert found is not None
    std = images.std((0, 2, 3)).numpy()
    np.testing.assert_allclose(found.std, std, rtol=near)
    np.testing.assert_allclose(found.mean, images.mean((0, 2, 3)).numpy(), atol=near * float(std.max()))


def test_read_trained_on_tells_nothing_of_random_statistics_and_of_few_channels() -> None:
    for seed in range(5):
        model = random_model(replace(small_variant(), widths=(16, 16, 16, 24, 32)), seed=seed)
        assert read_trained_on(model) is None
    assert read_trained_on(trained_stem("repvgg", photos(4, 32), width=8)) is None


def test_read_trained_on_gives_the_same_where_the_last_digits_of_the_sums_differ() -> None:
    # Least squares depend on where memory lies; here the last bits are changed on purpose.
    model = trained_stem("repvgg", photos(16, 32))
    first = read_trained_on(model)
    assert first is not None
    branch = model.blocks()["stage0"].rbr_1x1
    branch.bn.running_mean = branch.bn.running_mean.double() * (1 + 1e-15)
    branch.bn.running_var = branch.bn.running_var.double() * (1 + 1e-15)
    assert read_trained_on(model) == first

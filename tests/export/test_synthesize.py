"""Images from BatchNorm statistics: they match them, for every kind of block, and the gradient is the true one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repvgg_deploy.errors import CalibrationError, InputError
from repvgg_deploy.export.synthesize import (
    ModuleMismatch,
    StatisticsMismatch,
    SynthesisOptions,
    SynthesisPlan,
    image_cost,
    plan_synthesis,
    synthesize_images,
)
from repvgg_deploy.images.decode import default_preprocessing
from repvgg_deploy.model.block import TrainingBlock
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import Preprocessing, VariantSpec
from repvgg_deploy.specs.variants import PUBLISHED
from tests.model.generated import SMALL_PLUS, random_model
from tests.model.random_blocks import small_variant

VARIANTS: dict[str, VariantSpec] = {
    "repvgg": small_variant(),
    "qarepvgg_v1": small_variant("qarepvgg_v1"),
    "qarepvgg_v2": small_variant("qarepvgg_v2"),
    "plain": small_variant("plain", groups=(1,) * 9),
    "se_before": small_variant(se="before_relu"),
    "se_after_and_auxiliary": SMALL_PLUS,
}
SIZE = default_preprocessing(32, 32)


def hooked_mismatch(model: RepVGG, images: Tensor) -> Tensor:
    """The same by definition: hooks on the BatchNorm modules of the blocks, and torch's own gradient."""
    losses: list[Tensor] = []

    def record(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        std = (norm.running_var + norm.eps).sqrt()
        losses.append(
            ((mean - norm.running_mean) / std).square().mean()
            + ((variance + norm.eps).sqrt() / std - 1).square().mean()
        )

    norms = [
        module for block in model.blocks().values() for module in block.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    handles = [norm.register_forward_hook(record) for norm in norms]
    model(images)
    for handle in handles:
        handle.remove()
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", VARIANTS)
def test_mismatch_and_its_gradient_are_those_of_hooks_on_the_batchnorm_modules(name: str) -> None:
    model = random_model(VARIANTS[name]).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected = hooked_mismatch(model, theirs)
    expected.backward()  # type: ignore[no-untyped-call]
    # The initial values of the sum are float64 too, because everything takes its dtype from the images or the model.
    found = StatisticsMismatch(model)(ours)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["repvgg", "qarepvgg_v2", "se_before"])
def test_mismatch_of_a_module_is_that_of_the_network_that_it_is(name: str) -> None:
    model = random_model(VARIANTS[name]).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected = StatisticsMismatch(model)(theirs)
    expected.backward()
    with ModuleMismatch(model) as mismatch:
        found = mismatch(ours)
    found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)
    assert not any(module._forward_pre_hooks for module in model.modules())


class FrozenNorm(nn.Module):
    """As torchvision's and RT-DETR's: buffers only, and no class of torch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return (x - mean.reshape(1, -1, 1, 1)) * (variance + self.eps).rsqrt().reshape(1, -1, 1, 1)


class SharedHead(nn.Module):
    """One BatchNorm for two scales, as in heads that are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), FrozenNorm(8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.norm(self.conv(x)), self.norm(self.conv(x[:, :, ::2, ::2]))]


def test_mismatch_of_a_batchnorm_for_two_scales_is_of_their_mean_and_variance_averaged() -> None:
    torch.manual_seed(0)
    model, images = SharedHead(), torch.randn(2, 3, 16, 16)
    parts = [torch.var_mean(model.conv(x), (0, 2, 3), correction=0) for x in (images, images[:, :, ::2, ::2])]
    variance, mean = (sum(part) / 2 for part in zip(*parts, strict=True))
    norm = model.norm
    std = (norm.running_var + norm.eps).sqrt()
    expected = ((mean - norm.running_mean) / std).square() + ((variance + norm.eps).sqrt() / std - 1).square()
    with ModuleMismatch(model) as mismatch:
        torch.testing.assert_close(mismatch(images), expected.mean())


def test_cost_of_a_module_is_near_that_of_the_variant_that_it_is() -> None:
    spec = small_variant()
    with ModuleMismatch(random_model(spec)) as mismatch:
        found = mismatch.measure_cost((64, 64))
    known = image_cost(spec, (64, 64))
    # Its 1×1 branches are a ninth of the work more; a layer keeps branches, sum and activation.
    assert 1 < found.macs / known.macs < 1.3
    assert 0.7 < found.kept_bytes / known.kept_bytes < 2.5


class Detached(SharedHead):
    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x.detach())


class Bypassed(SharedHead):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x)]


@pytest.mark.parametrize("kind", [Detached, Bypassed])
def test_module_whose_batchnorms_do_not_see_the_image_is_refused(kind: type[nn.Module]) -> None:
    with ModuleMismatch(kind()) as mismatch, pytest.raises(CalibrationError, match=f"{kind.__name__} cannot be follow"):
        mismatch.measure_cost((16, 16))


@torch.no_grad()
def train_statistics(model: RepVGG, images: Tensor) -> None:
    """Running statistics become those of `images`, as training would leave them."""
    for block in model.blocks().values():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # cumulative average: of one batch, the batch itself
                module.reset_running_stats()
    model.train()
    for start in range(0, len(images), 32):
        model(images[start : start + 32])
    model.eval()


def stripes(count: int, *, seed: int = 0) -> Tensor:
    """Images that are not noise: coloured gratings of random direction and period, normalised."""
    generator = torch.Generator().manual_seed(seed)
    angle, period, phase = (torch.rand((count, 1, 1, 1), generator=generator) for _ in range(3))
    rows, columns = torch.arange(32.0).reshape(1, 1, -1, 1), torch.arange(32.0).reshape(1, 1, 1, -1)
    wave = torch.sin(
        (rows * torch.cos(angle * 3.2) + columns * torch.sin(angle * 3.2)) / (1 + 4 * period) + 6.3 * phase
    )
    return wave * torch.rand((count, 3, 1, 1), generator=generator) + 0.3 * torch.randn(
        (count, 3, 1, 1), generator=generator
    )


def learned(variant: VariantSpec) -> RepVGG:
    model = random_model(variant)
    train_statistics(model, stripes(128))
    return model


def synthesise(
    model: RepVGG, *, images: int = 16, steps: int = 60, seed: int = 0, preprocessing: Preprocessing = SIZE
) -> tuple[np.ndarray, float]:
    """One batch and its mismatch; without steps, as it begins."""
    plan = SynthesisPlan((images,), steps)
    return next(synthesize_images(StatisticsMismatch(model), preprocessing, plan, seed=seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_synthesised_images_match_statistics_far_better_than_their_start(name: str) -> None:
    model = learned(VARIANTS[name])
    _, before = synthesise(model, steps=0)
    images, after = synthesise(model)
    assert images.dtype == np.uint8 and images.shape == (16, 32, 32, 3)
    # A fifth is what the slowest kind keeps with a third of the usual steps; noise alone stays at 1.
    assert after < 0.2 * before, (before, after)


@torch.no_grad()
def test_synthesised_images_have_the_means_and_deviations_of_the_running_statistics() -> None:
    model = learned(VARIANTS["repvgg"])
    images, _ = synthesise(model, steps=150)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) - torch.tensor(SIZE.mean).reshape(3, 1, 1)) / torch.tensor(
        SIZE.std
    ).reshape(3, 1, 1)
    shifts, ratios = [], []
    for block in model.blocks().values():
        assert isinstance(block, TrainingBlock)
        y = block.rbr_dense.conv(x)
        norm = block.rbr_dense.bn
        shifts.append((y.mean((0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt())
        ratios.append(y.std((0, 2, 3)) / norm.running_var.sqrt())
        x = block(x)
    # In units of a channel's standard deviation, over all channels of all 3×3 convolutions.
    assert float(torch.cat(shifts).abs().mean()) < 0.1
    assert float((torch.cat(ratios) - 1).abs().mean()) < 0.1


def test_synthesis_is_deterministic_and_seeds_and_batches_differ() -> None:
    model = learned(VARIANTS["repvgg"])
    one, again, other = (synthesise(model, images=4, steps=5, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5
    both = [
        images for images, _ in synthesize_images(StatisticsMismatch(model), SIZE, SynthesisPlan((4, 4), 0), seed=0)
    ]
    assert (both[0] != both[1]).mean() > 0.5


def test_synthesis_with_another_normalisation_makes_pixels_of_the_same_kind() -> None:
    """A model that takes pixels / 255: what is optimised is the same."""
    model = learned(VARIANTS["repvgg"])
    plain = dataclasses.replace(SIZE, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    pixels, _ = synthesise(model, images=8, steps=0, preprocessing=plain)
    assert 80 < pixels.mean() < 160 and pixels.std() > 30


def test_synthesis_from_deploy_form_is_refused() -> None:
    with pytest.raises(CalibrationError, match="deploy form"):
        StatisticsMismatch(random_model(small_variant(), "deploy"))


def test_synthesis_in_a_network_that_overflows_is_refused() -> None:
    model = random_model(VARIANTS["repvgg"])
    with torch.no_grad():
        for block in model.blocks().values():
            block.rbr_dense.bn.weight.fill_(1e12)
    with pytest.raises(CalibrationError, match="leave float32"):
        synthesise(model, images=2, steps=1)


@pytest.mark.parametrize(
    "change", [{"images": 0}, {"images": -1}, {"images": 10**9}, {"steps": 0}, {"seed": -1}, {"seed": 1 << 63}]
)
def test_synthesis_options_that_cannot_hold_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        SynthesisOptions(**change)


def test_plan_chooses_less_for_larger_networks_and_keeps_batches_even() -> None:
    small = plan_synthesis(image_cost(PUBLISHED["A0"], (128, 128)), SynthesisOptions())
    large = plan_synthesis(image_cost(PUBLISHED["B2"], (224, 224)), SynthesisOptions())
    assert small.images >= 64 and small.images * small.steps > large.images * large.steps
    assert large.images >= 8
    assert plan_synthesis(image_cost(PUBLISHED["A0"], (128, 128)), SynthesisOptions(images=100, steps=7)).batches == (
        50,
        50,
    )
    assert plan_synthesis(image_cost(PUBLISHED["A0"], (128, 128)), SynthesisOptions(images=5)).batches == (5,)
    for spec, size in (
        (PUBLISHED["B2"], (224, 224)),
        (PUBLISHED["D2se"], (224, 224)),
        (PUBLISHED["RepVGGplus-L2pse"], (320, 320)),
    ):
        plan = plan_synthesis(image_cost(spec, size), SynthesisOptions(images=512))
        assert (
            max(plan.batches) * image_cost(spec, size).kept_bytes <= 3 << 30
        )  # of the 6 GB that a large network may take; its weights are another 1
        assert plan.images == 512


def test_plan_fills_a_fixed_batch() -> None:
    spec = PUBLISHED["A0"]
    assert plan_synthesis(image_cost(spec, (128, 128)), SynthesisOptions(), multiple=48).images % 48 == 0
    with pytest.raises(InputError, match="fixed batch of 48") as caught:
        plan_synthesis(image_cost(spec, (128, 128)), SynthesisOptions(images=50), multiple=48)
    assert "--synthetic-calibration 96" in caught.value.remedy

"""Images from BatchNorm statistics alone: a batch is optimised until every BatchNorm of the training form sees what it saw in training.

A batch starts as noise with the spectrum and the colours of photographs (power 1/f², grey more than colour), and takes
steps of Adam with a cosine rate, kept within the range of a pixel. Where it starts decides much: from white noise, even
smoothed, the first layers do not come near their statistics in many times the steps. What is optimised is (pixel −
118)/58 or so, whatever normalisation the model has.

Every step is a function from one `BatchState` to the next, so that an interruption at any moment loses nothing and a
state can be stored and resumed.

Source: Cai et al. 2020, ZeroQ, https://arxiv.org/abs/2001.00281; Yin et al. 2020, DeepInversion,
https://arxiv.org/abs/1912.08795; Field 1987, doi:10.1364/JOSAA.4.002379, for the spectrum; Kingma & Ba 2015,
https://arxiv.org/abs/1412.6980, for Adam.

How far images are from what the BatchNorm layers of a training form saw in training, with its gradient.

For every channel of every BatchNorm's input: ((mean − µ)/σ)² + (std/σ − 1)², averaged over channels, then over
BatchNorms. µ and σ² are the running statistics, mean and std² those over the batch and all positions; ε stands under
both roots, so that a channel that hardly varies counts for little.
Source: Cai et al. 2020, ZeroQ, https://arxiv.org/abs/2001.00281, with every branch of every block in place of one
BatchNorm a layer.

A block is computed once for both purposes, its statistics and what the next block sees: the branches' raw outputs, then
one affine sum of them (`_Sum`). That takes a third of the time and half the memory of hooks on the BatchNorm modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import CalibrationError, InputError
from ..images.decode import IMAGENET_MEAN, IMAGENET_STD
from ..model.arithmetic import Branch
from ..model.block import BlockSpec, TrainingBlock
from ..model.network import RepVGG
from ..specs.values import Preprocessing, VariantSpec
from ..specs.variants import count_macs


@dataclass(frozen=True, slots=True)
class _Term:
    """One summand: `scale`, (C,), times the output of `kernel` (None: of the identity), and what BatchNorm says of that output, if there is one."""

    kernel: Tensor | None
    scale: Tensor
    target: _Target | None


@dataclass(frozen=True, slots=True)
class _Target:
    """Running statistics: float32 mean (C,), std (C,) with ε under its root."""

    mean: Tensor
    std: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """A block as data: Σ terms + bias, then (QARepVGG) `post` and its bias, then `finish`."""

    spec: BlockSpec
    terms: tuple[_Term, ...]
    bias: Tensor
    post: tuple[_Term, Tensor] | None
    finish: Callable[[Tensor], Tensor]

    @property
    def norms(self) -> int:
        return sum(term.target is not None for term in self.terms) + (self.post is not None)


class StatisticsMismatch:
    """The mismatch of a model's BatchNorm layers, as a differentiable function of images.

    Args:
        model: In training form; its weights are no longer differentiable afterwards.

    Raises:
        CalibrationError: The model is in deploy form: it has no BatchNorm.
    """

    def __init__(self, model: RepVGG) -> None:
        blocks = [block for block in model.blocks().values() if isinstance(block, TrainingBlock)]
        if model.form != "training" or not blocks:
            raise CalibrationError(
                f"{model.spec.name} is in deploy form: the BatchNorm statistics that images could be synthesised "
                f"from are gone",
                remedy="give the training-form checkpoint, or calibrate with real images",
            )
        model.requires_grad_(False)
        self._layers = [_read(block) for block in blocks]
        self._norms = sum(layer.norms for layer in self._layers)

    def __call__(self, images: Tensor) -> Tensor:
        """The mismatch, () float32; 0 where all statistics are met.

        Args:
            images: float32 (N, 3, H, W), normalised RGB; channels_last is the quickest.
        """
        total, x = images.new_zeros(()), images
        for layer in self._layers:
            outputs = [_convolve(x, term.kernel, layer.spec) for term in layer.terms]
            x, loss = _sum(layer.terms, layer.bias, outputs)
            total = total + loss
            if layer.post is not None:
                x, loss = _sum((layer.post[0],), layer.post[1], [x])
                total = total + loss
            x = layer.finish(x)
        return total / self._norms


def _read(block: TrainingBlock) -> _Layer:
    channels = block.spec.out_channels
    pairs = [_term(branch, channels) for branch in block.branches()]
    bias = torch.stack([constant for _, constant in pairs]).sum(0)
    post = None if block.post_bn is None else _term(Branch(None, bn=block.post_bn), channels)
    return _Layer(block.spec, tuple(term for term, _ in pairs), bias, post, block.finish)


def _term(branch: Branch, channels: int) -> tuple[_Term, Tensor]:
    """A branch's summand, and the constant that it adds, (C,)."""
    kernel = None if branch.kernel is None else branch.kernel.detach().contiguous(memory_format=torch.channels_last)
    offset = torch.zeros(channels) if branch.bias is None else branch.bias.detach()
    if branch.bn is None:
        return _Term(kernel, torch.ones(channels), None), offset
    mean, variance = branch.bn.running_mean, branch.bn.running_var
    assert mean is not None and variance is not None
    std = torch.sqrt(variance + branch.bn.eps)
    weight = torch.ones_like(std) if branch.bn.weight is None else branch.bn.weight.detach()
    shift = torch.zeros_like(std) if branch.bn.bias is None else branch.bn.bias.detach()
    return _Term(kernel, weight / std, _Target(mean - offset, std, branch.bn.eps)), shift + (
        offset - mean
    ) * weight / std


def _convolve(x: Tensor, kernel: Tensor | None, spec: BlockSpec) -> Tensor:
    if kernel is None:
        return x
    dilation = spec.dilation if kernel.shape[-1] == 3 else 1
    padding = spec.dilation if kernel.shape[-1] == 3 else 0
    return nn.functional.conv2d(x, kernel, None, spec.stride, padding, dilation, spec.groups)


def _sum(terms: tuple[_Term, ...], bias: Tensor, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _Sum.apply(terms, bias, *outputs))  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """Σ scale·y + bias of outputs y, float32 (N, C, H, W), and Σ of their mismatches, ().

    The mismatch's gradient with respect to y is affine in y, c₁·y + c₀ for each channel, so that nothing but y itself
    is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, terms: tuple[_Term, ...], bias: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        loss, slopes = bias.new_zeros(()), []
        total = torch.addcmul(_as_channels(bias), outputs[0], _as_channels(terms[0].scale))
        for y, term in zip(outputs[1:], terms[1:], strict=True):
            total.addcmul_(y, _as_channels(term.scale))
        for y, term in zip(outputs, terms, strict=True):
            part = None if term.target is None else _mismatch(y, term.target)
            loss = loss if part is None else loss + part[0]
            slopes.append(part)
        ctx.save_for_backward(*outputs)
        ctx.terms, ctx.slopes = terms, slopes
        return total, loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_loss: Tensor) -> tuple[Any, ...]:
        found: list[Tensor] = []
        for term, slopes, y in zip(ctx.terms, ctx.slopes, ctx.saved_tensors, strict=True):
            own = gradient * _as_channels(term.scale)
            if slopes is not None:
                _, slope, offset = slopes
                own.addcmul_(y, _as_channels(slope * of_loss)).add_(_as_channels(offset * of_loss))
            found.append(own)
        return (None, None, *found)


def _mismatch(y: Tensor, target: _Target) -> tuple[Tensor, Tensor, Tensor]:
    """The mismatch of one BatchNorm's input y, (), and its gradient with respect to y, slope·y + offset, both (C,)."""
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    std = torch.sqrt(variance + target.eps)
    shift, ratio = (mean - target.mean) / target.std, std / target.std - 1
    slope = 2 * ratio / (target.std * std * y.numel())
    offset = 2 * shift / (target.std * y.numel()) - slope * mean
    return (shift.square() + ratio.square()).mean(), slope, offset


def _as_channels(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


MOST_IMAGES, MOST_STEPS = 100_000, 100_000
# On a trained A0, INT8 has the same 28 dB from 64 images of 100 or of 50 steps and from 128 of 30: what each step still
# lowers is not what limits it.
_USUAL_IMAGES, _LEAST_IMAGES, _USUAL_STEPS, _LEAST_STEPS = 128, 16, 40, 24
_BATCH_IMAGES = 64
_BATCH_BYTES = 3 << 30
_BUDGET_MACS = 3e13  # deploy-form multiply-accumulates times steps: about eight minutes on two cores
_RATE, _MOMENTUM, _SECOND_MOMENTUM, _EPSILON = 0.2, 0.9, 0.99, 1e-8
_GREY_SHARE, _COLOUR_SHARE = (
    1.5,
    0.5,
)  # of an image's first noise: correlation 0.9 between channels, as photographs have


@dataclass(frozen=True, slots=True)
class SynthesisOptions:
    """What calibration images are asked for.

    Attributes:
        images: How many; None chooses by the cost of the network.
        seed: Of the random generator, 0 to 2⁶³ − 1.
        steps: Optimisation steps a batch; None chooses.
    """

    images: int | None = None
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.images is not None and not 1 <= self.images <= MOST_IMAGES:
            raise InputError(
                f"expected 1 to {MOST_IMAGES} calibration images, found {self.images}",
                remedy="give --synthetic-calibration 64",
            )
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise InputError(
                f"expected 1 to {MOST_STEPS} steps, found {self.steps}", remedy="give --calibration-steps 100"
            )
        if not 0 <= self.seed < 1 << 63:
            raise InputError(
                f"expected a seed from 0 to 2^63 - 1, found {self.seed}", remedy="give --calibration-seed 0"
            )


@dataclass(frozen=True, slots=True)
class SynthesisPlan:
    """What will be done.

    Attributes:
        batches: Images of each batch, which match the statistics together; about equal, so that none matches them by
            fewer than it must.
        steps: Optimisation steps a batch.
    """

    batches: tuple[int, ...]
    steps: int

    @property
    def images(self) -> int:
        """Images in all."""
        return sum(self.batches)


def plan_synthesis(
    spec: VariantSpec, size: tuple[int, int], options: SynthesisOptions, *, multiple: int = 1
) -> SynthesisPlan:
    """Chooses what was not asked for, by cost, and batches that fit into memory.

    Args:
        spec: The variant.
        size: (height, width) in pixels.
        options: What was asked for.
        multiple: The graph's fixed batch: the number of images is a multiple of it.

    Raises:
        InputError: The number of images that was asked for is not such a multiple.
    """
    affordable = _BUDGET_MACS / count_macs(spec, *size)  # image-steps
    images, steps = options.images, options.steps
    if images is None:
        wanted = min(_USUAL_IMAGES, max(_LEAST_IMAGES, int(affordable / (steps or _USUAL_STEPS))))
        images = -(-wanted // multiple) * multiple
    elif images % multiple:
        raise InputError(
            f"the graph has a fixed batch of {multiple}, and {images} images do not fill it",
            remedy=f"give --synthetic-calibration {-(-images // multiple) * multiple}, or export with --batch dynamic",
        )
    if steps is None:
        steps = min(_USUAL_STEPS, max(_LEAST_STEPS, int(affordable / images)))
    most = min(_BATCH_IMAGES, max(1, _BATCH_BYTES // image_bytes(spec, size)))
    count = -(-images // most)
    return SynthesisPlan(tuple(images // count + (index < images % count) for index in range(count)), steps)


def image_bytes(spec: VariantSpec, size: tuple[int, int]) -> int:
    """Memory that one image of a batch takes while its gradient is computed: two to four float32 maps a layer."""
    height, width = size
    values = 6 * height * width
    for layer in spec.layers():
        height, width = (-(-side // layer.stride) for side in (height, width))
        maps = 2 if spec.block == "plain" else 3
        maps += (spec.block.startswith("qarepvgg")) + (spec.se != "none")
        values += maps * layer.out_channels * height * width
    return 4 * values


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch under optimisation.

    Attributes:
        pixels: float32 (N, 3, H, W), RGB, channels_last, in standard deviations of ImageNet's pixels from their mean.
        first: Adam's running mean of the gradient, likewise.
        second: Adam's running mean of the squared gradient, likewise.
        step: Steps done.
    """

    pixels: Tensor
    first: Tensor
    second: Tensor
    step: int


class Synthesizer:
    """Optimises batches of images for one model.

    Args:
        model: In training form; its weights are no longer differentiable afterwards.
        preprocessing: The model's normalisation and image size.
        seed: Of the random generator; each batch has a stream of its own.
        steps: Optimisation steps a batch.

    Raises:
        CalibrationError: The model is in deploy form.
    """

    def __init__(self, model: RepVGG, preprocessing: Preprocessing, *, seed: int, steps: int) -> None:
        self._mismatch = StatisticsMismatch(model)
        self._size = preprocessing.crop
        self._seed = seed
        self._steps = steps
        centre, spread = _channels(IMAGENET_MEAN), _channels(IMAGENET_STD)
        self._centre, self._spread = centre, spread
        self._lowest, self._highest = (0 - centre) / spread, (255 - centre) / spread
        mean, std = _channels(preprocessing.mean), _channels(preprocessing.std)
        # The model's own normalisation of a pixel, in one affine step.
        self._gain, self._offset = spread / std, (centre - mean) / std

    def start(self, index: int, count: int) -> BatchState:
        """The first state of batch number `index`, of `count` images."""
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self._seed, index)).generate_state(1, np.uint64)[0] >> 1)
        )
        pixels = _photo_noise((count, 3, *self._size), generator)
        pixels = torch.clamp(pixels, self._lowest, self._highest).contiguous(memory_format=torch.channels_last)
        return BatchState(pixels, torch.zeros_like(pixels), torch.zeros_like(pixels), 0)

    @torch.enable_grad()
    def advance(self, state: BatchState) -> BatchState:
        """One step of Adam; the state that is given stays as it is."""
        pixels = state.pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._mismatch(self._normalize(pixels)), pixels)
        step = state.step + 1
        first = torch.lerp(state.first, gradient, 1 - _MOMENTUM)
        second = torch.lerp(state.second, gradient.square(), 1 - _SECOND_MOMENTUM)
        rate = _RATE * 0.5 * (1 + math.cos(math.pi * state.step / self._steps))
        root = (second / (1 - _SECOND_MOMENTUM**step)).sqrt_().add_(_EPSILON)
        moved = state.pixels - rate / (1 - _MOMENTUM**step) * first / root
        return BatchState(torch.clamp(moved, self._lowest, self._highest), first, second, step)

    @torch.no_grad()
    def finish(self, state: BatchState) -> tuple[NDArray[np.uint8], float]:
        """The images, uint8 (N, H, W, 3), RGB, and their mismatch, rounded as they are.

        Raises:
            CalibrationError: The mismatch is not finite: the network's values leave float32.
        """
        rounded = (state.pixels * self._spread + self._centre).round_().clamp_(0, 255)
        mismatch = float(self._mismatch(self._normalize((rounded - self._centre) / self._spread)))
        if not math.isfinite(mismatch):
            raise CalibrationError(
                f"the mismatch of synthesised images with the BatchNorm statistics is {mismatch}: values in the "
                f"network leave float32",
                remedy="look for extreme BatchNorm weights in the checkpoint, or calibrate with real images",
            )
        return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).to(torch.uint8).numpy()), mismatch

    def _normalize(self, pixels: Tensor) -> Tensor:
        return pixels * self._gain + self._offset


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 3, 1, 1)


def _photo_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise with amplitude 1/f, float32 (N, 3, H, W), standard deviation 1, channels correlated as in photographs."""
    white = torch.randn(shape, generator=generator)
    height, width = shape[2:]
    down, across = torch.fft.fftfreq(height).reshape(-1, 1), torch.fft.rfftfreq(width).reshape(1, -1)
    frequency = torch.sqrt(down.square() + across.square()).clamp_min(1 / max(height, width))
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    mixed = _GREY_SHARE * noise.mean(1, keepdim=True) + _COLOUR_SHARE * noise
    result: Tensor = mixed / mixed.std()
    return result

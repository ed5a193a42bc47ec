"""Images from BatchNorm statistics alone: a batch is optimised until every BatchNorm of the training form sees what it saw in training.

A batch starts as noise with the spectrum and the colours of photographs (power 1/f², grey more than colour), and takes steps of Adam with a cosine
rate, kept within the range of a pixel. Where it starts decides much: from white noise, even smoothed, the first layers do not come near their
statistics in many times the steps. What is optimised is (pixel − 118)/58 or so, whatever normalisation the model has.

Every step is a function from one `BatchState` to the next, so that an interruption at any moment loses nothing and a state can be stored and resumed.

Source: Cai et al. 2020, ZeroQ, https://arxiv.org/abs/2001.00281; Yin et al. 2020, DeepInversion, https://arxiv.org/abs/1912.08795;
Field 1987, doi:10.1364/JOSAA.4.002379, for the spectrum; Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, for Adam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError, InputError
from ..images.decode import IMAGENET_MEAN, IMAGENET_STD
from ..model.network import RepVGG
from ..specs.values import Preprocessing, VariantSpec
from ..specs.variants import count_macs
from .bn_mismatch import StatisticsMismatch

MOST_IMAGES, MOST_STEPS = 100_000, 100_000
# On a trained A0, INT8 has the same 28 dB from 64 images of 100 or of 50 steps and from 128 of 30: what each step still lowers is not what limits it.
_USUAL_IMAGES, _LEAST_IMAGES, _USUAL_STEPS, _LEAST_STEPS = 128, 16, 40, 24
_BATCH_IMAGES = 64
_BATCH_BYTES = 3 << 30
_BUDGET_MACS = 3e13  # deploy-form multiply-accumulates times steps: about eight minutes on two cores
_RATE, _MOMENTUM, _SECOND_MOMENTUM, _EPSILON = 0.2, 0.9, 0.99, 1e-8
_GREY_SHARE, _COLOUR_SHARE = 1.5, 0.5  # of an image's first noise: correlation 0.9 between channels, as photographs have


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
            raise InputError(f"expected 1 to {MOST_IMAGES} calibration images, found {self.images}", remedy="give --synthetic-calibration 64")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise InputError(f"expected 1 to {MOST_STEPS} steps, found {self.steps}", remedy="give --calibration-steps 100")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"expected a seed from 0 to 2^63 - 1, found {self.seed}", remedy="give --calibration-seed 0")


@dataclass(frozen=True, slots=True)
class SynthesisPlan:
    """What will be done.

    Attributes:
        batches: Images of each batch, which match the statistics together; about equal, so that none matches them by fewer than it must.
        steps: Optimisation steps a batch.
    """

    batches: tuple[int, ...]
    steps: int

    @property
    def images(self) -> int:
        """Images in all."""
        return sum(self.batches)


def plan_synthesis(spec: VariantSpec, size: tuple[int, int], options: SynthesisOptions, *, multiple: int = 1) -> SynthesisPlan:
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
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((self._seed, index)).generate_state(1, np.uint64)[0] >> 1))
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
                f"the mismatch of synthesised images with the BatchNorm statistics is {mismatch}: values in the network leave float32",
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

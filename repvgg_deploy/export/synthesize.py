"""Images from BatchNorm statistics alone: optimised until every BatchNorm sees what it saw in training.

A batch starts as noise with the spectrum and the colours of photographs (power 1/f², grey more than colour), and takes
steps of Adam with a cosine rate, kept within the range of a pixel. Where it starts decides much: from white noise, even
smoothed, the first layers do not come near their statistics in many times the steps. What is optimised is (pixel −
118)/58 or so, whatever normalisation the model has.

What the steps lower is the mismatch: for every channel of every BatchNorm's input ((mean − µ)/σ)² + (std/σ − 1)²,
averaged over channels, then over BatchNorms. µ and σ² are the running statistics, mean and std² those over the batch
and all positions; ε stands under both roots, so that a channel that hardly varies counts for little. A block is
computed once for both purposes, its statistics and what the next block sees: the branches' raw outputs, then one affine
sum of them (`_Sum`). That takes a third of the time and half the memory of hooks on the BatchNorm modules, which serve
any other network (`ModuleMismatch`).

Source: Cai et al. 2020, ZeroQ, https://arxiv.org/abs/2001.00281, with every branch of every block in place of one
BatchNorm a layer; Yin et al. 2020, DeepInversion, https://arxiv.org/abs/1912.08795; Field 1987,
doi:10.1364/JOSAA.4.002379, for the spectrum; Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, for Adam.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CalibrationError, InputError
from ..images.decode import IMAGENET_MEAN, IMAGENET_STD
from ..model.arithmetic import Branch
from ..model.block import BlockSpec, TrainingBlock
from ..model.network import RepVGG
from ..specs.values import Preprocessing, VariantSpec
from ..specs.variants import count_macs

_LOG = logging.getLogger(__name__)
Steps = Callable[[int, int], None]
"""Takes the steps done and in all."""
_MOST_IMAGES, _MOST_STEPS = 100_000, 100_000
# On a trained A0, INT8 has the same 28 dB from 64 images of 100 or of 50 steps and from 128 of 30: what each step still
# lowers is not what limits it.
_USUAL_IMAGES, _LEAST_IMAGES, _USUAL_STEPS, _LEAST_STEPS = 128, 16, 40, 24
_BATCH_IMAGES = 64
_BATCH_BYTES = 3 << 30
_BUDGET_MACS = 3e13  # deploy-form multiply-accumulates times steps: about eight minutes on two cores
_RATE, _MOMENTUM, _SECOND_MOMENTUM, _EPSILON = 0.2, 0.9, 0.99, 1e-8
# Of an image's first noise: correlation 0.9 between channels, as photographs have.
_GREY_SHARE, _COLOUR_SHARE = 1.5, 0.5


@dataclass(frozen=True, slots=True)
class SynthesisOptions:
    """What calibration images are asked for.

    Attributes:
        images: How many; None chooses by the cost of the network.
        seed: Starts the random generator; 0 to 2⁶³ − 1.
        steps: Optimisation steps a batch; None chooses.
    """

    images: int | None = None
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.images is not None and not 1 <= self.images <= _MOST_IMAGES:
            raise InputError(
                f"expected 1 to {_MOST_IMAGES} calibration images, found {self.images}",
                remedy="give --synthetic-calibration 64",
            )
        if self.steps is not None and not 1 <= self.steps <= _MOST_STEPS:
            raise InputError(
                f"expected 1 to {_MOST_STEPS} steps, found {self.steps}", remedy="give --calibration-steps 100"
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


@dataclass(frozen=True, slots=True)
class ImageCost:
    """What one image costs: multiply-accumulates of a run, and bytes that are kept while its gradient is computed."""

    macs: float
    kept_bytes: int


def plan_synthesis(cost: ImageCost, options: SynthesisOptions, *, multiple: int = 1) -> SynthesisPlan:
    """Chooses what was not asked for, by cost, and batches that fit into memory.

    Args:
        cost: Of the network's own image size.
        options: What was asked for.
        multiple: The graph's fixed batch: the number of images is a multiple of it.

    Raises:
        InputError: The number of images that was asked for is not such a multiple.
    """
    affordable = _BUDGET_MACS / max(cost.macs, 1)  # image-steps
    images, steps = options.images, options.steps
    if images is None:
        wanted = min(_USUAL_IMAGES, max(_LEAST_IMAGES, int(affordable / (steps or _USUAL_STEPS))))
        images = -(-wanted // multiple) * multiple
    elif images % multiple:
        raise InputError(
            f"the graph has a fixed batch of {multiple}, and {images} images do not fill it",
            remedy=f"give --synthetic-calibration {-(-images // multiple) * multiple} (SynthesisOptions.images), or "
            "export with --batch dynamic (ModuleOptions.dynamic_batch)",
        )
    if steps is None:
        steps = min(_USUAL_STEPS, max(_LEAST_STEPS, int(affordable / images)))
    most = min(_BATCH_IMAGES, max(1, _BATCH_BYTES // max(cost.kept_bytes, 1)))
    count = -(-images // most)
    return SynthesisPlan(tuple(images // count + (index < images % count) for index in range(count)), steps)


def image_cost(spec: VariantSpec, size: tuple[int, int]) -> ImageCost:
    """Of a variant: in deploy form, and two to four float32 maps a layer."""
    height, width = size
    values = 6 * height * width
    for layer in spec.layers():
        height, width = (-(-side // layer.stride) for side in (height, width))
        maps = 2 if spec.block == "plain" else 3
        maps += (spec.block.startswith("qarepvgg")) + (spec.se != "none")
        values += maps * layer.out_channels * height * width
    return ImageCost(count_macs(spec, *size), 4 * values)


def synthesize_images(
    mismatch: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    plan: SynthesisPlan,
    *,
    seed: int,
    progress: Steps | None = None,
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Optimises one batch of images after the other.

    Args:
        mismatch: What is made small: of normalised images, float32 (N, 3, H, W), a number, ().
        preprocessing: The model's normalisation and image size.
        plan: Batches and steps.
        seed: Starts the random generator; each batch has a stream of its own.
        progress: Called before the first step of a batch and after each.

    Yields:
        The images of a batch, uint8 (N, H, W, 3), RGB, and their mismatch, rounded as they are.

    Raises:
        CalibrationError: The mismatch is not finite: the network's values leave float32.
    """
    centre, spread = _channels(IMAGENET_MEAN), _channels(IMAGENET_STD)
    lowest, highest = (0 - centre) / spread, (255 - centre) / spread
    # The model's own normalisation of a pixel, in one affine step.
    mean, std = _channels(preprocessing.mean), _channels(preprocessing.std)
    gain, offset = spread / std, (centre - mean) / std
    total = len(plan.batches) * plan.steps
    for index, count in enumerate(plan.batches):
        if progress is not None:
            progress(index * plan.steps, total)
        stream = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
        noise = _photo_noise((count, 3, *preprocessing.crop), torch.Generator().manual_seed(int(stream >> 1)))
        pixels = torch.clamp(noise, lowest, highest).contiguous(memory_format=torch.channels_last)
        first, second = torch.zeros_like(pixels), torch.zeros_like(pixels)
        for step in range(1, plan.steps + 1):
            pixels.requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(mismatch(pixels * gain + offset), pixels)
            first = torch.lerp(first, gradient, 1 - _MOMENTUM)
            second = torch.lerp(second, gradient.square(), 1 - _SECOND_MOMENTUM)
            rate = _RATE * 0.5 * (1 + math.cos(math.pi * (step - 1) / plan.steps))
            root = (second / (1 - _SECOND_MOMENTUM**step)).sqrt_().add_(_EPSILON)
            moved = pixels.detach() - rate / (1 - _MOMENTUM**step) * first / root
            pixels = torch.clamp(moved, lowest, highest)
            if progress is not None:
                progress(index * plan.steps + step, total)
        with torch.no_grad():
            rounded = (pixels * spread + centre).round_().clamp_(0, 255)
            left = float(mismatch((rounded - centre) / spread * gain + offset))
        if not math.isfinite(left):
            raise CalibrationError(
                f"the mismatch of synthesised images with the BatchNorm statistics is {left}: values in the network "
                f"leave float32",
                remedy="look for extreme BatchNorm weights, or calibrate with real images",
            )
        _LOG.info("calibration images: batch %d of %d, mismatch %.4f", index + 1, len(plan.batches), left)
        yield np.ascontiguousarray(rounded.permute(0, 2, 3, 1).to(torch.uint8).numpy()), left


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
        terms = [term for layer in self._layers for sum_ in layer.sums for term in sum_.terms]
        self._norms = sum(term.target is not None for term in terms)

    def __call__(self, images: Tensor) -> Tensor:
        """The mismatch, () float32; 0 where all statistics are met.

        Args:
            images: float32 (N, 3, H, W), normalised RGB; channels_last is the quickest.
        """
        total, x = images.new_zeros(()), images
        for layer in self._layers:
            for sum_ in layer.sums:
                outputs = [_convolve(x, term.kernel, layer.spec) for term in sum_.terms]
                found = _Sum.apply(sum_.terms, sum_.bias, *outputs)  # type: ignore[no-untyped-call]
                x, loss = cast("tuple[Tensor, Tensor]", found)
                total = total + loss
            x = layer.finish(x)
        return total / self._norms


class ModuleMismatch:
    """The same of any module, by hooks on its BatchNorms, while it is used: a context manager.

    A BatchNorm is what has a running mean and variance, whatever its class. Of one that is called several times, such
    as in a head for several scales, means and variances are averaged over the calls, as its running ones were.

    Args:
        model: In training form and `eval()`; its weights are no longer differentiable afterwards.

    Raises:
        CalibrationError: It has no BatchNorm.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model.requires_grad_(False)
        self._norms = [(name, module) for name, module in model.named_modules() if has_statistics(module)]
        if not self._norms:
            raise CalibrationError(
                f"{type(model).__name__} has no BatchNorm with running statistics that images could be synthesised "
                f"from",
                remedy="give the training form (ModuleOptions.reference, if the model is a conversion), or calibrate "
                "with real images",
            )
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> ModuleMismatch:
        for name, module in self._norms:
            self._hooks.append(module.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _see(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance, mean = torch.var_mean(inputs[0], axes, correction=0)
        self._seen.setdefault(name, []).append((mean, variance))

    def __call__(self, images: Tensor) -> Tensor:
        """As of `StatisticsMismatch`."""
        self._seen.clear()
        self._model(images)
        total = images.new_zeros(())
        for name, module in self._norms:
            if name in self._seen:
                mean, variance = (torch.stack(part).mean(0) for part in zip(*self._seen[name], strict=True))
                eps = float(getattr(module, "eps", 0.0))
                seen_mean, seen_variance = cast("Tensor", module.running_mean), cast("Tensor", module.running_var)
                std = torch.sqrt(seen_variance + eps).clamp_min(_EPSILON)
                ratio = torch.sqrt(variance + eps + _EPSILON**2) / std - 1
                total = total + (((mean - seen_mean) / std).square() + ratio.square()).mean()
        return total / max(1, len(self._seen))

    @torch.enable_grad()
    def measure_cost(self, size: tuple[int, int]) -> ImageCost:
        """What one image of (height, width) pixels costs: run once, with its gradient.

        Raises:
            CalibrationError: The module cannot be run so, or no BatchNorm's input depends on the image.
        """
        macs, kept = 0.0, dict[int, int]()

        def count(module: nn.Module, inputs: object, output: object) -> None:
            nonlocal macs
            weight = getattr(module, "weight", None)
            if isinstance(output, Tensor) and isinstance(weight, Tensor) and weight.ndim > 1:
                macs += output.numel() * weight[0].numel()

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = [module.register_forward_hook(count) for module in self._model.modules()]
        pixels = torch.zeros(1, 3, *size).requires_grad_()
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                found = self(pixels + 0.0)
            torch.autograd.grad(found, pixels)
        except RuntimeError as error:
            raise CalibrationError(
                f"the BatchNorm statistics of {type(self._model).__name__} cannot be followed back to an image of "
                f"{size[0]}×{size[1]} pixels: {str(error).partition(chr(10))[0]}",
                remedy="leave synthetic_calibration out, and calibrate with real images",
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        own = {tensor.untyped_storage().data_ptr() for tensor in self._model.state_dict().values()}
        return ImageCost(macs, sum(size for place, size in kept.items() if place not in own))


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that keeps running statistics."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.ndim == 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """A block as data: its convolutions' sum, for QARepVGG the BatchNorm of that sum, then `finish`."""

    spec: BlockSpec
    sums: tuple[_Terms, ...]
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Terms:
    """Summands, and the constant (C,) that is added."""

    terms: tuple[_Term, ...]
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Term:
    """One summand: `scale`, (C,), times the output of `kernel` (None: the identity), and that output's statistics."""

    kernel: Tensor | None
    scale: Tensor
    target: _Target | None


@dataclass(frozen=True, slots=True)
class _Target:
    """Running statistics: float32 mean (C,), std (C,) with ε under its root."""

    mean: Tensor
    std: Tensor
    eps: float


def _read(block: TrainingBlock) -> _Layer:
    branches = [block.branches(), *([] if block.post_bn is None else [[Branch(None, bn=block.post_bn)]])]
    pairs = [[_read_branch(branch, block.spec.out_channels) for branch in group] for group in branches]
    sums = [
        _Terms(tuple(term for term, _ in group), torch.stack([bias for _, bias in group]).sum(0)) for group in pairs
    ]
    return _Layer(block.spec, tuple(sums), block.finish)


def _read_branch(branch: Branch, channels: int) -> tuple[_Term, Tensor]:
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
    constant = shift + (offset - mean) * weight / std
    return _Term(kernel, weight / std, _Target(mean - offset, std, branch.bn.eps)), constant


def _convolve(x: Tensor, kernel: Tensor | None, spec: BlockSpec) -> Tensor:
    if kernel is None:
        return x
    dilation = spec.dilation if kernel.shape[-1] == 3 else 1
    padding = spec.dilation if kernel.shape[-1] == 3 else 0
    return nn.functional.conv2d(x, kernel, None, spec.stride, padding, dilation, spec.groups)


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

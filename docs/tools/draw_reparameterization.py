"""Draws one block of the trained sample before and after reparameterization, and prints how equal the two are.

    python -m docs.tools.draw_reparameterization --out docs/images

The branches' kernels are folded here by the formulas of docs/reparameterization.md, in NumPy and float64; the deploy
form is the library's. The picture, made for a light and for a dark page, shows that the two agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repvgg_deploy import build_model, load_checkpoint, reparameterize
from repvgg_deploy.evaluate.figures import BLUE, DARK, GREEN, ORANGE, SKY, open_figure, save_figure
from repvgg_deploy.images.decode import default_preprocessing, load_image, normalize
from repvgg_deploy.model.block import ConvBN, DeployBlock, TrainingBlock
from repvgg_deploy.model.network import RepVGG

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "sample"
BLOCK = "stage2.2"  # three branches, one group
BRANCHES = ("3×3 branch", "1×1 branch", "identity branch")
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Look:
    """Colours of a picture: of texts, of what surrounds it, of the three branches, and from low over zero to high."""

    ink: str
    quiet: str
    ground: str
    branches: tuple[str, str, str]
    scale: tuple[str, ...]
    on_strong: str


_BLUE_TO_RED = ("#053061", "#4393c3", "white", "#d6604d", "#67001f")
_BRIGHT_ENDS = ("#79c0ff", "#1f5f99", "#11151c", "#a8432f", "#ff9d85")
LOOKS = {
    "light": Look(DARK, "#59636e", "white", (BLUE, ORANGE, GREEN), _BLUE_TO_RED, "white"),
    "dark": Look("#e6edf3", "#a5adb8", "#1e2129", (SKY, ORANGE, "#2ecc9b"), _BRIGHT_ENDS, "black"),
}


@dataclass(frozen=True, slots=True)
class Folded:
    """One convolution: float64 kernel (C', C, 3, 3) and bias (C')."""

    kernel: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is drawn.

    Attributes:
        branches: The three of the training form, each folded with its BatchNorm.
        deploy: The library's one convolution.
        maps: The output of each branch for one image, float64 (3, C', H, W).
        answer: The output of the deploy form for it, in float32 arithmetic, (C', H, W).
        errors: By arithmetic, the differences of sum and deploy form over the evaluation images, in units of the
            largest output.
        shares: The share of each branch in the output, by channel, (3, C').
    """

    branches: tuple[Folded, Folded, Folded]
    deploy: Folded
    maps: Array
    answer: Array
    errors: dict[str, float]
    shares: Array

    @property
    def fold_error(self) -> float:
        """Largest difference between the sum of the three kernels and the library's, in units of its largest weight."""
        return float(
            np.abs(sum(b.kernel for b in self.branches) - self.deploy.kernel).max() / np.abs(self.deploy.kernel).max()
        )


def fold(bn: nn.BatchNorm2d, conv: nn.Conv2d | None) -> Folded:
    """γ/σ · W and β − γ·µ/σ, the kernel padded to 3×3; the identity for `conv` None."""
    assert bn.running_mean is not None and bn.running_var is not None
    gamma, beta, mean, variance = (
        t.detach().double().numpy() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    )
    scale = gamma / np.sqrt(variance + bn.eps)
    kernel = np.zeros((len(scale), len(scale), 3, 3))
    if conv is None:
        kernel[range(len(scale)), range(len(scale)), 1, 1] = 1
    elif conv.kernel_size == (1, 1):
        kernel[:, :, 1, 1] = conv.weight.detach().double().numpy()[:, :, 0, 0]
    else:
        kernel = conv.weight.detach().double().numpy()
    return Folded(kernel * scale[:, None, None, None], beta - mean * scale)


def gather() -> Evidence:
    """Loads the sample and runs both forms of the block on real images."""
    model = build_model(load_checkpoint(SAMPLE / "repvgg-sample.pth")).eval()
    block = cast(TrainingBlock, model.get_submodule(BLOCK))
    deploy = cast(DeployBlock, reparameterize(model).get_submodule(BLOCK))
    dense, pointwise = block.rbr_dense, cast(ConvBN, block.rbr_1x1)
    assert block.rbr_identity is not None
    branches = (fold(dense.bn, dense.conv), fold(pointwise.bn, pointwise.conv), fold(block.rbr_identity, None))
    weight, bias = deploy.rbr_reparam.weight, cast(torch.Tensor, deploy.rbr_reparam.bias)
    one = Folded(weight.detach().double().numpy(), bias.detach().double().numpy())
    with np.load(SAMPLE / "eval.npz", allow_pickle=False) as file:
        everything = arriving(model, block, file["images"])
    image = load_image(SAMPLE / "images" / "digit-3.png", default_preprocessing(32, 32))
    x = arriving(model, block, image[None])
    with torch.inference_mode():
        # float64 copies: what the branches are, without the noise of float32 sums.
        maps = np.stack([convolve(x.double(), branch)[0].numpy() for branch in branches])
        answer = deploy.linear(x)[0].double().numpy()
        shares = np.stack([np.abs(convolve(everything.double(), b).numpy()).mean(axis=(0, 2, 3)) for b in branches])
        truth = block.linear(everything)
        errors = {
            "float64": relative_error(
                block.double().linear(everything.double()), sum_of(everything.double(), branches)
            ),
            "float32": relative_error(truth, deploy.linear(everything)),
        }
    return Evidence(branches, one, maps, answer, errors, shares / shares.sum(axis=0))


def arriving(model: RepVGG, block: TrainingBlock, images: NDArray[np.uint8]) -> torch.Tensor:
    """The input of `block` when images, uint8 (N, 32, 32, 3), go through the model: float32 (N, C, H, W)."""
    seen: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(torch.from_numpy(normalize(images, default_preprocessing(32, 32))))
    hook.remove()
    return seen[0]


def convolve(x: torch.Tensor, folded: Folded) -> torch.Tensor:
    """One folded branch as a convolution."""
    return nn.functional.conv2d(x, torch.from_numpy(folded.kernel), torch.from_numpy(folded.bias), padding=1)


def sum_of(x: torch.Tensor, branches: Sequence[Folded]) -> torch.Tensor:
    """One convolution with the summed kernels and biases."""
    kernel, bias = np.sum([b.kernel for b in branches], axis=0), np.sum([b.bias for b in branches], axis=0)
    return convolve(x, Folded(kernel, bias))


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, in units of the reference's largest value."""
    return float((reference - other).abs().max() / reference.abs().max())


def choose_channel(found: Evidence) -> int:
    """The channel where all three branches contribute most, in the kernel and in the output."""
    rows = range(len(found.deploy.bias))
    largest = np.prod([np.abs(b.kernel[rows, rows]).max(axis=(1, 2)) for b in found.branches], axis=0)
    return int((largest * found.maps.std(axis=(2, 3)).prod(axis=0)).argmax())


def draw(found: Evidence, path: Path, look: Look) -> None:
    """Three rows of sums, then shares and the proof."""
    channel = choose_channel(found)
    with open_sheet(look) as figure:
        title = f"Three branches become one convolution: block {BLOCK} of the trained sample"
        figure.text(0.03, 0.972, title, fontsize=17, weight="bold", color=look.ink)
        kernels = [*(b.kernel for b in found.branches), found.deploy.kernel]
        biases = [*(b.bias[channel] for b in found.branches), found.deploy.bias[channel]]
        captions = [f"bias {write_number(value)}" for value in biases]
        label = f"Kernel\n× BatchNorm scale,\noutput channel {channel}\nfrom input channel {channel}"
        draw_sum(
            figure,
            look,
            0.735,
            [k[channel, channel] for k in kernels],
            label,
            captions=captions,
            numbers=True,
            titles=True,
        )
        label = "Centre taps\nof all {0} × {0}\nchannel pairs".format(len(found.deploy.bias))
        draw_sum(figure, look, 0.503, [k[:, :, 1, 1] for k in kernels], label)
        label = f"Output\nfor an image of a “3”,\nchannel {channel},\nbefore ReLU"
        draw_sum(figure, look, 0.285, [*(m[channel] for m in found.maps), found.answer[channel]], label)
        draw_shares(figure, look, found, channel)
        write_proof(figure, look, found)
        save_figure(figure, path, force=True)


def write_number(value: float) -> str:
    """Two decimals, with a minus sign as wide as a plus."""
    return "0" if value == 0 else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


@contextmanager
def open_sheet(look: Look) -> Iterator[Any]:
    """An empty figure in the project's style, whose places are chosen by hand."""
    with open_figure(12.5, 11.0) as (figure, axes):
        axes.remove()
        figure.set_layout_engine("none")
        figure.set_facecolor(look.ground)
        yield figure


def draw_sum(
    figure: Any,
    look: Look,
    bottom: float,
    panels: Sequence[Array],
    label: str,
    *,
    captions: Sequence[str] = (),
    numbers: bool = False,
    titles: bool = False,
) -> None:
    """Branch + branch + branch = deploy form, in one colour scale."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("scale", look.scale)
    limit = max(float(np.abs(panel).max()) for panel in panels)
    figure.text(0.03, bottom + 0.095, label, fontsize=10.5, color=look.quiet, va="center", linespacing=1.5)
    for index, panel in enumerate(panels):
        left = 0.19 + 0.205 * index
        axes = figure.add_axes((left, bottom, 0.175, 0.199))
        axes.imshow(panel, cmap=scale, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=(*look.branches, look.ink)[index], linewidth=2.5 if index == 3 else 1.6)
        if titles:
            title = (*BRANCHES, "deploy form: one 3×3")[index]
            axes.set_title(
                title, fontsize=12, color=(*look.branches, look.ink)[index], weight="bold", loc="center", pad=7
            )
        if captions:
            axes.set_xlabel(captions[index], fontsize=10, color=look.quiet, labelpad=4)
        if index < 3:
            figure.text(
                left + 0.19, bottom + 0.096, "++="[index], fontsize=22, ha="center", va="center", color=look.ink
            )
        for (row, column), value in np.ndenumerate(panel if numbers else np.empty((0, 0))):
            ink = look.on_strong if abs(value) > 0.7 * limit else (look.quiet if value == 0 else look.ink)
            axes.text(column, row, write_number(value), ha="center", va="center", fontsize=11, color=ink)


def draw_shares(figure: Any, look: Look, found: Evidence, channel: int) -> None:
    """Bars of how much each branch contributes to each output channel."""
    axes = figure.add_axes((0.19, 0.07, 0.38, 0.13), facecolor="none")
    axes.spines[:].set_color(look.quiet)
    order = np.argsort(-found.shares[2])
    lower = np.zeros(len(order))
    for share, colour in zip(found.shares[:, order], look.branches, strict=True):
        axes.bar(range(len(order)), 100 * share, bottom=lower, width=1.0, color=colour, linewidth=0)
        lower = lower + 100 * share
    means = 100 * found.shares.mean(axis=1)
    for place, (mean, name, colour) in enumerate(zip(means, BRANCHES, look.branches, strict=True)):
        text = f"■ {name.removesuffix(' branch')} {mean:.0f} %"
        axes.text(0.36 * place, 1.05, text, transform=axes.transAxes, fontsize=10, color=colour, weight="bold")
    point, arrow = (list(order).index(channel), 0), {"arrowstyle": "-", "color": look.ink}
    style = {"textcoords": "offset points", "fontsize": 9, "ha": "center", "color": look.ink, "arrowprops": arrow}
    axes.annotate(f"channel {channel}", point, (0, -16), **style)
    axes.set(
        xlim=(-0.5, len(order) - 0.5), ylim=(0, 100), xticks=[], yticks=[0, 50, 100], yticklabels=["0", "50", "100 %"]
    )
    axes.tick_params(labelsize=9, colors=look.quiet)
    label = "Share of each branch\nin the output of each\nchannel (mean of its\nabsolute values,\n400 images)"
    figure.text(0.03, 0.135, label, fontsize=10.5, color=look.quiet, va="center", linespacing=1.5)


def write_proof(figure: Any, look: Look, found: Evidence) -> None:
    """The errors, in words and figures."""
    figure.text(
        0.63,
        0.2105,
        "Are they equal? Largest difference by largest value:",
        fontsize=10.5,
        color=look.ink,
        weight="bold",
    )
    lines = (
        (found.fold_error, "kernels: the three added up here,\nand the library's, rounded to float32"),
        (found.errors["float64"], "outputs computed in float64,\n400 images, all channels"),
        (found.errors["float32"], "outputs computed in float32,\n400 images, all channels"),
    )
    for place, (value, what) in enumerate(lines):
        height = 0.175 - 0.045 * place
        figure.text(0.63, height, f"{value:.1e}", fontsize=15, color=look.ink, weight="bold", va="center")
        figure.text(0.735, height, what, fontsize=9.5, color=look.quiet, va="center", linespacing=1.35)


def main() -> int:
    """Draws and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    out: Path = parser.parse_args().out
    found = gather()
    for name, look in LOOKS.items():
        draw(found, out / f"reparameterization-{name}.png", look)
    print(
        f"{BLOCK}: kernels {found.fold_error:.1e}, outputs in float64 {found.errors['float64']:.1e}, in float32 "
        f"{found.errors['float32']:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

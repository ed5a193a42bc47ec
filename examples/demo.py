"""The whole way of the sample: checkpoint in training form → verified ONNX → Engine → predictions for real images.

    make demo            # or: python examples/demo.py

Prints what it does and writes into demo/: sample.onnx, predictions.png and reparameterize.png (what happens inside one
block); of the detector (detect.py) detector-silu.onnx and detections.png. Where the trained A0 and its photos stand
beside the clone (../shared/data), it runs them, too, and writes photos.png.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from repvgg_deploy import Engine, RepVGGDeployError, build_model, export_checkpoint, load_checkpoint, reparameterize
from repvgg_deploy.export.export import ExportOptions
from repvgg_deploy.export.options import GraphOptions
from repvgg_deploy.images.classes import best_classes, softmax
from repvgg_deploy.images.decode import default_preprocessing, load_image, normalize
from repvgg_deploy.model.block import TrainingBlock
from repvgg_deploy.model.network import RepVGG
from repvgg_deploy.specs.values import Check

mpl.use("Agg")  # before pyplot: no window, also where there is no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from examples import detect  # noqa: E402

SAMPLE = ROOT / "models" / "sample"
SHARED = ROOT.parent / "shared" / "data"
PHOTO_LABELS = ("tench", "English springer", "cassette player", "chain saw", "church",
                "French horn", "garbage truck", "gas pump", "golf ball", "parachute")  # fmt: skip
RIGHT, WRONG, INK, QUIET = "#1a7f37", "#c62828", "#1f2328", "#8b949e"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One image: uint8 (H, W, 3), its true label and the probability of each class, float (C)."""

    image: NDArray[np.uint8]
    truth: str
    probabilities: NDArray[np.float64]
    labels: tuple[str, ...]

    @property
    def best(self) -> list[int]:
        """Classes, the most probable first, at most five."""
        return [int(index) for index in best_classes(self.probabilities[np.newaxis], 5)[0]]

    @property
    def answer(self) -> str:
        return self.labels[self.best[0]]

    @property
    def right(self) -> bool:
        return self.answer == self.truth


def export(ckpt: Path, out: Path, size: int, *, labels: tuple[str, ...] | None = None) -> None:
    """Checkpoint → verified ONNX, and its certificate on the terminal."""
    print(f"\n{ckpt.name} → {out.name}")
    started = time.perf_counter()
    options = ExportOptions(graph=GraphOptions(image_size=(size, size)), labels=labels, force=True)
    result = export_checkpoint(ckpt, out, options=options, progress=lambda stage: print(f"  {stage} …"))
    certificate = result.metadata.certificate
    print(f"  {result.output.status} after {time.perf_counter() - started:.1f} s: {out.stat().st_size / 1e6:.1f} MB")
    print(f"\n  certificate: compared with {certificate.reference}; errors relative to the largest value")
    groups: dict[str, list[Check]] = {}
    for check in certificate.checks:
        words = check.name.replace(",", "").split()
        groups.setdefault(" ".join([words[0], *(word for word in words if word.startswith("float"))]), []).append(check)
    for group, checks in groups.items():
        worst = max(checks, key=lambda check: check.error / check.tolerance)
        verdict = "passed" if all(check.passed for check in checks) else "FAILED"
        print(
            f"    {group:20} {len(checks):3d} checks   worst error {worst.error:8.1e}   allowed "
            f"{worst.tolerance:8.1e}   {verdict}"
        )


def predict(engine: Engine, paths: Sequence[Path], truths: Sequence[str]) -> list[Prediction]:
    """Runs image files and prints a table."""
    logits = cast("NDArray[np.float32]", engine.infer_images(paths))
    labels, preprocessing = engine.spec.labels, engine.spec.preprocessing
    assert labels is not None and preprocessing is not None
    found = [
        Prediction(load_image(p, preprocessing), t, row, labels)
        for p, t, row in zip(paths, truths, softmax(logits), strict=True)
    ]
    width = max(len(label) for label in (*labels, "prediction"))
    print(f"\n  {'image':24}  {'truth':{width}}  {'prediction':{width}}  probability")
    for path, item in zip(paths, found, strict=True):
        probability = item.probabilities[item.best[0]]
        print(
            f"  {path.name:24}  {item.truth:{width}}  {item.answer:{width}}  {100 * probability:9.1f} "
            f"%{'' if item.right else '   ← wrong'}"
        )
    return found


def compare_on_evaluation(model: RepVGG, engine: Engine) -> list[Prediction]:
    """Prints top-1 of the training form in PyTorch and of the Engine; returns the Engine's mistakes."""
    with np.load(SAMPLE / "eval.npz", allow_pickle=False) as file:
        images, truth = file["images"], file["labels"]
    batch = normalize(images, default_preprocessing(*images.shape[1:3]))
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch)).numpy()
    logits = cast("NDArray[np.float32]", engine.infer(batch))
    labels = engine.spec.labels
    assert labels is not None
    print(f"\n  {len(truth)} evaluation images           right   top-1")
    for name, scores in (("PyTorch, training form", expected), ("Engine, one 3×3 per block", logits)):
        right = int((scores.argmax(1) == truth).sum())
        print(f"    {name:26} {right:8d}  {100 * right / len(truth):.2f} %")
    same = int((logits.argmax(1) == expected.argmax(1)).sum())
    print(
        f"  same answer for {same} of {len(truth)} images, largest difference of a logit "
        f"{np.abs(logits - expected).max():.1e}"
    )
    wrong = np.flatnonzero(logits.argmax(1) != truth)
    probabilities = softmax(logits)
    return [Prediction(images[i], labels[truth[i]], probabilities[i], labels) for i in wrong]


def draw_predictions(rows: Sequence[tuple[str, Sequence[Prediction]]], title: str, path: Path) -> None:
    """Tiles of image and top-5 bars, five to a line, under the heading of each row."""
    lines: list[tuple[str, Sequence[Prediction]]] = []
    for heading, items in rows:
        lines += [(heading if start == 0 else "", items[start : start + 5]) for start in range(0, len(items), 5)]
    height = 0.95 + 2.05 * len(lines)
    figure = plt.figure(figsize=(15, height), facecolor="white")
    figure.text(0.03, 1 - 0.4 / height, title, fontsize=17, weight="bold", color=INK, va="center")
    grid = figure.add_gridspec(len(lines), 10, left=0.03, right=0.985, top=1 - 1.1 / height, bottom=0.3 / height,
                               hspace=0.4, wspace=0.12, width_ratios=[1, 0.8] * 5)  # fmt: skip
    for line, (heading, items) in enumerate(lines):
        for column, item in enumerate(items):
            picture, bars = figure.add_subplot(grid[line, 2 * column]), figure.add_subplot(grid[line, 2 * column + 1])
            _draw_tile(picture, bars, item)
            if column == 0 and heading:
                picture.annotate(heading, (0, 1), (0, 22), "axes fraction", "offset points", fontsize=11, color=QUIET)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_tile(picture: Axes, bars: Axes, item: Prediction) -> None:
    colour = RIGHT if item.right else WRONG
    picture.imshow(item.image, interpolation="nearest")
    picture.set(xticks=[], yticks=[])
    for spine in picture.spines.values():
        spine.set(color=colour, linewidth=2.5)
    verdict = f"{item.answer}  {100 * item.probabilities[item.best[0]]:.0f} %"
    picture.set_title(verdict, fontsize=11, weight="bold", color=colour, loc="left", pad=5)
    if not item.right:
        picture.set_xlabel(f"truth: {item.truth}", fontsize=9.5, color=colour, loc="left", labelpad=4)
    order = item.best[::-1]
    bars.barh(
        range(len(order)),
        item.probabilities[order],
        height=0.36,
        color=[colour if i == item.best[0] else "#b6bfc9" for i in order],
    )
    for position, index in enumerate(order):
        bars.text(0, position + 0.24, item.labels[index], fontsize=8, color=INK, va="bottom")
    bars.set(xlim=(0, 1), ylim=(-0.2, len(order) - 0.2), xticks=[], yticks=[])
    bars.axis("off")


def fused(conv: torch.nn.Conv2d | None, bn: torch.nn.BatchNorm2d, channels: int) -> NDArray[np.float64]:
    """Kernel (C', C/groups, 3, 3) of one branch with its BatchNorm multiplied in; the identity for `conv` None."""
    assert bn.running_var is not None
    scale = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach().double().numpy()
    kernel = np.zeros((len(scale), channels, 3, 3))
    if conv is None:
        kernel[range(len(scale)), np.arange(len(scale)) % channels, 1, 1] = 1
    else:
        weight = conv.weight.detach().double().numpy()
        kernel[:, :, 1:2, 1:2] = weight if weight.shape[2] == 1 else 0
        kernel = weight if weight.shape[2] == 3 else kernel
    return cast("NDArray[np.float64]", kernel * scale.reshape(-1, 1, 1, 1))


def draw_reparameterization(model: RepVGG, name: str, path: Path) -> None:
    """One channel of one block: the kernels of three branches and their sum, and what each makes of a real image."""
    block, deploy = cast(Any, model.get_submodule(name)), cast(Any, reparameterize(model).get_submodule(name))
    channels = block.rbr_dense.conv.weight.shape[1]
    pairs = (
        (block.rbr_dense.conv, block.rbr_dense.bn),
        (block.rbr_1x1.conv, block.rbr_1x1.bn),
        (None, block.rbr_identity),
    )
    kernels = [*(fused(conv, bn, channels) for conv, bn in pairs), deploy.rbr_reparam.weight.detach().double().numpy()]
    x = _input_of(model, block, SAMPLE / "images" / "digit-3.png")
    with torch.inference_mode():
        maps = [
            branch(x)[0].numpy() for branch in (block.rbr_dense, block.rbr_1x1, block.rbr_identity, deploy.rbr_reparam)
        ]
    rows = np.arange(len(maps[0]))
    # Of the input channel that the identity branch passes on.
    kernels = [kernel[rows, rows % channels] for kernel in kernels]
    # The channel where all three branches contribute most.
    parts = [np.abs(kernel[:, 1, 1]) for kernel in kernels[:3]] + [m.std((1, 2)) for m in maps[:3]]
    channel = int(np.prod(parts, 0).argmax())
    figure = plt.figure(figsize=(14, 7.6), facecolor="white")
    title = f"Reparameterization: block {name} of the sample, channel {channel}"
    figure.text(0.03, 0.945, title, fontsize=17, weight="bold", color=INK)
    legend = (
        "Training form: three branches, each with its BatchNorm. Deploy form: one 3×3 convolution that computes the "
        "same."
    )
    figure.text(0.03, 0.905, legend, fontsize=12, color=QUIET)
    label = f"kernel × BatchNorm scale,\nfrom input channel {channel}"
    _draw_sum(figure, 0.5, [kernel[channel] for kernel in kernels], label, numbers=True)
    _draw_sum(figure, 0.07, [m[channel] for m in maps], "its output for an image of a “3”", numbers=False)
    difference = (
        f"largest difference between the sum and the one convolution, all {len(rows)} channels: "
        f"{np.abs(sum(maps[:3]) - maps[3]).max():.1e}"
    )
    figure.text(0.97, 0.02, difference, ha="right", fontsize=11, color=QUIET)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _input_of(model: RepVGG, block: TrainingBlock, image: Path) -> torch.Tensor:
    """The input of `block` when the image goes through the model."""
    seen: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    preprocessing = default_preprocessing(32, 32)
    with torch.inference_mode():
        model(torch.from_numpy(normalize(load_image(image, preprocessing)[None], preprocessing)))
    hook.remove()
    return seen[0]


def _draw_sum(figure: Figure, bottom: float, panels: Sequence[NDArray[Any]], label: str, *, numbers: bool) -> None:
    limit = max(float(np.abs(panel).max()) for panel in panels)
    titles = ("3×3 branch", "1×1 branch", "identity branch", "deploy form: one 3×3")
    for index, (panel, title, sign) in enumerate(zip(panels, titles, "++=·", strict=True)):
        left = 0.045 + 0.24 * index
        axes = figure.add_axes((left, bottom, 0.19, 0.35))
        axes.imshow(panel, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title if numbers else "", fontsize=12, color=INK, weight="bold" if index == 3 else "normal")
        if index == 0:
            axes.set_ylabel(label, fontsize=11, color=QUIET)
        if index < 3:
            figure.text(left + 0.215, bottom + 0.175, sign, fontsize=26, ha="center", va="center", color=INK)
        for (row, column), value in np.ndenumerate(panel if numbers else np.empty((0, 0))):
            text, colour = "0" if value == 0 else f"{value:.2f}", "white" if abs(value) > 0.55 * limit else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=13, color=colour)


def run_sample(out: Path) -> None:
    """Runs the sample of this repository: handwritten digits."""
    ckpt = SAMPLE / "repvgg-sample.pth"
    export(ckpt, out / "sample.onnx", 32)
    paths = sorted((SAMPLE / "images").glob("*.png"))
    model = build_model(load_checkpoint(ckpt))
    with Engine(out / "sample.onnx") as engine:
        shown = predict(engine, paths, [path.stem.removeprefix("digit-") for path in paths])
        mistakes = compare_on_evaluation(model, engine)
    rows = [
        ("one image of each class", shown),
        (f"all {len(mistakes)} mistakes among the 400 evaluation images", mistakes),
    ]
    draw_predictions(rows, "Handwritten digits, recognised by the Engine", out / "predictions.png")
    draw_reparameterization(model, "stage1.1", out / "reparameterize.png")


def run_photos(out: Path) -> None:
    """Runs the trained A0 on Imagenette photos, both from ../shared/data."""
    export(SHARED / "repvgg-a0-imagenette.pth", out / "a0.onnx", 128, labels=PHOTO_LABELS)
    (out / "photos").mkdir(exist_ok=True)
    paths, truths = [], []
    with np.load(SHARED / "imagenette128.npz", allow_pickle=False) as file:
        blob, offset, label, split = (file[key] for key in ("blob", "offset", "label", "split"))
    for index in np.flatnonzero(split == 1)[:: math.ceil(2000 / 15)]:
        paths.append(out / "photos" / f"{index:05d}.jpg")
        paths[-1].write_bytes(blob[offset[index] : offset[index + 1]].tobytes())
        truths.append(PHOTO_LABELS[label[index]])
    with Engine(out / "a0.onnx") as engine:
        shown = predict(engine, paths, truths)
    draw_predictions(
        [("15 of 2,000 evaluation images", shown)], "Photos, recognised by RepVGG-A0 in the Engine", out / "photos.png"
    )


def main() -> int:
    """Runs the sample, and the photos where they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is written (demo)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    try:
        run_sample(out)
        detect.run_sample(out, scenes=500)
        if (SHARED / "imagenette128.npz").exists():
            run_photos(out)
    except RepVGGDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\nwritten:", *(f"  {path}" for path in sorted(out.glob("*")) if path.is_file()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains the sample: a small RepVGG on the handwritten digits that scikit-learn ships. Minutes on two cores.

    python models/sample/train.py

Writes repvgg-sample.pth, eval.npz, calib.npz and images/, and prints the numbers of the model's card.

The seed fixes splits, initial weights, batches and augmentation. Equal versions on equal processors with equal thread
counts give equal weights; elsewhere the last digits differ.

Data: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from repvgg_deploy.files.output import sha256_file
from repvgg_deploy.images.decode import default_preprocessing, normalize
from repvgg_deploy.model.network import RepVGG, weight_decay_groups
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import VariantSpec
from repvgg_deploy.specs.variants import count_parameters, load_variant

HERE = Path(__file__).resolve().parent
SIDE = 32
LABELS = tuple("0123456789")
PREPROCESSING = default_preprocessing(SIDE, SIDE)
CALIBRATION_IMAGES = 256
EVALUATION_IMAGES = 400


@dataclass(frozen=True, slots=True)
class Options:
    """How the sample is trained."""

    out: Path
    seed: int = 0
    epochs: int = 60
    batch: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Split:
    """Images uint8 (N, 32, 32, 3), RGB, 0–255; labels int64 (N)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Normalised float32 (N, 3, 32, 32) and int64 (N)."""
        return torch.from_numpy(normalize(self.images, PREPROCESSING)), torch.from_numpy(self.labels)


def load_splits() -> dict[str, Split]:
    """Training, calibration and evaluation split, in the file's order.

    Not shuffled, because neighbours in the file were often written by the same person: a shuffled split would test on
    hands that were seen in training.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([_enlarge(grey) for grey in digits.images])
    first, second = len(images) - EVALUATION_IMAGES - CALIBRATION_IMAGES, len(images) - EVALUATION_IMAGES
    ranges = {"train": slice(0, first), "calib": slice(first, second), "eval": slice(second, None)}
    return {name: Split(images[part], digits.target[part].astype(np.int64)) for name, part in ranges.items()}


def _enlarge(grey: NDArray[np.float64]) -> NDArray[np.uint8]:
    """8×8, 0–16 → uint8 (32, 32, 3), 0–255, bilinear."""
    image = Image.fromarray(np.rint(grey * (255 / 16)).astype(np.uint8))
    return np.repeat(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))[..., None], 3, axis=2)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates (±14°), scales (±15 %), slants (±0.2), shifts (±4 pixels) each image, and its contrast (±30 %)."""
    count = len(images)

    def draw(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, size, slant = draw(math.radians(14)), 1 + draw(0.15), draw(0.2)
    sine, cosine = torch.sin(angle) * size, torch.cos(angle) * size
    rows = (cosine, slant * cosine - sine, draw(8 / SIDE), sine, slant * sine + cosine, draw(8 / SIDE))
    grid = nn.functional.affine_grid(torch.stack(rows, 1).reshape(count, 2, 3), list(images.shape), align_corners=False)
    paper = images.amin((2, 3), keepdim=True)  # what is shifted in from outside is paper too
    moved = nn.functional.grid_sample(images - paper, grid, align_corners=False)
    return paper + moved * (1 + draw(0.3)).reshape(-1, 1, 1, 1)


def train(spec: VariantSpec, split: Split, options: Options) -> RepVGG:
    """SGD with a cosine schedule, label smoothing, and the paper's L2 on equivalent kernels."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = RepVGG(spec)
    images, labels = split.tensors()
    batches = len(images) // options.batch
    steps = options.epochs * batches
    optimizer = torch.optim.SGD(
        weight_decay_groups(model, options.weight_decay), options.learning_rate, momentum=0.9, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for epoch in range(options.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: batches * options.batch].reshape(batches, options.batch):
            logits = model(augment(images[rows], generator))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss + 0.5 * options.weight_decay * model.custom_l2())
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d} of {options.epochs}: loss {total / batches:.4f}", file=sys.stderr)
    return model.eval()


def measure_top1(model: RepVGG, split: Split) -> float:
    """Top-1 accuracy, 0–1."""
    images, labels = split.tensors()
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).double().mean())


def save(model: RepVGG, splits: dict[str, Split], out: Path) -> Path:
    """Writes the checkpoint, both labelled splits and one evaluation image of each class."""
    note = {"variant": codec.encode(model.spec), "labels": list(LABELS), "preprocessing": codec.encode(PREPROCESSING)}
    path = out / "repvgg-sample.pth"
    torch.save({"state_dict": model.state_dict(), "repvgg_deploy": note}, path)
    for name in ("calib", "eval"):
        np.savez_compressed(out / f"{name}.npz", images=splits[name].images, labels=splits[name].labels)
    shutil.rmtree(out / "images", ignore_errors=True)
    (out / "images").mkdir()
    for label in range(len(LABELS)):
        index = int(np.flatnonzero(splits["eval"].labels == label)[0])
        Image.fromarray(splits["eval"].images[index]).save(out / "images" / f"digit-{label}.png", optimize=True)
    return path


def main() -> None:
    """Trains, measures, saves."""
    parser = argparse.ArgumentParser(description="Train the sample checkpoint.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    options = Options(arguments.out, seed=arguments.seed, epochs=arguments.epochs, threads=arguments.threads)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    spec, splits = load_variant(HERE / "variant.toml"), load_splits()
    options.out.mkdir(parents=True, exist_ok=True)
    model = train(spec, splits["train"], options)
    seconds = time.perf_counter() - start
    path = save(model, splits, options.out)
    card: dict[str, object] = {f"top1_{name}": round(measure_top1(model, split), 4) for name, split in splits.items()}
    card |= {
        "parameters_training_form": count_parameters(spec, "training"),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }
    print(json.dumps(card | {"seconds": round(seconds), "seed": options.seed, "torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()

"""Trains the deep narrow networks of the INT8 benchmark: 24 or 48 blocks of widths 32 to 512, with and without SE.

They are what mobile detectors and D2se look like, and small enough to train on a CPU: 24 blocks, 12 epochs at 64
pixels, take twelve minutes of one core, eight with `--bfloat16` where the processor has AMX; 48 blocks twice as long;
96 pixels twice as long again.

    python -m benchmarks.int8_parts.train_deep 24-before                   # barely trained
    python -m benchmarks.int8_parts.train_deep 24-none --epochs 40         # well
    python benchmarks/int8.py --models deep-24-before --only max fast ours "ours trt10"

Writes models/checkpoints/deep-NAME-EPOCHS.pth in training form; `int8.py` takes those of 12 epochs at 64 pixels. The
seed fixes initial weights, batches and augmentation; equal versions on equal processors with one thread give equal
weights. Data: the training split of `../shared/data/imagenette128.npz`.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from repvgg_deploy.images.decode import default_preprocessing
from repvgg_deploy.model.block import TrainingBlock
from repvgg_deploy.model.network import RepVGG, weight_decay_groups
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import SePosition, VariantSpec

from .places import DEEP, SHARED

DEPTHS = {24: (4, 6, 12, 1), 48: (8, 14, 24, 1)}
WIDTHS = (32, 32, 64, 128, 512)
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 0.1, 1e-4
SMALLEST_CROP = 0.5  # of the picture's area
EASED = 32  # blocks; deeper networks begin near the identity, and learn half as fast


def deep_variant(blocks: int, se: SePosition) -> VariantSpec:
    """The architecture: `blocks` counts the stem."""
    return VariantSpec(f"deep{blocks}-{se}", DEPTHS[blocks], WIDTHS, (1,) * blocks, se=se, num_classes=10)


def load_split(number: int, side: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 (N, side, side, 3), averaged over areas, and labels; split 0 is training, 1 evaluation."""
    with np.load(SHARED / "imagenette128.npz") as data:
        blob, offset, label, split = (data[key] for key in ("blob", "offset", "label", "split"))
    where = np.flatnonzero(split == number)
    images = np.empty((len(where), side, side, 3), np.uint8)
    for row, index in enumerate(where):
        picture = Image.open(io.BytesIO(blob[offset[index] : offset[index + 1]].tobytes())).convert("RGB")
        images[row] = np.asarray(picture.resize((side, side), Image.Resampling.BOX))
    return images, label[where].astype(np.int64)


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) → normalised float32 (N, 3, H, W)."""
    preprocessing = default_preprocessing(*images.shape[1:3])
    mean, std = (torch.tensor(value, dtype=torch.float32) for value in (preprocessing.mean, preprocessing.std))
    return ((torch.from_numpy(images).float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image, enlarged again, mirrored or not."""
    count = len(images)
    share = torch.sqrt(SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(count, generator=generator))
    mirror = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * (1 - share)[:, None]
    zero = torch.zeros(count)
    rows = (share * mirror, zero, shift[:, 0], zero, share, shift[:, 1])
    grid = nn.functional.affine_grid(torch.stack(rows, 1).reshape(count, 2, 3), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False, padding_mode="border")


def ease(model: RepVGG) -> None:
    """Lets every block with an identity begin near to it: of 48 plain ones nothing comes back to the first.

    The branches beside it begin at a third, and its shift keeps most values above what ReLU cuts off.
    """
    for block in model.blocks().values():
        if isinstance(block, TrainingBlock) and block.rbr_identity is not None:
            for norm in (norm for norm in block.modules() if isinstance(norm, nn.BatchNorm2d)):
                nn.init.constant_(norm.weight, 1 / 3)
            nn.init.ones_(block.rbr_identity.weight)
            nn.init.ones_(block.rbr_identity.bias)


def train(spec: VariantSpec, side: int, epochs: int, seed: int, *, bfloat16: bool) -> RepVGG:
    """SGD with a cosine schedule that ends at nothing, label smoothing, and the paper's L2 on equivalent kernels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RepVGG(spec)
    rate, rising = LEARNING_RATE, 0.1
    if sum(spec.depths) > EASED:
        ease(model)
        rate, rising = LEARNING_RATE / 2, 0.25
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs do not know it
    images, classes = load_split(0, side)
    labels = torch.from_numpy(classes)
    batches = len(images) // BATCH
    groups = weight_decay_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * batches, pct_start=rising, cycle_momentum=False
    )
    for epoch in range(epochs):
        model.train()
        total, start = 0.0, time.perf_counter()
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: batches * BATCH].reshape(batches, BATCH):
            batch = augment(to_input(images[rows.numpy()]), generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = model(batch).float()
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss + 0.5 * WEIGHT_DECAY * model.custom_l2())
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1:3d} of {epochs}: loss {total / batches:.3f}, {seconds:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval()


def measure_top1(model: RepVGG, side: int) -> float:
    """Top-1 on the evaluation split, in percent."""
    images, labels = load_split(1, side)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            answers = model(to_input(images[start : start + BATCH])).argmax(1).numpy()
            right += int((answers == labels[start : start + BATCH]).sum())
    return 100 * right / len(images)


def main() -> None:
    """Trains, measures, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "network", choices=[f"{blocks}-{se}" for blocks in DEPTHS for se in ("none", "before", "after")]
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--side", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="convolutions in bfloat16, the rest in float32")
    parser.add_argument("--out", type=Path, default=DEEP)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    blocks, where = arguments.network.split("-")
    positions: dict[str, SePosition] = {"none": "none", "before": "before_relu", "after": "after_relu"}
    spec = deep_variant(int(blocks), positions[where])
    model = train(spec, arguments.side, arguments.epochs, arguments.seed, bfloat16=arguments.bfloat16)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"deep-{arguments.network}-{arguments.epochs}.pth"
    note = {
        "variant": codec.encode(spec),
        "preprocessing": codec.encode(default_preprocessing(arguments.side, arguments.side)),
    }
    torch.save({"state_dict": model.state_dict(), "repvgg_deploy": note}, path)
    print(f"{path}: top-1 {measure_top1(model, arguments.side):.2f} %")


if __name__ == "__main__":
    main()

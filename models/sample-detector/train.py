"""Trains the sample detector on scenes of handwritten digits: 16 CPU minutes for each activation.

    python models/sample-detector/train.py --activation silu &
    python models/sample-detector/train.py --activation relu

Writes detector-silu.pth and detector-relu.pth beside this file. Equal versions on equal processors with equal thread
counts give equal weights; elsewhere the last digits differ. The digits of the training scenes are those that
models/sample/train.py trains on; scenes to evaluate on have digits, and grounds, of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from repvgg_deploy.files.output import sha256_file
from repvgg_deploy.images import fit_image, letterbox_preprocessing, normalize, place

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from detector import STRIDES, Activation, Detector  # noqa: E402
from scenes import Digits, draw_scene  # noqa: E402

PREPROCESSING = letterbox_preprocessing(128, 128)
BEST = 10  # positions that may answer for one box


@dataclass(frozen=True, slots=True)
class Options:
    """How the detector is trained."""

    activation: Activation
    steps: int = 1500
    batch: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    seed: int = 0


def training_digits() -> Digits:
    """The 1,141 digits that the classifier is trained on; scikit-learn ships them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = [Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)) for image in digits.images[:1141]]
    ink = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) for image in grey])
    return Digits(ink, digits.target[:1141].astype(np.int64))


def draw_batch(digits: Digits, first: int, count: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Scenes letterboxed to the input: float32 (N, 3, 128, 128), and boxes and classes of each."""
    pixels, boxes, classes = [], [], []
    for number in range(first, first + count):
        scene = draw_scene(digits, "train", number)
        pixels.append(fit_image(scene.image, PREPROCESSING))
        scale_x, scale_y, shift_x, shift_y = place(scene.image.shape[:2], PREPROCESSING).affine
        shift, scale = np.array([shift_x, shift_y] * 2, np.float32), np.array([scale_x, scale_y] * 2, np.float32)
        boxes.append(torch.from_numpy((scene.boxes - shift) / scale))
        classes.append(torch.from_numpy(scene.classes))
    return torch.from_numpy(normalize(np.stack(pixels), PREPROCESSING)), boxes, classes


def flatten(outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, P, 4) in pixels of the input, logits (N, P, classes) and centres (P, 2) of all positions."""
    boxes, logits, centres = [], [], []
    for stride in STRIDES:
        distances = outputs[f"boxes_{stride}"].clamp(max=5).exp() * stride
        y, x = torch.meshgrid(*(torch.arange(side) for side in distances.shape[2:]), indexing="ij")
        centre = (torch.stack((x, y), -1).reshape(-1, 2) + 0.5) * stride
        distances = distances.flatten(2).mT
        boxes.append(torch.cat((centre - distances[..., :2], centre + distances[..., 2:]), -1))
        logits.append(outputs[f"scores_{stride}"].flatten(2).mT)
        centres.append(centre)
    return torch.cat(boxes, 1), torch.cat(logits, 1), torch.cat(centres)


def overlap(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of boxes (…, 4), and the generalised one (Rezatofighi et al. 2019)."""
    common = (torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])).clamp(min=0)
    around = torch.maximum(one[..., 2:], two[..., 2:]) - torch.minimum(one[..., :2], two[..., :2])
    inside = common.prod(-1)
    union = (one[..., 2:] - one[..., :2]).prod(-1) + (two[..., 2:] - two[..., :2]).prod(-1) - inside
    iou = inside / union.clamp(min=1e-6)
    return iou, iou - 1 + union / around.prod(-1).clamp(min=1e-6)


@torch.no_grad()
def assign(found: Tensor, logits: Tensor, centres: Tensor, boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Which box each position of one image answers for, −1 for none, and the score that it should have there.

    Task-aligned: the best by √score × IoU⁶ among the positions inside a box (Feng et al. 2021, TOOD).
    """
    iou = overlap(boxes[:, None], found[None])[0]
    inside = ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(-1)
    aligned = logits.sigmoid()[:, classes].T.sqrt() * iou**6 * inside
    # A box that holds no position, or none that overlaps, takes the nearest.
    nearest = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, centres).argmin(1)
    aligned[torch.arange(len(boxes)), nearest] += 1e-9
    chosen = torch.zeros_like(aligned, dtype=torch.bool).scatter_(1, aligned.topk(BEST, 1).indices, value=True)
    aligned = aligned * chosen
    target = (aligned / aligned.amax(1, keepdim=True)) * (iou * chosen).amax(1, keepdim=True)
    best, answers = torch.where(aligned > 0, iou + 1e-9, 0).max(0)
    answers[best == 0] = -1
    return answers, target[answers, torch.arange(len(centres))] * (answers >= 0)


def loss_of(outputs: dict[str, Tensor], boxes: list[Tensor], classes: list[Tensor]) -> Tensor:
    """Binary cross-entropy against the aligned scores, and 1 − GIoU of the positions that answer for a box."""
    found, logits, centres = flatten(outputs)
    wanted, distance, total = torch.zeros_like(logits), logits.new_zeros(()), logits.new_zeros(())
    for image, (box, label) in enumerate(zip(boxes, classes, strict=True)):
        if len(box):
            answers, score = assign(found[image], logits[image], centres, box, label)
            rows = torch.nonzero(answers >= 0).squeeze(1)
            wanted[image, rows, label[answers[rows]]] = score[rows]
            distance = distance + ((1 - overlap(found[image, rows], box[answers[rows]])[1]) * score[rows]).sum()
            total = total + score.sum()
    return (binary_cross_entropy_with_logits(logits, wanted, reduction="sum") + 2 * distance) / total.clamp(min=1)


def train(digits: Digits, options: Options) -> Detector:
    """AdamW, one cycle."""
    torch.manual_seed(options.seed)
    model = Detector(activation=options.activation).train()
    kernels = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps, pct_start=0.1)
    shown = 0.0
    for step in range(options.steps):
        images, boxes, classes = draw_batch(digits, step * options.batch, options.batch)
        loss = loss_of(model(images), boxes, classes)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        shown += loss.item() / 100
        if step % 100 == 99:
            print(f"{options.activation} step {step + 1:5d} of {options.steps}: loss {shown:.3f}", file=sys.stderr)
            shown = 0.0
    return model.eval()


def main() -> None:
    """Trains, saves."""
    parser = argparse.ArgumentParser(description="Train the sample detector.")
    parser.add_argument("--activation", choices=["silu", "relu"], default="silu")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model = train(training_digits(), Options(arguments.activation, steps=arguments.steps))
    path = arguments.out / f"detector-{arguments.activation}.pth"
    torch.save(model.state_dict(), path)
    card = {"sha256": sha256_file(path), "seconds": round(time.perf_counter() - start), "torch": torch.__version__}
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()

"""A detector deployed, to copy for your own: training form → folded ONNX → Engine → boxes on the images, and their mAP.

    python examples/detect.py                    # --activation relu: the same network, trained with ReLU

Five steps, of which the first and the second are yours to change: the network, and what its outputs mean. Resizing
(letterbox), normalising, and the way of a box back to the image follow from what `export_network` states once: it is
kept in the ONNX, and in the plan that `repvgg-trt build` makes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repvgg_deploy import Engine
from repvgg_deploy.images import fit_image, image_size, letterbox_preprocessing, normalize, place

mpl.use("Agg")  # before pyplot: no window, also where there is no screen
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from repvgg_deploy.export.export import ExportResult

SAMPLE = Path(__file__).resolve().parents[1] / "models" / "sample-detector"
sys.path.insert(0, str(SAMPLE))
from scenes import LABELS, Scene, draw_scene, load_digits  # noqa: E402

Activation: TypeAlias = Literal["silu", "relu"]
Outputs: TypeAlias = "dict[str, NDArray[np.float32]]"
STRIDES = (8, 16)
MOST_BOXES = 100
SHOWN = 18  # scenes that are drawn


@dataclass(frozen=True, slots=True)
class Detections:
    """What was found on one image, best first.

    Boxes float32 (n, 4), left, top, right, bottom in pixels; scores float32 (n,), 0–1; classes int64 (n,).
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]

    def take(self, chosen: NDArray[Any]) -> Detections:
        return Detections(self.boxes[chosen], self.scores[chosen], self.classes[chosen])


# --- 1. The network, and how it was trained to see images.

PREPROCESSING = letterbox_preprocessing(128, 128)  # RGB ÷ 255, grey 114 around the image


def load_network(activation: Activation) -> Any:
    """The trained network in training form: yours, in `eval()`."""
    import torch
    from detector import Detector

    network = Detector(len(LABELS), activation)
    weights = torch.load(SAMPLE / f"detector-{activation}.pth", weights_only=True)  # noqa: TID251 - runs no code so
    network.load_state_dict(weights)
    return network.eval()


def export_network(network: Any, out: Path) -> ExportResult:
    """Folds, verifies against the network as it is, and writes the ONNX."""
    import torch

    from repvgg_deploy import export_module
    from repvgg_deploy.export.module import ModuleOptions

    scene = draw_scene(load_digits("calib"), "calib", 0)
    pixels = fit_image(scene.image, PREPROCESSING)
    options = ModuleOptions(preprocessing=PREPROCESSING, force=True)
    return export_module(network, torch.from_numpy(normalize(pixels[None], PREPROCESSING)), out, options=options)


# --- 2. What its outputs mean.


def decode(outputs: Outputs, least_score: float) -> list[Detections]:
    """Raw maps of N images → boxes in pixels of the input, without doubles.

    Here, and not in the network: what an exponential, a sigmoid and a sort do to a few hundred positions costs nothing,
    and in half precision they would cost accuracy (above 512, FP16 has steps of half a pixel).
    """
    boxes, scores = [], []
    for stride in STRIDES:
        left, top, right, bottom = np.moveaxis(np.exp(outputs[f"boxes_{stride}"]) * stride, 1, 0)
        y, x = (np.indices(left.shape[1:]) + 0.5) * stride
        boxes.append(np.stack((x - left, y - top, x + right, y + bottom), -1).reshape(len(left), -1, 4))
        raw = np.moveaxis(outputs[f"scores_{stride}"], 1, -1).reshape(len(left), -1, len(LABELS))
        scores.append(1 / (1 + np.exp(-raw)))
    found = []
    for box, score in zip(np.concatenate(boxes, 1), np.concatenate(scores, 1), strict=True):
        position, classes = np.nonzero(score > least_score)
        found.append(suppress(Detections(box[position].astype(np.float32), score[position, classes], classes)))
    return found


def suppress(found: Detections, *, most_overlap: float = 0.6) -> Detections:
    """Of boxes of one class that overlap, the best."""
    found = found.take(np.argsort(-found.scores, kind="stable")[: 4 * MOST_BOXES])
    boxes = found.boxes
    common = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    inside = np.clip(common, 0, None).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlaps = inside > most_overlap * (areas[:, None] + areas - inside)
    overlaps &= found.classes[:, None] == found.classes
    kept = np.ones(len(boxes), np.bool_)
    for index in range(len(boxes)):
        if kept[index]:
            kept[index + 1 :] &= ~overlaps[index, index + 1 :]
    return found.take(np.flatnonzero(kept)[:MOST_BOXES])


# --- 3. Image files → boxes on them.


def detect(engine: Engine, paths: Sequence[Path], *, least_score: float = 0.3) -> list[Detections]:
    """Boxes in pixels of each image."""
    outputs = cast(Outputs, engine.infer_images(paths))
    return to_images(decode(outputs, least_score), map(image_size, paths))


def to_images(found: Iterable[Detections], sizes: Iterable[tuple[int, int]]) -> list[Detections]:
    """Boxes in pixels of the input → in pixels of the images, whose sizes are (height, width)."""
    return [
        Detections(place(size, PREPROCESSING).to_image(item.boxes), item.scores, item.classes)
        for item, size in zip(found, sizes, strict=True)
    ]


# --- 4. How good it is: mAP on scenes in memory.


def run_scenes(run: Callable[[NDArray[np.float32]], Outputs], scenes: Sequence[Scene]) -> list[Detections]:
    """Everything that is found on each scene, in its pixels, however small its score; `run` is the network."""
    found: list[Detections] = []
    for start in range(0, len(scenes), 64):
        part = scenes[start : start + 64]
        batch = np.stack([fit_image(scene.image, PREPROCESSING) for scene in part])
        sizes = [scene.image.shape[:2] for scene in part]
        found += to_images(decode(run(normalize(batch, PREPROCESSING)), 0.01), sizes)
    return found


def measure_map(found: Sequence[Detections], scenes: Sequence[Scene]) -> tuple[float, float]:
    """COCO's mAP at IoU 0.50:0.95, and at 0.50, both 0–1."""
    judge = judge_boxes(found, scenes)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.accumulate()
    precision = judge.eval["precision"][..., 0, -1]  # by IoU, recall, class; −1 for a class that no scene has
    precision = precision[..., (precision > -1).all((0, 1))]
    return float(precision.mean()), float(precision[0].mean())


def judge_boxes(found: Sequence[Detections], scenes: Sequence[Scene]) -> Any:
    """COCO's matching of boxes with the scenes' own: a COCOeval that is evaluated, not accumulated."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = [Detections(scene.boxes, np.ones(len(scene.boxes), np.float32), scene.classes) for scene in scenes]
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {
            "images": [{"id": image} for image in range(len(scenes))],
            "categories": [{"id": index, "name": label} for index, label in enumerate(LABELS)],
            "annotations": _as_coco(truth),
        }
        data.createIndex()
        judge = COCOeval(data, data.loadRes(_as_coco(found)), "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], judge.params.areaRngLbl[:1]
        judge.evaluate()
    return judge


def score(run: Callable[[NDArray[np.float32]], Outputs]) -> float:
    """mAP at IoU 0.50:0.95, in percent, of 200 scenes: `repvgg-trt quantize --metric examples.detect:score`."""
    digits = load_digits("eval")
    scenes = [draw_scene(digits, "eval", number) for number in range(200)]
    return 100 * measure_map(run_scenes(run, scenes), scenes)[0]


def _as_coco(found: Sequence[Detections]) -> list[dict[str, Any]]:
    rows = [
        (image, box, score, label)
        for image, item in enumerate(found)
        for box, score, label in zip(item.boxes.tolist(), item.scores.tolist(), item.classes.tolist(), strict=True)
    ]
    return [
        {
            "id": index,  # COCO's counts from 1: a match with 0 counts as none
            "image_id": image,
            "category_id": label,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
            "score": score,
        }
        for index, (image, (left, top, right, bottom), score, label) in enumerate(rows, start=1)
    ]


# --- 5. Show it.


def draw(found: Sequence[Detections], images: Sequence[NDArray[np.uint8]], title: str, path: Path) -> None:
    """Images with their boxes, six to a row."""
    rows = -(-len(images) // 6)
    figure, axes = plt.subplots(rows, 6, figsize=(15, 0.8 + 2.5 * rows), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=17, weight="bold", color="#1f2328")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, item in zip(axes.flat, images, found, strict=False):
        axis.imshow(image, interpolation="nearest")
        for (left, top, right, bottom), score, label in zip(item.boxes, item.scores, item.classes, strict=True):
            colour = plt.get_cmap("tab10")(int(label))
            axis.add_patch(
                Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=colour, lw=2)
            )
            axis.text(
                left,
                top - 1,
                f"{LABELS[label]}  {100 * score:.0f} %",
                fontsize=8,
                color="white",
                va="bottom",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
            )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run_sample(out: Path, activation: Activation = "silu", scenes: int = 2000) -> None:
    """Exports the sample, runs it, prints what it reaches and draws what it finds."""
    import torch

    network, model = load_network(activation), out / f"detector-{activation}.onnx"
    print(f"\ndetector-{activation}.pth → {model.name}")
    result = export_network(network, model)
    certificate = result.metadata.certificate
    print(f"  certificate: compared with {certificate.reference}; {len(certificate.checks)} checks passed")
    assert result.folded is not None
    for kernels, count in Counter(fold.kernels for fold in result.folded.folds).items():
        print(f"    {count:3d} × {kernels}")

    def run_torch(batch: NDArray[np.float32]) -> Outputs:
        with torch.inference_mode():
            return {name: tensor.numpy() for name, tensor in network(torch.from_numpy(batch)).items()}

    digits = load_digits("eval")
    evaluated = [draw_scene(digits, "eval", number) for number in range(scenes)]
    (out / "scenes").mkdir(exist_ok=True)
    paths = [out / "scenes" / f"scene-{number:02d}.png" for number in range(min(scenes, SHOWN))]
    for path, scene in zip(paths, evaluated, strict=False):
        Image.fromarray(scene.image).save(path)
    with Engine(model) as engine:
        print(f"\n  {scenes:,} scenes                 mAP 0.50:0.95      mAP 0.50      seconds")
        for name, run in (("PyTorch, training form", run_torch), ("Engine, folded", engine.infer)):
            started = time.perf_counter()
            found = run_scenes(cast("Callable[[NDArray[np.float32]], Outputs]", run), evaluated)
            seconds = time.perf_counter() - started
            strict, loose = measure_map(found, evaluated)
            print(f"    {name:26} {100 * strict:13.2f} % {100 * loose:11.2f} % {seconds:12.1f}")
        shown = detect(engine, paths)
    draw(shown, [scene.image for scene in evaluated[:SHOWN]], "Digits on scenes of any shape, found by the Engine",
         out / "detections.png")  # fmt: skip


def main() -> None:
    """Runs the sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is written (demo)")
    parser.add_argument("--activation", choices=["silu", "relu"], default="silu", help="which of the samples")
    parser.add_argument("--scenes", type=int, default=2000, help="how many to evaluate on (2000)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    run_sample(arguments.out, arguments.activation, arguments.scenes)


if __name__ == "__main__":
    main()

"""What a user writes: this file must pass `mypy --strict` and pyright in a project of its own, without a cast."""

from pathlib import Path

import numpy as np

from repvgg_deploy import Engine, export_checkpoint
from repvgg_deploy.runtime import Prediction


def show(model: Path, image: Path) -> str:
    with Engine(model) as engine:
        best = engine.classify(image)[0]
        pixels = np.zeros((8, 8, 3), np.uint8)
        several = engine.classify([str(image), pixels], top=2)
        names = [prediction.label for answer in several for prediction in answer]
        names += [answer.predictions[0].label for answer in engine.stream([image]) if answer.error is None]
        batch = np.zeros((1, 3, 8, 8), np.float32)
        largest = float(engine.logits(batch)[0].max())
        return f"{best.label} {best.score:.2f} {names} {largest:.1f}"


def choose(predictions: list[Prediction]) -> int:
    return max(predictions, key=lambda each: each.score).index


export_checkpoint("a.pth", "a.onnx")
print(show(Path("a.onnx"), Path("b.png")))

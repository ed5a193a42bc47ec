"""Seeded models, typed for every TensorRT, with reference outputs: made where torch is, used where it is not."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np

SIZE = 224
IMAGES = {"sample": 64}
"""How many images a reference holds; 8 where it is not said."""
VARIANTS = ("A0", "B1g4", "B2")
SAMPLE = "sample"
"""The trained sample of this repository, small: what `pytest -m gpu` runs."""
KINDS = ("fp32", "fp16", "int8", "int8-trt8", "uint8-fp16")
"""`uint8-fp16`: takes bytes, which a quarter of the copying is spared with; of the first variant only."""
_CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "sample" / "repvgg-sample.pth"


def find_missing() -> list[str]:
    """What of the packages that make models is not installed."""
    return [
        name
        for name in ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]


def path_of(folder: Path, variant: str, kind: str) -> Path:
    """`b2-fp16.onnx`."""
    return folder / f"{variant.lower()}-{kind}.onnx"


def reference_of(folder: Path, variant: str) -> Path:
    """`images` float32 (N, 3, H, W), and what each graph gives for them in ONNX Runtime, by its kind.

    The export compared FP32 with PyTorch. Of the first variant also `bytes`, uint8 (N, H, W, 3), and `bytes-fp32`: what
    the FP32 graph that takes bytes gives for them.
    """
    return folder / f"{variant.lower()}-answers.npz"


def make(folder: Path, variant: str) -> None:
    """Writes all kinds of one variant, and the reference; what stands there already is kept."""
    from repvgg_deploy.export.export import ExportOptions, export_checkpoint
    from repvgg_deploy.export.options import GraphOptions
    from repvgg_deploy.precision.fp16 import to_fp16
    from repvgg_deploy.precision.int8 import FAST, to_int8
    from repvgg_deploy.precision.typed_model import write_typed
    from repvgg_deploy.runtime.checks import usual_shape
    from repvgg_deploy.runtime.engine import Engine

    folder.mkdir(parents=True, exist_ok=True)
    if reference_of(folder, variant).exists():
        return
    fp32, checkpoint = (
        path_of(folder, variant, "fp32"),
        _CHECKPOINT if variant == SAMPLE else folder / f"{variant.lower()}.pth",
    )
    if variant != SAMPLE:
        save_checkpoint(variant, checkpoint)
    export_checkpoint(checkpoint, fp32, options=ExportOptions(force=True))
    with Engine(fp32) as engine:
        images = draw_images(IMAGES.get(variant, 8), usual_shape(engine.spec)[1:])
        answers = {"images": images, "fp32": np.asarray(engine.infer(images))}
    calibration = [images[:4], images[4:]]
    write_typed(path_of(folder, variant, "fp16"), to_fp16(fp32, calibration)[0], force=True)
    for kind, target in (("int8", "trt10"), ("int8-trt8", "trt8")):
        path = path_of(folder, variant, kind)
        write_typed(path, to_int8(fp32, calibration, dataclasses.replace(FAST, target=target))[0], force=True)  # type: ignore[arg-type]
        with Engine(path) as engine:
            answers[kind] = np.asarray(engine.infer(images))
    if variant == VARIANTS[0]:
        raw = folder / "uint8.onnx"
        export_checkpoint(checkpoint, raw, options=ExportOptions(GraphOptions(input="uint8"), force=True))
        write_typed(path_of(folder, variant, "uint8-fp16"), to_fp16(raw, None)[0], force=True)
        answers["bytes"] = np.random.default_rng(1).integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8)
        with Engine(raw) as engine:
            answers["bytes-fp32"] = np.asarray(engine.infer(answers["bytes"]))
        raw.unlink()
    if variant != SAMPLE:
        checkpoint.unlink()
    partial = (
        folder / f".{variant.lower()}-partial.npz"
    )  # whole or not at all: its being there says that the models are
    np.savez(partial, **answers)  # type: ignore[arg-type]
    partial.rename(reference_of(folder, variant))


def save_checkpoint(variant: str, path: Path) -> None:
    """Weights of a seed, with affine parameters that are not those of a fresh network, and statistics of images.

    With statistics that are drawn, too, each layer makes the images more alike, and the logits of all are the same but
    for a thousandth: answers in the wrong order would hardly be wrong.
    """
    import torch

    from repvgg_deploy.model.network import RepVGG
    from repvgg_deploy.specs.variants import get_variant

    torch.manual_seed(0)
    model = RepVGG(get_variant(variant))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.momentum = None  # the statistics of one pass
    with torch.no_grad():
        model.train()(torch.from_numpy(draw_images(8, (3, SIZE, SIZE))))
    torch.save(model.state_dict(), path)


def draw_images(count: int, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Normalised drawn images (N, 3, H, W)."""
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)

"""Seeded models, typed for every TensorRT, with reference outputs: made where torch is, used where it is not."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np

SIZE = 224
IMAGES = 8
VARIANTS = ("A0", "B1g4", "B2")
KINDS = ("fp32", "fp16", "int8", "int8-trt8", "uint8-fp16")
"""`uint8-fp16`: takes bytes, which a quarter of the copying is spared with; of the first variant only."""


def can_make() -> bool:
    """Whether what makes models is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx", "onnxsim", "onnxruntime"))


def path_of(folder: Path, variant: str, kind: str) -> Path:
    """`b2-fp16.onnx`."""
    return folder / f"{variant.lower()}-{kind}.onnx"


def reference_of(folder: Path, variant: str) -> Path:
    """`images` (8, 3, 224, 224), and what each graph gives in ONNX Runtime, by its kind; the FP32 one was compared with PyTorch by the export."""
    return folder / f"{variant.lower()}-reference.npz"


def make(folder: Path, variant: str) -> None:
    """Writes all kinds of one variant, and the reference; what stands there already is kept."""
    from repvgg_deploy.export.options import GraphOptions
    from repvgg_deploy.pipeline.checkpoint import ExportOptions, export_checkpoint
    from repvgg_deploy.precision.fp16 import to_fp16
    from repvgg_deploy.precision.int8 import FAST, to_int8
    from repvgg_deploy.precision.typed_model import write_typed
    from repvgg_deploy.runtime.engine import Engine

    folder.mkdir(parents=True, exist_ok=True)
    fp32, checkpoint = path_of(folder, variant, "fp32"), folder / f"{variant.lower()}.pth"
    if reference_of(folder, variant).exists():
        return
    save_checkpoint(variant, checkpoint)
    export_checkpoint(checkpoint, fp32, options=ExportOptions(force=True))
    images = draw_images(IMAGES)
    calibration = [images[:4], images[4:]]
    write_typed(path_of(folder, variant, "fp16"), to_fp16(fp32, calibration)[0], force=True)
    for kind, target in (("int8", "trt10"), ("int8-trt8", "trt8")):
        write_typed(path_of(folder, variant, kind), to_int8(fp32, calibration, dataclasses.replace(FAST, target=target))[0], force=True)  # type: ignore[arg-type]
    if variant == VARIANTS[0]:
        raw = folder / "uint8.onnx"
        export_checkpoint(checkpoint, raw, options=ExportOptions(GraphOptions(input="uint8"), force=True))
        write_typed(path_of(folder, variant, "uint8-fp16"), to_fp16(raw, None)[0], force=True)
        raw.unlink()
    answers = {}
    for kind in ("fp32", "int8", "int8-trt8"):
        with Engine(path_of(folder, variant, kind)) as engine:
            answers[kind] = np.asarray(engine.infer(images))
    np.savez(reference_of(folder, variant), images=images, **answers)  # type: ignore[arg-type]
    checkpoint.unlink()


def save_checkpoint(variant: str, path: Path) -> None:
    """Weights of a seed, with BatchNorm statistics and affine parameters that are not those of a fresh network."""
    import torch

    from repvgg_deploy.reference.network import RepVGG
    from repvgg_deploy.variants import get_variant

    torch.manual_seed(0)
    model = RepVGG(get_variant(variant))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    torch.save(model.state_dict(), path)


def draw_images(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Normalised drawn images (N, 3, 224, 224)."""
    return np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)

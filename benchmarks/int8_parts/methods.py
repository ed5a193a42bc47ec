"""The methods of the INT8 benchmark: each makes `target` of `fp32.onnx` in the working folder."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from repvgg_deploy.export.calibrate import write_calibration, write_module_calibration
from repvgg_deploy.export.synthesize import SynthesisOptions
from repvgg_deploy.images.calibration import calibration_path, load_calibration_file
from repvgg_deploy.precision.fp16 import to_fp16
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, Int8Options, to_int8
from repvgg_deploy.precision.typed_model import write_typed

from .data import as_batches, calibration_batches
from .peers import quantize_modelopt, quantize_onnxruntime
from .places import SUBJECTS

OURS = Int8Options(target="trt8")
OPTIONS = {
    "max": MAX_CALIBRATION,
    "fast": FAST,
    "ours": OURS,
    "ours trt10": dataclasses.replace(OURS, target="trt10"),
    "fp8": Int8Options(format="fp8"),
}


def quantize(
    subject: str, method: str, folder: Path, target: Path, *, seed: int, setting: str = "", quick: bool = False
) -> None:
    """Runs one method.

    Args:
        subject: Of `SUBJECTS`.
        method: Its key.
        folder: See `data`.
        target: The file to write.
        seed: Of the calibration images.
        setting: Of `peers.ONNXRUNTIME`.
        quick: Fewer synthetic images.
    """
    parent = folder / "fp32.onnx"
    if method == "onnxruntime":
        quantize_onnxruntime(parent, target, calibration_batches(folder, seed), setting)
    elif method.startswith("modelopt"):
        how_chosen = method.removeprefix("modelopt ")
        quantize_modelopt(parent, target, calibration_batches(folder, seed), how_chosen)
    elif method == "fp16":
        write_typed(target, to_fp16(parent, calibration_batches(folder, seed))[0])
    elif method == "synthetic":
        options = SynthesisOptions(16, seed, 8) if quick else SynthesisOptions(seed=seed)
        if SUBJECTS[subject].kind == "classifier":
            write_calibration(SUBJECTS[subject].checkpoint, parent, options=options, force=True)
        else:
            from .networks import make_network

            model, preprocessing = make_network(SUBJECTS[subject], folder)
            write_module_calibration(model, parent, preprocessing, options, force=True)
        images, _ = load_calibration_file(calibration_path(parent))
        write_typed(target, to_int8(parent, as_batches(folder, images), OURS)[0])
    elif method == "statistics":
        write_typed(target, to_int8(parent, None, OURS)[0])
    else:
        write_typed(target, to_int8(parent, calibration_batches(folder, seed), OPTIONS[method], progress=_tell())[0])


def _tell() -> Callable[[str, int, int], None]:
    def tell(stage: str, done: int, total: int) -> None:
        if done == total and sys.stderr.isatty():
            print(f"    {stage}", file=sys.stderr)

    return tell

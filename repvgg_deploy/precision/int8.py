"""FP32 ONNX → INT8 ONNX with explicit quantization, as TensorRT wants it.

Pairs stand on the input of every convolution and of the classifier, and nowhere else (none between Conv and ReLU: it would break the fusion); weights
are INT8 initializers behind DequantizeLinear, one scale per output channel; zero points are 0; biases stay floating-point.

The steps, each a function of its own and each can be left out: ranges (`calibrate`, or `closed_form` without images), equalization (`search`,
`equalize`), scales (`scales`), rounding with bias correction (`round_network`), sensitivity (`sensitivity`), types (`mixed`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from .calibrate import collect
from .closed_form import closed_form_statistics
from .equalize import EqualizeOptions
from .halves import half_spec
from .int8_options import FAST, MAX_CALIBRATION, Int8Options, Int8Report, LayerReport
from .int8_work import Images, Int8Work, Progress, check_opset
from .scales import ScaleFile, ScaleOptions
from .typed_model import StrPath, TypedModel, extend, load_parent

__all__ = ["FAST", "MAX_CALIBRATION", "Images", "Int8Options", "Int8Report", "LayerReport", "quantize_graph", "to_int8"]


def to_int8(
    source: StrPath | onnx.ModelProto,
    images: Images | Sequence[NDArray[Any]] | None,
    options: Int8Options | None = None,
    *,
    saved: ScaleFile | None = None,
    progress: Progress | None = None,
) -> tuple[TypedModel, Int8Report]:
    """Makes the INT8 graph of an FP32 ONNX that repvgg-export wrote, with its metadata extended; `typed_model.write_typed` writes it.

    Args:
        source: File, or the model in memory.
        images: Calibration images, in a list. None: ranges in closed form from the BatchNorm statistics that an export of a training form keeps,
            nothing clipped, and weights rounded by what is true of every image; see `closed_form` and `round_prior`.
        options: Steps and their methods.
        saved: Scales of an earlier calibration of the same graph and images.
        progress: See `Progress`.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, the bound cannot be met, or the result is not what TensorRT takes.
        ModelError: The file is damaged or not one of ours.
    """
    options = options or Int8Options()
    parent = load_parent(source)
    if images is None:
        statistics, moments = closed_form_statistics(parent)
        # Nothing can be measured; and a normal distribution's tail is no reason to clip.
        options = dataclasses.replace(
            options, search=None, sensitivity=False, max_drop=None, equalize=options.equalize and EqualizeOptions(0.5), scales=ScaleOptions("max")
        )
        work = Int8Work(parent.model, Images(()), options, progress)
        graph, report = work.finish_without_images(statistics, moments)
    else:
        graph, report = quantize_graph(parent.model, images, options, saved=saved, progress=progress)
    said: dict[str, str | int | float | bool | None] = {
        "target": options.target,
        "equalize": None if options.equalize is None else "measured" if options.search is not None else options.equalize.exponent,
        "scales": options.scales.method,
        "rounding": options.rounding.method if images is not None or options.rounding.method == "nearest" else "prior",
        "bias_correction": options.rounding.bias_correction,
        "kept": ", ".join(report.kept) or None,
        "images": report.images,
        "data_sha256": report.scales.data_sha256,
    }
    spec = half_spec(parent.metadata.spec, options.io) if options.target == "trt10" else None
    return extend(parent, graph, stage="int8", options=said, spec=spec), report


def quantize_graph(
    model: onnx.ModelProto,
    images: Images | Sequence[NDArray[Any]],
    options: Int8Options | None = None,
    *,
    saved: ScaleFile | None = None,
    progress: Progress | None = None,
) -> tuple[onnx.ModelProto, Int8Report]:
    """Makes the INT8 graph of an exported FP32 graph. Its metadata is still the parent's.

    Args:
        model: FP32, as exported; not changed.
        images: Calibration images.
        options: Steps and their methods.
        saved: Scales of an earlier calibration of the same graph and images.
        progress: See `Progress`.

    Raises:
        CalibrationError: The graph is typed already, the images do not do, the bound cannot be met, or the result is not what TensorRT takes.
        ModelError: The graph is not one of ours.
    """
    check_opset(model)
    given = images if isinstance(images, Images) else Images(images)
    work = Int8Work(model, given, options or Int8Options(), progress)
    if saved is None:
        work.calibrate(collect(model, given.batches, progress=work.stage("ranges")))
    else:
        work.reuse(saved)
    return work.finish()

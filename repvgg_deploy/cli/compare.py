"""`repvgg-trt compare`: two models on the same images, their answers and their layers."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..evaluate.figures import require_drawable
from ..evaluate.plots import AccuracyRow, SqnrSeries, draw_accuracy, draw_layer_sqnr
from ..images.decode import normalize
from ..specs.values import ModelSpec, TensorSpec
from .common import Output, Progress, format_pairs, format_table
from .eval import draw, infer, open_engine, show_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..evaluate.agreement import AgreementReport, Kind, ModelAccuracy
    from ..images.sets import ImageSet

logger = logging.getLogger(__name__)
_LAYER_BATCH = 4  # every layer's output is in memory, of both models


@dataclass(frozen=True, slots=True)
class _Inputs:
    """How one set of images becomes the inputs of two models.

    Attributes:
        spec: What the set is read for.
        reference: Its batches → those of the first model.
        other: Its batches → those of the second.
    """

    spec: ModelSpec
    reference: Callable[[NDArray[Any]], NDArray[Any]]
    other: Callable[[NDArray[Any]], NDArray[Any]]


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: A model or the images cannot be used, or the two cannot be compared.
    """
    from ..evaluate.agreement import compare
    from ..images.sets import SetOptions, open_images

    if args.plot is not None:
        require_drawable(Path(args.plot))
    with open_engine(args.reference, args) as one, open_engine(args.other, args) as two:
        specs = one.spec, two.spec
        _require_same_classes(args, *specs)
        inputs = share_input(*specs)
        options = SetOptions(limit=args.limit, batch_size=args.batch_size, labels="optional")
        images = open_images(args.data, inputs.spec, options)
        with Progress(len(images), "images") as bar:
            report = compare(
                lambda batch: infer(one, inputs.reference(batch)),
                lambda batch: infer(two, inputs.other(batch)),
                images,
                kind=_common_kind(*specs),
                progress=bar.advance,
            )
    report = _with_layers(report, inputs, specs, args)
    errors = draw(args, lambda: _figure(args, report))
    data = {"reference": str(args.reference), "other": str(args.other), "data": str(args.data), "report": report}
    return Output(data=data, text=_as_text(args, report), errors=errors)


def share_input(reference: ModelSpec, other: ModelSpec) -> _Inputs:
    """How both models get to see the same pixels, whether they take bytes or normalised numbers.

    Raises:
        InputError: They resize or crop images differently, or one does not say how.
    """
    one, two = reference.preprocessing, other.preprocessing
    same_kind = (reference.input.dtype == "uint8") == (other.input.dtype == "uint8")
    if same_kind and one == two:
        return _Inputs(reference, lambda batch: batch, lambda batch: batch)
    if (
        one is None
        or two is None
        or (one.resize_short, one.crop, one.interpolation) != (two.resize_short, two.crop, two.interpolation)
    ):
        raise InputError(
            f"the two models do not see the same image: {one or 'unknown preprocessing'} and "
            f"{two or 'unknown preprocessing'}",
            remedy="export both with the same --image-size",
        )
    pixels = dataclasses.replace(
        reference,
        input=TensorSpec("pixels", "uint8", ("batch", *one.crop, 3), "NHWC"),
        preprocessing=dataclasses.replace(one, in_graph=True),
    )
    return _Inputs(pixels, _from_pixels(reference), _from_pixels(other))


def _from_pixels(spec: ModelSpec) -> Callable[[NDArray[Any]], NDArray[Any]]:
    preprocessing = spec.preprocessing
    assert preprocessing is not None
    return (lambda batch: batch) if spec.input.dtype == "uint8" else (lambda batch: normalize(batch, preprocessing))


def _require_same_classes(args: argparse.Namespace, reference: ModelSpec, other: ModelSpec) -> None:
    from ..images.sets import classes_of

    one, two = classes_of(reference), classes_of(other)
    if None not in (one.count, two.count) and one.count != two.count:
        raise InputError(
            f"{args.reference} has {one.count} classes, {args.other} has {two.count}",
            remedy="compare two models of the same classes",
        )
    if one.labels and two.labels and one.labels != two.labels:
        logger.warning("the two models name their classes differently; they are compared by index")


def _common_kind(reference: ModelSpec, other: ModelSpec) -> Kind | None:
    if reference.kind == other.kind == "logits":
        return "logits"
    return "probabilities" if reference.kind == other.kind == "probabilities" else None


def _with_layers(
    report: AgreementReport, inputs: _Inputs, specs: tuple[ModelSpec, ModelSpec], args: argparse.Namespace
) -> AgreementReport:
    """The report with a comparison layer by layer, or with the reason why there is none."""
    from ..evaluate.agreement import compare_layers, first_below
    from ..images.sets import SetOptions, open_images

    if not args.layer_images:
        return dataclasses.replace(report, layers_note="not asked for")
    try:
        from ..precision.layers import LayerRun, run_pairs

        size = _layer_batch(specs)
        one, two = LayerRun(Path(args.reference)), LayerRun(Path(args.other))
        shared = one.shared_with(two)
    except ImportError:
        return dataclasses.replace(
            report, layers_note="that needs the package onnx: pip install 'repvgg-deploy[export,cpu]'"
        )
    except InputError as error:
        return dataclasses.replace(report, layers_note=error.message)
    limit = min(args.layer_images, report.images + report.skipped)
    images = open_images(args.data, inputs.spec, SetOptions(limit=limit, batch_size=size, labels="none"))
    with Progress(limit, "layers") as bar:
        pairs = _layer_inputs(images, inputs, size if any(spec.batch for spec in specs) else None, bar)
        layers = compare_layers(run_pairs(one, two, pairs), fixed=shared.classifiers)
    return dataclasses.replace(report, layers=layers, first_apart=first_below(layers, report.apart_below_db))


def _layer_batch(specs: tuple[ModelSpec, ModelSpec]) -> int:
    fixed = {spec.batch for spec in specs} - {None}
    if len(fixed) > 1:
        raise InputError(
            "layers are not compared: the two have different fixed batches", remedy="export both with the same --batch"
        )
    return next((size for size in fixed if size is not None), _LAYER_BATCH)


def _layer_inputs(
    images: ImageSet, inputs: _Inputs, fixed: int | None, bar: Progress
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The same images for both models; of a fixed batch the last one is filled by repeating its images."""
    for batch in images:
        if len(batch.images):
            whole = batch.images if fixed is None else np.resize(batch.images, (fixed, *batch.images.shape[1:]))
            yield inputs.reference(whole), inputs.other(whole)
        bar.advance(len(batch.images) + len(batch.skipped))


def _figure(args: argparse.Namespace, report: AgreementReport) -> Figure:
    one, two = _names(args)
    if report.layers:
        series = SqnrSeries(
            two, tuple(layer.name for layer in report.layers), tuple(layer.sqnr_db for layer in report.layers)
        )
        return draw_layer_sqnr([series], reference=one, bound_db=report.apart_below_db)
    rows = [AccuracyRow(f"{two}: same class as {one}", report.agreement, report.agreement_standard_error)]
    return draw_accuracy(rows, title=f"Agreement on {report.images} images")


def _names(args: argparse.Namespace) -> tuple[str, str]:
    """Short names of the two files; with their folders where the files are called alike."""
    one, two = Path(args.reference), Path(args.other)
    return (one.name, two.name) if one.name != two.name else (str(one), str(two))


def _as_text(args: argparse.Namespace, report: AgreementReport) -> str:
    one, two = _names(args)
    skipped = f", {report.skipped} more could not be read" if report.skipped else ""
    pairs = [
        ("compared", f"{two} with the reference {one}, {report.images} images{skipped}"),
        (
            "agreement",
            f"{show_share(report.agreement, report.agreement_standard_error)} of the best classes are the same",
        ),
    ]
    if report.output is not None:
        output = report.output
        errors = (
            f"largest error {output.largest:.3g}, rms {output.rms:.3g} (rms of the reference "
            f"{output.reference_rms:.3g})"
        )
        pairs.append((output.kind, f"SQNR {output.sqnr_db:.1f} dB, {errors}"))
    if report.reference is not None and report.other is not None:
        pairs.append(("top-1", f"{_show_accuracy(report.reference)} → {_show_accuracy(report.other)}"))
        pairs.append(("top-5", f"{100 * report.reference.top5:.2f} % → {100 * report.other.top5:.2f} %"))
    return "\n".join([format_pairs(pairs), *_layer_lines(report)])


def _show_accuracy(accuracy: ModelAccuracy) -> str:
    return show_share(accuracy.top1, accuracy.top1_standard_error)


def _layer_lines(report: AgreementReport) -> list[str]:
    if not report.layers:
        return [f"layers not compared: {report.layers_note}"]
    where = f"they part at {report.first_apart}" if report.first_apart else "they part nowhere"
    rows = [["layer", "SQNR dB", "channels scaled by"]]
    for layer in report.layers:
        factors = f"{layer.smallest_factor:.3g} … {layer.largest_factor:.3g}"
        rows.append([layer.name, f"{layer.sqnr_db:.1f}", factors])
    return [f"layers (parted below {report.apart_below_db:g} dB): {where}", format_table(rows, "<><")]

"""`repvgg-trt compare`: two models on the same images, their answers and their layers."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, say_install
from .common import Command, Output, parse_whole, save_plot
from .eval import add_data_options, describe_data, infer, open_engine, read_set_options, show_share
from .terminal import Progress, format_pairs, format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..evaluate.agreement import AgreementReport
    from ..images.sets import ImageSet
    from ..specs.values import ModelSpec, Preprocessing

    Convert = Callable[[NDArray[Any]], NDArray[Any]]

logger = logging.getLogger(__name__)
_LAYER_BATCH = 4  # every layer's output is in memory, of both models


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The two models and their images."""
    parser.add_argument("reference", metavar="A", help="the reference, usually the FP32 .onnx")
    parser.add_argument("other", metavar="B", help="the other, usually the typed .onnx")
    parser.add_argument("--layer-images", type=partial(parse_whole, least=0), default=64, metavar="N",
                        help="images for the comparison of layers, 0 for none (default: %(default)s)")
    add_data_options(parser)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Inputs:
    """How one set of images, read for `spec`, becomes the inputs of two models: a function for each."""

    spec: ModelSpec
    reference: Convert
    other: Convert


def execute(args: argparse.Namespace) -> Output:
    """Compares the answers of both models, then their layers where they have the same ones."""
    from ..evaluate.agreement import compare
    from ..evaluate.figures import require_drawable
    from ..images.likeness import require_like
    from ..images.sets import open_images

    if args.plot is not None:
        require_drawable(args.plot)
    with open_engine(args.reference, args) as one, open_engine(args.other, args) as two:
        _require_same_classes(args, one.spec, two.spec)
        inputs = share_input(one.spec, two.spec)
        images = open_images(args.data, inputs.spec, read_set_options(args, labels="optional"))
        likeness = require_like(images, accept=args.accept_data)
        kind = one.spec.kind if one.spec.kind == two.spec.kind else None
        fixed = {size for size in (one.spec.batch, two.spec.batch) if size is not None}
        with Progress(len(images), "images") as bar:
            report = compare(
                lambda batch: infer(one, inputs.reference(batch)),
                lambda batch: infer(two, inputs.other(batch)),
                images,
                kind=kind if kind in ("logits", "probabilities") else None,
                progress=bar.advance,
            )
    report = _with_layers(report, inputs, fixed, args)
    name, other = Path(args.reference).name, Path(args.other).name
    if name == other:
        name, other = args.reference, args.other  # with their folders
    errors = save_plot(args.plot, lambda: _draw(name, other, report), force=args.force)
    data = {
        "reference": str(args.reference),
        "other": str(args.other),
        "data": str(args.data),
        "labels_from": images.labels_from,
        "left_out": images.left_out,
        "likeness": likeness,
        "report": report,
    }
    said = [] if images.labels is not None else [("accuracy", f"not measured: {images.labels_from}")]
    said += describe_data(images.left_out, likeness)
    return Output(data=data, text=_as_text(name, other, report, said), errors=errors)


def share_input(reference: ModelSpec, other: ModelSpec) -> _Inputs:
    """How both models get to see the same pixels, whether they take bytes or normalised numbers.

    Raises:
        InputError: They resize or crop images differently, or one does not say how.
    """
    from ..images.decode import normalize
    from ..specs.values import TensorSpec

    one, two = reference.preprocessing, other.preprocessing
    same_kind = (reference.input.dtype == "uint8") == (other.input.dtype == "uint8")
    if same_kind and one == two:
        return _Inputs(reference, lambda batch: batch, lambda batch: batch)
    if one is None or two is None or _without_normalisation(one) != _without_normalisation(two):
        unknown = "unknown preprocessing"
        raise InputError(
            f"the two models do not see the same image: {one or unknown} and {two or unknown}",
            remedy="export both with the same --image-size, --resize and --interpolation",
        )

    def from_pixels(spec: ModelSpec) -> Convert:
        how = spec.preprocessing
        assert how is not None
        return (lambda batch: batch) if spec.input.dtype == "uint8" else (lambda batch: normalize(batch, how))

    pixels = TensorSpec("pixels", "uint8", ("batch", *one.crop, 3), "NHWC")
    shared = dataclasses.replace(reference, input=pixels, preprocessing=dataclasses.replace(one, in_graph=True))
    return _Inputs(shared, from_pixels(reference), from_pixels(other))


def _without_normalisation(how: Preprocessing) -> Preprocessing:
    return dataclasses.replace(how, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), in_graph=False)


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


def _with_layers(
    report: AgreementReport, inputs: _Inputs, fixed: set[int], args: argparse.Namespace
) -> AgreementReport:
    """The report with a comparison layer by layer, or with the reason why there is none."""
    from ..evaluate.agreement import compare_layers, first_below
    from ..images.sets import SetOptions, open_images

    if not args.layer_images:
        return dataclasses.replace(report, layers_note="not asked for")
    try:
        from ..precision.layers import LayerRun, run_pairs

        if len(fixed) > 1:
            note = "layers are not compared: the two have different fixed batches"
            return dataclasses.replace(report, layers_note=note)
        one, two = LayerRun(Path(args.reference)), LayerRun(Path(args.other))
        one.require_same(two)
    except ImportError:
        note = f"that needs the package onnx: {say_install('quantize,cpu')}"
        return dataclasses.replace(report, layers_note=note)
    except InputError as error:
        return dataclasses.replace(report, layers_note=error.message)
    size = next(iter(fixed), None)
    limit = min(args.layer_images, report.images + report.skipped)
    options = SetOptions(limit=limit, batch_size=size or _LAYER_BATCH, labels="none", max_value=args.max_value)
    images = open_images(args.data, inputs.spec, options)
    with Progress(limit, "layers") as bar:
        layers = compare_layers(run_pairs(one, two, _pair_inputs(images, inputs, size, bar)), fixed=one.classifiers)
    return dataclasses.replace(report, layers=layers, first_apart=first_below(layers, report.apart_below_db))


def _pair_inputs(
    images: ImageSet, inputs: _Inputs, fixed: int | None, bar: Progress
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The same images for both models; of a fixed batch the last one is filled by repeating its images."""
    import numpy as np

    for batch in images:
        if len(batch.images):
            whole = batch.images if fixed is None else np.resize(batch.images, (fixed, *batch.images.shape[1:]))
            yield inputs.reference(whole), inputs.other(whole)
        bar.advance(len(batch.images) + len(batch.skipped))


def _draw(one: str, two: str, report: AgreementReport) -> Figure:
    from ..evaluate.plots import AccuracyRow, SqnrSeries, draw_accuracy, draw_layer_sqnr

    if report.layers:
        names, sqnrs = zip(*((layer.name, layer.sqnr_db) for layer in report.layers), strict=True)
        return draw_layer_sqnr([SqnrSeries(two, names, sqnrs)], reference=one, bound_db=report.apart_below_db)
    rows = [AccuracyRow(f"{two}: same class as {one}", report.agreement, report.agreement_standard_error)]
    return draw_accuracy(rows, title=f"Agreement on {report.images} images")


def _as_text(one: str, two: str, report: AgreementReport, said: Sequence[tuple[str, str]]) -> str:
    skipped = f", {report.skipped} more could not be read" if report.skipped else ""
    same = show_share(report.agreement, report.agreement_standard_error)
    pairs = [
        ("compared", f"{two} with the reference {one}, {report.images} images{skipped}"),
        ("agreement", f"{same} of the best classes are the same"),
    ]
    if report.output is not None:
        output = report.output
        errors = f"largest error {output.largest:.3g}, rms {output.rms:.3g}"
        text = f"SQNR {output.sqnr_db:.1f} dB, {errors} (rms of the reference {output.reference_rms:.3g})"
        pairs.append((output.kind, text))
    if report.reference is not None and report.other is not None:
        both = report.reference, report.other
        top1 = (show_share(accuracy.top1, accuracy.top1_standard_error) for accuracy in both)
        pairs.append(("top-1", " → ".join(top1)))
        pairs.append(("top-5", " → ".join(f"{100 * accuracy.top5:.2f} %" for accuracy in both)))
    pairs += said
    if not report.layers:
        return f"{format_pairs(pairs)}\nlayers not compared: {report.layers_note}"
    where = f"they part at {report.first_apart}" if report.first_apart else "they part nowhere"
    rows = [["layer", "SQNR dB", "channels scaled by"]]
    for layer in report.layers:
        factors = f"{layer.smallest_factor:.3g} … {layer.largest_factor:.3g}"
        rows.append([layer.name, f"{layer.sqnr_db:.1f}", factors])
    title = f"layers (parted below {report.apart_below_db:g} dB): {where}"
    return "\n".join([format_pairs(pairs), title, format_table(rows, "<><")])


COMMAND = Command(
    "compare",
    "compare two models on the same images, layer by layer",
    "Runs two models of the same classes on the same images and prints how often their best classes are the same, how "
    "far apart their outputs are, their accuracy where the images have labels, and the signal-to-quantization-noise "
    "ratio of every layer. Channels that equalization rescaled are scaled back first.",
    add_options,
    execute,
)

"""`repvgg-trt eval`: how well a model does on labelled images."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, InputError
from ..evaluate.figures import require_drawable, save_figure
from ..evaluate.plots import AccuracyRow, ClassBar, draw_accuracy, draw_confusion
from .common import Output, Progress, format_pairs, format_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..evaluate.accuracy import AccuracyReport, Answer, ClassAccuracy
    from ..images.sets import ImageSet
    from ..runtime.engine import Engine


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: The model or the images cannot be used.
    """
    from ..evaluate.accuracy import evaluate
    from ..images.sets import SetOptions, classes_of, open_images

    if args.plot is not None:
        require_drawable(Path(args.plot))
    with open_engine(args.model, args) as engine:
        classes_of(engine.spec)
        images = open_images(args.data, engine.spec, SetOptions(limit=args.limit, batch_size=args.batch_size))
        with Progress(len(images), "images") as bar:
            report = evaluate(
                lambda batch: infer(engine, batch),
                images,
                labels=engine.spec.labels or images.class_names,
                worst=args.worst,
                progress=bar.advance,
            )
        backend = engine.backend_name
    errors = draw(args, lambda: _figure(args.model, report))
    data = {
        "model": str(args.model),
        "data": str(args.data),
        "labels_from": images.labels_from,
        "backend": backend,
        "report": report,
    }
    return Output(data=data, text=_as_text(report, images, backend), errors=errors)


def open_engine(model: str, args: argparse.Namespace) -> Engine:
    """The Engine of a model, warmed up where its image size is known."""
    from ..runtime.engine import Engine
    from ..runtime.options import EngineOptions

    engine = Engine(
        model, device=args.device, backend=args.backend, options=EngineOptions(intra_op_threads=args.threads)
    )
    with contextlib.suppress(InputError):
        engine.warm_up()
    return engine


def infer(engine: Engine, batch: NDArray[Any]) -> Answer:
    """A classifier's answer to a batch."""
    result = engine.infer(batch)
    assert not isinstance(result, dict), "a classifier has one answer"
    return result


def draw(args: argparse.Namespace, figure: Any) -> tuple[ArtifactError, ...]:
    """Writes `--plot`, if asked for. A picture that cannot be written is no reason to lose the figures.

    Args:
        args: `plot` and `force`.
        figure: Called for the picture.
    """
    if args.plot is None:
        return ()
    try:
        save_figure(figure(), Path(args.plot), force=args.force)
    except ArtifactError as error:
        return (error,)
    return ()


def show_share(share: float, error: float) -> str:
    """A share and its standard error in percent."""
    return f"{100 * share:.2f} % ± {100 * error:.2f}"


def _figure(model: str, report: AccuracyReport) -> Figure:
    name = Path(model).name
    head = f"{name} on {report.images} images: top-1 {show_share(report.top1, report.top1_standard_error)}"
    if not report.worst:
        return draw_accuracy([AccuracyRow(name, report.top1, report.top1_standard_error)], title=head)
    return draw_confusion(
        [_bar(item) for item in report.worst], title=f"{head}\nThe worst classes, and what they are taken for"
    )


def _bar(item: ClassAccuracy) -> ClassBar:
    taken = tuple((_label(other.index, other.label), other.images / item.images) for other in item.confused_with)
    return ClassBar(_label(item.index, item.label), item.images, item.top1, taken)


def _label(index: int, label: str | None) -> str:
    return label or f"class {index}"


def _as_text(report: AccuracyReport, images: ImageSet, backend: str) -> str:
    skipped = f", {report.skipped} more could not be read" if report.skipped else ""
    speed = (
        f"{report.inference_images_per_second:,.0f} images/s inference, {report.decode_images_per_second:,.0f} "
        f"images/s decoding"
    )
    pairs = [
        ("images", f"{report.images}{skipped}; {images.labels_from}"),
        ("top-1", show_share(report.top1, report.top1_standard_error)),
        ("top-5", f"{100 * report.top5:.2f} %"),
        ("speed", f"{speed} ({backend})"),
    ]
    return "\n".join([format_pairs(pairs), *_worst_lines(report.worst)])


def _worst_lines(worst: Sequence[ClassAccuracy]) -> list[str]:
    if not worst:
        return []
    rows = [["class", "images", "top-1 %", "taken for"]]
    for item in worst:
        taken = ", ".join(f"{_label(other.index, other.label)}: {other.images}" for other in item.confused_with)
        rows.append([_label(item.index, item.label), str(item.images), f"{100 * item.top1:.1f}", taken])
    return ["worst classes", format_table(rows, "<>><")]

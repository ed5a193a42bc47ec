"""`repvgg-trt eval`: how well a model does on labelled images. `compare` shares its images, Engine and words."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .common import Command, Output, add_device_options, parse_whole, save_plot
from .terminal import Progress, format_pairs, format_table, paint

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..evaluate.accuracy import AccuracyReport, Answer, ConfusionMatrix
    from ..images.likeness import Likeness
    from ..images.sets import ImageSet, LabelUse, SetOptions
    from ..runtime.engine import Engine


_TERMINAL_CLASSES, _NAME_WIDTH = 10, 22


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The model and its images."""
    parser.add_argument("model", metavar="MODEL",
                        help="an .onnx of repvgg-export, fold or quantize, or a plan with its passport beside it")
    parser.add_argument("--worst", type=parse_whole, default=5, metavar="N",
                        help="how many of the worst classes to print (default: %(default)s)")
    add_data_options(parser)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The images, what runs the models, and the picture."""
    parser.add_argument("--data", required=True, metavar="PATH",
                        help="images: a folder with a sub-folder a class; a CSV of path,label (paths relative to it); "
                             "an .npz with images and labels")
    parser.add_argument("--sorted-folders", action="store_true",
                        help="the sub-folders' names say nothing: the first in sorted order is class 0 (torchvision's "
                             "ImageFolder)")
    add_data_check_option(parser)
    add_max_value_option(parser)
    parser.add_argument("--limit", type=parse_whole, metavar="N",
                        help="only so many images, drawn evenly (default: all)")
    parser.add_argument("--batch-size", type=parse_whole, default=32, metavar="N",
                        help="images decoded and run at a time (default: %(default)s)")
    add_device_options(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the result as a .png (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="replace a picture that differs")


def add_data_check_option(group: argparse._ActionsContainer) -> None:
    """Whether images that are unlike those of training are taken all the same."""
    group.add_argument("--accept-data", action="store_true",
                       help="go on though the images are unlike what the model was trained on")


def add_max_value_option(group: argparse._ActionsContainer) -> None:
    """The depth of images, for commands that read them."""
    group.add_argument("--max-value", type=partial(parse_whole, most=65535), metavar="N",
                       help="what is white in images of more than 8 bits, such as 4095 (default: as exported)")
# fmt: on


def execute(args: argparse.Namespace) -> Output:
    """Runs the model on the images, says how often it is right, and draws the worst classes if asked to."""
    from ..evaluate.accuracy import evaluate
    from ..evaluate.figures import require_drawable
    from ..images.likeness import require_like
    from ..images.sets import classes_of, open_images

    if args.plot is not None:
        require_drawable(args.plot)
    with open_engine(args.model, args) as engine:
        classes_of(engine.spec)
        images = open_images(args.data, engine.spec, read_set_options(args))
        likeness = require_like(images, accept=args.accept_data)
        with Progress(len(images), "images") as bar:
            report = evaluate(
                lambda batch: infer(engine, batch),
                images,
                labels=engine.spec.labels or images.class_names,
                worst=args.worst,
                progress=bar.advance,
            )
        backend = engine.backend_name
    errors = save_plot(args.plot, lambda: _draw(Path(args.model).name, report), force=args.force)
    data = {
        "model": str(args.model),
        "data": str(args.data),
        "labels_from": images.labels_from,
        "left_out": images.left_out,
        "likeness": likeness,
        "backend": backend,
        "report": report,
    }
    return Output(data=data, text=_as_text(report, images, likeness, backend), errors=errors)


def read_set_options(args: argparse.Namespace, *, labels: LabelUse = "required") -> SetOptions:
    """Which images are asked for."""
    from ..images.sets import SetOptions

    return SetOptions(
        args.limit, args.batch_size, labels=labels, sorted_folders=args.sorted_folders, max_value=args.max_value
    )


def open_engine(model: str, args: argparse.Namespace) -> Engine:
    """The Engine of a model, warmed up where its image size is known."""
    from ..runtime.engine import Engine
    from ..runtime.options import EngineOptions

    options = EngineOptions(intra_op_threads=args.threads, bfloat16=args.bfloat16)
    engine = Engine(model, device=args.device, backend=args.backend, options=options)
    with contextlib.suppress(InputError):
        engine.warm_up()
    return engine


def infer(engine: Engine, batch: NDArray[Any]) -> Answer:
    """A classifier's answer to a batch."""
    result = engine.infer(batch)
    assert not isinstance(result, dict), "a classifier has one answer"
    return result


def show_share(share: float, error: float) -> str:
    """A share and its standard error in percent."""
    return f"{100 * share:.2f} % ± {100 * error:.2f}"


def describe_data(left_out: str, likeness: Likeness | None) -> list[tuple[str, str]]:
    """What was left out, and how the images compare with those of training."""
    pairs = [("left out", left_out.removeprefix("left out: "))] if left_out else []
    return pairs if likeness is None else [*pairs, ("data", likeness.said)]


def _draw(name: str, report: AccuracyReport) -> Figure:
    from ..evaluate.plots import draw_confusion

    head = f"{name} on {report.images} images: top-1 {show_share(report.top1, report.top1_standard_error)}"
    return draw_confusion(report.confusion, title=head)


def _label(index: int, label: str | None) -> str:
    return label or f"class {index}"


def _clip(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"


def _as_text(report: AccuracyReport, images: ImageSet, likeness: Likeness, backend: str) -> str:
    skipped = f", {report.skipped} more could not be read" if report.skipped else ""
    inference = f"{report.inference_images_per_second:,.0f} images/s inference"
    decoding = f"{report.decode_images_per_second:,.0f} images/s decoding"
    pairs = [
        ("images", f"{report.images}{skipped}; {images.labels_from}"),
        ("top-1", show_share(report.top1, report.top1_standard_error)),
        ("top-5", f"{100 * report.top5:.2f} %"),
        ("speed", f"{inference}, {decoding} ({backend})"),
        *describe_data(images.left_out, likeness),
    ]
    if not report.worst:
        return format_pairs(pairs)
    rows = [["class", "images", "top-1 %", "taken for"]]
    for item in report.worst:
        taken = ", ".join(f"{_label(other.index, other.label)}: {other.images}" for other in item.confused_with)
        rows.append([_clip(_label(item.index, item.label)), str(item.images), f"{100 * item.top1:.1f}", taken])
    return "\n".join([format_pairs(pairs), "worst classes", format_table(rows, "<>><"), *_matrix(report.confusion)])


def _matrix(found: ConfusionMatrix) -> list[str]:
    """The confusion matrix of few classes, which a terminal has room for; more are drawn by --plot."""
    if len(found.classes) > _TERMINAL_CLASSES:
        return []
    rows = [["", *map(str, found.classes)]]
    for index, label, counts in zip(found.classes, found.labels, found.counts, strict=True):
        name = str(index) if label is None or label == str(index) else f"{_clip(label)} ({index})"
        rows.append(
            [
                name,
                *(
                    paint(str(count), "bad") if count and other != index else str(count or "·")
                    for other, count in zip(found.classes, counts, strict=True)
                ),
            ]
        )
    return ["rows: the right class, columns: what the model said", format_table(rows, "<" + ">" * len(found.classes))]


COMMAND = Command(
    "eval",
    "measure top-1, top-5 and speed on labelled images",
    "Runs a classifier on labelled images and prints top-1, top-5, images a second and the worst classes with what "
    "they are taken for. An image that cannot be read is skipped and counted; above 10 % it is an error.",
    add_options,
    execute,
)

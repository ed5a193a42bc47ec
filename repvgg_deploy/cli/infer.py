"""`repvgg-trt infer`: the best classes of images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, ModelError, RepVGGDeployError
from .common import Command, Output, Progress, add_device_options, format_table, parse_whole
from .eval import add_max_value_option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.engine import Engine
    from ..specs.values import ModelSpec, Preprocessing

logger = logging.getLogger(__name__)
_USUAL_TOP = 5


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, the images, and what is printed of them."""
    parser.add_argument("model", metavar="MODEL",
                        help="an .onnx of repvgg-export, fold or quantize, or a plan with its passport beside it")
    parser.add_argument("images", metavar="IMAGE", nargs="+",
                        help="image files, folders (with all below them), quoted patterns, or - for one image on "
                             "standard input")
    parser.add_argument("--top", type=parse_whole, metavar="N", help="how many classes to print (default: 5)")
    parser.add_argument("--labels", type=Path, metavar="FILE",
                        help="names of the classes, one a line; in place of those in the model")
    parser.add_argument("--batch-size", type=parse_whole, default=16, metavar="N",
                        help="images decoded and run at a time (default: %(default)s)")
    add_max_value_option(parser)
    add_device_options(parser)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Answer:
    """What became of one image: class, label and probability, best first, or an error."""

    image: str
    predictions: tuple[tuple[int, str | None, float], ...] = ()
    error: RepVGGDeployError | None = None


def execute(args: argparse.Namespace) -> Output:
    """Answers the images that can be read; what is wrong with the others stands in the output's errors."""
    from ..images.listing import Listing, expand
    from ..runtime.engine import Engine
    from ..runtime.options import EngineOptions

    options = EngineOptions(intra_op_threads=args.threads)
    answers: list[_Answer] = []
    with Engine(args.model, device=args.device, backend=args.backend, options=options) as engine:
        labels = _choose_labels(engine.spec, args)
        preprocessing = engine.spec.preprocessing
        assert preprocessing is not None, "_choose_labels refuses a model without"
        if args.max_value is not None:
            preprocessing = replace(preprocessing, max_value=args.max_value)
        found = Listing()
        for item in args.images:
            try:
                found += expand([item])
            except InputError as error:
                answers.append(_Answer(item, error=error))
        if found.left_out:
            logger.warning("%s", found.left_out)
        files = found.files
        with Progress(len(files), "images") as bar:
            for start in range(0, len(files), args.batch_size):
                piece = files[start : start + args.batch_size]
                answers += _answer(engine, piece, preprocessing, labels, top=args.top or _USUAL_TOP)
                bar.advance(len(piece))
    left_out = {"hidden": found.hidden, "no_image": found.others, "without_images": found.empty}
    return Output(
        data={"model": str(args.model), "images": [_as_json(answer) for answer in answers], "left_out": left_out},
        text="\n".join(_as_text(answer) for answer in answers if answer.error is None),
        errors=tuple(answer.error for answer in answers if answer.error is not None),
    )


def _choose_labels(spec: ModelSpec, args: argparse.Namespace) -> tuple[str, ...] | None:
    """The names of the classes; refuses a model that has none, and options that do not fit it."""
    from ..images.labels import read_labels

    from_python = "run it from Python: Engine(path).infer(batch)"
    if spec.kind not in ("logits", "probabilities", "top5"):
        raise InputError(
            f"{args.model}: gives {spec.kind}, not classes, so there is nothing to print", remedy=from_python
        )
    if spec.preprocessing is None:
        raise InputError(f"{args.model}: does not say how an image becomes its input", remedy=from_python)
    if spec.kind == "top5" and args.top is not None and args.top > (best := _count_columns(spec)):
        raise InputError(
            f"{args.model}: gives the best {best} classes, --top {args.top} asks for more",
            remedy=f"give --top {best} or less, or export with --output logits",
        )
    if args.labels is None:
        return spec.labels
    labels = read_labels(args.labels)
    if spec.kind != "top5" and len(labels) != (count := _count_columns(spec)):
        raise InputError(
            f"{args.labels}: holds {len(labels)} labels, and the model has {count} classes",
            remedy="give one label a line, in the order of the classes",
        )
    return labels


def _count_columns(spec: ModelSpec) -> int:
    columns = spec.outputs[0].shape[-1]
    if isinstance(columns, str):
        message = f"the model does not say how many classes it has: {spec.outputs[0]}"
        raise ModelError(message, remedy="export it again with repvgg-export")
    return columns


def _answer(
    engine: Engine, files: Sequence[Path], preprocessing: Preprocessing, labels: tuple[str, ...] | None, *, top: int
) -> list[_Answer]:
    """Answers the images that can be read at once, in the order of the files; each is read once."""
    import numpy as np

    from ..images.decode import load_image, normalize
    from ..runtime.results import rank_classes

    images: dict[str, NDArray[np.uint8]] = {}
    answers: dict[str, _Answer] = {}
    for file in dict.fromkeys(map(str, files)):
        try:
            images[file] = load_image(file, preprocessing)
        except InputError as error:
            answers[file] = _Answer(file, error=error)
    if images:
        pixels = np.stack(list(images.values()))
        result = engine.infer(pixels if preprocessing.in_graph else normalize(pixels, preprocessing))
        for file, (classes, scores) in zip(images, rank_classes(result, engine.spec, top), strict=True):
            if np.isfinite(scores).all():
                names = [labels[index] if labels is not None and index < len(labels) else None for index in classes]
                answers[file] = _Answer(file, tuple(zip(classes.tolist(), names, scores.tolist(), strict=True)))
            else:
                message = f"{file}: the model answers with NaN or infinities"
                remedy = "export it again from the checkpoint, and verify it"
                answers[file] = _Answer(file, error=ModelError(message, remedy=remedy))
    return [answers[str(file)] for file in files]


def _as_json(answer: _Answer) -> dict[str, object]:
    if answer.error is not None:
        return {"image": answer.image, "error": answer.error.message, "remedy": answer.error.remedy}
    keys = ("class", "label", "probability")
    return {"image": answer.image, "predictions": [dict(zip(keys, p, strict=True)) for p in answer.predictions]}


def _as_text(answer: _Answer) -> str:
    rows = [
        [str(rank), label or f"class {index}", f"{probability:.4f}"]
        for rank, (index, label, probability) in enumerate(answer.predictions, start=1)
    ]
    return f"{answer.image}\n{format_table(rows, '><>')}"


COMMAND = Command(
    "infer",
    "print the best classes of images",
    "Prints the best classes of each image with their probabilities. An image that cannot be read is named, the others "
    "are answered all the same, and the exit code is 1.",
    add_options,
    execute,
)

"""`repvgg-trt infer`: the best classes of images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, ModelError, RepVGGDeployError
from ..images.classes import read_labels
from ..images.decode import list_images
from .common import Output, Progress, format_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runtime.engine import Engine
    from ..specs.values import ModelSpec

_USUAL_TOP = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class of one image.

    Attributes:
        index: Of the class.
        label: Its name, or None where none is known.
        probability: 0 to 1.
    """

    index: int
    label: str | None
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one image: predictions, best first, or an error."""

    image: str
    predictions: tuple[Prediction, ...] = ()
    error: RepVGGDeployError | None = None


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: The model or the labels cannot be used; what is wrong with an image is in the output.
    """
    from ..runtime.engine import Engine
    from ..runtime.options import EngineOptions

    with Engine(
        args.model, device=args.device, backend=args.backend, options=EngineOptions(intra_op_threads=args.threads)
    ) as engine:
        labels = _choose_labels(engine.spec, args)
        answers = _answer(engine, labels, args)
    return Output(
        data={"model": str(args.model), "images": [_as_json(answer) for answer in answers]},
        text="\n".join(_as_text(answer) for answer in answers if answer.error is None),
        errors=tuple(answer.error for answer in answers if answer.error is not None),
    )


def _choose_labels(spec: ModelSpec, args: argparse.Namespace) -> tuple[str, ...] | None:
    if spec.kind not in ("logits", "probabilities", "top5"):
        raise InputError(
            f"{args.model}: gives {spec.kind}, not classes, so there is nothing to print",
            remedy="run it from Python: Engine(path).infer(batch)",
        )
    if spec.preprocessing is None:
        raise InputError(
            f"{args.model}: does not say how an image becomes its input",
            remedy="run it from Python: Engine(path).infer(batch)",
        )
    if spec.kind == "top5" and args.top is not None and args.top > (best := _columns(spec)):
        raise InputError(
            f"{args.model}: gives the best {best} classes, --top {args.top} asks for more",
            remedy=f"give --top {best} or less, or export with --output logits",
        )
    if args.labels is None:
        return spec.labels
    labels = read_labels(Path(args.labels))
    if spec.kind != "top5" and len(labels) != _columns(spec):
        raise InputError(
            f"{args.labels}: holds {len(labels)} labels, and the model has {_columns(spec)} classes",
            remedy="give one label a line, in the order of the classes",
        )
    return labels


def _columns(spec: ModelSpec) -> int:
    columns = spec.outputs[0].shape[-1]
    if isinstance(columns, str):
        raise ModelError(
            f"the model does not say how many classes it has: {spec.outputs[0]}",
            remedy="export it again with repvgg-export",
        )
    return columns


def _answer(engine: Engine, labels: tuple[str, ...] | None, args: argparse.Namespace) -> list[Answer]:
    answers: list[Answer] = []
    files: list[Path] = []
    for item in args.images:
        try:
            files += list_images([item])
        except InputError as error:
            answers.append(Answer(item, error=error))
    with Progress(len(files), "images") as bar:
        for start in range(0, len(files), args.batch_size):
            piece = files[start : start + args.batch_size]
            answers += _answer_batch(engine, piece, labels, args.top or _USUAL_TOP)
            bar.advance(len(piece))
    return answers


def _answer_batch(engine: Engine, files: Sequence[Path], labels: tuple[str, ...] | None, top: int) -> list[Answer]:
    """Answers several images at once, or one by one where one of them is unusable."""
    from ..runtime.results import rank_classes

    try:
        result = engine.infer_images(files)
    except InputError as error:
        if len(files) == 1:
            return [Answer(str(files[0]), error=error)]
        return [answer for file in files for answer in _answer_batch(engine, [file], labels, top)]
    rows = rank_classes(result, engine.spec, top)
    return [
        _make_answer(str(file), classes, scores, labels) for file, (classes, scores) in zip(files, rows, strict=True)
    ]


def _make_answer(
    image: str, classes: NDArray[np.int64], scores: NDArray[np.float64], labels: tuple[str, ...] | None
) -> Answer:
    if not np.isfinite(scores).all():
        error = ModelError(
            f"{image}: the model answers with NaN or infinities",
            remedy="export it again from the checkpoint, and verify it",
        )
        return Answer(image, error=error)
    predictions = (
        Prediction(int(index), labels[index] if labels is not None and index < len(labels) else None, float(score))
        for index, score in zip(classes, scores, strict=True)
    )
    return Answer(image, tuple(predictions))


def _as_json(answer: Answer) -> dict[str, object]:
    if answer.error is not None:
        return {"image": answer.image, "error": answer.error.message, "remedy": answer.error.remedy}
    predictions = [{"class": p.index, "label": p.label, "probability": p.probability} for p in answer.predictions]
    return {"image": answer.image, "predictions": predictions}


def _as_text(answer: Answer) -> str:
    rows = [
        [str(rank), p.label or f"class {p.index}", f"{p.probability:.4f}"]
        for rank, p in enumerate(answer.predictions, start=1)
    ]
    return f"{answer.image}\n{format_table(rows, '><>')}"

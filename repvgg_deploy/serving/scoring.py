"""Any number of images → rows of a table: classes with scores, or the embeddings of a backbone.

`Scorer` says which columns there are and makes the rows of each piece; `score` runs it over files, and `serving.ray`
over a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..images.ahead import Piece, decode_ahead
from ..runtime.answers import plan_answers, show_picture, to_input
from ..runtime.engine import Engine
from ..runtime.results import Result
from ..specs.values import Preprocessing, TensorSpec
from .tables import GrowingTable, Row, as_text

PART_ROWS = 5000
PART_SECONDS = 60.0
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """What is computed of each image.

    Attributes:
        top: Classes, best first, where the model has so many.
        features: The outputs of a backbone as vectors, in place of classes; maps are averaged over the image.
        labels: In place of the model's own.
        max_value: What is white in images of more than 8 bits; None: as the model says.
    """

    top: int = 5
    features: bool = False
    labels: tuple[str, ...] | None = None
    max_value: int | None = None


class Scorer:
    """Makes the rows of a table: `image`, what was computed, and `error`, why an image cannot be read.

    Of a classifier `class_1`, `label_1`, `score_1` and so on, best first; of a backbone one vector an output, under the
    output's name, or `features` where there is one.

    Args:
        engine: Runs the model; it stays the caller's.
        options: What is computed.

    Raises:
        InputError: The model gives no classes, or no vectors, or does not say how an image becomes its input.
    """

    def __init__(self, engine: Engine, options: ScoringOptions) -> None:
        spec, path = engine.spec, engine.path
        self._infer, self._how = engine.infer, None
        if options.features:
            if spec.kind in ("logits", "probabilities", "top5"):
                remedy = "leave --features out, or export the backbone with --features"
                raise InputError(f"{path}: gives {spec.kind}, not features", remedy=remedy)
            if spec.preprocessing is None:
                remedy = "run it from Python: Engine(path).infer(batch)"
                raise InputError(f"{path}: does not say how an image becomes its input", remedy=remedy)
            how = spec.preprocessing
            name = "features" if len(spec.outputs) == 1 else ""
            self._vectors = {output.name: (name or output.name, _width(output, path)) for output in spec.outputs}
            values: dict[str, type | int] = dict(self._vectors.values())
        else:
            self._how = plan_answers(spec, path, top=options.top, labels=options.labels)
            how = self._how.preprocessing
            classes = spec.outputs[-1].shape[-1]
            self._top = min(options.top, classes) if isinstance(classes, int) else options.top
            kinds = (("class", int), ("label", str), ("score", float))
            values = {f"{name}_{rank + 1}": kind for rank in range(self._top) for name, kind in kinds}
        self.preprocessing: Preprocessing = (
            how if options.max_value is None else replace(how, max_value=options.max_value)
        )
        self.columns: dict[str, type | int] = {"image": str, **values, "error": str}

    def make_rows(self, piece: Piece) -> list[Row]:
        """The rows of a piece, in its order."""
        result = self._infer(to_input(piece.pixels, self.preprocessing)) if len(piece.pixels) else None
        if self._how is None:
            return list(self._make_vectors(piece, result))
        missing = (None,) * (3 * self._top)
        rows: list[Row] = []
        for answer in self._how.answer(piece, result):
            values = [value for each in answer.predictions for value in (each.index, each.label, each.score)]
            error = None if answer.error is None else str(answer.error)
            rows.append((_name(answer.image), *(values if answer.error is None else missing), error))
        return rows

    def _make_vectors(self, piece: Piece, result: Result | None) -> Iterator[Row]:
        outputs: dict[str, Any] = result if isinstance(result, dict) else dict.fromkeys(self._vectors, result)
        pooled = [
            None if outputs[name] is None else outputs[name].mean(axis=tuple(range(2, outputs[name].ndim)))
            for name in self._vectors
        ]
        row = 0
        for picture, error in piece.pictures:
            vectors = [None if error is not None or each is None else each[row] for each in pooled]
            yield (_name(picture), *vectors, None if error is None else str(error))
            row += error is None


def _width(output: TensorSpec, path: object) -> int:
    width = output.shape[1] if len(output.shape) >= 2 else None
    if not isinstance(width, int) or not output.dtype.startswith("float"):
        raise InputError(
            f"{path}: output {output.name} is {output.dtype} {output.shape}, no vector of an image",
            remedy="export a backbone with --features, or run it from Python: Engine(path).infer(batch)",
        )
    return width


def _name(picture: Any) -> str:
    return as_text(show_picture(picture))


@dataclass(frozen=True, slots=True)
class Scored:
    """What a run did.

    Attributes:
        images: Rows that it added.
        unread: How many of them could not be read.
        errors: The first of those, in words.
        seconds: How long it took.
    """

    images: int
    unread: int
    errors: tuple[str, ...]
    seconds: float


def score(
    files: Iterable[str],
    scorer: Scorer,
    table: GrowingTable,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Appends a row for each file; what was computed is on the disk every minute and at any end but a kill.

    Args:
        files: Taken as they are needed, so that memory does not grow with their number.
        scorer: Makes the rows.
        table: Takes them, in parts of PART_ROWS or PART_SECONDS.
        batch_size: Images that are run at a time.
        progress: Called with the number of images after each batch.

    Raises:
        ArtifactError: The disk is full.
        ModelError: The backend failed.
    """
    rows: list[Row] = []
    errors: list[str] = []
    images, unread = 0, 0
    started = written = time.monotonic()
    try:
        for piece in decode_ahead(files, scorer.preprocessing, batch_size=batch_size):
            made = scorer.make_rows(piece)
            rows += made
            images += len(made)
            failed = [row[-1] for row in made if row[-1] is not None]
            unread += len(failed)
            errors += failed[: _SHOWN - len(errors)]
            if progress is not None:
                progress(len(made))
            if len(rows) >= PART_ROWS or time.monotonic() - written >= PART_SECONDS:
                part, rows = rows, []  # an interrupted append is made again by the next run, never twice by this one
                table.append(part)
                written = time.monotonic()
    finally:
        if rows:
            table.append(rows)
    return Scored(images, unread, tuple(errors), time.monotonic() - started)

"""`repvgg-trt infer`: the best classes of images."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, ModelError
from .common import Command, Output, add_device_options, parse_whole
from .eval import add_max_value_option
from .terminal import Progress, format_table

if TYPE_CHECKING:
    from ..runtime.answers import Answer, Classifying
    from ..specs.values import ModelSpec

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
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write a table with a row for each image, for any number of them: .csv, .jsonl or "
                             ".parquet; what cannot be read has its reason there, and is no error")
    parser.add_argument("--features", action="store_true",
                        help="with --out: a backbone's outputs as columns, averaged over the image")
    parser.add_argument("--resume", action="store_true",
                        help="with --out: go on where an interrupted run of this command stopped")
    parser.add_argument("--force", action="store_true", help="with --out: replace the file, or begin anew")
    add_max_value_option(parser)
    add_device_options(parser)
# fmt: on


def find_conflict(args: argparse.Namespace) -> str | None:
    """What belongs to a table needs one."""
    if args.out is not None:
        return "--resume goes on, --force begins anew: give one" if args.resume and args.force else None
    given = [name for name in ("features", "resume", "force") if getattr(args, name)]
    return f"--{given[0]} needs --out" if given else None


def execute(args: argparse.Namespace) -> Output:
    """Prints what the images show, or writes it to a table."""
    return _print_answers(args) if args.out is None else _write_table(args)


def _print_answers(args: argparse.Namespace) -> Output:
    """Answers the images that can be read; what is wrong with the others stands in the output's errors."""
    from ..images.listing import Listing, expand
    from ..runtime.answers import Answer, answer_images
    from ..runtime.engine import Engine
    from ..runtime.options import EngineOptions

    options = EngineOptions(intra_op_threads=args.threads, bfloat16=args.bfloat16)
    answers: list[Answer] = []
    with Engine(args.model, device=args.device, backend=args.backend, options=options) as engine:
        how = _plan(engine.spec, args)
        found = Listing()
        for item in args.images:
            try:
                found += expand([item])
            except InputError as error:
                answers.append(Answer(item, error=error))
        if found.left_out:
            logger.warning("%s", found.left_out)
        files = tuple(dict.fromkeys(map(str, found.files)))  # each is read once
        with Progress(len(files), "images") as bar:
            for answer in answer_images(files, how, infer=engine.infer, batch_size=args.batch_size):
                answers.append(answer)
                bar.advance(1)
    left_out = {"hidden": found.hidden, "no_image": found.others, "without_images": found.empty}
    return Output(
        data={"model": str(args.model), "images": [_as_json(answer, how) for answer in answers], "left_out": left_out},
        text="\n".join(_as_text(answer) for answer in answers if answer.error is None),
        errors=tuple(answer.error for answer in answers if answer.error is not None),
    )


def _write_table(args: argparse.Namespace) -> Output:
    """Scores all images below the folders; as many rows as images, however often it is interrupted."""
    from ..files.output import refuse_stdout, sha256_file
    from ..images.listing import STANDARD_INPUT, stream_images
    from ..runtime.engine import Engine
    from ..runtime.options import EngineOptions
    from ..serving.scoring import Scorer, ScoringOptions, score
    from ..serving.tables import GrowingTable

    refuse_stdout(args.out)
    if any(item in STANDARD_INPUT for item in args.images):
        raise InputError("--out: standard input holds one image", remedy="leave --out out, or give files and folders")
    engine_options = EngineOptions(intra_op_threads=args.threads, bfloat16=args.bfloat16)
    with Engine(args.model, device=args.device, backend=args.backend, options=engine_options) as engine:
        labels = None if args.features else _plan(engine.spec, args).labels
        options = ScoringOptions(args.top or _USUAL_TOP, args.features, labels, args.max_value)
        scorer = Scorer(engine, options)
        run = {
            "model_sha256": sha256_file(Path(args.model)),
            "images": args.images,
            "bfloat16": args.bfloat16,
            **asdict(options),
        }
        with GrowingTable(args.out, scorer.columns, run=run, resume=args.resume, force=args.force) as table:
            done = table.find_done()
            if len(done):
                logger.warning("%s rows are there already", f"{len(done):,}")
            known = Counter(file in done for file in stream_images(args.images))
            if not known:
                raise InputError(
                    f"{', '.join(args.images)}: no image found there", remedy="name folders that hold some"
                )
            files = (file for file in stream_images(args.images) if file not in done)
            with Progress(known[False], "images") as bar:
                found = score(files, scorer, table, batch_size=args.batch_size, progress=bar.advance)
            rows = table.finish()
    rate = found.images / max(found.seconds, 1e-9)
    lines = [f"{args.out}: {rows:,} rows, {found.images:,} of them now: {found.seconds:.0f} s, {rate:.0f} images/s"]
    if found.unread:
        lines += [f"{found.unread:,} could not be read:", *(f"  {error}" for error in found.errors)]
        lines += [f"  … and {found.unread - len(found.errors):,} more, in the column error"] * (
            found.unread > len(found.errors)
        )
    data = {"model": str(args.model), "output": str(args.out), "rows": rows, **asdict(found)}
    return Output(data=data, text="\n".join(lines))


def _plan(spec: ModelSpec, args: argparse.Namespace) -> Classifying:
    """How images become answers; refuses a model without classes, and options that do not fit it."""
    from ..images.labels import read_labels
    from ..runtime.answers import plan_answers

    how = plan_answers(spec, args.model, top=args.top or _USUAL_TOP)
    if spec.kind == "top5" and args.top is not None and args.top > (best := _count_columns(spec)):
        raise InputError(
            f"{args.model}: gives the best {best} classes, --top {args.top} asks for more",
            remedy=f"give --top {best} or less, or export with --output logits",
        )
    if args.max_value is not None:
        how = replace(how, preprocessing=replace(how.preprocessing, max_value=args.max_value))
    if args.labels is None:
        return how
    labels = read_labels(args.labels)
    if spec.kind != "top5" and len(labels) != (count := _count_columns(spec)):
        raise InputError(
            f"{args.labels}: holds {len(labels)} labels, and the model has {count} classes",
            remedy="give one label a line, in the order of the classes",
        )
    return replace(how, labels=labels)


def _count_columns(spec: ModelSpec) -> int:
    columns = spec.outputs[0].shape[-1]
    if isinstance(columns, str):
        message = f"the model does not say how many classes it has: {spec.outputs[0]}"
        raise ModelError(message, remedy="export it again with repvgg-export")
    return columns


def _as_json(answer: Answer, how: Classifying) -> dict[str, object]:
    image = str(answer.image)
    if answer.error is not None:
        return {"image": image, "error": answer.error.message, "remedy": answer.error.remedy}
    found = [
        {"class": each.index, "label": how.label_of(each.index), "probability": each.score}
        for each in answer.predictions
    ]
    return {"image": image, "predictions": found}


def _as_text(answer: Answer) -> str:
    rows = [[str(rank), each.label, f"{each.score:.4f}"] for rank, each in enumerate(answer.predictions, start=1)]
    return "\n".join([str(answer.image), format_table(rows, "><>")])


COMMAND = Command(
    "infer",
    "print the best classes of images",
    "Prints the best classes of each image with their probabilities. An image that cannot be read is named, the others "
    "are answered all the same, and the exit code is 1. With --out it writes a table of any number of images in "
    "constant memory; an interrupted run goes on with --resume.",
    add_options,
    execute,
    find_conflict,
)

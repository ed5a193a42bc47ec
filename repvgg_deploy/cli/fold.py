"""`repvgg-trt fold`: somebody's ONNX in training form → the same network with fewer convolutions, verified."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Command, Output, parse_triple, show_bytes
from .export import RESIZE_FLAGS, add_resize_options, find_resize_conflict, read_resizing
from .terminal import format_pairs, format_table

if TYPE_CHECKING:
    from ..export.fold import FoldResult

_COLUMNS = 80
_KERNELS = 34
EXAMPLES = """examples:
  repvgg-trt fold yolo.onnx --describe
  repvgg-trt fold yolo.onnx --out yolo-deploy.onnx
  repvgg-trt fold yolo.onnx --out yolo-raw.onnx --output raw
"""


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """What is folded, and where it goes."""
    parser.add_argument("model", type=Path, metavar="IN.onnx", help="an FP32 ONNX of anybody, operator set 11 to 22")
    parser.add_argument("--out", type=Path, metavar="OUT.onnx", help="the folded file")
    parser.add_argument("--output", nargs="+", metavar="NAME", default=(),
                        help="the outputs of the folded file, in place of the given one's: names of tensors; or raw: "
                             "what TopK, ArgMax and NonMaxSuppression, and all behind them, read")
    parser.add_argument("--describe", action="store_true", help="only say what would be folded, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace a different file")
    stated = parser.add_argument_group("images and classes, which the file does not state")
    stated.add_argument("--mean", type=parse_triple, metavar="R,G,B", help="mean in 0-255 units")
    stated.add_argument("--std", type=parse_triple, metavar="R,G,B", help="standard deviation in 0-255 units")
    add_resize_options(stated)
    stated.add_argument("--labels", type=Path, metavar="FILE|imagenet1k",
                        help="text file with one class name a line, kept in the ONNX; imagenet1k: the 1,000 names of "
                             "ImageNet")
# fmt: on


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if (args.mean is None) != (args.std is None):
        return "--mean and --std belong together"
    given = [flag for flag in RESIZE_FLAGS if getattr(args, flag[2:].replace("-", "_")) is not None]
    if given and args.mean is None:
        return f"{given[0]} needs --mean and --std"
    if (conflict := find_resize_conflict(args)) is not None:
        return conflict
    if not args.describe:
        return None if args.out is not None else "give --out OUT.onnx, or --describe"
    others = {"--out": args.out, "--mean": args.mean, "--labels": args.labels, "--force": args.force or None}
    given = [name for name, value in others.items() if value is not None]
    return f"--describe writes nothing: it cannot hold with {given[0]}" if given else None


def execute(args: argparse.Namespace) -> Output:
    """Folds the file, and says what was folded and what it saves."""
    from ..export.fold import FoldOptions, fold_onnx
    from ..images.classes import imagenet_labels
    from ..images.labels import read_labels

    labels = None
    if args.labels is not None:
        labels = imagenet_labels() if str(args.labels) == "imagenet1k" else read_labels(args.labels)
    options = FoldOptions(args.mean, args.std, read_resizing(args), labels, tuple(args.output), args.force)
    result = fold_onnx(args.model, args.out, options=options)
    sizes = (args.model.stat().st_size, None if args.out is None else args.out.stat().st_size)
    follow = f"inspect {shlex.quote(str(args.out))}" if result.metadata is not None else None
    if args.describe and result.report.folds:
        follow = f"fold {shlex.quote(str(args.model))} --out OUT.onnx"
    return Output(
        data=_as_json(args, result, sizes),
        text=_as_text(args, result, sizes),
        next_command=follow and f"repvgg-trt {follow}",
    )


def _as_text(args: argparse.Namespace, result: FoldResult, sizes: tuple[int, int | None]) -> str:
    folds, left = result.report.folds, result.report.left
    done = "to fold" if result.output is None else "folded"
    count = f"{len(folds)} region{'s' if len(folds) > 1 else ''} {done}" if folds else "nothing to fold"
    pairs = [("model", f"{args.model} ({show_bytes(sizes[0])}): {count}")]
    if left:
        pairs.append(("remain", "\n".join(f"{name}: {reason}" for name, reason in left)))
    pairs += [("note", note) for note in result.notes]
    if result.output is not None and sizes[1] is not None:
        worst = max(check.error / check.tolerance for check in result.checks)
        checks = f"{len(result.checks)} checks against the file as it was given"
        pairs.append(("verified", f"{checks}; worst error: {worst:.2g} of what is allowed"))
        pairs.append((result.output.status, f"{args.out} ({show_bytes(sizes[1])}, {sizes[1] / sizes[0]:.0%})"))
    if not folds:
        return format_pairs(pairs)
    if result.macs is not None and result.image_size is not None:
        height, width = result.image_size
        work = " → ".join(f"{macs / 1e6:,.4g} M" for macs in result.macs)
        pairs.append(("work", f"{work} multiply-accumulates in these, of an image of {height}×{width}"))
    cells = [
        [
            str(fold.branches),
            _cut(fold.kernels, _KERNELS),
            f"{float(fold.macs_after / fold.macs_before) - 1:+.0%}",
            show_bytes(fold.bytes_saved),
        ]
        for fold in folds
    ]
    rows = [["branches", "kernels", "MACs", "saved"], *cells]
    macs = result.macs
    share = "" if macs is None or not macs[0] else f"{macs[1] / macs[0] - 1:+.0%}"
    rows.append(["", "", share, show_bytes(sum(fold.bytes_saved for fold in folds))])
    room = _COLUMNS - 2 - sum(2 + max(len(row[column]) for row in rows) for column in range(4))
    names = ["region", *(_cut(fold.output, room, left=True) for fold in folds), "total"]
    table = [[name, *row] for name, row in zip(names, rows, strict=True)]
    return f"{format_pairs(pairs)}\n{format_table(table, '<><>>')}"


def _cut(text: str, room: int, *, left: bool = False) -> str:
    """A text of at most so many letters; what is cut off is an ellipsis."""
    if len(text) <= room:
        return text
    return f"…{text[len(text) - room + 1 :]}" if left else f"{text[: room - 1]}…"


def _as_json(args: argparse.Namespace, result: FoldResult, sizes: tuple[int, int | None]) -> dict[str, object]:
    folds = [
        {
            "output": fold.output,
            "source": fold.source,
            "replaced": fold.replaced,
            "branches": fold.branches,
            "kernels_before": fold.kernels_before,
            "kernel_after": fold.kernel_after,
            "error": fold.error,
            "macs_before": float(fold.macs_before),
            "macs_after": float(fold.macs_after),
            "bytes_saved": fold.bytes_saved,
        }
        for fold in result.report.folds
    ]
    return {
        "model": str(args.model),
        "out": None if args.out is None else str(args.out),
        "status": "described" if result.output is None else result.output.status,
        "folds": folds,
        "left": [{"output": name, "reason": reason} for name, reason in result.report.left],
        "notes": result.notes,
        "checks": result.checks,
        "bytes_before": sizes[0],
        "bytes_after": sizes[1],
        "metadata": result.metadata,
        "macs_before": None if result.macs is None else result.macs[0],
        "macs_after": None if result.macs is None else result.macs[1],
        "image_size": result.image_size,
    }


COMMAND = Command(
    "fold",
    "write the branches of an ONNX in training form as single convolutions",
    "Folds the linear regions of anybody's ONNX (the branches of RepVGG, MobileOne, YOLO and their like) into the "
    "fewest multiply-accumulates, found by algebra, compares the result with the file, and writes it only if they "
    "agree. Needs no PyTorch.",
    add_options,
    execute,
    find_conflict,
    EXAMPLES,
)

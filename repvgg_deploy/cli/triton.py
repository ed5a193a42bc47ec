"""The options of `repvgg-trt triton`. Standard library only: `--help` must be quick.

`repvgg-trt triton`: plans or an ONNX → a Triton model repository; `--validate`: what Triton would refuse.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..serving.options import RepositoryOptions
from ..serving.validate import validate_repository
from .common import Output, format_pairs

if TYPE_CHECKING:
    from ..serving.triton import TritonResult

TRITON_EXAMPLES = """examples:
  repvgg-trt triton b2.plan --out model_repository
  repvgg-trt triton b2-a10.plan b2-l4.plan --name b2 --out model_repository
  repvgg-trt triton b2.onnx --ensemble jpeg --out model_repository
  repvgg-trt triton --validate model_repository
"""


def add_triton_options(parser: argparse.ArgumentParser) -> None:
    """The models, the repository, and how they are served. `--version` is the model's here: the parser must resolve conflicts."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        type=Path,
        help="one .onnx, or a .plan for each GPU type with its passport beside it",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the repository; made if it is not there, and may hold other models"
    )
    parser.add_argument(
        "--validate", type=Path, metavar="FOLDER", help="write nothing: say what Triton would refuse in this repository"
    )
    parser.add_argument("--name", metavar="NAME", help="of the model in Triton (default: the file's)")
    parser.add_argument("--version", dest="version_number", type=_positive, default=None, metavar="N",
                        help="of the version folder (default: one more than the highest, or that one if it holds the " "same files)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace what is there and differs")
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--instances",
        type=_positive,
        default=1,
        metavar="N",
        help="copies that run at once on each GPU (default: %(default)s)",
    )
    group.add_argument(
        "--max-batch",
        type=_positive,
        default=None,
        metavar="N",
        help="the largest batch (default: the plan's; 32 for an ONNX)",
    )
    group.add_argument("--preferred-batch", type=_positive, nargs="+", default=None, metavar="N",
                       help="sizes that are run at once (default: the plan's usual and largest; none for an ONNX)")  # fmt: skip
    group.add_argument("--max-queue-delay-us", type=_count, default=1000, metavar="N",
                       help="how long a request waits for company, in microseconds (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-queue", type=_positive, default=None, metavar="N",
                       help="requests that may wait; more are answered 503 (default: eight of the largest batches)")  # fmt: skip
    group.add_argument("--queue-timeout-us", type=_count, default=1_000_000, metavar="N",
                       help="how long a request may wait in all, 0 for ever (default: %(default)s)")  # fmt: skip
    group.add_argument("--cuda-graphs", action="store_true", help="let the TensorRT backend capture CUDA graphs")
    group.add_argument(
        "--ensemble",
        choices=("jpeg",),
        help="also a model NAME_jpeg that takes JPEG files; decodes in the python backend",
    )
    group.add_argument(
        "--written-by",
        metavar="NAME",
        help="kept in the models' parameters, for programs that take out again what they wrote",
    )
    parser.set_defaults(usage_error=parser.error)


def find_triton_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if args.validate is not None:
        return "--validate writes nothing: leave MODEL and --out out" if args.models or args.out is not None else None
    if not args.models:
        return "MODEL is needed, or --validate FOLDER"
    return "--out FOLDER is needed" if args.out is None else None


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:10]) < 1 << 31:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: A model or an option cannot be used, or the repository cannot be written or read.
    """
    from ..serving.triton import write_triton

    if args.validate is not None:
        return _validate(args)
    options = RepositoryOptions(
        name=args.name,
        version=args.version_number,
        max_batch=args.max_batch,
        instances=args.instances,
        max_queue_delay_us=args.max_queue_delay_us,
        preferred_batch=tuple(args.preferred_batch) if args.preferred_batch else None,
        max_queue=args.max_queue,
        queue_timeout_us=args.queue_timeout_us,
        cuda_graphs=args.cuda_graphs,
        ensemble=args.ensemble,
        written_by=args.written_by,
    )
    result = write_triton(args.models, args.out, options, force=args.force)
    return Output(
        data=_as_json(args, result),
        text=format_pairs(_as_pairs(result)),
        next_command=f"repvgg-trt triton --validate {shlex.quote(str(args.out))}",
    )


def _validate(args: argparse.Namespace) -> Output:
    models, findings = validate_repository(args.validate)
    wrong = [finding for finding in findings if finding.severity == "error"]
    errors = tuple(
        InputError(f"{args.validate / finding.model}: {finding.message}", remedy=finding.remedy) for finding in wrong
    )
    refused = {finding.model for finding in wrong}
    pairs = [
        (name, "Triton would refuse it" if name in refused else "nothing found that Triton would refuse")
        for name in models
    ]
    pairs += [
        ("warning", f"{finding.model}: {finding.message}; {finding.remedy}")
        for finding in findings
        if finding.severity == "warning"
    ]
    data = {"repository": str(args.validate), "models": models, "valid": not wrong, "findings": findings}
    return Output(data=data, text=format_pairs(pairs), errors=errors)


def _as_pairs(result: TritonResult) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for model in result.models:
        batches = f"batches up to {model.max_batch}" if model.max_batch else "one batch size"
        pairs.append((model.version.status, f"{model.version.folder} ({batches})"))
    pairs.append(("server", result.container))
    if any(model.name.endswith("_jpeg") for model in result.models[1:]):
        pairs.append(("needs", "the python backend, with numpy and pillow in the server's Python"))
    return pairs


def _as_json(args: argparse.Namespace, result: TritonResult) -> dict[str, object]:
    return {
        "repository": str(args.out),
        "models": [
            {
                "name": model.name,
                "version": model.version.number,
                "status": model.version.status,
                "config": str(model.config),
                "max_batch": model.max_batch,
            }
            for model in result.models
        ],
        "platform": result.servable.platform,
        "container": result.container,
        "provenance": result.servable.provenance,
    }

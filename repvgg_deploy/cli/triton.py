"""`repvgg-trt triton`: plans or an ONNX → a Triton model repository; `--validate`: what Triton would refuse."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

from ..errors import InputError
from .common import Command, Output, parse_whole
from .terminal import format_pairs

EXAMPLES = """examples:
  repvgg-trt triton b2.plan --out model_repository
  repvgg-trt triton b2-a10.plan b2-l4.plan --name b2 --out model_repository
  repvgg-trt triton b2.onnx --ensemble jpeg --out model_repository
  repvgg-trt triton --validate model_repository
"""


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """The models, the repository, and how they are served. `--version` is the model's, in place of the program's."""
    count = partial(parse_whole, least=0)
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path,
                        help="one .onnx, or a .plan for each GPU type with its passport beside it")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="the repository; made if it is not there, and may hold other models")
    parser.add_argument("--validate", type=Path, metavar="FOLDER",
                        help="write nothing: say what Triton would refuse in this repository")
    parser.add_argument("--name", metavar="NAME", help="the model's name in Triton (default: the file's)")
    parser.add_argument("--version", dest="version_number", type=parse_whole, metavar="N",
                        help="number of the version folder (default: one more than the highest, or that one if it "
                             "holds the same files)")
    parser.add_argument("--force", action="store_true", help="replace files that exist and differ")
    group = parser.add_argument_group("serving")
    group.add_argument("--instances", type=parse_whole, default=1, metavar="N",
                       help="copies that run at once on each GPU (default: %(default)s)")
    group.add_argument("--max-batch", type=parse_whole, metavar="N",
                       help="the largest batch (default: the plan's; 32 for an ONNX)")
    group.add_argument("--preferred-batch", type=parse_whole, nargs="+", metavar="N",
                       help="batch sizes that run without waiting for more (default: the plan's usual and largest; "
                            "none for an ONNX)")
    group.add_argument("--max-queue-delay-us", type=count, default=1000, metavar="N",
                       help="how long a request waits for others to join its batch, in microseconds (default: "
                            "%(default)s)")
    group.add_argument("--max-queue", type=parse_whole, metavar="N",
                       help="requests that may wait; more are answered 503 (default: eight of the largest batches)")
    group.add_argument("--queue-timeout-us", type=count, default=1_000_000, metavar="N",
                       help="how long a request may wait in all, 0 for ever (default: %(default)s)")
    group.add_argument("--cuda-graphs", action="store_true", help="let the TensorRT backend capture CUDA graphs")
    group.add_argument("--ensemble", choices=("jpeg",),
                       help="also a model NAME_jpeg that takes JPEG files; decodes in the python backend")
    group.add_argument("--written-by", metavar="NAME",
                       help="a name kept in the models' parameters, by which a program finds what it wrote")
# fmt: on


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot hold together, or None."""
    if args.validate is not None:
        return "--validate writes nothing: leave MODEL and --out out" if args.models or args.out is not None else None
    if not args.models:
        return "MODEL is needed, or --validate FOLDER"
    return "--out FOLDER is needed" if args.out is None else None


def execute(args: argparse.Namespace) -> Output:
    """Writes the models into the repository; or says what is wrong with it, if that is asked for."""
    return _validate(args.validate) if args.validate is not None else _write(args)


def _write(args: argparse.Namespace) -> Output:
    from ..serving.options import RepositoryOptions
    from ..serving.triton import write_triton

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
    pairs: list[tuple[str, str]] = []
    models: list[dict[str, object]] = []
    for model in result.models:
        batches = f"batches up to {model.max_batch}" if model.max_batch else "one batch size"
        pairs.append((model.version.status, f"{model.version.folder} ({batches})"))
        version = {"version": model.version.number, "status": model.version.status}
        models.append({"name": model.name, **version, "config": str(model.config), "max_batch": model.max_batch})
    pairs.append(("server", result.container))
    if any(model.name.endswith("_jpeg") for model in result.models[1:]):
        pairs.append(("needs", "the python backend, with numpy and pillow in the server's Python"))
    data = {
        "repository": str(args.out),
        "models": models,
        "platform": result.servable.platform,
        "container": result.container,
        "provenance": result.servable.provenance,
    }
    follow = f"repvgg-trt triton --validate {shlex.quote(str(args.out))}"
    return Output(data=data, text=format_pairs(pairs), next_command=follow)


def _validate(repository: Path) -> Output:
    from ..serving.validate import validate_repository

    models, findings = validate_repository(repository)
    wrong = [finding for finding in findings if finding.severity == "error"]
    refused = {finding.model for finding in wrong}
    pairs = [
        (name, "Triton would refuse it" if name in refused else "nothing found that Triton would refuse")
        for name in models
    ]
    for finding in findings:
        if finding.severity == "warning":
            pairs.append(("warning", f"{finding.model}: {finding.message}; {finding.remedy}"))
    return Output(
        data={"repository": str(repository), "models": models, "valid": not wrong, "findings": findings},
        text=format_pairs(pairs),
        errors=tuple(InputError(f"{repository / f.model}: {f.message}", remedy=f.remedy) for f in wrong),
    )


COMMAND = Command(
    "triton",
    "write a model repository for Triton Inference Server, or check one",
    "Writes a model repository that Triton serves as it is: configuration, labels, warm-up, dynamic batching. Needs no "
    "server and no GPU. --validate says what Triton would refuse; exit code 1 then.",
    add_options,
    execute,
    find_conflict,
    EXAMPLES,
)

"""`repvgg-trt triton`: plans or an ONNX → a Triton model repository; `--validate`: what Triton would refuse."""

from __future__ import annotations

import argparse
import shlex

from ..errors import InputError
from ..serving.options import RepositoryOptions
from ..serving.triton import TritonResult, write_triton
from ..serving.validate import validate_repository
from .common import Output
from .tables import format_pairs


def execute(args: argparse.Namespace) -> Output:
    """Runs the subcommand.

    Raises:
        RepVGGDeployError: A model or an option cannot be used, or the repository cannot be written or read.
    """
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
    errors = tuple(InputError(f"{args.validate / finding.model}: {finding.message}", remedy=finding.remedy) for finding in wrong)
    refused = {finding.model for finding in wrong}
    pairs = [(name, "Triton would refuse it" if name in refused else "nothing found that Triton would refuse") for name in models]
    pairs += [("warning", f"{finding.model}: {finding.message}; {finding.remedy}") for finding in findings if finding.severity == "warning"]
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

"""What Triton would refuse in a repository, found without Triton, a GPU or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, RepVGGDeployError
from .config_rules import backend_of, check_config
from .findings import Finding
from .folders import PARTIAL_SUFFIX, list_versions
from .repository import CONFIG_FILE
from .schema import load_schema, parse_config
from .version_rules import check_unconfigured_version, check_version


def validate_repository(repository: Path) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    """Checks every model of a repository.

    Args:
        repository: The folder that `tritonserver --model-repository` gets.

    Returns:
        The models, and what is wrong with them, errors first.

    Raises:
        InputError: It is no folder, holds no model, or may not be read.
        MissingDependencyError: The extra `serving` is not installed.
    """
    load_schema()
    try:
        return _check_repository(repository)
    except RepVGGDeployError:
        raise
    except OSError as error:
        remedy = "run it as the user that tritonserver runs as, and let that user read all of the repository"
        raise InputError(f"{error.filename or repository}: cannot be read: {error.strerror}", remedy=remedy) from error


def _check_repository(repository: Path) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    if not repository.is_dir():
        raise InputError(f"{repository}: is no folder", remedy="give the folder that holds a folder for each model")
    if (repository / CONFIG_FILE).exists():
        raise InputError(f"{repository}: is one model and no repository", remedy=f"give the folder around it: {repository.absolute().parent}")
    models = tuple(sorted(entry.name for entry in repository.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not models:
        raise InputError(f"{repository}: holds no model", remedy="write one with repvgg-trt triton MODEL --out REPOSITORY")
    configs = {name: _read_config(repository / name) for name in models}
    findings = [finding for name in models for finding in _check_model(repository / name, configs[name])]
    findings += [finding for name in models for finding in _check_steps(name, configs)]
    return models, tuple(sorted(findings, key=lambda finding: (finding.severity, finding.model)))


def _read_config(folder: Path) -> Any:
    """The configuration, or the Finding that stands in its place."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        if list_versions(folder):
            return Finding("warning", folder.name, f"has no {CONFIG_FILE}: Triton would make one up, without batching or labels", "write one")
        return Finding("error", folder.name, f"has neither a {CONFIG_FILE} nor a version folder", "move it out of the repository")
    try:
        return parse_config(path.read_text(encoding="utf-8"), path)
    except InputError as error:
        return Finding("error", folder.name, error.message, error.remedy)
    except (OSError, UnicodeDecodeError) as error:
        return Finding("error", folder.name, f"{CONFIG_FILE} cannot be read: {error}", "make it a UTF-8 text file that Triton may read")


def _check_model(folder: Path, config: Any) -> Iterator[Finding]:
    if isinstance(config, Finding):
        yield config
        for number in list_versions(folder)[-1:] if config.severity == "warning" else ():
            yield from check_unconfigured_version(folder / str(number), folder.name)
        return
    yield from check_config(config, folder.name)
    yield from _check_labels(folder, config)
    yield from _check_leftovers(folder)
    versions = list_versions(folder)
    if not versions:
        yield Finding("error", folder.name, "has no version folder, such as 1", f"mkdir {folder / '1'} and put the model there")
        return
    policy = config.version_policy
    wanted = set(policy.specific.versions) if policy.HasField("specific") else set()
    for number in sorted(wanted - set(versions)):
        yield Finding("error", folder.name, f"version_policy wants version {number}, which is not there", "correct the policy, or add the version")
    latest = policy.latest.num_versions or 1
    served = sorted(wanted & set(versions)) if wanted else list(versions) if policy.HasField("all") else list(versions)[-latest:]
    if backend_of(config) != "ensemble":
        for number in served:
            yield from check_version(folder / str(number), config, folder.name)


def _check_labels(folder: Path, config: Any) -> Iterator[Finding]:
    for output in config.output:
        if not output.label_filename:
            continue
        path = folder / output.label_filename
        if not path.is_file():
            yield Finding(
                "error", folder.name, f"the labels {path.name} of {output.name!r} are not there", "add the file, or leave label_filename out"
            )
            continue
        count, classes = len(path.read_bytes().splitlines()), output.dims[-1] if output.dims else -1
        if classes not in (-1, count):
            yield Finding(
                "warning", folder.name, f"{path.name} names {count} classes, and {output.name!r} has {classes}", "give one line a class, in order"
            )


def _check_leftovers(folder: Path) -> Iterator[Finding]:
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith((PARTIAL_SUFFIX, ".tmp")):
            yield Finding("warning", folder.name, f"{entry.name} was left by an interrupted copy", f"rm -r {entry}")
        elif entry.is_dir() and entry.name.isdecimal() and entry.name.startswith("0"):
            yield Finding("warning", folder.name, f"the folder {entry.name} is no version for Triton: it begins with 0", "rename it, such as to 1")


def _check_steps(name: str, configs: dict[str, Any]) -> Iterator[Finding]:
    """The models of an ensemble must be there, and have the tensors that it maps."""
    config = configs[name]
    if isinstance(config, Finding) or config.platform != "ensemble":
        return
    for step in config.ensemble_scheduling.step:
        other = configs.get(step.model_name)
        if other is None:
            yield Finding("error", name, f"needs the model {step.model_name!r}, which is not in the repository", "add it, or correct its name")
            continue
        if isinstance(other, Finding):
            continue
        maps = ((step.input_map, other.input, "input"), (step.output_map, other.output, "output"))
        for mapped, tensors, kind in maps:
            for key in sorted(set(mapped) - {tensor.name for tensor in tensors}):
                yield Finding("error", name, f"maps the {kind} {key!r} of {step.model_name!r}, which has none of that name", f"correct {kind}_map")
        if 0 < other.max_batch_size < config.max_batch_size:
            message = f"takes batches up to {config.max_batch_size}, and its step {step.model_name!r} only up to {other.max_batch_size}"
            yield Finding("error", name, message, "give it the smallest max_batch_size of its steps")

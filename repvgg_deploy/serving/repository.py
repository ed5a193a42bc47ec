"""Writes a model into a Triton repository: version folder, labels, configuration, in the order in which a server may see them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, InputError
from ..files.output import explain_os_errors, write_text
from .config import LABELS_FILE, PREFIX, WRITTEN_BY, WRITTEN_VERSIONS, has_labels, make_config
from .folders import WrittenVersion, choose_version, list_versions, require_version_replaceable, write_version
from .jpeg import make_jpeg_models
from .options import RepositoryOptions, Servable, ServedFile
from .schema import parse_config, print_config

CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """One model of a repository.

    Attributes:
        name: In Triton.
        version: Its version folder.
        config: Its `config.pbtxt`.
        max_batch: `max_batch_size`; 0 where Triton may not put requests together.
    """

    name: str
    version: WrittenVersion
    config: Path
    max_batch: int


@dataclass(frozen=True, slots=True)
class _Draft:
    """One model that is to be written: its configuration, version folder and labels."""

    config: Any
    files: tuple[ServedFile, ...]
    version: int | None
    labels: tuple[str, ...] | None = None


def write_repository(model: Servable, out: Path, options: RepositoryOptions, *, force: bool = False) -> tuple[WrittenModel, ...]:
    """Writes a model, and with `ensemble` the two that stand before it. Nothing is written if any of it may not be.

    Args:
        model: What is to be served.
        out: The repository; made if it is not there.
        options: How.
        force: Replace what is there and differs.

    Returns:
        The models, that of the plan or ONNX first.

    Raises:
        InputError: The options do not fit the model.
        ArtifactError: It cannot be written, or something else stands there.
        MissingDependencyError: The schema is not installed.
    """
    labels = model.spec.labels if has_labels(model) else None
    drafts = [_Draft(make_config(model, options), model.files, options.version, labels)]
    if options.ensemble is not None:
        before = make_jpeg_models(model, options, drafts[0].config)
        drafts += [_Draft(config, files, 1, labels if not files else None) for config, files in before]
    for draft in drafts if options.written_by is not None else ():
        draft.config.parameters[WRITTEN_BY].string_value = options.written_by
    for draft in drafts:
        _require_replaceable(draft, out / draft.config.name, force=force)
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    return tuple(_write(draft, out / draft.config.name, force=force) for draft in drafts)


def _require_replaceable(draft: _Draft, folder: Path, *, force: bool) -> None:
    version = choose_version(folder, draft.files, draft.version)
    require_version_replaceable(folder / str(version), draft.files, force=force)
    if force:
        return
    config, labels = folder / CONFIG_FILE, folder / LABELS_FILE
    if config.exists() and not _serves_the_same(config, draft.config):
        raise ArtifactError(
            f"{config}: exists and configures the model otherwise, for all of its versions",
            remedy="give the options that it was written with, another --name, or --force to replace it",
        )
    if draft.labels is not None and labels.exists() and labels.read_bytes() != _labels_text(draft.labels).encode():
        raise ArtifactError(f"{labels}: exists and names other classes, for all versions", remedy="give another --name, or --force to replace it")


def _serves_the_same(path: Path, config: Any) -> bool:
    """Whether a configuration on disk differs in nothing but the provenance that we state in it."""
    found = read_config(path.parent)
    return found is not None and bool(_without_provenance(found) == _without_provenance(config))


def _without_provenance(config: Any) -> Any:
    copy = type(config)()
    copy.CopyFrom(config)
    for name in [name for name in copy.parameters if name.startswith(PREFIX)]:
        del copy.parameters[name]
    return copy


def _write(draft: _Draft, folder: Path, *, force: bool) -> WrittenModel:
    with explain_os_errors(folder):
        folder.mkdir(exist_ok=True)
    try:
        if draft.labels is not None:
            write_text(folder / LABELS_FILE, _labels_text(draft.labels), force=force)
        number = choose_version(folder, draft.files, draft.version)
        version = write_version(folder / str(number), draft.files, force=force)
        _note_version(draft, folder, number)
    except BaseException:
        _remove_beginning(folder)
        raise
    # Last, so that a server that polls finds no model whose files are not there yet. What differs was allowed above, or is provenance.
    write_text(folder / CONFIG_FILE, print_config(draft.config), force=True)
    return WrittenModel(draft.config.name, version, folder / CONFIG_FILE, draft.config.max_batch_size)


def _note_version(draft: _Draft, folder: Path, number: int) -> None:
    """Adds a version to those that the same writer wrote before."""
    if WRITTEN_BY not in draft.config.parameters:
        return
    versions = {number}
    found = read_config(folder)
    if found is not None and read_writer(found) == draft.config.parameters[WRITTEN_BY].string_value:
        versions |= set(read_written_versions(found)) & set(list_versions(folder))
    draft.config.parameters[WRITTEN_VERSIONS].string_value = ",".join(map(str, sorted(versions)))


def read_config(folder: Path) -> Any:
    """The configuration in a model's folder; None where none can be read."""
    path = folder / CONFIG_FILE
    try:
        return parse_config(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, InputError):
        return None


def read_writer(config: Any) -> str | None:
    """`RepositoryOptions.written_by` of when it was written; None where nobody was named."""
    return str(config.parameters[WRITTEN_BY].string_value) if WRITTEN_BY in config.parameters else None


def read_written_versions(config: Any) -> tuple[int, ...]:
    """The versions that this writer wrote."""
    text = config.parameters[WRITTEN_VERSIONS].string_value if WRITTEN_VERSIONS in config.parameters else ""
    return tuple(int(number) for number in text.split(",") if number.isdecimal())


def _remove_beginning(folder: Path) -> None:
    """Removes a model's folder that holds labels at most: tritonserver does not start on a repository with a model that has no version."""
    with contextlib.suppress(OSError):
        if {entry.name for entry in folder.iterdir()} <= {LABELS_FILE}:
            (folder / LABELS_FILE).unlink(missing_ok=True)
            folder.rmdir()


def _labels_text(labels: Sequence[str]) -> str:
    return "".join(" ".join(label.split()) + "\n" for label in labels)

"""Writes a model into a Triton repository: version folder, labels, configuration, in the order in which a server may see them.

Version folders that appear whole or not at all. Standard library only.

A folder is filled under a hidden name that Triton takes for no version, and renamed.

Takes models out of a repository, of those that somebody wrote there and no longer wants; what others put there stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, InputError
from ..files.output import explain_os_errors, sha256_file, write_text
from .config import (
    LABELS_FILE,
    PREFIX,
    WRITTEN_BY,
    WRITTEN_VERSIONS,
    has_labels,
    make_config,
    make_jpeg_models,
    parse_config,
    print_config,
)
from .options import RepositoryOptions, Servable, ServedFile

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class WrittenVersion:
    """A version folder.

    Attributes:
        folder: Such as `model_repository/b2/1`.
        status: `up to date` where the same files stood there already.
    """

    folder: Path
    status: Literal["written", "up to date"]

    @property
    def number(self) -> int:
        """Of the version."""
        return int(self.folder.name)


def list_versions(model_folder: Path) -> tuple[int, ...]:
    """The numbers of the version folders, as Triton finds them: names that are numbers without a leading zero."""
    if not model_folder.is_dir():
        return ()
    names = [entry.name for entry in model_folder.iterdir() if entry.is_dir()]
    return tuple(
        sorted(int(name) for name in names if name.isascii() and name.isdecimal() and not name.startswith("0"))
    )


def choose_version(model_folder: Path, files: Sequence[ServedFile], version: int | None) -> int:
    """The number that is asked for; else the highest if it holds these files, one more if it holds others, 1 if there is none."""
    if version is not None:
        return version
    highest = max(list_versions(model_folder), default=0)
    if highest and _holds(model_folder / str(highest), files):
        return highest
    return highest + 1


def require_version_replaceable(folder: Path, files: Sequence[ServedFile], *, force: bool) -> None:
    """Finds out before anything is written that a version folder may not be replaced.

    Raises:
        ArtifactError: It holds other files, and `force` is not given.
    """
    if folder.exists() and not force and not _holds(folder, files):
        remedy = (
            "leave --version out for the next number, which Triton can load while the old one serves, or give "
            "--force to replace it"
        )
        raise ArtifactError(f"{folder}: exists and holds other files", remedy=remedy)


def write_version(folder: Path, files: Sequence[ServedFile], *, force: bool) -> WrittenVersion:
    """Writes a version folder.

    Args:
        folder: Where it shall stand; the folder around it exists.
        files: What it shall hold.
        force: Replace a different one; for a moment there is none then.

    Raises:
        ArtifactError: It cannot be written, or a different one stands there already.
    """
    require_version_replaceable(folder, files, force=force)
    if _holds(folder, files):
        return WrittenVersion(folder, "up to date")
    with explain_os_errors(folder):
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL_SUFFIX))
        try:
            for file in files:
                _write_file(partial / file.name, file.source)
            os.chmod(partial, 0o755)
            _put_in_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return WrittenVersion(folder, "written")


def _write_file(path: Path, source: Path | bytes) -> None:
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copyfile(source, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.chmod(0o644)


def _put_in_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(partial, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old.", suffix=PARTIAL_SUFFIX))
    os.rename(folder, old / folder.name)
    try:
        os.rename(partial, folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old / folder.name, folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _holds(folder: Path, files: Sequence[ServedFile]) -> bool:
    """Whether a folder holds exactly these files."""
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} != {file.name for file in files}:
        return False
    return all(_same(folder / file.name, file.source) for file in files)


def _same(path: Path, source: Path | bytes) -> bool:
    if not path.is_file():
        return False
    if isinstance(source, bytes):
        return path.read_bytes() == source
    return path.stat().st_size == source.stat().st_size and sha256_file(path) == sha256_file(source)


@dataclass(frozen=True, slots=True)
class Stale:
    """Models that are no longer wanted.

    Attributes:
        removable: Those that may go, ensembles before what they are made of.
        kept: Those that stay all the same, with the reason.
    """

    removable: tuple[str, ...]
    kept: Mapping[str, str]


def find_stale(repository: Path, written_by: str, wanted: Collection[str]) -> Stale:
    """What somebody wrote into a repository and does not want any more. Nothing is changed.

    Args:
        repository: The folder that `tritonserver --model-repository` gets.
        written_by: As `RepositoryOptions.written_by`, when it was written.
        wanted: Names of the models that stay.

    Raises:
        MissingDependencyError: The schema is not installed.
    """
    folders = (
        sorted(entry for entry in repository.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if repository.is_dir()
        else []
    )
    configs = {folder.name: read_config(folder) for folder in folders}
    stale = [
        name
        for name, config in configs.items()
        if name not in wanted and config is not None and read_writer(config) == written_by
    ]
    foreign = {name: _find_foreign(repository / name, configs[name]) for name in stale}
    kept = {
        name: f"it holds {other}, which somebody else put there" for name, other in foreign.items() if other is not None
    }
    for name, user in _needed(configs, stale, kept):
        kept[name] = f"the ensemble {user} needs it"
    removable = [name for name in stale if name not in kept]
    return Stale(tuple(sorted(removable, key=lambda name: (configs[name].platform != "ensemble", name))), kept)


def remove_models(repository: Path, names: Collection[str]) -> None:
    """Takes models out, each at once: a server finds it whole or not at all.

    Args:
        repository: The folder around them.
        names: Such as `Stale.removable`, in this order.

    Raises:
        ArtifactError: One cannot be taken out.
    """
    for name in names:
        with explain_os_errors(repository / name):
            aside = Path(tempfile.mkdtemp(dir=repository.parent, prefix=f".{repository.name}.", suffix=PARTIAL_SUFFIX))
            try:
                os.rename(repository / name, aside / name)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def _find_foreign(folder: Path, config: Any) -> str | None:
    """A file or folder beside what this writer wrote."""
    ours = {CONFIG_FILE, LABELS_FILE, *map(str, read_written_versions(config))}
    return next(
        (
            entry.name
            for entry in sorted(folder.iterdir())
            if entry.name not in ours and not entry.name.endswith(PARTIAL_SUFFIX)
        ),
        None,
    )


def _needed(configs: Mapping[str, Any], stale: Collection[str], kept: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Stale models that an ensemble that stays is made of, with its name; also those that they themselves need."""
    staying = [name for name in configs if name not in stale or name in kept]
    seen = set(staying)
    while staying:
        user = staying.pop()
        config = configs[user]
        for step in config.ensemble_scheduling.step if config is not None else ():
            if step.model_name in stale and step.model_name not in seen:
                seen.add(step.model_name)
                staying.append(step.model_name)
                yield step.model_name, user


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


def write_repository(
    model: Servable, out: Path, options: RepositoryOptions, *, force: bool = False
) -> tuple[WrittenModel, ...]:
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
    return tuple(_write_draft(draft, out / draft.config.name, force=force) for draft in drafts)


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
        raise ArtifactError(
            f"{labels}: exists and names other classes, for all versions",
            remedy="give another --name, or --force to replace it",
        )


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


def _write_draft(draft: _Draft, folder: Path, *, force: bool) -> WrittenModel:
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
    # Last, so that a server that polls finds no model whose files are not there yet. What differs was allowed above, or
    # is provenance.
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

"""Writes models into a Triton repository, in the order in which a server may see the files, and takes models out.

A model folder appears whole, with its configuration, or not at all, whatever ends the writer: it is filled under a
hidden name beside the repository, where no server looks, and renamed. (Inside, Triton takes every folder for a model,
hidden ones too, and does not start on one without a version: `_make_aside`.) A new version of a model that is
configured so already is filled inside its folder, under a hidden name, which Triton takes for no version. What a writer
that was killed left is removed by the next one. What is taken out is what somebody wrote here and no longer wants; what
others put there stays.
"""

from __future__ import annotations

import contextlib
import filecmp
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, InputError
from ..files.output import exchange, explain_os_errors, locked, read_umask, refuse_stdout, write_text
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

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.pbtxt"
PARTIAL_SUFFIX = ".partial"
_OLD_SUFFIX = f".old{PARTIAL_SUFFIX}"
_HIDDEN = re.compile(r"\.(?P<of>.+)\.[a-z0-9_]{8}(\.old)?\.partial")
"""What a writer at work names what will be `of`; the rest as `tempfile` chooses it."""
_LOCKED = "repository"


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
        """The version."""
        return int(self.folder.name)


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """One model of a repository.

    Attributes:
        name: Its name in Triton.
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
    """One model that is to be written; `version` is the one that is asked for."""

    config: Any
    files: tuple[ServedFile, ...]
    labels: str | None
    version: int | None


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
    labels = None
    if has_labels(model):
        labels = "".join(" ".join(label.split()) + "\n" for label in model.spec.labels or ())
    config = make_config(model, options)
    drafts = [_Draft(config, model.files, labels, options.version)]
    if options.ensemble is not None:
        before = make_jpeg_models(model, options, config)
        drafts += [_Draft(other, files, None if files else labels, 1) for other, files in before]
    for draft in drafts:
        if options.written_by is not None:
            draft.config.parameters[WRITTEN_BY].string_value = options.written_by
        if not force:
            _require_no_other(draft, out / draft.config.name)
    refuse_stdout(out)
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / _LOCKED) as held:
        if held:
            _clear_leftovers(out)
        # A server that starts between two of the models must not find a new model behind an ensemble of the old one.
        ensembles = [draft.config.name for draft in drafts if draft.config.platform == "ensemble"]
        standing = [name for name in ensembles if (out / name).exists()]
        if standing and any(_find_place(draft, out / draft.config.name, force=True)[2] for draft in drafts):
            remove_models(out, standing)
        return tuple(_write_model(draft, out, force=force) for draft in drafts)


def _clear_leftovers(out: Path) -> None:
    """Removes what writers that were killed left; for who holds the lock, so that none of them is at work.

    What one had taken away and not yet replaced comes back.
    """
    out = out.resolve()  # as `_make_aside` does
    with explain_os_errors(out):
        for folder in (out.parent, out, *(out / name for name in list_models(out))):
            for entry in list(folder.iterdir()):
                hidden = _HIDDEN.fullmatch(entry.name)
                # Beside the repository there are files and repositories of others.
                if hidden and (folder not in (out.parent, out) or (hidden["of"] == out.name and entry.is_dir())):
                    for taken in entry.iterdir() if entry.name.endswith(_OLD_SUFFIX) else ():
                        place = (out if folder == out.parent else folder) / taken.name
                        if not place.exists():
                            os.rename(taken, place)
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _make_aside(out: Path) -> Path:
    """A hidden folder on the repository's disk: beside it, where no server looks for models, or else in it.

    There it is said: a server that starts while it is there, or after a kill and before the next writer, does not.
    """
    out = out.resolve()  # a link may lie on another disk than what it shows
    named: dict[str, str] = {"prefix": f".{out.name}.", "suffix": PARTIAL_SUFFIX}
    with contextlib.suppress(OSError):
        if out.parent.stat().st_dev == out.stat().st_dev:
            return Path(tempfile.mkdtemp(dir=out.parent, **named))
    logger.warning(
        "%s: is a mount of its own, or the folder around it may not be written to: no server may start on it until "
        "this is done; a repository one folder below avoids that",
        out,
    )
    return Path(tempfile.mkdtemp(dir=out, **named))


def find_version(
    model_folder: Path, files: Sequence[ServedFile], version: int | None, *, force: bool = False
) -> tuple[int, bool]:
    """The version folder to write, and whether it stands there with these very files.

    Args:
        model_folder: The folder around it.
        files: What it shall hold.
        version: The number that is asked for; None: the highest if it holds these files, else the next one.
        force: Whether a version that is asked for and holds other files may be replaced.

    Raises:
        ArtifactError: It may not.
    """
    number = version or max(list_versions(model_folder), default=0)
    folder = model_folder / str(number)
    if number and _holds(folder, files):
        return number, True
    if version is None:
        return number + 1, False
    if folder.exists() and not force:
        remedy = (
            "leave --version out for the next number, which Triton can load while the old one serves, or give "
            "--force to replace it"
        )
        raise ArtifactError(f"{folder}: exists and holds other files", remedy=remedy)
    return number, False


def list_versions(model_folder: Path) -> tuple[int, ...]:
    """The numbers of the version folders, as Triton finds them: names that are numbers without a leading zero."""
    names = list_models(model_folder)
    return tuple(
        sorted(int(name) for name in names if name.isascii() and name.isdecimal() and not name.startswith("0"))
    )


def list_models(repository: Path) -> tuple[str, ...]:
    """The folders that are not hidden, by name; none where there is no repository."""
    if not repository.is_dir():
        return ()
    return tuple(
        sorted(entry.name for entry in repository.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )


def _require_no_other(draft: _Draft, folder: Path) -> None:
    """Finds out before anything is written that something else stands there."""
    find_version(folder, draft.files, draft.version)
    path, labels = folder / CONFIG_FILE, folder / LABELS_FILE
    if path.exists():
        found = _read_config(folder)
        if found is None or _without_provenance(found) != _without_provenance(draft.config):
            raise ArtifactError(
                f"{path}: exists and configures the model otherwise, for all of its versions",
                remedy="give the options that it was written with, another --name, or --force to replace it",
            )
    if draft.labels is not None and labels.exists() and labels.read_bytes() != draft.labels.encode():
        raise ArtifactError(
            f"{labels}: exists and names other classes, for all versions",
            remedy="give another --name, or --force to replace it",
        )


def _without_provenance(config: Any) -> Any:
    copy = type(config)()
    copy.CopyFrom(config)
    for name in [name for name in copy.parameters if name.startswith(PREFIX)]:
        del copy.parameters[name]
    return copy


def _differs(draft: _Draft, folder: Path) -> bool:
    """Whether the folder that stands there configures the model otherwise, or names other classes."""
    found, labels = _read_config(folder), folder / LABELS_FILE
    if found is None or _without_provenance(found) != _without_provenance(draft.config):
        return True
    return draft.labels is not None and (not labels.is_file() or labels.read_bytes() != draft.labels.encode())


def _find_place(draft: _Draft, folder: Path, *, force: bool) -> tuple[int, bool, bool]:
    """As `find_version`, and whether what stands there must be replaced as a whole, as it is configured otherwise."""
    number, standing = find_version(folder, draft.files, draft.version, force=force)
    replaces = folder.is_dir() and (_differs(draft, folder) or (not standing and (folder / str(number)).exists()))
    return number, standing, replaces


def _write_model(draft: _Draft, out: Path, *, force: bool) -> WrittenModel:
    config, folder = draft.config, out / draft.config.name
    # Looked up again: another writer may have been here meanwhile.
    number, standing, replaces = _find_place(draft, folder, force=force)
    if WRITTEN_BY in config.parameters:
        versions, found = {number}, _read_config(folder)
        if found is not None and _read_writer(found) == config.parameters[WRITTEN_BY].string_value:
            versions |= set(_read_written_versions(found)) & set(list_versions(folder))
        config.parameters[WRITTEN_VERSIONS].string_value = ",".join(map(str, sorted(versions)))
    if folder.is_dir() and not replaces:
        if not standing:
            write_version(folder / str(number), draft.files)
        write_text(folder / CONFIG_FILE, print_config(config), force=True)  # no more than its provenance changes
    else:
        _write_folder(draft, folder, out, number=number)
    written = WrittenVersion(folder / str(number), "up to date" if standing else "written")
    return WrittenModel(config.name, written, folder / CONFIG_FILE, config.max_batch_size)


def _write_folder(draft: _Draft, folder: Path, out: Path, *, number: int) -> None:
    """Writes a whole model folder and puts it in its place; what stands there keeps its other versions and files."""
    with explain_os_errors(folder):
        aside = _make_aside(out)
        try:
            made = aside / folder.name
            if folder.is_dir():
                ours = shutil.ignore_patterns(str(number), CONFIG_FILE, LABELS_FILE, f".*{PARTIAL_SUFFIX}")
                shutil.copytree(
                    folder,
                    made,
                    copy_function=_link,
                    ignore=lambda place, names: ours(place, names) if Path(place) == folder else (),
                    symlinks=True,
                )
            made.mkdir(exist_ok=True)
            made.chmod(0o777 & ~read_umask())
            texts = {CONFIG_FILE: print_config(draft.config), LABELS_FILE: draft.labels}
            _fill(made, [ServedFile(name, text.encode()) for name, text in texts.items() if text is not None])
            version = made / str(number)
            version.mkdir()
            version.chmod(0o777 & ~read_umask())
            _fill(version, draft.files)
            _put_in_place(made, folder, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write_version(folder: Path, files: Sequence[ServedFile]) -> None:
    """Writes a version folder, whole or not at all.

    Args:
        folder: Where it shall stand; the folder around it exists.
        files: What it shall hold.

    Raises:
        ArtifactError: It cannot be written.
    """
    with explain_os_errors(folder):
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL_SUFFIX))
        try:
            _fill(partial, files)
            os.chmod(partial, 0o777 & ~read_umask())
            _put_in_place(partial, folder, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, files: Sequence[ServedFile]) -> None:
    for file in files:
        path = folder / file.name
        if isinstance(file.source, bytes):
            path.write_bytes(file.source)
        else:
            shutil.copyfile(file.source, path)
        with path.open("rb+") as written:
            os.fsync(written.fileno())
        path.chmod(0o666 & ~read_umask())


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where there are none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _put_in_place(made: Path, folder: Path, aside: Path) -> None:
    """Renames a folder; what stands there goes into `aside`, at once where the system can, else after a moment."""
    if not folder.exists():
        os.rename(made, folder)
        return
    if exchange(made, folder):
        return  # the old one is `made` now, and goes with what is around it
    old = aside.with_name(aside.name.removesuffix(PARTIAL_SUFFIX) + _OLD_SUFFIX)
    old.mkdir()
    try:
        os.rename(folder, old / folder.name)
        os.rename(made, folder)
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
    return all(_is_same(folder / file.name, file.source) for file in files)


def _is_same(path: Path, source: Path | bytes) -> bool:
    if not path.is_file():
        return False
    if isinstance(source, bytes):
        return path.read_bytes() == source
    return filecmp.cmp(path, source, shallow=False)


def _read_config(folder: Path) -> Any:
    """The configuration in a model's folder; None where none can be read."""
    path = folder / CONFIG_FILE
    try:
        return parse_config(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, InputError):
        return None


def _read_writer(config: Any) -> str | None:
    """`RepositoryOptions.written_by` of when it was written; None where nobody was named."""
    return str(config.parameters[WRITTEN_BY].string_value) if WRITTEN_BY in config.parameters else None


def _read_written_versions(config: Any) -> tuple[int, ...]:
    """The versions that this writer wrote."""
    text = config.parameters[WRITTEN_VERSIONS].string_value if WRITTEN_VERSIONS in config.parameters else ""
    return tuple(int(number) for number in text.split(",") if number.isdecimal())


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
    configs = {name: _read_config(repository / name) for name in list_models(repository)}
    stale = [
        name
        for name, config in configs.items()
        if name not in wanted and config is not None and _read_writer(config) == written_by
    ]
    foreign = {name: _find_foreign(repository / name, configs[name]) for name in stale}
    kept = {name: f"it holds {other}, which somebody else put there" for name, other in foreign.items() if other}
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
            aside = _make_aside(repository)
            try:
                os.rename(repository / name, aside / name)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def _find_foreign(folder: Path, config: Any) -> str | None:
    """A file or folder beside what this writer wrote."""
    ours = {CONFIG_FILE, LABELS_FILE, *map(str, _read_written_versions(config))}
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(PARTIAL_SUFFIX))
    return next((name for name in names if name not in ours), None)


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

"""Takes models out of a repository, of those that somebody wrote there and no longer wants; what others put there stays."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.output import explain_os_errors
from .config import LABELS_FILE
from .folders import PARTIAL_SUFFIX
from .repository import CONFIG_FILE, read_config, read_writer, read_written_versions


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
    folders = sorted(entry for entry in repository.iterdir() if entry.is_dir() and not entry.name.startswith(".")) if repository.is_dir() else []
    configs = {folder.name: read_config(folder) for folder in folders}
    stale = [name for name, config in configs.items() if name not in wanted and config is not None and read_writer(config) == written_by]
    foreign = {name: _find_foreign(repository / name, configs[name]) for name in stale}
    kept = {name: f"it holds {other}, which somebody else put there" for name, other in foreign.items() if other is not None}
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
    return next((entry.name for entry in sorted(folder.iterdir()) if entry.name not in ours and not entry.name.endswith(PARTIAL_SUFFIX)), None)


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

"""Version folders that appear whole or not at all. Standard library only.

A folder is filled under a hidden name that Triton takes for no version, and renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ArtifactError
from ..files.output import explain_os_errors, sha256_file
from .options import ServedFile

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
    return tuple(sorted(int(name) for name in names if name.isascii() and name.isdecimal() and not name.startswith("0")))


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
        remedy = "leave --version out for the next number, which Triton can load while the old one serves, or give --force to replace it"
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
                _write(partial / file.name, file.source)
            os.chmod(partial, 0o755)
            _put_in_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return WrittenVersion(folder, "written")


def _write(path: Path, source: Path | bytes) -> None:
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

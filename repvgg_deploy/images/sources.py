"""Where the images of a set lie: folders, lists of files and .npz archives; listed first, read one by one.

An image that cannot be read does not end the reading: an error is given in its place, and the caller decides.
"""

from __future__ import annotations

import contextlib
import csv
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..errors import InputError
from ..specs.values import Preprocessing
from .decode import IMAGE_SUFFIXES, load_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image: TypeAlias = "NDArray[np.uint8] | NDArray[np.float32]"
_CHUNK_BYTES = 1 << 20
_PATH_NAMES, _LABEL_NAMES = ("path", "file", "filename", "image"), ("label", "class", "target")
_NPZ_REMEDY = (
    "write it with numpy.savez(file, images=…, labels=…): one C-ordered array uint8 (N, H, W, 3), and integers (N,)"
)
_NPZ_ERRORS = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError, zlib.error, zipfile.BadZipFile
)  # fmt: skip
"""What zipfile and NumPy raise on damaged archives."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """Image files in order, and how each becomes a crop uint8 (H, W, 3)."""

    paths: tuple[Path, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, chosen: Sequence[int]) -> Iterator[Image | InputError]:
        """The images at the ascending indices `chosen`, or an error in the place of one that cannot be read."""
        for index in chosen:
            try:
                yield load_image(self.paths[index], self.preprocessing)
            except InputError as error:
                yield error


class NpzSource:
    """The array `images` of an .npz, read row by row: it may be larger than memory.

    Raises:
        InputError: It is no such archive, or its `images` are not uint8 or float32 of rank 4.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open("images") as file:
            self.shape, self.dtype, fortran = _read_header(file)
        if len(self.shape) != 4 or self.dtype not in ("uint8", "float32") or fortran:
            order = "Fortran order, " if fortran else ""
            what = "arrays of mixed shapes (objects)" if self.dtype == "object" else f"{order}{self.dtype} {self.shape}"
            raise InputError(
                f"{path}: images: expected uint8 (N, H, W, 3) in C order, found {what}", remedy=_NPZ_REMEDY
            )

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, chosen: Sequence[int]) -> Iterator[Image | InputError]:
        """The rows at the ascending indices `chosen`, as they are stored.

        Raises:
            InputError: The archive is damaged.
        """
        import numpy as np

        row = self.shape[1:]
        size = int(np.prod(row)) * np.dtype(self.dtype).itemsize
        with self._open("images") as file:
            _read_header(file)
            position = 0
            for index in chosen:
                left = (index - position) * size
                while left > 0 and (passed := len(file.read(min(left, _CHUNK_BYTES)))):
                    left -= passed
                data = file.read(size)
                position = index + 1
                if len(data) != size:
                    raise InputError(
                        f"{self._path}: images: ends after {index} of {len(self)} images",
                        remedy="copy the file again from its source",
                    )
                yield np.frombuffer(data, self.dtype).reshape(row)

    def labels(self) -> list[str] | None:
        """The array `labels` as texts, or None where there is none.

        Raises:
            InputError: It is damaged, or not one whole number or name for each image.
        """
        import numpy as np

        with _explain_damage(self._path), np.load(self._path, allow_pickle=False) as archive:
            if "labels" not in archive.files:
                return None
            labels = archive["labels"]
        if labels.ndim != 1 or labels.dtype.kind not in "iuU" or len(labels) != len(self):
            raise InputError(
                f"{self._path}: labels: expected {len(self)} integers, found {labels.dtype} {labels.shape}",
                remedy=_NPZ_REMEDY,
            )
        return [str(label) for label in labels.tolist()]

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        with _explain_damage(self._path), zipfile.ZipFile(self._path) as archive:
            if f"{name}.npy" not in archive.namelist():
                found = ", ".join(archive.namelist()).replace(".npy", "") or "nothing"
                raise InputError(f"{self._path}: expected an array {name}, found {found}", remedy=_NPZ_REMEDY)
            with archive.open(f"{name}.npy") as file:
                yield file


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _NPZ_ERRORS as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as .npz: {said}", remedy=_NPZ_REMEDY) from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], str, bool]:
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return tuple(shape), dtype.name if dtype.isnative else dtype.str, bool(fortran)


ImageSource: TypeAlias = "FileSource | NpzSource"


def find_images(folder: Path) -> tuple[Path, ...]:
    """All image files below a folder, sorted by path; hidden files and folders are left out, links are followed once.

    Raises:
        InputError: A folder may not be read: without it, a class could be missing unseen.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be read: {error.strerror}", remedy="make the folder readable, or move it out"
        ) from error

    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [Path(root, name) for name in files if not name.startswith(".")]
        found += [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    return tuple(sorted(found))


class FileList(NamedTuple):
    """The images that a text or CSV file names, and the label of each, or None where the file has no labels."""

    paths: tuple[Path, ...]
    labels: list[str] | None


def read_list(path: Path) -> FileList:
    """Reads lines of `path` or `path,label`, with or without a header line; other columns need one.

    Columns are separated by commas, semicolons or tabs.

    Raises:
        InputError: It cannot be read, has wrong columns, or names files that do not exist.
    """
    rows = _read_rows(path)
    if not rows:
        raise InputError(f"{path}: names no image", remedy="write one image a line: path, or path,label")
    path_column, label_column, has_header = _columns(path, rows)
    rows = rows[1:] if has_header else rows
    wanted = max(path_column, label_column or 0) + 1
    short = next((line for line, row in rows if len(row) < wanted), None)
    if short is not None or not rows:
        where = f"line {short}: expected {wanted} columns" if short is not None else "expected lines below the header"
        raise InputError(
            f"{path}: {where}, found fewer", remedy="write path,label on each line; quote paths that hold a comma"
        )
    paths = tuple(path.parent / row[path_column].strip() for _, row in rows)
    missing = [(line, file) for (line, _), file in zip(rows, paths, strict=True) if not file.is_file()]
    if missing:
        line, file = missing[0]
        raise InputError(
            f"{path}: {len(missing)} of {len(paths)} files do not exist, the first on line {line}: {file}",
            remedy="paths are relative to the list's own folder; a header line must name the columns path and label",
        )
    return FileList(paths, None if label_column is None else [row[label_column].strip() for _, row in rows])


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and cells of every line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as a list of images: {error}", remedy="give a UTF-8 text or CSV file"
        ) from error
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    try:
        numbered = list(enumerate(csv.reader(lines, delimiter=delimiter), start=1))
        return [(number, row) for number, row in numbered if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV: {error}", remedy="write path,label on each line") from error


def _columns(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[int, int | None, bool]:
    """Columns of the path and the label, and whether the first row is a header."""
    head = [cell.strip().casefold() for cell in rows[0][1]]
    path_column = next((head.index(name) for name in _PATH_NAMES if name in head), None)
    label_column = next((head.index(name) for name in _LABEL_NAMES if name in head), None)
    if path_column is not None:
        return path_column, label_column, True
    if label_column is not None or len(head) > 2:
        raise InputError(
            f"{path}: expected the columns path,label, found {', '.join(rows[0][1])}",
            remedy="name the columns path and label in the first line",
        )
    return 0, 1 if len(head) == 2 else None, False

"""Tables that are written in parts and lose no row to a kill: CSV, JSON lines or Parquet.

While the table grows, its parts stand in a hidden folder beside it, each a file that appears whole or not at all, and
`run.json`, which says what is being computed. At the end they become one file, and the folder goes. A row of which the
name stands in a part is done; everything else is computed again after a kill.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from ..errors import ArtifactError, InputError, MissingDependencyError, say_install
from ..files.output import atomic_output, require_writable

logger = logging.getLogger(__name__)
Row: TypeAlias = "Sequence[Any]"
"""One value a column: text, a number, a vector as a float32 array, or None for what is not there."""
SUFFIXES = (".csv", ".jsonl", ".parquet")
_NOTE = "run.json"


class GrowingTable:
    """A table under construction; use it as a context manager. Whatever interrupts, what was appended stays.

    Args:
        target: The file to make, with one of SUFFIXES.
        columns: By name `str`, `int`, `float`, or the number of elements of a float32 vector. The first is the row's
            name. In CSV a vector is one column an element.
        run: What is computed, for `run.json`: parts of another run are not continued.
        resume: Go on with the parts of an interrupted run.
        force: Begin anew where parts or a file stand already.

    Raises:
        InputError: Another suffix, or the parts are of another run.
        ArtifactError: The file or parts of it stand there already, another process is writing it, or the disk is full.
        MissingDependencyError: Parquet needs pyarrow, which is not installed.
    """

    def __init__(
        self,
        target: Path,
        columns: Mapping[str, type | int],
        *,
        run: Mapping[str, Any],
        resume: bool = False,
        force: bool = False,
    ) -> None:
        if target.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{target}: expected a file that ends in {', '.join(SUFFIXES)}",
                remedy=f"give --out {target.with_suffix('.csv').name}, say",
            )
        self._format = target.suffix.lower()
        if self._format == ".parquet":
            _import_parquet()
        self._target, self._columns, self._force = target, columns, force or resume
        self._folder = target.with_name(f".{target.name}.parts")
        self._run = json.loads(json.dumps(run))
        require_writable(target)
        if target.exists() and not force and not (resume and self._folder.exists()):
            raise ArtifactError(f"{target}: is there already", remedy="give --force to replace it, or another name")
        begun = self._folder.exists()
        self._lock = self._take()
        try:
            if begun and not resume:
                if not force:
                    raise ArtifactError(
                        f"{target}: an interrupted run left {len(self._parts())} parts of it in {self._folder.name}",
                        remedy="give --resume to go on, or --force to begin anew",
                    )
                self._clear()
            self._check_run()
            self._next = 1 + max((int(path.stem) for path in self._parts()), default=-1)
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self) -> int:
        """Holds the folder's lock, so that no two processes write one table."""
        try:
            self._folder.mkdir(exist_ok=True)
            handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ArtifactError(
                f"{self._target}: cannot be written: {error.strerror}",
                remedy=f"make {self._target.parent} writable, or write elsewhere with --out",
            ) from error
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ArtifactError(
                f"{self._target}: another process is writing it", remedy="wait for its end, or give another name"
            ) from error
        except (ImportError, OSError):
            logger.info("%s: there are no locks here: start no second run of it", self._target)
        return handle

    def _check_run(self) -> None:
        note = self._folder / _NOTE
        if not note.exists():
            with atomic_output(note) as output:
                output.partial.write_text(json.dumps(self._run, indent=1) + "\n", encoding="utf-8")
            return
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{note}: is damaged: {error}", remedy="give --force to begin anew") from error
        before = before if isinstance(before, dict) else {}
        keys = sorted({*before, *self._run}, key=str)
        differing = [key for key in keys if before.get(key) != self._run.get(key)]
        if differing:
            key = differing[0]
            was, now = (reprlib.repr(values.get(key)) for values in (before, self._run))
            raise InputError(
                f"{self._target}: the interrupted run had {key} {was}, this one has {now}",
                remedy="run the same command with --resume, or give --force to begin anew",
            )

    def _parts(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*" + self._format) if path.stem.isdecimal())

    def _clear(self) -> None:
        """Removes the parts, then what says of which run they are."""
        for part in self._parts():
            part.unlink()
        (self._folder / _NOTE).unlink(missing_ok=True)

    def _remove(self) -> None:
        self._clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def find_done(self) -> Done:
        """The rows that stand in the parts."""
        return Done(name for part in self._parts() for name in _read_names(part, self._format))

    def append(self, rows: Sequence[Row]) -> None:
        """Writes one more part; it is on the disk when this returns.

        Raises:
            ArtifactError: The disk is full, or the operating system refuses.
        """
        part = self._folder / f"{self._next:08d}{self._format}"
        with atomic_output(part, force=True) as output:
            _WRITERS[self._format](output.partial, self._columns, rows)
        self._next += 1

    def finish(self) -> int:
        """Makes the one file of the parts, and removes them; gives the number of rows.

        Raises:
            ArtifactError: The disk is full, or the operating system refuses.
        """
        parts = self._parts()
        with atomic_output(self._target, force=self._force) as output:
            if self._format == ".parquet":
                _merge_parquet(parts, output.partial, self._columns)
            else:
                with output.partial.open("wb") as file:
                    if self._format == ".csv":
                        file.write(_to_csv([_csv_names(self._columns)]))
                    for part in parts:
                        with part.open("rb") as source:
                            shutil.copyfileobj(source, file)
        rows = sum(1 for part in parts for _ in _read_names(part, self._format))
        self._remove()
        return rows

    def __enter__(self) -> GrowingTable:
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder.exists() and not self._parts():
            self._remove()
        os.close(self._lock)


class Done:
    """Which rows are done, in 16 bytes each."""

    def __init__(self, names: Iterable[str]) -> None:
        digests = np.frombuffer(b"".join(map(_digest, names)), np.uint64).reshape(-1, 2)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        self._high, self._low = digests[order, 0], digests[order, 1]

    def __len__(self) -> int:
        return len(self._high)

    def __contains__(self, name: str) -> bool:
        if not len(self._high):
            return False
        high, low = np.frombuffer(_digest(name), np.uint64)
        first, last = np.searchsorted(self._high, high, "left"), np.searchsorted(self._high, high, "right")
        return bool((self._low[first:last] == low).any())


def _digest(name: str) -> bytes:
    return hashlib.blake2b(as_text(name).encode(), digest_size=16).digest()


def as_text(name: str) -> str:
    """A file's name as text that every format holds; bytes that are no UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    """A value for text; a float32 in the fewest digits that say it."""
    return [float(str(element)) for element in value] if isinstance(value, np.ndarray) else value


def _write_jsonl(path: Path, columns: Mapping[str, type | int], rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            values = dict(zip(columns, map(_plain, row), strict=True))
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _write_csv(path: Path, columns: Mapping[str, type | int], rows: Sequence[Row]) -> None:
    lines = []
    for row in rows:
        cells: list[Any] = []
        for value, kind in zip(row, columns.values(), strict=True):
            if isinstance(kind, int):
                cells += [None] * kind if value is None else _plain(value)
            else:
                cells.append(value)
        lines.append(cells)
    path.write_bytes(_to_csv(lines))


def _to_csv(lines: Iterable[Sequence[Any]]) -> bytes:
    """Rows that end in a line feed; what holds one or a carriage return is quoted."""
    text = io.StringIO(newline="")
    # Asked for a line feed alone, the writer of Python below 3.13 does not quote a carriage return.
    ended = SimpleNamespace(write=lambda row: text.write(row.removesuffix("\r\n") + "\n"))
    csv.writer(ended, lineterminator="\r\n").writerows(lines)
    return text.getvalue().encode()


def _csv_names(columns: Mapping[str, type | int]) -> list[str]:
    names = []
    for name, kind in columns.items():
        names += [f"{name}_{index}" for index in range(kind)] if isinstance(kind, int) else [name]
    return names


def _schema(columns: Mapping[str, type | int]) -> Any:
    pyarrow, _ = _import_parquet()
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    fields = [
        (name, pyarrow.list_(pyarrow.float32(), kind) if isinstance(kind, int) else kinds[kind])
        for name, kind in columns.items()
    ]
    return pyarrow.schema(fields)


def _write_parquet(path: Path, columns: Mapping[str, type | int], rows: Sequence[Row]) -> None:
    _import_parquet()[1].write_table(to_arrow(columns, rows), path)


def to_arrow(columns: Mapping[str, type | int], rows: Sequence[Row]) -> Any:
    """Rows as a pyarrow.Table.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow, _ = _import_parquet()
    schema = _schema(columns)
    arrays = [pyarrow.array([row[index] for row in rows], field.type) for index, field in enumerate(schema)]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def _merge_parquet(parts: Sequence[Path], path: Path, columns: Mapping[str, type | int]) -> None:
    _, parquet = _import_parquet()
    with parquet.ParquetWriter(path, _schema(columns)) as writer:
        for part in parts:
            with parquet.ParquetFile(part) as file:
                for index in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(index))


_WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}


def _read_names(path: Path, kind: str) -> Iterator[str]:
    """The first column of a part."""
    if kind == ".parquet":
        with _import_parquet()[1].ParquetFile(path) as file:
            for batch in file.iter_batches(columns=file.schema_arrow.names[:1]):
                yield from batch.column(0).to_pylist()
        return
    with path.open(encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            yield from (next(iter(json.loads(line).values())) for line in file)
        else:
            yield from (row[0] for row in csv.reader(file))


def _import_parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet needs pyarrow, which is not installed", remedy=f"{say_install('parquet')}, or write .csv or .jsonl"
        ) from error
    return pyarrow, pyarrow.parquet

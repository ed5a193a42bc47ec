"""Text files that list images, a path a line, with the class behind it where there are labels."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ..errors import InputError
from .formats import read_text

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".list")
_PATH_NAMES = (
    "path",
    "file",
    "filename",
    "image",
    "filepath",
    "file_path",
    "file_name",
    "image_path",
    "img",
    "img_path",
)
_LABEL_NAMES = ("label", "class", "target", "labels", "category", "label_id", "class_id", "class_name")
_DELIMITERS = "\t,;"
_REMEDY = "write one image a line: path, or path,label"
_NUMBERS_BEHIND = re.compile(r"(\S.*?)((?:\s+[+-]?\d+(?:\.\d*)?)+)\s*")
_ZERO_OR_ONE = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "0.": 0, "1.": 1, "false": 0, "true": 1}
_Row: TypeAlias = "tuple[int, list[str]]"


class FileList(NamedTuple):
    """The images that a text or CSV file names, and the label of each, or None where the file has no labels."""

    paths: tuple[Path, ...]
    labels: list[str] | None


def read_list(path: Path) -> FileList:
    """Reads lines of `path` or `path,label`, with or without a header line; other columns need one.

    Columns are separated by tabs, commas, semicolons or, where there are none of these, spaces. In place of a label
    there may be a column of 0 and 1 for each class. Backslashes are separators of folders where a file with them in its
    name is not there.

    Raises:
        InputError: It cannot be read, has wrong columns, or names files that do not exist.
    """
    text = read_text(path, "a list of images", f"give a UTF-8 text or CSV file: {_REMEDY}")
    if text.lstrip()[:1] in ("{", "["):
        raise InputError(f"{path}: is JSON, expected a list of images", remedy=_REMEDY)
    rows = _read_rows(path, text)
    if not rows:
        raise InputError(f"{path}: names no image", remedy=_REMEDY)
    head = [cell.strip().casefold() for cell in rows[0][1]]
    path_column = next((head.index(name) for name in _PATH_NAMES if name in head), None)
    label_column = next((head.index(name) for name in _LABEL_NAMES if name in head), None)
    names = None if path_column is None else [cell.strip() for cell in rows[0][1]]
    width = len(head)
    if path_column is not None:
        rows = rows[1:]
    if not rows:
        raise InputError(f"{path}: expected lines below the header, found none", remedy=_REMEDY)
    labels = None
    one_hot = [column for column in range(width) if column not in (path_column or 0, label_column)]
    if path_column is None and (label_column is not None or width > 2) and not _are_one_hot(rows, one_hot):
        raise InputError(
            f"{path}: expected the columns path,label, found {', '.join(rows[0][1])[:200]}",
            remedy="name the columns path and label in the first line",
        )
    if path_column is None and width == 2:
        label_column = 1
    _require_width(path, rows, max(path_column or 0, label_column or 0) + 1)
    files = _find_files(path, [(line, row[path_column or 0].strip()) for line, row in rows])
    if label_column is not None:
        labels = [row[label_column].strip() for _, row in rows]
    elif len(one_hot) > 1 and _are_one_hot(rows, one_hot):
        labels = _read_one_hot(path, rows, one_hot, names)
    return FileList(files, labels)


def _read_rows(path: Path, text: str) -> list[_Row]:
    """Line number and cells of every line that is not blank."""
    lines = re.split(r"\r\n|\n|\r", text)
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in _DELIMITERS if mark in first), None)
    if delimiter is None:
        return _split_at_spaces(path, [(number, line) for number, line in enumerate(lines, 1) if line.strip()])
    try:
        numbered = list(enumerate(csv.reader(lines, delimiter=delimiter), start=1))
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV: {error}", remedy="write path,label on each line") from error
    return [(number, row) for number, row in numbered if any(cell.strip() for cell in row)]


def _split_at_spaces(path: Path, lines: Sequence[tuple[int, str]]) -> list[_Row]:
    """Whole lines as paths, unless the first is no file and what stands before its numbers or last word is one."""
    numbers = [_NUMBERS_BEHIND.fullmatch(line) for _, line in lines]
    whole = [(number, [_unquote(line)]) for number, line in lines]
    if not lines or _resolve(path, whole[0][1][0]) is not None:
        return whole
    if all(numbers):
        rows = [(line, [_unquote(m[1]), *m[2].split()]) for (line, _), m in zip(lines, numbers, strict=True) if m]
    else:
        rows = [(number, [_unquote(part) for part in line.strip().rsplit(None, 1)]) for number, line in lines]
    header = [cell.casefold() for cell in rows[0][1]]
    tried = rows[1:2] if header and header[0] in _PATH_NAMES else rows[:1]
    is_list = bool(tried) and all(len(row) > 1 for _, row in rows) and _resolve(path, tried[0][1][0]) is not None
    return rows if is_list else whole


def _unquote(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _require_width(path: Path, rows: Sequence[_Row], wanted: int) -> None:
    short = next((line for line, row in rows if len(row) < wanted), None)
    if short is not None:
        raise InputError(
            f"{path}: line {short}: expected {wanted} columns, found fewer",
            remedy="write path,label on each line; quote paths that hold a comma",
        )


def _resolve(path: Path, name: str) -> Path | None:
    """The file that a list calls so, beside the list where the name is relative; None where there is none."""
    for text in dict.fromkeys((name, name.replace("\\", "/"))):
        file = path.parent / text
        try:
            if os.path.exists(file) and not file.is_dir():
                return file
        except (OSError, ValueError):
            continue
    return None


def _find_files(path: Path, names: Sequence[tuple[int, str]]) -> tuple[Path, ...]:
    found = [(line, name, _resolve(path, name)) for line, name in names]
    missing = [(line, name) for line, name, file in found if file is None]
    if missing:
        line, name = missing[0]
        raise InputError(
            f"{path}: {len(missing)} of {len(found)} files do not exist, the first on line {line}: "
            f"{path.parent / name}",
            remedy="paths are relative to the list's own folder; a header line must name the columns path and label",
        )
    return tuple(file for _, _, file in found if file is not None)


def _are_one_hot(rows: Sequence[_Row], columns: Sequence[int]) -> bool:
    """Whether there is a 0 or 1 in each of the columns of each row."""
    return len(columns) > 1 and all(
        len(row) > columns[-1] and all(row[column].strip().casefold() in _ZERO_OR_ONE for column in columns)
        for _, row in rows
    )


def _read_one_hot(path: Path, rows: Sequence[_Row], columns: Sequence[int], names: list[str] | None) -> list[str]:
    """The column of the one 1 in each row: its name, or its index where there is no header.

    Raises:
        InputError: A row has none, or several.
    """
    labels = []
    for line, row in rows:
        ones = [column for column in columns if _ZERO_OR_ONE[row[column].strip().casefold()]]
        if len(ones) != 1:
            raise InputError(
                f"{path}: line {line}: {len(ones)} of {len(columns)} classes are 1, expected one",
                remedy="write path,label with one class on each line",
            )
        labels.append(str(columns.index(ones[0])) if names is None else names[ones[0]])
    return labels

"""Which files are images: the one listing of folders and patterns, for `eval`, `infer` and `--calib` alike.

A folder is searched with all folders below it. A file counts as an image by its suffix, or, with any other name, by how
it begins: what has an image's suffix and is none is an error where it is read, and nothing is left out in silence.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..errors import InputError
from .formats import IMAGE_SUFFIXES, RAW_SUFFIXES, is_read, name_special, name_unread, read_head

StrPath: TypeAlias = "str | os.PathLike[str]"
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
"""Names of standard input, from which one image is read."""
_NO_CONTENT = ("@eaDir", "__MACOSX", "lost+found")  # of Synology, macOS and ext4: thumbnails and attributes
_FEW = 3


@dataclass(frozen=True, slots=True)
class Listing:
    """Images, and what stands beside them and is none.

    Attributes:
        files: The images, sorted by path within each argument.
        hidden: Names that begin with a dot (AppleDouble's `._` too) or are an operating system's own: files, and
            folders, whose content is not counted.
        others: Files that are no images; what they are stands behind the name, where that is known.
        empty: Folders directly below the one that was searched that hold no image.
    """

    files: tuple[Path, ...] = ()
    hidden: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    @property
    def left_out(self) -> str:
        """How many were left out and what they are called; empty where nothing was."""
        kinds = ((self.hidden, "hidden"), (self.others, "no image"), (self.empty, "a folder without images"))
        parts = [f"{len(names):,} {what} ({_name_few(names)})" for names, what in kinds if names]
        return f"left out: {'; '.join(parts)}" if parts else ""

    def __add__(self, other: Listing) -> Listing:
        """Both, in order."""
        return Listing(
            self.files + other.files, self.hidden + other.hidden, self.others + other.others, self.empty + other.empty
        )


def _name_few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_FEW]) + (", …" if len(names) > _FEW else "")


def find_images(folder: Path) -> Listing:
    """All images below a folder; links are followed once.

    Raises:
        InputError: A folder may not be read: without it, a class could be missing unseen.
    """
    found: dict[str, list[str]] = {kind: [] for kind in ("file", "hidden", "other", "folder")}
    for kind, name in _walk(str(folder)):
        found[kind].append(name)
    files = tuple(sorted(map(Path, found["file"])))
    filled = {file.relative_to(folder).parts[0] for file in files}
    empty = tuple(sorted(name for name in found["folder"] if name not in filled))
    return Listing(files, tuple(sorted(found["hidden"])), tuple(sorted(found["other"])), empty)


def stream_images(paths: Iterable[StrPath]) -> Iterator[str]:
    """The files of `expand`, one by one, in the memory that the names in one folder take.

    The order is the same each time: the arguments', then that of names, a folder's content where its name stands. What
    is no image is passed over, and of several arguments that overlap each file comes once.

    Raises:
        InputError: A folder may not be read, or the one argument names nothing. Of several, such a one comes as it is:
            whoever reads the files notes it beside those that cannot be read.
    """
    texts = [os.fspath(path) for path in paths]
    if len(texts) == 1 and not (os.path.lexists(texts[0]) or glob.has_magic(texts[0])):
        raise InputError(f"{texts[0]}: no such file or folder", remedy="check the path")
    seen: set[str] = set()  # of one argument nothing need be remembered
    for text in texts:
        folder = os.path.isdir(text)
        for name in (name for kind, name in _walk(text) if kind == "file") if folder else _expand_one(text).files:
            path = str(name)
            if len(texts) == 1:
                yield path
            elif path not in seen:
                seen.add(path)
                yield path


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """What stands below a folder, in the order of names, as kind and name.

    Kinds: `file`, an image, with its path; `hidden` and `other`, no image, by their names below the root; `folder`, one
    directly below the root, by its name.
    """
    seen, open_folders = {os.path.realpath(root)}, [iter(_entries(root))]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif entry.name.startswith(".") or entry.name in _NO_CONTENT:
            yield "hidden", os.path.relpath(entry.path, root)
        elif entry.is_dir():
            if len(open_folders) == 1:
                yield "folder", entry.name
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                open_folders.append(iter(_entries(entry.path)))
        elif (reason := why_no_image(Path(entry.path), is_file=entry.is_file())) is None:
            yield "file", entry.path
        else:
            where = os.path.relpath(entry.path, root)
            yield "other", f"{where} ({reason})" if reason else where


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read: {error.strerror}", remedy="make the folder readable, or move it out"
        ) from error


def why_no_image(path: Path, *, is_file: bool) -> str | None:
    """None for what is to be read as an image, also where that will fail; else what it is, as far as it is known."""
    if path.suffix.lower() in IMAGE_SUFFIXES | RAW_SUFFIXES:
        return None
    if not is_file:
        return name_special(path) or "a broken link"
    try:
        head = read_head(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if is_read(head):
        return None
    found = name_unread(path, head)
    if found is None:
        return "" if head else "empty"
    return None if found.is_image else found.what


def expand(paths: Iterable[StrPath]) -> Listing:
    """Files as they are named, folders with all images below them, patterns such as `photos/*.jpg`, and `-`.

    Raises:
        InputError: A folder or pattern holds no image, a folder may not be read, or `paths` is empty.
    """
    found = Listing()
    for item in paths:
        text = os.fspath(item)
        listed = _expand_one(text)
        if not listed.files:
            beside = f"; {listed.left_out}" if listed.left_out else ""
            raise InputError(
                f"{text}: no image found there{beside}", remedy="name image files, or a folder that holds some"
            )
        found += listed
    if not found.files:
        raise InputError("expected at least one image, found none", remedy="name image files, folders or patterns")
    return found


def _expand_one(text: str) -> Listing:
    path = Path(text)
    if text in STANDARD_INPUT or os.path.lexists(path) or not glob.has_magic(text):
        return find_images(path) if path.is_dir() else Listing((path,))
    found = Listing()
    for name in sorted(glob.glob(text, recursive=True)):
        match = Path(name)
        if match.is_dir():
            # `**` names every folder beside what is in it.
            found += Listing() if "**" in text else find_images(match)
        elif (reason := why_no_image(match, is_file=match.is_file())) is None:
            found += Listing((match,))
        else:
            found += Listing(others=(f"{name} ({reason})" if reason else name,))
    return found


def list_images(paths: Iterable[StrPath]) -> tuple[Path, ...]:
    """The files of `expand`: those that are named, those below folders, and those that patterns match.

    Args:
        paths: Files, folders, patterns such as `photos/*.jpg`, and `-` for standard input.

    Returns:
        Files, sorted within each folder and pattern.

    Raises:
        InputError: A folder or pattern holds no image, a folder may not be read, or `paths` is empty.
    """
    return expand(paths).files

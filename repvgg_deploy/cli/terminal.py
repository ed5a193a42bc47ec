"""What a person sees: colours, bars and progress lines, aligned tables, lines that are folded between words."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Literal, TextIO

from ..errors import clean_text

Tone = Literal["good", "bad", "warn", "dim"]
_CODES: dict[Tone, str] = {"good": "32", "bad": "31", "warn": "33", "dim": "2"}
# Letters for private use in the place of escapes: what comes from files is cleaned of escapes after it was laid out.
_END = "\ue000"
_MARKS: dict[Tone, str] = {"good": "\ue001", "bad": "\ue002", "warn": "\ue003", "dim": "\ue004"}
_PAINTED = re.compile("[\ue000-\ue004]")
_BAR_WIDTH = 20
_BAR_SECONDS = 0.1  # at most ten drawings a second
_SILENT_SECONDS, _LINE_SECONDS = 30.0, 10.0  # where there is no terminal: before the first line, and between two
_RATE_SECONDS = 1.0  # before, a rate says nothing
CLEAR = "\r\x1b[K"


def paint(text: str, tone: Tone) -> str:
    """Text in a colour, which `colour` shows where it is printed, or leaves out."""
    return f"{_MARKS[tone]}{text}{_END}"


def plain(text: str) -> str:
    """Text without the colours of `paint`."""
    return _PAINTED.sub("", text)


def colour(text: str, stream: TextIO) -> str:
    """Painted text for a stream: in colour on a terminal, unless nobody wants any, else plain.

    Source: https://no-color.org for NO_COLOR.
    """
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return plain(text)
    for tone, mark in _MARKS.items():
        text = text.replace(mark, f"\x1b[{_CODES[tone]}m")
    return text.replace(_END, "\x1b[0m")


class Progress:
    """A bar on standard error while a long job runs; now and then a line where that is no terminal.

    Args:
        total: Steps.
        label: What is being done; nothing is drawn before `show` is called where it is empty.
        stream: Where to draw; standard error for None.
    """

    def __init__(self, total: int = 0, label: str = "", *, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._draws, self._broken = self._stream.isatty(), False
        self._said = time.monotonic() + _SILENT_SECONDS - _LINE_SECONDS
        self._begin(total, label)

    def _begin(self, total: int, label: str) -> None:
        self._total, self._label, self._done = max(total, 1), label, 0
        self._started, self._drawn = time.monotonic(), 0.0

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(self, *error: object) -> None:
        if self._draws and self._label:
            self._write(CLEAR)

    def advance(self, steps: int = 1, *, label: str | None = None) -> None:
        """Counts `steps` as done; `label` names what is done from here on."""
        self._done = min(self._done + steps, self._total)
        changed = label is not None and label != self._label
        self._label = label if label is not None else self._label
        if not self._draws:
            if self._label and time.monotonic() - self._said >= _LINE_SECONDS:
                self._said = time.monotonic()
                self._write(f"{clean_text(self._label)}: {self._done:,} of {self._total:,}, {self._pace()}\n")
        elif changed or time.monotonic() - self._drawn >= _BAR_SECONDS:
            self._draw()

    def show(self, stage: str, done: int, total: int) -> None:
        """So many steps of a stage are done. Another stage, or fewer steps than before, begins a new bar."""
        if (stage, max(total, 1)) != (self._label, self._total) or done < self._done:
            self._begin(total, stage)
            self._draw()
        self.advance(done - self._done)

    def _draw(self) -> None:
        if not self._draws or not self._label:
            return
        self._drawn = time.monotonic()
        filled = _BAR_WIDTH * self._done // self._total
        bar = f" [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self._done}/{self._total} {self._pace()}"
        # What reaches the last column goes on in the next line, and only that one would be cleared.
        room = terminal_columns(self._stream) - 1 - len(bar)
        label = clean_text(self._label)
        label = label if len(label) <= room else label[: max(room - 1, 0)] + "…"
        self._write(CLEAR + label + bar)

    def _pace(self) -> str:
        """The time that it took so far; of steps that can be counted the rate, and what is left of the time."""
        seconds = time.monotonic() - self._started
        if seconds < _RATE_SECONDS or not 0 < self._done < self._total:
            return f"{seconds:.0f} s"
        rate = self._done / seconds
        left = (self._total - self._done) / rate
        return f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'}/s, {show_time(left)} left"

    def _write(self, text: str) -> None:
        try:
            if not self._broken:
                self._stream.write(text)
                self._stream.flush()
        except OSError:
            self._broken = True  # the terminal is gone; the work goes on


def show_time(seconds: float) -> str:
    """`7 s`, `3:05 min`, `2:10 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def terminal_columns(stream: TextIO) -> int:
    """The width of the terminal behind a stream; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, or closed
        return 80


def format_table(rows: Sequence[Sequence[str]], align: str, *, indent: int = 2) -> str:
    """Rows of equal length as lines with aligned columns.

    Args:
        rows: The first may be a header.
        align: `<` or `>` for each column.
        indent: Spaces before each line.
    """
    widths = [max(len(plain(row[column])) for row in rows) for column in range(len(align))] if rows else []

    def pad(cell: str, side: str, width: int) -> str:
        space = " " * (width - len(plain(cell)))
        return cell + space if side == "<" else space + cell

    lines = ("  ".join(map(pad, row, align, widths)) for row in rows)
    return "\n".join((" " * indent + line).rstrip() for line in lines)


def format_groups(rows: Sequence[Sequence[str]], align: str) -> str:
    """A table whose first column would make it too wide: what stands there is a line of its own above its rows.

    Args:
        rows: The first is the header, whose first cell is left out; rows of one group are neighbours.
        align: `<` or `>` for each column but the first.
    """
    head, *lines = format_table([row[1:] for row in rows], align, indent=4).split("\n")
    title, grouped = None, [head]
    for row, line in zip(rows[1:], lines, strict=True):
        if row[0] != title:
            title = row[0]
            grouped.append(f"  {title}")
        grouped.append(line)
    return "\n".join(grouped)


def format_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines with the values aligned; a value of several lines is indented as a whole."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(
        f"{name:<{width}}  {value}".replace("\n", "\n" + " " * (width + 2)).rstrip() for name, value in pairs
    )


def fit(text: str, stream: TextIO) -> str:
    """Text for a stream: on a terminal folded to its width and in colour, elsewhere plain."""
    return colour(fold_lines(text, terminal_columns(stream)) if stream.isatty() else text, stream)


def fold_lines(text: str, columns: int) -> str:
    """Breaks lines that are longer than a terminal is wide; what goes on stands below the value, as in `format_pairs`.

    Rows of a table, which have gaps of two spaces and more in several places are folded in their last column alone, and
    where that begins far to the right they stay as they are: folded they would be harder to read.
    """
    return "\n".join(_fold(line, columns) for line in text.split("\n"))


def _fold(line: str, columns: int) -> str:
    if len(plain(line)) <= columns:
        return line
    gaps = [gap.end() for gap in re.finditer(r"\S {2,}(?=\S)", line)]
    if len(gaps) > 1:
        indent = len(plain(line[: gaps[-1]]))
        if indent > columns * 2 // 3:
            return line
    else:
        value = re.match(r" *\S+(?: \S+)* {2,}(?=\S)| +", line)
        indent = value.end() if value and value.end() <= columns // 2 else 2
    return textwrap.fill(
        line,
        columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )

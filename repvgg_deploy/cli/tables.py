"""Aligned columns of text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], align: str, *, indent: int = 2) -> str:
    """Rows of equal length as lines with aligned columns.

    Args:
        rows: The first may be a header.
        align: `<` or `>` for each column.
        indent: Spaces before each line.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))] if rows else []
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)) for row in rows)
    return "\n".join((" " * indent + line).rstrip() for line in lines)


def format_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines with the values aligned; a value of several lines is indented as a whole."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {value}".replace("\n", "\n" + " " * (width + 2)).rstrip() for name, value in pairs)


def fold_lines(text: str, columns: int) -> str:
    """Lines that are longer than a terminal is wide, broken between words; what goes on stands below the value, as `format_pairs` has it.

    Rows of a table, which have gaps of two spaces and more in several places, stay as they are: folded they would be harder to read.
    """
    return "\n".join(_fold(line, columns) for line in text.split("\n"))


def _fold(line: str, columns: int) -> str:
    if len(line) <= columns or len(re.findall(r"\S {2,}(?=\S)", line)) > 1:
        return line
    value = re.match(r" +|\S+(?: \S+)* {2,}(?=\S)", line)
    indent = value.end() if value and value.end() <= columns // 2 else 2
    return textwrap.fill(
        line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False, expand_tabs=False
    )


def show_bytes(count: int) -> str:
    """`25.5 MB`, `3.1 kB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1_000_000 else f"{count / 1e3:.1f} kB"

"""Aligned columns of text."""

from __future__ import annotations

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


def show_bytes(count: int) -> str:
    """`25.5 MB`, `3.1 kB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1_000_000 else f"{count / 1e3:.1f} kB"

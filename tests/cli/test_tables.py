"""Aligned columns, and what happens to them in a narrow terminal."""

from __future__ import annotations

from repvgg_deploy.cli.common import fold_lines, format_pairs, format_table


def test_fold_breaks_between_words_below_the_value() -> None:
    text = format_pairs([("asked for", "one two three four"), ("device", "T4")])
    assert fold_lines(text, 22) == "asked for  one two\n           three four\ndevice     T4"


def test_fold_of_a_continued_value_keeps_its_place() -> None:
    assert fold_lines("    one two three", 12) == "    one two\n    three"


def test_fold_leaves_tables_long_words_and_short_lines_as_they_are() -> None:
    table = format_table([["layer", "SQNR dB", "MACs"], ["stage1.0.conv", "40.0", "4.8%"]], "<>>")
    assert fold_lines(table, 20) == table
    assert fold_lines("0123456789" * 3, 20) == "0123456789" * 3
    assert fold_lines("  two words\n\nmore", 20) == "  two words\n\nmore"


def test_fold_of_a_long_line_without_a_gap_ends() -> None:
    # With a pattern that backtracks, this does not.
    assert fold_lines("a b " * 2000, 80).count("\n") > 90

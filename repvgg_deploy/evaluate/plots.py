"""Reports as pictures: layers, channel ranges, accuracies, confusions; from a small dataclass each to a Figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .figures import (
    BLUE,
    DARK,
    GREY,
    SERIES,
    SKY,
    VERMILION,
    draw_grid,
    draw_legend,
    open_figure,
    open_panels,
    require_data,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .accuracy import ConfusionMatrix

_MOST_DB = 100.0  # what is better is equal for all purposes, and would flatten the rest of the picture
_NAME_WIDTH = 34
_CELL_NAME = 20
_SQNR_HEIGHT, _RANGES_WIDTH = 5.2, 8.0  # inches
_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


@dataclass(frozen=True, slots=True)
class SqnrSeries:
    """One model or method: the SQNR of each layer in decibels; all series of a picture have the same layers."""

    name: str
    layers: tuple[str, ...]
    sqnr_db: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChannelSpread:
    """The channel ranges of one layer's output.

    Attributes:
        before: Largest divided by median channel range, before equalization.
        after: The same, after equalization.
        blocked_by: Why it was left as it was, or None.
    """

    name: str
    before: float
    after: float
    blocked_by: str | None = None


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """The top-1 accuracy of one method, 0 to 1; the others are compared with the reference."""

    method: str
    top1: float
    standard_error: float
    is_reference: bool = False


def draw_layer_sqnr(series: Sequence[SqnrSeries], *, reference: str, bound_db: float | None = None) -> Figure:
    """Signal-to-quantization-noise ratio of every layer, first to last: where two models part.

    Args:
        series: One to five models.
        reference: Name of the model that they are compared with.
        bound_db: Below this the layers are said to part; drawn as a line.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    require_data(bool(series) and bool(series[0].layers), "no layers")
    with open_figure(_sqnr_width(series), _SQNR_HEIGHT) as (figure, axes):
        _fill_sqnr(axes, series, reference, bound_db)
    return figure


def _sqnr_width(series: Sequence[SqnrSeries]) -> float:
    return max(7.0, 1.5 + 0.3 * len(series[0].layers))


def _fill_sqnr(axes: Axes, series: Sequence[SqnrSeries], reference: str, bound_db: float | None) -> None:
    layers = series[0].layers
    for one, (colour, marker) in zip(series, SERIES, strict=False):
        values = [min(value, _MOST_DB) for value in one.sqnr_db]
        label = f"{one.name} against {reference}"
        axes.plot(range(len(layers)), values, color=colour, marker=marker, markersize=6, linewidth=1.6, label=label)
    if bound_db is not None:
        axes.axhline(bound_db, color=DARK, linestyle="--", linewidth=1, label=f"{bound_db:g} dB: below it, they part")
    axes.set_xticks(range(len(layers)), [shorten(name) for name in layers], rotation=90, fontsize=8.5)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    low, high = min(0.0, *(min(one.sqnr_db) for one in series)), max(min(max(one.sqnr_db), _MOST_DB) for one in series)
    axes.set_ylim(low - (3 if low < 0 else 0), max(high, bound_db or 0) * 1.08 + 1)
    capped = any(max(one.sqnr_db) > _MOST_DB for one in series)
    axes.set(
        title="Signal-to-quantization-noise ratio of each layer's output", xlabel="layer, in the order of execution"
    )
    axes.set_ylabel("SQNR, dB (higher is better; 6 dB: one bit)" + (f"\ndrawn up to {_MOST_DB:g} dB" if capped else ""))
    draw_grid(axes, "y")
    draw_legend(axes, entries=len(series) + (bound_db is not None))


def draw_ranges(rows: Sequence[ChannelSpread]) -> Figure:
    """How unequal the channels of each layer are before and after equalization.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    require_data(bool(rows), "no layers")
    with open_figure(_RANGES_WIDTH, _ranges_height(rows)) as (figure, axes):
        _fill_ranges(axes, rows)
    return figure


def _ranges_height(rows: Sequence[ChannelSpread]) -> float:
    return 1.9 + 0.27 * len(rows)


def _fill_ranges(axes: Axes, rows: Sequence[ChannelSpread]) -> None:
    moved = [(place, row) for place, row in enumerate(rows) if row.blocked_by is None]
    for place, row in moved:
        axes.plot([row.before, row.after], [place, place], color=GREY, linewidth=2.5, zorder=1)
    before, label = [row.before for row in rows], "before equalization"
    axes.scatter(before, range(len(rows)), s=52, color=VERMILION, marker="s", label=label, zorder=2)
    places, after = [place for place, _ in moved], [row.after for _, row in moved]
    axes.scatter(after, places, s=52, color=BLUE, marker="o", label="after", zorder=3)
    names = [shorten(row.name) + ("" if row.blocked_by is None else "  (left as it is)") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    values = [value for row in rows for value in (row.before, row.after)]
    axes.set_xlim(min(0.9, *values) * 0.95, max(2.2, *values) * 1.15)
    axes.set(
        title="Spread of the channel ranges of each layer's output",
        xlabel="largest ÷ median channel range (1×: all alike; log scale)",
    )
    draw_grid(axes, "x")
    draw_legend(axes, entries=2)


def draw_quantization(series: Sequence[SqnrSeries], rows: Sequence[ChannelSpread], *, reference: str) -> Figure:
    """What a quantization did: `draw_layer_sqnr` beside `draw_ranges`, or one alone where the other has no data.

    Args:
        series: None where nothing was measured.
        rows: None where nothing was equalized.
        reference: Name of the model that was quantized.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    if not series or not rows:
        return draw_layer_sqnr(series, reference=reference) if series else draw_ranges(rows)
    widths = (_sqnr_width(series), _RANGES_WIDTH)
    with open_panels(sum(widths), max(_SQNR_HEIGHT, _ranges_height(rows)), widths) as (figure, axes):
        _fill_sqnr(axes[0], series, reference, None)
        _fill_ranges(axes[1], rows)
    return figure


def draw_accuracy(rows: Sequence[AccuracyRow], *, title: str = "Top-1 accuracy by method") -> Figure:
    """Top-1 of several methods with its standard error; the reference as a line.

    Args:
        rows: Top to bottom.
        title: Which model, which images.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    require_data(bool(rows), "no methods")
    with open_figure(8.5, 1.7 + 0.42 * len(rows)) as (figure, axes):
        percent, errors = [100 * row.top1 for row in rows], [100 * row.standard_error for row in rows]
        axes.barh(range(len(rows)), percent, height=0.62, color=[SKY if row.is_reference else BLUE for row in rows])
        axes.errorbar(percent, range(len(rows)), xerr=errors, fmt="none", ecolor=DARK, elinewidth=1.4, capsize=4)
        ends = [value + sign * error for value, error in zip(percent, errors, strict=True) for sign in (-1, 1)]
        left = max(0.0, min(ends) - 0.6 * max(max(ends) - min(ends), 1.0)) if min(ends) > 10 else 0.0
        width = max(ends) - left
        axes.set_xlim(left, max(ends) + 0.3 * width)
        axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= min(100, left + 1.3 * width)])
        for place, (value, error) in enumerate(zip(percent, errors, strict=True)):
            end, text = value + error + 0.015 * width, f"{value:.2f} ± {error:.2f}"
            axes.text(end, place, text, va="center", fontsize=9, bbox=_BOX)
        axes.set_yticks(range(len(rows)), [textwrap.fill(row.method, _NAME_WIDTH) for row in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        note = " (the axis does not begin at 0)" if left > 0 else ""
        axes.set(title=title, xlabel=f"top-1, % ± standard error{note}")
        draw_grid(axes, "x")
        references = [row for row in rows if row.is_reference]
        for row in references:
            value, label = 100 * row.top1, f"{row.method}, {100 * row.top1:.2f} %"
            axes.axvline(value, color=DARK, linestyle="--", linewidth=1, label=label)
        if references:
            draw_legend(axes, entries=len(references))
    return figure


def draw_confusion(matrix: ConfusionMatrix, *, title: str = "Which class is taken for which") -> Figure:
    """The confusion matrix: a row for each right class, a column for each class that was said, images in the cells.

    Colours are shares of the row; images that were taken for a class without a column stand in the last one.

    Args:
        matrix: Of at most some twenty classes.
        title: Title of the picture.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    require_data(bool(matrix.classes), "no class was ever confused")
    names = [
        shorten(label or f"class {index}", _CELL_NAME)
        for index, label in zip(matrix.classes, matrix.labels, strict=True)
    ]
    rows = [[*row, other] for row, other in zip(matrix.counts, matrix.others, strict=True)]
    columns = [*names, "others"]
    if not any(matrix.others):
        rows, columns = [row[:-1] for row in rows], names
    shares = [[count / max(sum(row), 1) for count in row] for row in rows]
    side = 2.6 + 0.42 * len(names)
    with open_figure(side + 0.42 * (len(columns) - len(names)) + 1.0, side) as (figure, axes):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for top, row in enumerate(rows):
            for left, count in enumerate(row):
                if count:
                    colour = "white" if shares[top][left] > 0.5 else DARK
                    axes.text(left, top, str(count), ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set(title=title, xlabel="what the model said", ylabel="right class")
    return figure

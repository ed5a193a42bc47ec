"""A benchmark as a picture: latency against throughput, and the roofline with every layer on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..evaluate.figures import DARK, SERIES, draw_grid, draw_legend, open_figure, open_panels, require_data
from .records import Benchmark, ModelResult
from .roofline import Ceiling, LayerBound, bound_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT, _LATENCY_WIDTH, _ROOFLINE_WIDTH = 6.2, 7.6, 8.2  # inches
_SMALL = 8.5
_Label = tuple[str, float, float]
_Box = tuple[float, float, float, float]
_LINES = {"engine": "-", "onnxruntime": ":", "torch": "--"}
_ROOFS = {"fp32": "-", "fp16": "--", "int8": ":"}


def draw_benchmark(result: Benchmark) -> Figure:
    """Latency against throughput beside the roofline; the first alone where no roofline is known.

    Args:
        result: Of a run.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    require_data(any(model.points for model in result.models), "no model was measured")
    drawn = [
        model
        for model in result.models
        if result.ceiling is not None and model.layers and _bounds(result.ceiling, model)
    ]
    if not drawn or result.ceiling is None:
        with open_figure(_LATENCY_WIDTH, _HEIGHT) as (figure, axes):
            _fill_latency(axes, result)
        return figure
    widths = (_LATENCY_WIDTH, _ROOFLINE_WIDTH)
    with open_panels(sum(widths), _HEIGHT, widths) as (figure, panels):
        _fill_latency(panels[0], result)
        _fill_roofline(panels[1], result, result.ceiling, drawn)
    return figure


def _fill_latency(axes: Axes, result: Benchmark) -> None:
    count = 0
    for index, model in enumerate(result.models):
        colour, marker = SERIES[index % len(SERIES)]
        for way in dict.fromkeys(point.way for point in model.points):
            points = [point for point in model.points if point.way == way]
            medians, rates = (
                [point.latency.median_ms for point in points],
                [point.images_per_second for point in points],
            )
            tails = [point.latency.p99_ms - point.latency.median_ms for point in points]
            axes.errorbar(
                medians,
                rates,
                xerr=[[0.0] * len(points), tails],
                fmt="none",
                ecolor=colour,
                elinewidth=1,
                capsize=3,
                alpha=0.6,
            )
            label = f"{_title(model)}, {way}"
            axes.plot(medians, rates, color=colour, marker=marker, markersize=7, linestyle=_LINES[way], linewidth=1.6, label=label,
                      markerfacecolor=colour if way == "engine" else "white")  # fmt: skip
            count += 1
    axes.set_xscale("log")
    axes.set_yscale("log")
    _pad(axes, result)
    _plain_ticks(axes)
    points = [point for model in result.models for point in model.points]
    labels = [
        (f"batch {point.batch}", point.latency.median_ms, point.images_per_second)
        for point in points
        if point.way == "engine"
    ]
    _place_labels(axes, labels, [(point.latency.median_ms, point.images_per_second) for point in points])
    axes.set(
        title=f"Latency against throughput\n{result.device.name}",
        xlabel="latency of one call, ms (mark: median, bar: to the 99th percentile)",
    )
    axes.set_ylabel("images a second" + (f" of {result.clients} clients" if result.clients > 1 else ""))
    draw_grid(axes, "x")
    draw_grid(axes, "y")
    draw_legend(axes, entries=count, columns=2)


def _pad(axes: Axes, result: Benchmark) -> None:
    points = [point for model in result.models for point in model.points]
    times = [value for point in points for value in (point.latency.median_ms, point.latency.p99_ms)]
    rates = [point.images_per_second for point in points]
    axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
    axes.set_ylim(min(rates) / 1.5, max(rates) * 1.6)


def _plain_ticks(axes: Axes) -> None:
    """10, 20, 50, 100 in place of powers; fewer where they would stand close."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        narrow = high / low < 2000
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def _fill_roofline(axes: Axes, result: Benchmark, ceiling: Ceiling, models: Sequence[ModelResult]) -> None:
    used = sorted({cost.precision for model in models for cost in model.layers})
    every = [bound for model in models for bounds in _bounds(ceiling, model).values() for bound in bounds]
    left, right = (
        min(bound.intensity for bound in every) / 2,
        max(*(bound.intensity for bound in every), *map(ceiling.ridge, used)) * 3,
    )
    _draw_roofs(axes, ceiling, used, (left, right))
    entries, reached = 0, list[_Label]()
    for index, model in enumerate(models):
        colour, marker = SERIES[index % len(SERIES)]
        for batch, bounds in _bounds(ceiling, model).items():
            full = batch == max(_bounds(ceiling, model))
            look: dict[str, Any] = {"facecolor": colour if full else "white", "edgecolor": colour, "marker": marker}
            places = [bound.intensity for bound in bounds], [bound.attainable for bound in bounds]
            axes.scatter(
                *places,
                s=26,
                zorder=3,
                alpha=0.75,
                linewidth=1.1,
                label=f"layers of {_title(model)}, batch {batch}",
                **look,
            )
            entries += 1
            reached += _draw_reached(axes, model, bounds, look=look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    lowest = min([bound.attainable for bound in every] + _reached_rates(models))
    axes.set_ylim(lowest / 2, max(ceiling.operations_per_second[name] for name in used) * 4)
    _place_labels(
        axes, reached, [*((x, y) for _, x, y in reached), *((bound.intensity, bound.attainable) for bound in every)]
    )
    source = "measured on the spot" if ceiling.measured else ceiling.source
    axes.set(
        title=f"Roofline: what each layer could reach\n{ceiling.device} ({source})",
        xlabel="arithmetic intensity, operations a byte",
    )
    axes.set_ylabel("operations a second (a multiply-accumulate is two)")
    axes.yaxis.set_major_formatter(lambda value, _: _show_rate(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    draw_grid(axes, "x")
    draw_grid(axes, "y")
    draw_legend(axes, entries=entries, columns=2)


def _draw_roofs(axes: Axes, ceiling: Ceiling, used: Sequence[str], span: tuple[float, float]) -> None:
    left, right = span
    names: dict[float, list[str]] = {}
    for name in used:  # equal peaks are one roof
        names.setdefault(ceiling.operations_per_second[name], []).append(name)
    for peak, same in names.items():
        ridge = peak / ceiling.bytes_per_second
        axes.plot([min(left, ridge), ridge, right], [min(left, ridge) * ceiling.bytes_per_second, peak, peak], color=DARK, linewidth=1.4,
                  linestyle=_ROOFS[same[0]], zorder=1)  # fmt: skip
        axes.text(
            ridge / 1.15,
            peak,
            f"{' and '.join(same)}: {_show_rate(peak)}op/s",
            ha="right",
            va="center",
            fontsize=_SMALL,
            color=DARK,
        )
    note = (
        f"slope: memory, {ceiling.bytes_per_second / 1e9:,.0f} GB/s\nlarge marks: the whole model as measured, and "
        f"its share of the roof"
    )
    axes.text(0.02, 0.98, note, transform=axes.transAxes, va="top", fontsize=_SMALL, color=DARK)


def _draw_reached(
    axes: Axes, model: ModelResult, bounds: Sequence[LayerBound], *, look: Mapping[str, Any]
) -> list[_Label]:
    """The whole model at one batch size, as it was measured: a large mark, and its share of the roof to be written beside it."""
    batch, labels = bounds[0].batch, []
    for point in model.points:
        if point.batch != batch or point.way != "engine" or point.share is None or point.floor_ms is None:
            continue
        operations, moved = sum(bound.operations for bound in bounds), sum(bound.bytes for bound in bounds)
        place = operations / moved, operations / (point.floor_ms / point.share / 1e3)
        axes.scatter([place[0]], [place[1]], s=130, linewidth=1.4, zorder=4, **{**look, "edgecolor": DARK})
        labels.append((f"batch {batch}: {100 * point.share:.0f} %", *place))
    return labels


def _place_labels(axes: Axes, labels: Sequence[_Label], marks: Sequence[tuple[float, float]]) -> None:
    """Writes each label beside its mark where it covers no mark and no other label: above, below, right, left, then further off."""
    points_per_pixel = 72 / axes.figure.dpi
    taken = [
        (x - 6, x + 6, y - 6, y + 6) for x, y in (points_per_pixel * axes.transData.transform(mark) for mark in marks)
    ]
    for text, x, y in labels:
        centre, half = points_per_pixel * axes.transData.transform((x, y)), 0.29 * _SMALL * len(text)
        boxes = []
        for right, up in (
            (0, 14),
            (0, -14),
            (half + 11, 0),
            (-half - 11, 0),
            (half + 4, -12),
            (-half - 4, -12),
            (0, 26),
            (0, -26),
            (0, 38),
        ):
            left, low = centre[0] + right - half, centre[1] + up - 5
            boxes.append(((left, left + 2 * half, low, low + 10), (right, up)))
        free = [(box, offset) for box, offset in boxes if not any(_overlap(box, other) for other in taken)]
        box, offset = (free or boxes)[0]
        taken.append(box)
        axes.annotate(
            text,
            (x, y),
            textcoords="offset points",
            xytext=offset,
            ha="center",
            va="center",
            fontsize=_SMALL,
            color=DARK,
            zorder=5,
        )


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _reached_rates(models: Sequence[ModelResult]) -> list[float]:
    rates = []
    for model in models:
        for point in model.points:
            if point.way == "engine" and point.share is not None and point.floor_ms is not None:
                rates.append(
                    sum(cost.count_operations(point.batch) for cost in model.layers)
                    / (point.floor_ms / point.share / 1e3)
                )
    return rates


def _bounds(ceiling: Ceiling, model: ModelResult) -> dict[int, tuple[LayerBound, ...]]:
    """Of the smallest and the largest batch that were measured; none where a peak is not known."""
    batches = sorted({point.batch for point in model.points})
    found = (
        {batch: bound_layers(model.layers, ceiling, batch) for batch in dict.fromkeys((batches[0], batches[-1]))}
        if batches
        else {}
    )
    return {batch: bounds for batch, bounds in found.items() if bounds is not None}


def _title(model: ModelResult) -> str:
    return f"{PurePath(model.file).stem} ({model.precision or '?'})"


def _show_rate(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value:,.3g} "

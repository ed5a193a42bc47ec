"""A benchmark as a picture: latency against throughput, and the roofline with every layer on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..evaluate.figures import DARK, SERIES, draw_grid, draw_legend, open_figure, open_panels, require_data
from .records import Benchmark, ModelResult, Point
from .roofline import Ceiling, LayerBound, bound_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT, _LATENCY_WIDTH, _ROOFLINE_WIDTH = 6.2, 7.6, 8.2  # inches
_SMALL = 8.5  # points
_Label = tuple[str, float, float]
_Box = tuple[float, float, float, float]
_LINES = {"engine": "-", "onnxruntime": ":", "torch": "--"}
_ROOFS = {"fp32": "-", "fp16": "--", "fp8": "-.", "int8": ":"}


def draw_benchmark(result: Benchmark) -> Figure:
    """Latency against throughput beside the roofline; the first alone where no roofline is known.

    Raises:
        InputError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    require_data(any(model.points for model in result.models), "no model was measured")
    ceiling = result.ceiling
    drawn = [] if ceiling is None else [model for model in result.models if model.layers and _bounds(ceiling, model)]
    if not drawn or ceiling is None:
        with open_figure(_LATENCY_WIDTH, _HEIGHT) as (figure, axes):
            _fill_latency(axes, result)
        return figure
    widths = (_LATENCY_WIDTH, _ROOFLINE_WIDTH)
    with open_panels(sum(widths), _HEIGHT, widths) as (figure, panels):
        _fill_latency(panels[0], result)
        _fill_roofline(panels[1], ceiling, drawn)
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
            bars = [[0.0] * len(points), [point.latency.p99_ms - point.latency.median_ms for point in points]]
            axes.errorbar(medians, rates, xerr=bars, fmt="none", ecolor=colour, elinewidth=1, capsize=3, alpha=0.6)
            look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1.6}
            look |= {"linestyle": _LINES[way], "markerfacecolor": colour if way == "engine" else "white"}
            axes.plot(medians, rates, label=f"{_title(model)}, {way}", **look)
            count += 1
    points = [point for model in result.models for point in model.points]
    times = [value for point in points for value in (point.latency.median_ms, point.latency.p99_ms)]
    rates = [point.images_per_second for point in points]
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=(min(times) / 1.5, max(times) * 1.5), ylim=(min(rates) / 1.5, max(rates) * 1.6))
    _plain_ticks(axes)
    labels = [(f"batch {point.batch}", *_place(point)) for point in points if point.way == "engine"]
    _place_labels(axes, labels, [_place(point) for point in points])
    axes.set(
        title=f"Latency against throughput\n{result.device.name}",
        xlabel="latency of one call, ms (mark: median, bar: to the 99th percentile)",
        ylabel="images a second" + (f" of {result.clients} clients" if result.clients > 1 else ""),
    )
    draw_grid(axes, "x")
    draw_grid(axes, "y")
    draw_legend(axes, entries=count, columns=2)


def _place(point: Point) -> tuple[float, float]:
    return point.latency.median_ms, point.images_per_second


def _plain_ticks(axes: Axes) -> None:
    """10, 20, 50, 100 in place of powers; fewer where they would stand close."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        narrow = high / low < 2000
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def _fill_roofline(axes: Axes, ceiling: Ceiling, models: Sequence[ModelResult]) -> None:
    used = sorted({cost.precision for model in models for cost in model.layers})
    every = [bound for model in models for bounds in _bounds(ceiling, model).values() for bound in bounds]
    intensities = [bound.intensity for bound in every]
    span = min(intensities) / 2, max(*intensities, *map(ceiling.ridge, used)) * 3
    _draw_roofs(axes, ceiling, used, span)
    entries, reached = 0, list[_Label]()
    for index, model in enumerate(models):
        colour, marker = SERIES[index % len(SERIES)]
        found = _bounds(ceiling, model)
        for batch, bounds in found.items():
            face = colour if batch == max(found) else "white"
            look: dict[str, Any] = {"facecolor": face, "edgecolor": colour, "marker": marker}
            places = [bound.intensity for bound in bounds], [bound.attainable for bound in bounds]
            label = f"layers of {_title(model)}, batch {batch}"
            axes.scatter(*places, s=26, zorder=3, alpha=0.75, linewidth=1.1, label=label, **look)
            entries += 1
            for text, x, y in _reached(model, batch):
                axes.scatter([x], [y], s=130, linewidth=1.4, zorder=4, **{**look, "edgecolor": DARK})
                reached.append((text, x, y))
    lowest = min(
        [bound.attainable for bound in every]
        + [rate for model in models for point in model.points for _, _, rate in _reached(model, point.batch)]
    )
    highest = max(ceiling.operations_per_second[name] for name in used)
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=span, ylim=(lowest / 2, highest * 4))
    marks = [(x, y) for _, x, y in reached] + [(bound.intensity, bound.attainable) for bound in every]
    _place_labels(axes, reached, marks)
    source = "measured on the spot" if ceiling.measured else ceiling.source
    axes.set(
        title=f"Roofline: what each layer could reach\n{ceiling.device} ({source})",
        xlabel="arithmetic intensity, operations a byte",
        ylabel="operations a second (a multiply-accumulate is two)",
    )
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
    note: dict[str, Any] = {"fontsize": _SMALL, "color": DARK}
    for peak, same in names.items():
        ridge = peak / ceiling.bytes_per_second
        corners = [min(left, ridge), ridge, right], [min(left, ridge) * ceiling.bytes_per_second, peak, peak]
        axes.plot(*corners, color=DARK, linewidth=1.4, linestyle=_ROOFS[same[0]], zorder=1)
        text = f"{' and '.join(same)}: {_show_rate(peak)}op/s"
        axes.text(ridge / 1.15, peak, text, ha="right", va="center", **note)
    text = (
        f"slope: memory, {ceiling.bytes_per_second / 1e9:,.0f} GB/s\nlarge marks: the whole model as measured, and "
        f"its share of the roof"
    )
    axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", **note)


def _reached(model: ModelResult, batch: int) -> list[_Label]:
    """What the whole model reached at one batch size: share of the roof, operations a byte, operations a second."""
    operations = sum(cost.count_operations(batch) for cost in model.layers)
    intensity = operations / sum(cost.count_bytes(batch) for cost in model.layers)
    return [
        (f"batch {batch}: {100 * point.share:.0f} %", intensity, operations / (point.floor_ms / point.share / 1e3))
        for point in model.points
        if point.batch == batch and point.way == "engine" and point.share is not None and point.floor_ms is not None
    ]


def _place_labels(axes: Axes, labels: Sequence[_Label], marks: Sequence[tuple[float, float]]) -> None:
    """Writes each label beside its mark where it covers no mark and no other label, first above and below it."""
    points_per_pixel = 72 / axes.figure.dpi
    taken = [
        (x - 6, x + 6, y - 6, y + 6) for x, y in (points_per_pixel * axes.transData.transform(mark) for mark in marks)
    ]
    for text, x, y in labels:
        centre, half = points_per_pixel * axes.transData.transform((x, y)), 0.29 * _SMALL * len(text)
        offsets = [(0, 14), (0, -14), (half + 11, 0), (-half - 11, 0), (half + 4, -12), (-half - 4, -12)]
        offsets += [(0, 26), (0, -26), (0, 38)]
        boxes = []
        for right, up in offsets:
            left, low = centre[0] + right - half, centre[1] + up - 5
            boxes.append(((left, left + 2 * half, low, low + 10), (right, up)))
        free = [(box, offset) for box, offset in boxes if not any(_overlap(box, other) for other in taken)]
        box, offset = (free or boxes)[0]
        taken.append(box)
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _SMALL, "color": DARK, "zorder": 5}
        axes.annotate(text, (x, y), textcoords="offset points", xytext=offset, **look)


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _bounds(ceiling: Ceiling, model: ModelResult) -> dict[int, tuple[LayerBound, ...]]:
    """The layers at the smallest and the largest batch that were measured; none where a peak is not known."""
    batches = sorted({point.batch for point in model.points})
    found = {batch: bound_layers(model.layers, ceiling, batch) for batch in dict.fromkeys(batches[:1] + batches[-1:])}
    return {batch: bounds for batch, bounds in found.items() if bounds is not None}


def _title(model: ModelResult) -> str:
    return f"{PurePath(model.file).stem} ({model.precision or '?'})"


def _show_rate(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value:,.3g} "

"""How the project's pictures look, and how they become files. Matplotlib is imported to draw one; no window is opened.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any colour vision can tell
apart; where two things share a picture they differ in shape or place as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, MissingDependencyError, say_install
from ..files.output import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, YELLOW, GREY, DARK = "#56B4E9", "#E69F00", "#F0E442", "#B8B8B8", "#333333"
SERIES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v"))
"""Colour and marker of each of several lines."""
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a file name may hold dollar signs
}
_NAME = "give --plot picture.png"
_DOTS_PER_INCH = 120
_MOST_INCHES = 80.0


@contextmanager
def open_figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many inches with one picture; see `open_panels`."""
    with open_panels(width, height, (1.0,)) as (figure, axes):
        yield figure, axes[0]


@contextmanager
def open_panels(width: float, height: float, shares: Sequence[float]) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with pictures side by side, which no window shows and no global state knows.

    Args:
        width: Width of the figure in inches.
        height: Height in inches.
        shares: Each picture's share of the width.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing() from error
    with mpl.rc_context(_STYLE):
        size = (min(width, _MOST_INCHES), min(height, _MOST_INCHES))
        figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(1, len(shares), squeeze=False, width_ratios=list(shares))[0])
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def draw_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Thin lines behind the data."""
    axes.grid(axis=axis, color=GREY, linewidth=0.6, alpha=0.6)


def draw_legend(axes: Axes, *, entries: int, columns: int = 2, handles: list[Any] | None = None) -> None:
    """The legend between the title, which must be set already, and the data; `handles` None takes what is labelled."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.legend(
        handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=9,
        borderaxespad=0.2,
    )  # fmt: skip
    axes.set_title(axes.get_title(loc="left"), pad=8 + 15 * -(-entries // columns))


def shorten(name: str, most: int = 34) -> str:
    """A layer's or class's name that fits beside an axis: without `.conv`, and its end where it is long."""
    name = name.removesuffix(".conv")
    return name if len(name) <= most else f"…{name[1 - most :]}"


def require_data(condition: bool, what: str) -> None:
    """Refuses to draw an empty picture.

    Raises:
        InputError: There is no data; `what` says of what.
    """
    if not condition:
        raise InputError(f"there is nothing to draw: {what}", remedy="leave the picture out")


def save_figure(figure: Figure, path: Path, *, force: bool = False) -> Literal["pending", "written", "up to date"]:
    """Writes a PNG whole or not at all; equal pictures give equal bytes.

    Raises:
        ArtifactError: It cannot be written, or a different file stands there and `force` is not given.
        InputError: The name does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: expected a name that ends in .png", remedy=_NAME)
    with atomic_output(path, force=force) as output:
        figure.savefig(output.partial, format="png", metadata={"Software": None}, dpi=_DOTS_PER_INCH)
    return output.status


def require_drawable(path: Path) -> None:
    """Refuses what `save_figure` would, and a missing matplotlib: before the long work whose result is to be drawn.

    Raises:
        InputError: The name does not end in .png, or its folder does not exist.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise InputError(f"{path}: expected a name that ends in .png, in a folder that exists", remedy=_NAME)
    if importlib.util.find_spec("matplotlib") is None:
        raise _missing()


def _missing() -> MissingDependencyError:
    return MissingDependencyError("drawing needs matplotlib, which is not installed", remedy=say_install("plot"))

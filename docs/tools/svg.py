"""Parts of pictures as SVG, in the colours of a light and of a dark page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, slots=True)
class Colours:
    """Of one picture: as CSS says them."""

    ink: str
    quiet: str
    line: str
    fill: str
    accent: str
    good: str
    good_fill: str


LIGHT = Colours("#1f2328", "#59636e", "#8c959f", "#f6f8fa", "#0969da", "#1a7f37", "#dafbe1")
DARK = Colours("#f0f6fc", "#a5adb8", "#6e7681", "#1c222b", "#58a6ff", "#3fb950", "#12361f")


def make_svg(width: float, height: float, body: Iterable[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    return "\n".join(
        [f'{head} height="{height:g}" role="img" font-family="{FONT}">', f"<title>{title}</title>", *body, "</svg>", ""]
    )


def make_box(x: float, y: float, width: float, height: float, colours: Colours, *, accent: bool = False) -> str:
    stroke = colours.accent if accent else colours.line
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="7" fill="{colours.fill}" stroke="{stroke}" stroke-width="1.5"/>'


def make_text(
    x: float, y: float, text: str, size: int, fill: str, *, bold: bool = False, anchor: str = "middle"
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}"{weight}>{escape(text)}</text>'


def make_arrow(start: tuple[float, float], end: tuple[float, float], colours: Colours) -> str:
    (x, y), (to_x, to_y) = start, end
    head = "l-8 -5v10z" if y == to_y else "l-5 -8h10z"
    line = f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{colours.line}" stroke-width="1.8"/>'
    return f'{line}<path d="M{to_x:g} {to_y:g}{head}" fill="{colours.line}"/>'


def make_bars(rows: Sequence[tuple[str, float, bool]], unit: str, colours: Colours) -> str:
    """Horizontal bars from zero, one a row: its label, its value, whether it is ours.

    Args:
        rows: From top to bottom.
        unit: What the numbers are; the title.
        colours: Of the page.
    """
    left, room, step = 230, 400, 30
    most = max(value for _, value, _ in rows)
    body = [make_text(4, 20, unit, 15, colours.ink, bold=True, anchor="start")]
    for index, (label, value, ours) in enumerate(rows):
        y = 34 + step * index
        fill, width = colours.accent if ours else colours.line, max(room * value / most, 1)
        body.append(make_text(left - 10, y + 15, label, 14, colours.ink, anchor="end"))
        body.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="20" rx="2" fill="{fill}"/>')
        body.append(
            make_text(
                left + width + 8,
                y + 15,
                f"{value:.{0 if most > 99 else 1}f}",
                14,
                colours.ink,
                bold=ours,
                anchor="start",
            )
        )
    return make_svg(left + room + 60, 40 + step * len(rows), body, unit)

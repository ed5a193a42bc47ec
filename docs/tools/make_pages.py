"""Writes the pages of the site as plain Markdown, from which any builder can make HTML.

    python -m docs.tools.make_pages            # or: make docs

Copies docs/ into build/pages/ and puts in what other files say: a page for each command, the API from docstrings,
tables of measured figures, JSON Schemas of the artifacts, folders' own READMEs, formulas as drawings. Nothing of this
is done by the site's builder.
"""

from __future__ import annotations

import argparse
import html
import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import api_pages, command_pages, figure_tables, json_schemas

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# READMEs of folders that are pages of the site, too.
FOLDERS = {"service.md": "examples/service/README.md", "containers.md": "docker/README.md"}
ASSETS = ("images", "schemas", "stylesheets", "javascripts")

_CODE = re.compile(r"^(?P<fence>`{3,}).*?^(?P=fence)$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
_FORMULA = re.compile(
    r"^\$\$\n(?P<display>.+?)\n\$\$$|(?<![\w$])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])", re.M | re.S
)
_LINK = re.compile(r"(?P<open>\[(?P<text>[^\]]*)\])\((?P<target>(?!https?:|#)[^)#\s]*)(?P<rest>#[^)\s]*)?\)")
_NOTE = re.compile(r"^<!-- (?:not run|needs)\b[^>]*-->\n", re.M)
_TABLE = re.compile(r"^<!-- figures: (\w+) -->$", re.M)
_CHART = re.compile(r"^<!-- chart: (\w+) -->$", re.M)
_COMMANDS = re.compile(r"^<!-- commands -->$", re.M)
_SCHEMAS = re.compile(r"^<!-- schemas -->$", re.M)
_VIEW = re.compile(r'viewBox="([^"]+)"')
_UNITS_PER_EM = 24


def main() -> int:
    """Writes all pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "pages", metavar="FOLDER")
    out: Path = parser.parse_args().out
    if out.exists():
        shutil.rmtree(out)
    for name in ASSETS:
        shutil.copytree(DOCS / name, out / name)
    for name, picture in figure_tables.draw_charts().items():
        (out / "images" / name).write_text(picture, encoding="utf-8")
    for name, schema in json_schemas.write_schemas().items():
        (out / "schemas" / name).write_text(schema, encoding="utf-8")
    pages = read_pages()
    names = api_pages.find_names({page: text for page, (_, text) in pages.items()}) | command_pages.find_pages()
    for page, (source, text) in pages.items():
        target = out / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(finish(page, source, text, names), encoding="utf-8")
    return 0


def read_pages() -> dict[str, tuple[str, str]]:
    """By the page's path below the site: the file it comes from, below the repository, and its Markdown."""
    sources = {path.relative_to(DOCS).as_posix(): path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    pages = {
        page: (source, (ROOT / source).read_text(encoding="utf-8")) for page, source in (sources | FOLDERS).items()
    }
    for page, text in command_pages.make_pages().items():
        pages[page] = (f"docs/{page}", text)
    return pages


def finish(page: str, source: str, text: str, names: dict[str, str]) -> str:
    """A page as it goes to the builder.

    Args:
        page: Its path below the site.
        source: The file that it comes from, below the repository.
        text: That file's Markdown.
        names: What code in the text may name: page and anchor by name of a class, function or command.
    """
    text = _NOTE.sub("", text)
    text = _TABLE.sub(lambda found: figure_tables.make_table(found[1]), text)
    text = _CHART.sub(lambda found: figure_tables.show_chart(found[1]), text)
    text = _COMMANDS.sub(lambda _: command_pages.make_list(), text)
    text = _SCHEMAS.sub(lambda _: json_schemas.make_list(), text)
    text = _LINK.sub(lambda found: move_link(found, page, source), text)
    text = api_pages.insert(text, page, names)
    text = _outside_code(
        text,
        lambda part: _FORMULA.sub(
            lambda found: draw_formula(found["display"] or found["inline"], display=bool(found["display"])), part
        ),
        lambda span: mark_span(span, page, names),
    )
    return text


def _outside_code(text: str, prose: Callable[[str], str], span: Callable[[str], str]) -> str:
    """Applies `prose` to what is no code, `span` to inline code; blocks stay as they are."""
    parts, end = [], 0
    for found in _CODE.finditer(text):
        parts.append(prose(text[end : found.start()]))
        linked = text[found.end() : found.end() + 1] == "{" or text[found.end() : found.end() + 2] == "]("
        parts.append(found[0] if found["fence"] or linked else span(found[0]))
        end = found.end()
    return "".join([*parts, prose(text[end:])])


def mark_span(span: str, page: str, names: dict[str, str]) -> str:
    """Options are marked, so that no line breaks inside one; names that the API documents become links."""
    code = span.strip("`")
    if re.fullmatch(r"--?[a-z][^`]{,28}", code):
        return f"{span}{{ .option }}"
    target = names.get(code) if re.search(r"[A-Z_ -]", code) else None  # `compare` may be a command, a function, a word
    if target is None or target.partition("#")[0] == page:
        return span
    return f"[{span}]({_relative(target, page)})"


def move_link(found: re.Match[str], page: str, source: str) -> str:
    """A link between files of the repository as one between pages; what the site does not have keeps its text only."""
    target = os.path.normpath(os.path.join(os.path.dirname(source), found["target"]))
    homes = {place: name for name, readme in FOLDERS.items() for place in (readme, os.path.dirname(readme))}
    if target in homes:
        home = homes[target]
    elif target.startswith("docs/"):
        home = target.removeprefix("docs/")
    else:
        return found["text"]
    return f"{found['open']}({_relative(home, page)}{found['rest'] or ''})"


def _relative(target: str, page: str) -> str:
    return os.path.relpath(target, os.path.dirname(page) or ".")


def draw_formula(latex: str, *, display: bool) -> str:
    """LaTeX as an SVG of outlines, which looks the same everywhere and needs neither a script nor a font."""
    ziamath: Any = importlib.import_module("ziamath")

    ziamath.config.precision, ziamath.config.svg2 = 2, False
    formula = ziamath.Math.fromlatex(
        " ".join(latex.split()), size=_UNITS_PER_EM, inline=not display, color="currentColor"
    )
    picture: str = formula.svg()
    found = _VIEW.search(picture)
    assert found is not None
    _, top, width, height = (float(number) / _UNITS_PER_EM for number in found[1].split())
    style = f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-top - height:.3f}em"  # the baseline lies at 0
    label = html.escape(" ".join(latex.split()))
    drawn = f'<svg role="img" aria-label="{label}" style="{style}" {picture.removeprefix("<svg ")}'
    drawn = " ".join(drawn.split())
    return f'<div class="formula">{drawn}</div>' if display else f'<span class="formula">{drawn}</span>'


if __name__ == "__main__":
    sys.exit(main())

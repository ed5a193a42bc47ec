"""What the site of docs/ needs beyond Markdown: drawn formulas, current `--help` texts, nothing from the network."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from repvgg_deploy import errors

PROGRAMS = {"repvgg-export": "repvgg_deploy.cli.export", "repvgg-trt": "repvgg_deploy.cli.trt"}
_HELP = re.compile(r"^<!-- help: (?P<program>[\w-]+)(?: (?P<command>\w+))? -->$", re.M)
_SECTION = re.compile(r"^<!-- README: (.+) -->$", re.M)
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S)
_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\((?:\.\./)+[^)]*\)")
_VIEW = re.compile(r'viewBox="([^"]+)"')
_ERROR = re.compile(
    f"<code>({'|'.join(kind for kind, value in vars(errors).items() if isinstance(value, type))})</code>"
)
_OPTION = re.compile(r"<code>(?=--?[a-z][^<]{,28}</code>)")
_SHIM = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim">')
_UNITS_PER_EM = 24
_COMMENT = re.compile(r"^<!-- (?:not run|needs)\b[^>]*-->\n", re.M)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Inserts help texts and sections of the README; removes links that leave docs/, and comments for tests."""
    del config, files
    base = os.path.dirname(page.file.src_uri)
    markdown = _SECTION.sub(lambda found: readme_section(found[1]), markdown)
    markdown = _HELP.sub(lambda found: f"```text\n{help_text(found['program'], found['command'])}```", markdown)
    outside = _OUTSIDE.sub(lambda found: found["text"] if leaves_docs(base, found[0]) else found[0], markdown)
    return _COMMENT.sub("", outside)


def on_page_content(content: str, *, page: Any, config: Any, files: Any) -> str:
    """Draws formulas, marks options so that no line breaks inside one, and links names of errors to their page."""
    del config, files
    content = _FORMULA.sub(
        lambda found: draw_formula(html.unescape(found["latex"]), display=found["open"] == "["), content
    )
    home = os.path.relpath("api/errors.html", os.path.dirname(page.url) or ".")
    content = _OPTION.sub(r'<code class="option">', content)
    return _ERROR.sub(lambda found: f'<a href="{home}#repvgg_deploy.errors.{found[1]}">{found[0]}</a>', content)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Replaces the theme's script for searching pages from the disk, which would come from the network, by our own."""
    del config
    up = "../" * page.url.count("/")
    return _SHIM.sub(f'<script src="{up}javascripts/worker-from-disk.js">', output)


def on_post_template(output_content: str, *, template_name: str, config: Any) -> str:
    """The same for the page of error 404, whose links begin at the site's root."""
    del template_name, config
    return _SHIM.sub('<script src="/javascripts/worker-from-disk.js">', output_content)


def leaves_docs(base: str, link: str) -> bool:
    """Whether a relative Markdown link, written in the folder `base` of docs/, leads out of docs/."""
    target = link.rpartition("(")[2].rstrip(")")
    return os.path.normpath(os.path.join(base, target)).startswith("..")


def readme_section(title: str) -> str:
    """One section of the README, with its links as they are from a page of docs/."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert section, f"the README has no section {title}"
    return f"## {title}\n{section}".replace("](docs/", "](")


def help_text(program: str, command: str | None) -> str:
    """What `program [command] --help` prints in 80 columns: wider lines would not fit beside the table of contents."""
    line = [sys.executable, "-m", PROGRAMS[program], *([command] if command else []), "--help"]
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stdout


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
    drawn = f'<svg role="img" aria-label="{html.escape(latex.strip())}" style="{style}" {picture.removeprefix("<svg ")}'
    return f'<div class="formula">{drawn}</div>' if display else f'<span class="formula">{drawn}</span>'

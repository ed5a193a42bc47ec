"""The site of docs/: it builds without a warning, is whole, needs no network, and draws the weights of the sample."""

from __future__ import annotations

import argparse
import html
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

import repvgg_deploy
from repvgg_deploy import errors
from repvgg_deploy.cli import export, trt
from tests.contract.source_tree import ROOT, modules, references

DOCS = ROOT / "docs"
COMMANDS = {"export": export.build_parser()} | {
    f"trt-{name}": parser
    for action in trt.build_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
    for name, parser in action.choices.items()
}
needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("material", "griffe", "ziamath")),
    reason="the extra docs is not installed",
)


class Page(HTMLParser):
    """What a page links to, what it loads by itself, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values or (tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect")):
            self.loads.append(values.get("src") or values["href"])


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "MPLBACKEND": "Agg"}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` does, elsewhere: the script writes Markdown, and the builder needs nothing but that."""
    folder = tmp_path_factory.mktemp("docs")
    run(["docs.tools.make_pages", "--out", str(folder / "build" / "pages")], ROOT)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    result = run(["mkdocs", "build", "--strict"], folder)
    assert "WARNING" not in result.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if path.name != "404.html"
    }


@needs_mkdocs
def test_site_has_a_page_for_every_document_and_each_is_in_the_navigation(pages: dict[Path, Page], site: Path) -> None:
    written = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    commands = {Path("commands", f"{name}.html") for name in COMMANDS}
    expected = {site / path for path in written | commands | {Path("service.html"), Path("containers.html")}}
    assert len(expected) > 30
    assert set(pages) == expected
    for path in expected - {site / "index.html"}:  # the home page shows a link to every other one
        assert path.relative_to(site).as_posix() in pages[site / "index.html"].links, path


@needs_mkdocs
def test_every_link_of_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 200


@needs_mkdocs
def test_site_loads_nothing_from_the_network(pages: dict[Path, Page], site: Path) -> None:
    for path, page in pages.items():
        assert [load for load in page.loads if urlsplit(load).scheme or load.startswith("//")] == [], path.name
        assert all((path.parent / unquote(urlsplit(load).path)).exists() for load in page.loads), path.name
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"@import|url\([\"']?(?:https?:)?//", text) for text in styles)


@needs_mkdocs
def test_page_for_what_is_not_there_loads_nothing_from_the_network(site: Path) -> None:
    page = Page((site / "404.html").read_text(encoding="utf-8"))
    assert page.loads and [load for load in page.loads if urlsplit(load).scheme or load.startswith("//")] == []
    assert all((site / urlsplit(load).path.lstrip("/")).exists() for load in page.loads)


@needs_mkdocs
def test_what_a_function_returns_is_one_item(site: Path) -> None:
    # A colon in a continued line was taken for the beginning of another value.
    engine = (site / "api" / "engine.html").read_text(encoding="utf-8")
    sections = re.findall(r"<p>Returns:</p>(.*?)</ul>", engine, re.S)
    assert len(sections) > 5
    assert [text for text in sections if text.count("<li") != 1] == []


@needs_mkdocs
def test_options_are_not_broken_between_their_dashes(site: Path) -> None:
    text = (site / "commands.html").read_text(encoding="utf-8")
    assert '<code class="option">--force</code>' in text and "<code>--" not in text


@needs_mkdocs
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_page_has_an_anchor_for_every_option_and_the_words_of_its_help(name: str, site: Path) -> None:
    text = (site / "commands" / f"{name}.html").read_text(encoding="utf-8")
    words = " ".join(html.unescape(re.sub("<[^>]+>", "", text)).split())
    parser, anchors = COMMANDS[name], Page(text).anchors
    checked = 0
    for action in parser._actions:
        for option in action.option_strings[-1:]:
            assert option.lstrip("-") in anchors
            assert option in words
        said = (action.help or "").partition("%(")[0].partition("(")[0].split()
        assert " ".join(said[1:]) in words, action.dest  # the first word has a capital letter
        checked += 1
    assert checked > 3
    assert " ".join((parser.description or "").split()) in words


@needs_mkdocs
def test_pages_are_plain_markdown_that_any_builder_takes(site: Path) -> None:
    for path in (site.parent / "build" / "pages").rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^:::|<!-- (?:not run|needs|figures|chart|commands)|^\$\$", text, re.M), path.name
    assert "hooks" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@needs_mkdocs
def test_measured_figures_name_their_command_and_processor(site: Path) -> None:
    pages = site.parent / "build" / "pages"
    text = (pages / "figures.md").read_text(encoding="utf-8")
    named = re.findall(
        r"^\*Measured by\* `python benchmarks/(\w+)\.py` \*on (.+)\.\*$",
        "\n".join(path.read_text(encoding="utf-8") for path in pages.glob("*.md")),
        re.M,
    )
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")} - {"long"}
    assert {program for program, _ in named} == {name for name in results if not name.startswith("gpu")}
    assert all((ROOT / "benchmarks" / f"{program}.py").exists() and machine for program, machine in named)
    assert "| 85.65 | 99.5 |" in text  # a row of the file, as it was measured
    for picture in ("chart-int8-light.svg", "chart-int8-dark.svg", "chart-runtime-light.svg", "chart-runtime-dark.svg"):
        assert f"images/{picture}" in text
        assert "<text" in (site / "images" / picture).read_text(encoding="utf-8")


@needs_mkdocs
def test_reference_has_every_public_name_and_every_error(pages: dict[Path, Page], site: Path) -> None:
    anchors = {anchor for path, page in pages.items() if path.parent == site / "api" for anchor in page.anchors}
    assert [
        name for name in repvgg_deploy.__all__ if f"repvgg_deploy.{name}" not in anchors and name != "RepVGGDeployError"
    ] == []
    kinds = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.RepVGGDeployError)
    ]
    assert len(kinds) > 15
    assert [name for name in kinds if f"repvgg_deploy.errors.{name}" not in anchors] == []


# Of what the programs call: parts of their own checks and output.
HELPERS = {
    "answer_images",
    "as_path",
    "classes_of",
    "count_steps",
    "examine",
    "expand",
    "first_below",
    "imagenet_labels",
    "is_plan",
    "load_metric",
    "look_for_gpu",
    "look_up_gpu",
    "plan_answers",
    "read_labels",
    "read_model",
    "require_drawable",
    "require_free",
    "require_like",
    "run_pairs",
    "save_figure",
    "score",
    "stream_images",
}
STAGES = {"build", "evaluate", "export", "graph", "images", "measure", "precision", "runtime", "serving"}


@needs_mkdocs
def test_reference_has_what_the_programs_call_and_what_rooms_offer(pages: dict[Path, Page], site: Path) -> None:
    """What `repvgg-trt` and `repvgg-export` do, a program of a user's can do, too, and reads here how."""
    anchors = {anchor for path, page in pages.items() if path.parent == site / "api" for anchor in page.anchors}
    documented = {anchor.rpartition(".")[2] for anchor in anchors if anchor.startswith("repvgg_deploy.")}
    called: set[str] = set()
    for module in modules():
        for name, _ in references(module) if module.layer == "cli" else ():
            home, _, last = name.rpartition(".")
            of_a_stage = home.startswith("repvgg_deploy.") and home.split(".")[1] in STAGES
            if of_a_stage and inspect.isroutine(getattr(importlib.import_module(home), last, None)):
                called.add(last)
    assert {"write_triton", "validate_repository", "run_benchmark", "advise", "evaluate", "check_plan"} <= called
    assert called - documented == HELPERS
    for room in STAGES:
        face = importlib.import_module(f"repvgg_deploy.{room}")
        offered = {name for name in face.__getattr__("__all__") if callable(getattr(face, name))}
        assert offered - documented == set(), room


@needs_mkdocs
def test_formulas_are_drawn(site: Path) -> None:
    formulas = (site / "reparameterization.html").read_text(encoding="utf-8")
    assert formulas.count('class="formula"') > 20
    assert "$" not in html.unescape(re.sub(r"<(script|pre|svg).*?</\1>|<[^>]+>", "", formulas, flags=re.S))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pictures")
    return folder, run(["docs.tools.draw_reparameterization", "--out", str(folder)], ROOT).stdout


@pytest.mark.parametrize("look", ["light", "dark"])
def test_picture_of_the_block_is_that_of_the_sample(look: str, drawn: tuple[Path, str]) -> None:
    image = pytest.importorskip("PIL.Image")
    again, committed = (
        np.asarray(image.open(folder / f"reparameterization-{look}.png").convert("RGB"), np.float64)
        for folder in (drawn[0], DOCS / "images")
    )
    assert again.shape == committed.shape
    # Of 255. Another processor gives other last digits in three numbers, another matplotlib other edges of letters;
    # other weights give other panels.
    assert np.abs(again - committed).mean() < 2.0


def test_pictures_of_the_way_and_of_the_rooms_are_those_that_the_script_draws(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    run(["docs.tools.draw_pictures", "--out", str(tmp_path)], ROOT)
    names = ["flow-dark.svg", "flow-light.svg", "rooms-dark.svg", "rooms-light.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        again, committed = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, DOCS / "images"))
        percent = re.compile(r">(\d+) %<")
        assert percent.sub("", again) == percent.sub("", committed), name
        # Another processor may round a probability to the next percent.
        pairs = zip(percent.findall(again), percent.findall(committed), strict=True)
        assert all(abs(int(one) - int(other)) <= 1 for one, other in pairs)
    digits = re.findall(r'font-size="21"[^>]*>(\d)<', (DOCS / "images" / "flow-light.svg").read_text(encoding="utf-8"))
    assert digits == list("0123456789")


def test_drawing_of_the_rooms_has_the_order_of_the_imports() -> None:
    pytest.importorskip("torch")  # which the drawing of the predictions needs
    from docs.tools.draw_pictures import ROOMS
    from tests.contract.test_imports import ROOMS as RANKS

    drawn_rooms = [name for row in ROOMS for name, _ in row]
    assert sorted(drawn_rooms) == sorted(RANKS)
    place = {name: row for row, rooms in enumerate(ROOMS) for name, _ in rooms}
    for one in RANKS:
        for other in RANKS:
            assert RANKS[one] >= RANKS[other] or place[one] < place[other], (one, other)


def test_errors_in_the_text_are_those_that_are_measured(drawn: tuple[Path, str]) -> None:
    measured = [float(number) for number in re.findall(r"\d\.\de-\d+", drawn[1])]
    text = (DOCS / "reparameterization.md").read_text(encoding="utf-8")
    written = [float(number) for number in re.findall(r"^\| .* \| (\d\.\de-\d+) \|$", text, re.M)]
    assert len(measured) == len(written) == 3
    # Rounding errors depend on the processor's order of sums; the order of magnitude does not.
    assert all(0.1 < one / other < 10 for one, other in zip(measured, written, strict=True))

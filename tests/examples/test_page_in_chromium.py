"""The page of REPVGG_PAGES=1 in a real Chromium: what a person sees, types and hears."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import onnxruntime
import prometheus_client
import pytest

pytest.importorskip("playwright", reason="playwright, of the extra dev, is not installed")

from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from examples.service.pages import KINDS
from tests.examples.running_service import RunningService, serve
from tests.waiting import PATIENCE_SECONDS

NEEDED = (fastapi, onnxruntime, prometheus_client)  # imported, so that without one this file is left out and named
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
]
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
MAX_BODY_BYTES = 50_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # As root, as in a container, its sandbox cannot be made.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=PROGRAM, args=arguments)


@pytest.fixture(scope="module")
def service(exported_sample: Path) -> Iterator[RunningService]:
    with serve(exported_sample, pages=1, max_body_bytes=MAX_BODY_BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def photo(sample_dir: Path) -> Path:
    return sample_dir / "images/digit-3.png"


@contextlib.contextmanager
def opened(browser: Browser, service: RunningService, **options: Any) -> Iterator[Page]:
    """The page, in a window of its own; at the end it has logged no error and asked nobody else."""
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        expect.set_options(timeout=PATIENCE_SECONDS * 1000)
        errors: list[str] = []
        asked: list[str] = []
        page.on("filechooser", lambda _: None)  # from now on, no window of the system opens
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{service.port}/")
        yield page
        # Chromium itself logs that an answer was no 200.
        assert [error for error in errors if not error.startswith("Failed to load resource: ")] == []
        ours = {f"http://127.0.0.1:{service.port}/{name}" for name in ("", "predict", *KINDS)}
        assert {url for url in asked if not url.startswith("blob:")} <= ours


@pytest.fixture
def page(browser: Browser, service: RunningService) -> Iterator[Page]:
    with opened(browser, service, **DESKTOP) as page:
        yield page


def give(page: Page, event: str, files: dict[str, bytes]) -> None:
    """Drops or pastes files, or nothing."""
    page.evaluate(
        """([event, files]) => {
            const data = new DataTransfer();
            for (const [name, content] of Object.entries(files))
                data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
            const kind = event === "paste" ? ClipboardEvent : DragEvent;
            const given = event === "paste" ? { clipboardData: data } : { dataTransfer: data };
            document.querySelector("h1").dispatchEvent(new kind(event, { bubbles: true, cancelable: true, ...given }));
        }""",
        [event, {name: base64.b64encode(content).decode() for name, content in files.items()}],
    )


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_image_chosen_by_keyboard_shows_its_five_best_classes_as_bars(
    device: dict[str, Any], scheme: str, browser: Browser, service: RunningService, photo: Path
) -> None:
    expected = service.ask("POST", "/predict", photo.read_bytes()).json["predictions"]
    with opened(browser, service, color_scheme=scheme, **device) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        assert page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(photo)
        rows = page.get_by_role("listitem")
        expect(rows).to_have_count(5)
        shown = [row.inner_text().split("\n") for row in rows.all()]
        assert shown == [[one["label"], f"{100 * one['score']:.1f} %"] for one in expected]
        track = page.locator(".track").first.bounding_box()
        widths = [bar.bounding_box()["width"] for bar in page.locator(".bar").all()]
        # Half a pixel, by which a browser rounds; and no bar is narrower than two.
        assert widths == pytest.approx([max(2, one["score"] * track["width"]) for one in expected], abs=0.5)
        assert re.fullmatch(r"Best: 3, [\d.]+ %\. Answered in \d+ ms", page.get_by_role("status").text_content() or "")
        preview = page.get_by_alt_text("The chosen image, digit-3.png")
        assert preview.is_visible() and preview.evaluate("image => image.naturalWidth") > 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        side_by_side = page.locator("section").nth(1).bounding_box()["x"] > page.locator("#drop").bounding_box()["x"]
        assert side_by_side == (device is DESKTOP)
        assert page.locator("section").nth(1).bounding_box()["y"] >= 0
        assert least_contrast(page) >= 4.5  # WCAG 2, level AA
        assert (brightness(page) > 0.5) == (scheme == "light")


CONTRAST = """() => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const color = parse(getComputedStyle(element).backgroundColor);
            if (color.length === 3) return light(color);
        }
        return 1;
    };
    const texts = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
        && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return texts.map((element) => {
        const both = [light(parse(getComputedStyle(element).color)), behind(element)].sort((a, b) => b - a);
        return (both[0] + 0.05) / (both[1] + 0.05);
    });
}"""


def least_contrast(page: Page) -> float:
    """Of all texts with what is behind them. Source: WCAG 2.2, contrast ratio and relative luminance."""
    found: list[float] = page.evaluate(CONTRAST)
    assert len(found) > 8
    return min(found)


def brightness(page: Page) -> float:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 765


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_image_may_be_dropped_or_pasted_anywhere(event: str, page: Page, photo: Path) -> None:
    give(page, event, {"a.png": photo.read_bytes()})
    expect(page.get_by_role("status")).to_contain_text("Best: 3, ")
    give(page, event, {})
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"is no file\. Take a JPEG, PNG or WebP image\.$"))
    expect(page.get_by_role("listitem")).to_have_count(0)


def test_screen_reader_hears_what_each_part_is(page: Page, photo: Path) -> None:
    def names(role: str) -> list[str]:
        tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        mine = [node for node in tree if node.get("role", {}).get("value") == role and not node["ignored"]]
        return [
            f"{node['name']['value']} ({node['description']['value']})"
            if node.get("description", {}).get("value")
            else node["name"]["value"]
            for node in mine
        ]

    assert names("button") == ["Choose an image (JPEG, PNG or WebP, up to 48.8 kB)"]
    assert names("heading") == ["What is in the image?", "Best classes"]
    assert names("region") == ["Image", "Best classes"]
    live = {id_: page.locator(f"#{id_}").get_attribute("role") for id_ in ("status", "failure")}
    assert live == {"status": "status", "failure": "alert"}  # read out when they change
    page.set_input_files("#file", photo)
    expect(page.get_by_role("listitem")).to_have_count(5)
    assert names("button") == ["Choose another image (JPEG, PNG or WebP, up to 48.8 kB)"]
    assert names("image") == ["The chosen image, digit-3.png"]
    assert page.locator("html").get_attribute("lang") == "en" and "sample" in page.title()


def test_what_the_service_refuses_is_said_in_words(page: Page) -> None:
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"nonsense"})
    expect(page.get_by_role("alert")).to_contain_text("not an image")
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()  # it would be refused again
    assert least_contrast(page) >= 4.5
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    large = {"name": "x.png", "mimeType": "image/png", "buffer": bytes(2 << 20)}
    page.set_input_files("#file", large)
    expect(page.get_by_role("alert")).to_have_text("The file has 2.0 MB, and this service takes 48.8 kB at most.")
    assert "POST" not in sent


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 503, "body": '{"error": "the queue is full; try again"}'}, "The queue is full; try again."),
        ({"status": 502, "body": "<html><b>Bad gateway</b>"}, "The service answered with status 502."),
        (None, "No answer came: the service may have stopped, or the network is gone."),
    ],
)
def test_service_that_is_busy_or_gone_can_be_asked_again(
    answer: dict[str, Any] | None, said: str, page: Page, photo: Path
) -> None:
    def refuse(route: Route) -> None:
        if answer is None:
            route.abort()
        else:
            route.fulfill(**answer)

    page.route("**/predict", refuse)
    page.set_input_files("#file", photo)
    expect(page.get_by_role("alert")).to_have_text(said)
    page.unroute("**/predict")
    page.get_by_role("button", name="Try again").press("Enter")
    expect(page.get_by_role("listitem")).to_have_count(5)
    expect(page.get_by_role("alert")).to_be_empty()
    assert page.evaluate("document.activeElement.id") == "file"  # and not lost with the button


def test_names_are_shown_as_text_and_scores_of_any_kind(page: Page, photo: Path) -> None:
    predictions = [
        {"class": 4, "label": '<img src=x onerror="document.title=1">', "score": 12.5},
        {"class": 2, "label": None, "score": -3.25},
    ]
    page.route("**/predict", lambda route: route.fulfill(body=json.dumps({"model": "m", "predictions": predictions})))
    title = page.title()
    page.set_input_files("#file", {"name": "<b>.png", "mimeType": "image/png", "buffer": photo.read_bytes()})
    expect(page.get_by_role("listitem")).to_have_count(2)
    assert [name.inner_text() for name in page.locator(".name").all()] == [predictions[0]["label"], "Class 2"]
    assert [score.inner_text() for score in page.locator(".score").all()] == ["12.50", "-3.250"]
    assert page.locator("#classes img").count() == 0 and page.title() == title
    assert page.locator("#preview").get_attribute("alt") == "The chosen image, <b>.png"


def test_answer_to_an_earlier_image_does_not_take_the_place_of_the_later_ones(page: Page, photo: Path) -> None:
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/predict", hold_the_first)
    with page.expect_request("**/predict"):
        page.set_input_files("#file", photo)
    page.set_input_files("#file", photo)
    expect(page.get_by_role("listitem")).to_have_count(5)
    with contextlib.suppress(Exception):  # the page has given it up
        held[0].fulfill(status=500, body="{}")
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.get_by_role("status")).to_contain_text("Best: 3, ")

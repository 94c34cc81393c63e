"""The page of ``ezpz-moe plot`` in a real browser: what it loads, what is seen, and how large.

Needs a Chromium. Without one the short check says so and goes on; `make test-all` fails.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from telemetry_cases import run

from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.telemetry.plot import plot

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
ABSENT = f"needs a browser: none of {', '.join(NAMES)} is on the PATH (apt-get install chromium)"
# It asks nobody for anything. In a container it has no sandbox, and it opens only our own file.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PICTURES = {
    "Load at the end",
    "Load over the steps",
    "Imbalance over the steps",
    "Loss against balance",
    "Balance losses",
}
PANELS = "Load over the steps"  # a picture for each layer
SECTIONS = {"Alerts", "Over the layers", *PICTURES, "Layer by layer, steps 201 to 220"}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """The page of a run with every picture, an alert and names that are long."""
    folder = tmp_path_factory.mktemp("run")
    for each in run(layers=5, experts=8, steps=220, every=20, dead=1):
        told = {
            "time": datetime(2026, 12, 1, tzinfo=UTC),
            "model": "debugmodel_sdpa_for_loop",
            "job": "/scratch/" + "a_long_name_without_a_space" * 5 + "/job.toml",
        }
        append(folder / "telemetry.jsonl", replace(each, **told))
    return plot(folder).paths[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(ABSENT)  # here, so that all of them are one line of the summary
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Shown:
    """The page on a screen, and what happened while it was loaded."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str) -> None:
        self.said: list[str] = []
        self.requested: list[str] = []
        screen = {"width": width, "height": 900}
        self.page = browser.new_page(viewport=screen, color_scheme=scheme, offline=True)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(file.as_uri())

    def of_all(self, selector: str, expression: str) -> list[Any]:
        """The value of a JavaScript expression of each element ``e``."""
        program = f"all => all.map(e => {{ const s = getComputedStyle(e); return {expression} }})"
        return self.page.eval_on_selector_all(selector, program)


@pytest.fixture(
    scope="module",
    params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")],
    ids=lambda it: f"{it[0]}-{it[1]}",
)
def shown(browser, page_file, request) -> Iterator[Shown]:
    made = Shown(browser, page_file, *request.param)
    made.width, made.scheme = request.param
    yield made
    made.page.close()


def test_nothing_is_loaded_and_nothing_complains(shown: Shown, page_file: Path) -> None:
    embedded = [url for url in shown.requested if url.startswith("data:")]
    assert [url for url in shown.requested if url not in embedded] == [page_file.as_uri()]
    assert shown.said == []


def test_every_section_has_its_heading_and_its_picture(shown: Shown) -> None:
    assert len(shown.of_all("h1", "e.innerText")) == 1
    pictures = "[...e.querySelectorAll('img')]"
    of_section = dict(
        shown.of_all(
            "section",
            f"[e.querySelector('h2').innerText, {pictures}.map(i => i.complete * i.naturalWidth)]",
        )
    )
    assert of_section.keys() == SECTIONS
    panels = of_section.pop(PANELS)
    assert panels == [400] * 5
    drawn = {name for name, widths in of_section.items() if len(widths) == 1 and widths[0] > 400}
    assert drawn == PICTURES - {PANELS}
    is_dark = shown.of_all("picture", "e.children[0].srcset == e.children[1].currentSrc")
    assert is_dark == [shown.scheme == "dark"] * len(drawn)


def test_the_head_says_what_ran_and_when(shown: Shown) -> None:
    facts = dict(shown.of_all("header div", "e.innerText.split('\\n')"))
    assert facts["Model"] == "debugmodel_sdpa_for_loop"
    assert facts["Job"].endswith("/job.toml")
    assert facts["Trained"] == "2026-12-01 00:00 to 00:00 UTC"
    # Above what one has to scroll to.
    assert max(shown.of_all("dt", "e.getBoundingClientRect().top")) < 600


def test_it_fills_the_screen_and_only_pictures_and_tables_scroll(shown: Shown) -> None:
    assert shown.page.evaluate("document.documentElement.scrollWidth") == shown.width
    edges = shown.of_all("main, header", "[e.getBoundingClientRect().x, e.clientWidth]")
    assert all(x <= 32 and inner >= shown.width - 64 for x, inner in edges)
    assert set(shown.of_all(".wide", "s.overflowX")) == {"auto"}
    # None is over another.
    boxes = shown.of_all("section", "e.getBoundingClientRect().toJSON()")
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            apart = one["left"] >= other["right"] or one["top"] >= other["bottom"]
            assert apart or one["right"] <= other["left"]
    if shown.width == 1280:
        # The pictures over the steps fill it, and tables do not have to scroll.
        widest = max(shown.of_all(".wide img", "e.clientWidth"))
        assert widest > 0.9 * shown.width
        assert all(shown.of_all(".wide", "e.scrollWidth <= e.clientWidth"))


def test_words_are_large_enough_and_stand_out(shown: Shown) -> None:
    """10 pixels at least in pictures, where words have 10 points; 13 and 4.5 to 1 elsewhere."""
    scales = shown.of_all(".wide img", "e.clientWidth / e.naturalWidth")
    assert min(scales) * 10 * 96 / 72 >= 9.9  # pixels of 10 points at 96 dots per inch
    words = "h1, h2, h3, p, li, dt, dd, figcaption, th, td"
    assert min(shown.of_all(words, "parseFloat(s.fontSize)")) >= 13
    (paper,) = shown.of_all("body", "s.backgroundColor")
    assert (luminance(paper) < 0.05) == (shown.scheme == "dark")
    for ink in set(shown.of_all(words, "s.color")):
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) > 4.5


def test_panels_are_not_squeezed(shown: Shown) -> None:
    """Each expert has whole pixels, and a panel of a phone is as wide as the phone."""
    sizes = shown.of_all(".cells img", "[e.clientWidth, e.clientHeight, e.naturalHeight]")
    assert all(wide >= 270 and high == drawn for wide, high, drawn in sizes)
    if shown.width == 390:
        assert all(wide > 0.85 * shown.width for wide, _, _ in sizes)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(1, 2, 3)``, as WCAG 2 defines it."""
    channels = [int(channel) / 255 for channel in colour.removeprefix("rgb(")[:-1].split(",")]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.full
def test_there_is_a_browser_where_everything_is_tested() -> None:
    """The short check does without; whoever asks for everything gets no less."""
    assert CHROMIUM, ABSENT

"""The report in a real headless browser, where playwright and a Chromium are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import MethodEntry, ProblemEntry, Run, execute
from raybilevel._records import store as records

pytest.importorskip("plotly", reason="the extra `report` is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path, nor named by CHROMIUM")


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raybilevel.report._page import drawing, render, sections_of
    from raybilevel.report._sources import read_folder

    folder = tmp_path_factory.mktemp("comparison")
    problem = ProblemEntry(problem="ridge", options={"groups": 2})
    for method in ("default", "random"):
        for seed in (0, 1):
            run = Run("ridge-2", problem, method, MethodEntry(method=method), seed, 5.0, (3,), None)
            records.write(folder / run.path, execute(run))
    source = read_folder(folder)
    path = folder / "report.html"
    path.write_text(render(source, sections_of(source), drawing()), encoding="utf-8")
    return path


@pytest.fixture
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("look", ["desktop", "phone", "dark", "print"])
def test_the_page_works_offline_without_an_error(page_path: Path, browser: Any, look: str) -> None:
    size = {"width": 390, "height": 800} if look == "phone" else {"width": 1100, "height": 900}
    context = browser.new_context(viewport=size, color_scheme="dark" if look == "dark" else "light")
    context.set_offline(True)
    page = context.new_page()
    troubles: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_path.as_uri())
    page.wait_for_selector("#plot-ridge-2-cost .main-svg")
    assert [url for url in asked if url.startswith("http")] == []
    if look == "print":
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out
    unfolded = page.locator("section:not(#folded) .plot").count()
    assert unfolded >= 2
    assert page.locator("section:not(#folded) .plot .main-svg").count() >= unfolded
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert (ink == "rgb(230, 237, 243)") == (look == "dark")
    # A folded run is drawn when it is opened.
    first = page.locator("details").first
    assert first.locator(".main-svg").count() == 0
    if look != "print":
        first.locator("summary").click()
        first.locator(".main-svg").first.wait_for()
    assert troubles == []
    context.close()


def test_hover_shows_values_and_the_legend_hides_a_method(page_path: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(page_path.as_uri())
    plot = page.locator("#plot-ridge-2-cost")
    plot.locator(".main-svg").first.wait_for()
    plot.scroll_into_view_if_needed()
    # Where the first point of the first curve is, in the window.
    x, y = page.evaluate(
        """() => { const div = document.getElementById("plot-ridge-2-cost"), at = div.getBoundingClientRect();
                   const layout = div._fullLayout;
                   const trace = div._fullData.find(t => t.name === "default" && t.showlegend);
                   return [at.x + layout.xaxis._offset + layout.xaxis.d2p(trace.x[0]),
                           at.y + layout.yaxis._offset + layout.yaxis.d2p(trace.y[0])]; }"""
    )
    page.mouse.move(x - 5, y)
    page.mouse.move(x, y)
    plot.locator(".hovertext").first.wait_for()
    assert "default" in plot.locator(".hovertext").first.text_content()
    visible = "() => document.getElementById('plot-ridge-2-cost')._fullData.filter(t => t.visible === true).length"
    before = page.evaluate(visible)
    plot.locator(".legendtoggle").first.click()
    page.wait_for_function(f"({visible})() < {before}")
    page.close()

"""The page over a run, in a browser when there is one: hostile data stays text, filters work, nothing is fetched."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_run
import pytest
from PIL import Image
from typer.testing import CliRunner

from replan.cli import app
from replan.eval import browse
from replan.eval.data import Bench, DataConfig, Item, load_bench
from replan.eval.generate import read_run
from replan.eval.score import Cost, Kept, Scoring
from replan.judge import load_judge

EVIL = '</script><script>window.evil=1</script><img src=x onerror="window.evil=1">'


def evil_item() -> Item:
    picture = io.BytesIO()
    Image.new("RGB", (300, 200), "teal").save(picture, format="PNG")
    return Item(900, EVIL, EVIL, EVIL, EVIL, "", {}, picture.getvalue)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A page over one run and one over two, the second of which lacks items."""
    folder = tmp_path_factory.mktemp("browse")
    bench = load_bench(DataConfig(limit=5))
    everything = Bench((*bench.items, evil_item()), ())
    for name, items in (("base", everything.items), ("replan", everything.items[1:])):
        bench_run.run(folder / name, Bench(tuple(items), ()))
        scoring = Scoring.of(folder / name, everything, load_judge("mini"), Kept(folder / "cache"))
        list(scoring.run(1, Cost()))
        scoring.save(read_run(folder / name), Cost())
    browse.write(everything.items, [folder / "base"], folder / "one.html")
    browse.write(everything.items, [folder / "base", folder / "replan"], folder / "two.html")
    return folder / "one.html", folder / "two.html"


def test_self_contained_and_no_markup_from_data(pages: tuple[Path, Path]) -> None:
    for page in pages:
        text = page.read_text()
        assert len(re.findall(r"<script", text)) == 2  # the data and our own
        assert "<img" not in text.split('id="data">')[1]
        assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
        assert "default-src 'none'" in text
        data = json.loads(text.split('id="data">')[1].split("</script>")[0])
        assert data["items"][-1]["instruction"] == EVIL


def test_command(tmp_path: Path) -> None:
    bench_run.run(tmp_path / "run", load_bench(DataConfig(limit=3)))
    words = ["eval", "browse", str(tmp_path / "run"), "-o", str(tmp_path / "x.html"), "--limit", "2"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.strip() == str(tmp_path / "x.html")
    assert "final_result" not in (tmp_path / "x.html").read_text()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.problems = []
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and page.problems.append(request.url))
    yield page
    assert page.problems == []
    page.close()


def wait_until(page: Any, expression: str) -> None:
    """Until a JavaScript expression holds. Playwright's own wait evaluates strings, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{expression}: never held")


def test_page_in_a_browser(pages: tuple[Path, Path], open_page: Any) -> None:
    page = open_page
    page.goto(pages[1].as_uri())
    assert page.title() == "base against replan"
    assert page.locator("article").count() == 6
    assert page.evaluate("window.evil") is None
    assert page.locator("article h2").last.inner_text() == EVIL
    assert page.locator("article").first.get_by_text("not generated").count() == 1
    loaded = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    page.locator("article").last.scroll_into_view_if_needed()
    wait_until(page, loaded)
    # a box is where the plan says: 8..40 of 96 pixels
    frame = page.locator("article").nth(1).locator(".frame").nth(1).bounding_box()
    box = page.locator("article").nth(1).locator(".frame").nth(1).locator(".box").bounding_box()
    assert (box["x"] - frame["x"]) / frame["width"] == pytest.approx(8 / 96, abs=0.01)
    assert (box["width"]) / frame["width"] == pytest.approx(32 / 96, abs=0.01)
    page.locator("#boxes").uncheck()
    assert page.locator(".box:visible").count() == 0
    second = page.locator("article").nth(1)
    assert not second.get_by_text("made up").first.is_visible()
    second.get_by_text("Plan and reasoning").first.click()
    assert second.get_by_text("made up").first.is_visible()


def test_filters_in_a_browser(pages: tuple[Path, Path], open_page: Any) -> None:
    page = open_page
    page.goto(pages[0].as_uri())
    status = page.locator("#count")
    kinds = load_bench(DataConfig(limit=5)).items
    page.locator("#referring").select_option(kinds[0].referring)
    wanted = sum(item.referring == kinds[0].referring for item in kinds)
    assert status.inner_text() == f"{wanted} of 6 items"
    page.locator("button[type=reset]").click()
    wait_until(page, "document.getElementById('count').textContent.startsWith('6 of')")
    page.locator("#dimension").select_option("quality")
    page.locator("#low").select_option("2")
    assert status.inner_text() == "0 of 6 items"  # noise has quality 1, and the last item has no score
    page.locator("#low").select_option("1")
    page.locator("#high").select_option("1")
    assert status.inner_text() == "5 of 6 items"
    page.locator("button[type=reset]").click()
    page.locator("#words").fill("ONERROR")
    assert status.inner_text() == "1 of 6 items"
    assert page.locator("article .none").count() == 4  # unscored, by an exact judge of another world


def test_narrow_screen_has_no_sideways_scrolling(pages: tuple[Path, Path], open_page: Any) -> None:
    open_page.set_viewport_size({"width": 380, "height": 800})
    open_page.goto(pages[1].as_uri())
    assert open_page.evaluate("document.documentElement.scrollWidth") <= 380

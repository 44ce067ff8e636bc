"""A running demo on fake models, and pages of a real headless Chromium that may talk to nothing but it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeBackbone, FakePlanner

from replan.backbones import default_config
from replan.types import EditRequest, Plan

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ANSWER = "<think>I see two cups. The left one is meant.</think>"


class TalkingPlanner(FakePlanner):
    """Tells a reasoning piece by piece before its plan."""

    def stream(self, request: EditRequest, on_text: Callable[[str], bool | None]) -> Plan:
        for end in range(7, len(ANSWER) + 7, 7):
            time.sleep(0.03)
            if on_text(ANSWER[:end]) is False:
                break
        return self(request)


class PacedBackbone(FakeBackbone):
    """Takes `pause` seconds for each step and counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.pause, self.steps = 0.0, 0

    def velocity(self, cond: Any) -> Any:
        inner = super().velocity(cond)

        def paced(x: Any, sigma: Any) -> Any:
            self.steps += 1
            time.sleep(self.pause)
            return inner(x, sigma)

        return paced


@dataclass
class Demo:
    """A running app: where it is and what is behind it."""

    url: str
    backbone: PacedBackbone
    planner: TalkingPlanner
    folder: str = field(default="")


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install replan[demo]")
    from replan.demo.serve import Place, running
    from replan.demo.studio import Studio

    backbone, planner = PacedBackbone(), TalkingPlanner()
    studio = Studio({"mini": lambda: backbone}, {"mini": lambda: planner}, {"mini": default_config("mini")})
    studio.warm()
    with running(studio, Place(port=0)) as url:
        yield Demo(url, backbone, planner, os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture(autouse=True)
def _unpaced(request: pytest.FixtureRequest) -> None:
    if "demo" in request.fixturenames:
        request.getfixturevalue("demo").backbone.pause = 0.0


@dataclass
class Visitor:
    """One user's page, and what went wrong on it."""

    page: Page
    errors: list[str]
    outside: list[str]

    def pick(self, number: int = 0) -> Visitor:
        """Take an example of the gallery."""
        self.page.locator("#examples button").nth(number).click()
        self.page.wait_for_selector(".bx[data-empty=false]")
        return self

    def notice(self, text: str, seconds: float = 20) -> str:
        """Wait until the notice holds a text; return all of it."""
        from playwright.sync_api import expect

        expect(self.page.locator("#notice")).to_contain_text(text, timeout=seconds * 1000)
        return self.page.locator("#notice").inner_text()

    def done(self, seconds: float = 30) -> str:
        """Wait for a finished edit."""
        self.page.wait_for_selector(".vw[data-state=done]", timeout=seconds * 1000)
        return self.notice("seed")

    def client(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the picture is on the screen."""
        script = """([x, y]) => { const m = document.querySelector('.bx-svg').getScreenCTM();
                    const p = new DOMPoint(x, y).matrixTransform(m); return [p.x, p.y]; }"""
        return tuple(self.page.evaluate(script, [x, y]))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one pixel of the picture, move in steps, release at another."""
        mouse = self.page.mouse
        mouse.move(*self.client(*start))
        mouse.down()
        mouse.move(*self.client(*((a + b) / 2 for a, b in zip(start, end, strict=True))))
        mouse.move(*self.client(*end))
        mouse.up()

    def regions(self) -> list[tuple[str, tuple[int, int, int, int]]]:
        """(hint, box) of each region, as a screen reader is told."""
        found = []
        for label in self.page.locator(".bx-box").evaluate_all("all => all.map((one) => one.ariaLabel)"):
            match = re.fullmatch(r"Region (\d+): (.*); left (\d+), top (\d+), (\d+) by (\d+) pixels", label, re.DOTALL)
            assert match, label
            left, top, width, height = map(int, match.groups()[2:])
            found.append((int(match[1]), match[2], (left, top, left + width, top + height)))
        return [(hint, box) for _, hint, box in sorted(found)]

    def shot(self, name: str) -> None:
        """Keep a screenshot when REPLAN_SHOTS names a folder."""
        if folder := os.environ.get("REPLAN_SHOTS"):
            self.page.screenshot(path=f"{folder}/{name}.png")


@pytest.fixture
def visit(browser: Browser, demo: Demo) -> Iterator[Callable[..., Visitor]]:
    """Open the page as a new user; at the end no page may have had an error or asked the network for anything."""
    contexts, visitors = [], []

    def open_page(width: int = 1440, height: int = 900, url: str | None = None, **more: Any) -> Visitor:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **more)
        page = context.new_page()
        page.set_default_timeout(20000)
        visitor = Visitor(page, [], [])
        page.on("pageerror", lambda error: visitor.errors.append(str(error)))
        local = ("http://127.0.0.1", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else visitor.outside.append(r.url))
        page.goto(url or demo.url)
        page.wait_for_selector("#canvas .bx")
        contexts.append(context)
        visitors.append(visitor)
        return visitor

    yield open_page
    for context in contexts:
        context.close()
    for visitor in visitors:
        assert visitor.errors == []
        assert visitor.outside == []


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Return as soon as a condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        threading.Event().wait(0.02)

"""One calm screen: sizes, both colour schemes, accessibility by axe, and the time to the first paint."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from visitors import Visitor

Visit = Callable[..., Visitor]


def busy_page(visit: Visit, **more: object) -> Visitor:
    """A page with a picture, two boxes, a plan and a result on it."""
    one = visit(**more).pick()
    one.page.click("#both")
    one.done()
    one.page.locator(".bx-svg").scroll_into_view_if_needed()
    one.drag((60, 60), (90, 90))
    return one


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_a_laptop_screen(visit: Visit, scheme: str) -> None:
    one = busy_page(visit, color_scheme=scheme)
    assert one.page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    for tab in ("Settings", "Attention", "History", "Plan file"):
        one.page.get_by_role("tab", name=tab).click()
        one.page.wait_for_timeout(150)
        one.shot(f"{scheme}_{tab.split()[0].lower()}")
        assert one.page.evaluate("document.documentElement.scrollHeight <= innerHeight")
        for column in ("left", "middle", "right"):
            hidden = f"(({{scrollHeight: all, clientHeight: seen}}) => all - seen)(document.querySelector('#{column}'))"
            assert one.page.evaluate(hidden) <= 1, (column, tab)


def test_a_telephone_is_enough(visit: Visit) -> None:
    one = visit(390, 844)
    one.shot("phone_empty")
    one.page.close()
    one = busy_page(visit, width=390, height=844)
    assert one.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for query in ("#both", "#plan", "#edit", "#cancel", ".bx-text >> nth=0", "[data-do=undo]", "#save"):
        box = one.page.locator(query).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["height"] >= 28
    if path := os.environ.get("REPLAN_SHOTS"):
        one.page.screenshot(path=f"{path}/phone.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Visit, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install replan[dev]")
    one = busy_page(visit, color_scheme=scheme)
    for tab in ("Settings", "Attention", "History", "Plan file"):
        one.page.get_by_role("tab", name=tab).click()
        one.page.wait_for_timeout(300)
        found = axe.Axe().run(one.page).response["violations"]
        serious = [
            (item["id"], [node["target"] for node in item["nodes"]][:6], item["nodes"][0]["failureSummary"][:300])
            for item in found
            if item["impact"] in ("serious", "critical")
        ]
        assert serious == [], tab


def test_the_first_paint_is_quick(visit: Visit) -> None:
    script = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    assert min(visit().page.evaluate(script) for _ in range(3)) < 2000  # ms; of three, because tests share the machine

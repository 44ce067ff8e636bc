"""Makes assets/demo.png: the app on the mini models after a plan and an edit. Needs Chromium and replan[demo,dev]."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from replan.backbones.runtime import Runtime
from replan.demo.serve import Place, running
from replan.demo.studio import Studio

ASSETS = Path(__file__).parent.parent / "assets"
LONG = 600_000  # ms: on a busy machine


def use(page: Page, address: str, example: int, boundary: float) -> None:
    """Take an example, plan and edit it, select its first region and put the boundary of before and after there."""
    page.goto(address)
    page.locator("#examples button").nth(example).click()
    page.wait_for_selector(".bx[data-empty=false]")
    page.wait_for_function("document.querySelector('#instruction textarea').value")
    page.click("#both")
    page.wait_for_selector(".vw[data-state=done]", timeout=LONG)
    page.wait_for_selector("#both:not([disabled])", timeout=LONG)
    page.locator(".bx-number").first.click()
    page.locator(".vw-slide").fill(str(boundary))
    page.mouse.move(2, 2)
    page.wait_for_timeout(1000)  # colours fade into each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", type=int, default=3, help="number in the gallery, from 0")
    parser.add_argument("--boundary", type=float, default=17, help="where before ends and after begins, in percent")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=ASSETS / "demo.png")
    args = parser.parse_args()
    studio = Studio.load(["mini"], ["mini"], Runtime())
    with running(studio, Place(port=0)) as address, sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        scheme = "dark" if args.dark else "light"
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(LONG)
        use(page, address, args.example, args.boundary)
        page.screenshot(path=args.output)
        browser.close()


if __name__ == "__main__":
    main()

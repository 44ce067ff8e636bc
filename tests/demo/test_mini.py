"""`replan demo` as it is started from a shell, on the mini models: the same way through, with real weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from test_flow import picture_in
from visitors import Visitor

Visit = Callable[..., Visitor]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a demo that was started without any option but a free port."""
    weights = resources.files("replan").joinpath("mini", "weights")
    for name in ("planner", "editor"):
        if not weights.joinpath(name).is_dir():
            pytest.skip(f"the weights of the mini {name} are not in this checkout")
    own = tmp_path_factory.mktemp("tmp")
    environment = os.environ | {"TMPDIR": str(own), "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "-c", "from replan.cli import main; main()", "demo", "--port", "0"]
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        yield program.stdout.readline().strip()
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130
    assert list(own.glob("replan-demo-*")) == []  # the folder for uploads went with it
    assert tempfile.gettempdir() != str(own)


def test_the_whole_way_on_the_mini_models(visit: Visit, mini: str) -> None:
    one = visit(url=mini).pick()
    page = one.page
    page.evaluate("""() => { window.heard = []; const box = document.querySelector('#reasoning textarea');
        setInterval(() => { if (box.value !== heard.at(-1)) heard.push(box.value); }, 10); }""")
    page.click("#plan")
    one.notice("press Edit", seconds=120)
    assert len(page.evaluate("heard")) > 3  # the reasoning grew before our eyes
    assert page.input_value("#reasoning textarea")
    if not one.regions():
        one.drag((8, 8), (28, 28))
    planned = one.regions()[0][1]
    left, top, right, bottom = planned
    middle = ((left + right) / 2, (top + bottom) / 2)
    one.drag(middle, (middle[0] + 2, middle[1] + 1))
    moved = one.regions()[0][1]
    assert moved != planned
    page.locator(".bx-text").first.fill("make this blue")
    page.keyboard.press("Enter")
    page.click("#edit")
    page.wait_for_selector(".vw[data-state=done]", timeout=120000)
    one.notice("seed")
    before, after = (np.asarray(picture_in(one, f".vw-{name}"), float) for name in ("before", "after"))
    inside = np.zeros(before.shape[:2], bool)
    for _, (x0, y0, x1, y1) in one.regions():
        inside[y0:y1, x0:x1] = True
    change = np.abs(before - after).mean(2)
    assert change[inside].mean() > 3 * change[~inside].mean()
    one.shot("mini")
    page.click("[data-do=undo]")
    page.click("[data-do=undo]")
    assert one.regions()[0][1] == planned


def test_the_background_can_be_kept_pixel_by_pixel(visit: Visit, mini: str) -> None:
    one = visit(url=mini).pick(1)
    one.drag((2, 66), (30, 94))
    one.page.keyboard.type("make this red")
    one.page.keyboard.press("Enter")
    one.page.click("#keep input")
    one.page.click("#edit")
    one.page.wait_for_selector(".vw[data-state=done]", timeout=120000)
    (_, (left, top, right, bottom)), *_ = one.regions()
    before, after = (np.asarray(picture_in(one, f".vw-{name}")) for name in ("before", "after"))
    outside = np.ones(before.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert (before[outside] == after[outside]).all()
    assert (before != after).any()


def test_the_package_carries_the_page() -> None:
    static = Path(str(resources.files("replan.demo").joinpath("static")))
    assert {path.suffix for path in static.iterdir()} == {".html", ".css", ".js"}

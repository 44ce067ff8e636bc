"""`replan demo` as it is started from a shell, on the mini models: the same way through, with real weights."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_flow import CANCEL_SOON, picture_in
from typer.testing import CliRunner
from visitors import Visitor

from replan.cli import app
from replan.demo.examples import examples

Visit = Callable[..., Visitor]
LONG = 120  # seconds: the models load, and the machine may be busy


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
    one.notice("press Edit", seconds=LONG)
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
    one.done(LONG)
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
    one.done(LONG)
    (_, (left, top, right, bottom)), *_ = one.regions()
    before, after = (np.asarray(picture_in(one, f".vw-{name}")) for name in ("before", "after"))
    outside = np.ones(before.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert (before[outside] == after[outside]).all()
    assert (before != after).any()


def draw(one: Visitor, box: tuple[int, int, int, int], hint: str) -> None:
    """Draw a box and give it a hint."""
    one.drag(box[:2], box[2:])
    one.page.keyboard.type(hint)
    one.page.keyboard.press("Enter")


def set_number(one: Visitor, name: str, value: int) -> None:
    """Type into a number of the settings."""
    one.page.get_by_role("tab", name="Settings").click()
    one.page.locator(f"#{name} input[type=number], #{name} input:not([type])").first.fill(str(value))
    one.page.keyboard.press("Tab")


def runs(one: Visitor) -> int:
    """How many finished edits the history of this page holds."""
    one.page.get_by_role("tab", name="History").click()
    return one.page.locator("#history button").count()


def test_an_exported_plan_is_the_command_lines_and_comes_back(
    visit: Visit, mini: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = visit(url=mini).pick(2)
    page = one.page
    mine = {
        "size": [96, 96], "prompt": "", "reasoning": "<p>by hand</p>",
        "regions": [{"box": [8, 8, 40, 48], "hint": "make this red"}, {"box": [60, 60, 90, 90], "hint": "a blue star"}],
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    page.get_by_role("tab", name="Plan file").click()
    page.set_input_files("#tabs input[type=file]", str(tmp_path / "mine.json"))
    one.notice("Plan imported")
    assert one.regions() == [("make this red", (8, 8, 40, 48)), ("a blue star", (60, 60, 90, 90))]
    one.drag((24, 28), (28, 30))
    corrected = [("make this red", (12, 10, 44, 50)), ("a blue star", (60, 60, 90, 90))]
    assert one.regions() == corrected
    page.click("#edit")
    one.done(LONG)
    for button, name in (("#export", "plan.json"), ("#save-picture", None), ("#save", "result.png")):
        with page.expect_download() as waiting:
            page.click(button)
        waiting.value.save_as(tmp_path / (name or waiting.value.suggested_filename))
    exported = json.loads((tmp_path / "plan.json").read_text())
    assert [(region["hint"], tuple(region["box"])) for region in exported["regions"]] == corrected

    words = shlex.split(page.input_value("#command textarea"))
    assert words[:2] == ["replan", "edit"]
    assert words[words.index("--plan") + 1] == "plan.json"
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, words[1:])  # the real editor again, in this process
    assert told.exit_code == 0, told.output
    ours, theirs = (np.asarray(Image.open(tmp_path / name), int) for name in ("result.png", "edited.png"))
    assert np.abs(ours - theirs).max() <= 2  # another process may add up in another order

    for name in ("plan.json", "edited.json"):  # the page's own export, and the file the command line wrote
        for _ in corrected:
            page.get_by_label("Delete region 1").click()
        assert one.regions() == []
        page.set_input_files("#tabs input[type=file]", str(tmp_path / name))
        one.notice("Plan imported")
        page.locator(".bx-box").nth(1).wait_for()
        assert one.regions() == corrected


def test_cancel_stops_a_long_edit_and_keeps_the_work(visit: Visit, mini: str) -> None:
    one = visit(url=mini).pick(3)
    page = one.page
    draw(one, (8, 8, 40, 48), "make this red")
    page.fill("#instruction textarea", "my own words")
    page.fill("#prompt textarea", "keep the rest")
    set_number(one, "steps", 100)
    page.evaluate(CANCEL_SOON)
    page.click("#edit")
    told = one.notice("Cancelled", LONG)
    done = re.search(r"after (?:step )?(\d+) of 100", told)
    assert done is not None, told
    assert int(done[1]) < 100
    page.wait_for_selector("#edit:not([disabled])")
    assert page.evaluate("late") == []
    assert one.regions() == [("make this red", (8, 8, 40, 48))]
    assert page.input_value("#instruction textarea") == "my own words"
    assert page.input_value("#prompt textarea") == "keep the rest"
    assert page.locator(".vw").get_attribute("data-state") == "empty"
    set_number(one, "steps", 4)
    page.click("#edit")
    one.done(LONG)
    page.wait_for_selector("#edit:not([disabled])")
    assert runs(one) == 1  # the one that was cancelled never came to an end


def test_two_users_of_the_mini_models_do_not_mix(visit: Visit, mini: str) -> None:
    people = [visit(url=mini).pick(number) for number in (0, 1)]
    hints, boxes = ("make this red", "make this blue"), ((5, 5, 45, 45), (50, 50, 90, 90))
    for person, hint, box in zip(people, hints, boxes, strict=True):
        draw(person, box, hint)
        person.page.click("#keep input")
        set_number(person, "steps", 16)
    for person in people:
        person.page.click("#edit")
    for person in people:
        person.done(LONG)
    together = [picture_in(person, ".vw-after") for person in people]
    for number, person in enumerate(people):
        source = examples()[number].picture
        assert picture_in(person, ".vw-before").tobytes() == source.tobytes()
        assert person.regions() == [(hints[number], boxes[number])]
        left, top, right, bottom = boxes[number]
        changed = (np.asarray(source) != np.asarray(together[number])).any(2)
        assert changed[top:bottom, left:right].any()
        changed[top:bottom, left:right] = False
        assert not changed.any()
        assert runs(person) == 1
    for person, shared in zip(people, together, strict=True):  # alone, one after the other
        person.page.click("#edit")
        person.page.locator("#history button").nth(1).wait_for(timeout=LONG * 1000)
        assert picture_in(person, ".vw-after").tobytes() == shared.tobytes()


def test_an_upload_that_is_no_picture_changes_nothing(visit: Visit, mini: str, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("this is no picture")
    examples()[0].picture.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    one = visit(url=mini).pick(4)
    page = one.page
    draw(one, (8, 8, 40, 48), "make this red")
    shown = page.locator(".bx-image").get_attribute("href")
    for name, told in (("words.png", "not a picture"), ("half.png", "damaged")):
        page.set_input_files("#left input[type=file]", str(tmp_path / name))
        assert "Choose another file" in one.notice(told)
        assert page.locator(".bx-image").get_attribute("href") == shown
        assert one.regions() == [("make this red", (8, 8, 40, 48))]
    page.click("#edit")
    one.done(LONG)
    assert picture_in(one, ".vw-before").tobytes() == examples()[4].picture.tobytes()


def test_the_package_carries_the_page() -> None:
    static = Path(str(resources.files("replan.demo").joinpath("static")))
    assert {path.suffix for path in static.iterdir()} == {".html", ".css", ".js"}


def test_the_speed_of_its_edits_is_chosen_at_the_start() -> None:
    from replan.backbones.runtime import Runtime
    from replan.demo.studio import Studio
    from replan.errors import ConfigError

    own, exact, fast = (Studio.load(["mini"], ["mini"], Runtime(), speed) for speed in (None, "exact", "fast"))
    caches = [studio.config("mini").speed.cache for studio in (own, exact, fast)]
    assert caches == ["reference", "none", "background"]
    with pytest.raises(ConfigError, match="speed"):
        Studio.load(["mini"], ["mini"], Runtime(), "warp")

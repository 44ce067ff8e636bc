"""The whole way through the app, as a user goes it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from visitors import ANSWER, Demo, Visitor, wait_until

from replan.demo.examples import examples

Visit = Callable[..., Visitor]


CANCEL_SOON = """() => { const told = () => document.querySelector('#notice').textContent;
    const eye = new MutationObserver(() => { if (/Step/.test(told())) {
        eye.disconnect(); document.querySelector('#cancel').click();
        window.late = []; let over = false;
        const read = (text) => { over ||= /Cancelled/.test(text); if (over && /Step/.test(text)) late.push(text); };
        new MutationObserver(() => read(told())).observe(
            document.querySelector('#notice'), {subtree: true, childList: true, characterData: true});
    } });
    eye.observe(document.querySelector('#notice'), {subtree: true, childList: true, characterData: true}); }"""


def picture_in(visitor: Visitor, query: str) -> Image.Image:
    """The picture that an <img> shows."""
    source = visitor.page.locator(query).get_attribute("src")
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")


def test_plan_correct_edit_compare(visit: Visit, demo: Demo) -> None:
    one = visit().pick()
    page = one.page
    one.shot("example")
    page.fill("#instruction textarea", "make the left cup red")
    page.click("#plan")
    page.wait_for_function("document.querySelector('#reasoning textarea').value.startsWith('I see')")
    seen = page.input_value("#reasoning textarea")
    one.notice("1 region")
    assert ANSWER.startswith("<think>" + seen)  # told while it was thought, before the plan was there
    assert page.input_value("#reasoning textarea") == "the left half is meant"
    assert page.input_value("#prompt textarea") == "keep the rest"
    assert one.regions() == [("make the left cup red", (0, 0, 48, 96))]
    one.shot("planned")

    one.drag((24, 48), (54, 48))  # move
    assert one.regions()[0][1] == (30, 0, 78, 96)
    one.drag((78, 96), (70, 60))  # by a corner
    assert one.regions()[0][1] == (30, 0, 70, 60)
    one.drag((30, 30), (20, 30))  # by an edge
    assert one.regions()[0][1] == (20, 0, 70, 60)
    page.fill(".bx-text", "a blue star")
    page.keyboard.press("Enter")
    page.click("#edit")
    one.done()
    one.shot("done")

    assert demo.backbone.requests[-1].instruction == "make the left cup red"
    plan = demo.backbone.plans[-1]
    assert plan is not None
    assert [(r.hint, r.box.as_tuple()) for r in plan.regions] == [("a blue star", (20, 0, 70, 60))]
    before, after = picture_in(one, ".vw-before"), picture_in(one, ".vw-after")
    assert before.size == after.size == (96, 96)
    for x in range(96):
        for y in range(96):
            inside = 20 <= x < 70 and y < 60
            assert inside or before.getpixel((x, y)) == after.getpixel((x, y))
    assert len({after.getpixel((x, y)) for x in range(20, 70) for y in range(60)}) == 1
    page.click(".vw-modes [data-mode=heat]")
    heat = picture_in(one, ".vw-heat")
    assert heat.getpixel((90, 90)) == (16, 18, 38)
    assert heat.getpixel((40, 30)) != (16, 18, 38)


def test_draw_undo_redo_duplicate_order_keep_delete(visit: Visit) -> None:
    one = visit().pick(1)
    page = one.page
    one.drag((10, 10), (40, 40))
    page.keyboard.type("first")
    page.keyboard.press("Enter")
    one.drag((60, 60), (90, 90))
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    assert one.regions() == [("first", (10, 10, 40, 40)), ("second", (60, 60, 90, 90))]
    page.click("[data-do=undo]")
    page.click("[data-do=undo]")
    assert one.regions() == [("first", (10, 10, 40, 40))]
    page.click("[data-do=redo]")
    page.click("[data-do=redo]")
    assert one.regions()[1] == ("second", (60, 60, 90, 90))
    page.get_by_label("Move up region 2").click()
    assert [hint for hint, _ in one.regions()] == ["second", "first"]
    page.get_by_label("Keep region 2 unchanged").check()
    assert one.regions()[1][0] == "keep this unchanged"
    page.get_by_label("Keep region 2 unchanged").uncheck()
    assert one.regions()[1][0] == "first"
    page.get_by_label("Duplicate region 2").click()
    assert one.regions()[2] == ("first", (12, 12, 42, 42))
    assert page.locator(".bx-overlap").count() == 1
    page.locator(".bx-box").nth(2).focus()
    for key in ("ArrowRight", "Shift+ArrowDown", "Alt+ArrowLeft"):
        page.keyboard.press(key)
    assert one.regions()[2][1] == (13, 22, 42, 52)
    page.keyboard.press("Delete")
    page.keyboard.press("Control+z")
    assert len(one.regions()) == 3
    page.keyboard.press("n")
    assert len(one.regions()) == 4


def test_whole_edges_resize_and_the_smallest_box_is_taken(visit: Visit) -> None:
    one = visit().pick()
    page = one.page
    one.drag((10, 10), (60, 60))
    page.keyboard.press("Escape")
    one.drag((60, 20), (64, 20))  # an edge, far from its middle
    one.drag((20, 60), (20, 70))
    assert one.regions()[0][1] == (10, 10, 64, 70)
    page.keyboard.press("Escape")
    one.drag((70, 80), (90, 90))
    page.keyboard.press("Escape")
    one.drag((80, 85), (50, 50))  # into the large one
    page.keyboard.press("Escape")
    assert page.locator(".bx-box[aria-pressed=true]").count() == 0
    for place, number in (((50, 50), 2), ((15, 15), 1), ((50, 50), 2)):
        page.mouse.click(*one.client(*place))
        assert page.locator(".bx-box[aria-pressed=true]").get_attribute("aria-label").startswith(f"Region {number}")
    page.mouse.click(*one.client(90, 15))  # empty space
    assert page.locator(".bx-box[aria-pressed=true]").count() == 0
    page.keyboard.press("Delete")  # nothing is selected and nothing is being typed
    assert len(one.regions()) == 2


def test_undo_by_key_from_anywhere_but_a_text(visit: Visit) -> None:
    one = visit()
    assert one.page.locator(".bx [data-do=undo]").is_disabled()
    one.pick()
    page = one.page
    one.drag((10, 10), (60, 60))
    page.locator("#plan").focus()
    page.keyboard.press("Control+z")
    assert one.regions() == []
    page.keyboard.press("Control+Shift+z")
    assert len(one.regions()) == 1
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+z")
    assert len(one.regions()) == 1


def test_what_the_models_cannot_do_is_said(visit: Visit) -> None:
    one = visit().pick(len(examples()) - 1)
    assert "know their own drawn scenes only" in one.notice("rocket.png, 640 × 427")
    one.drag((100, 100), (300, 300))
    assert one.page.locator(".bx-off").is_hidden()
    one.page.click("#baseline input")
    assert one.page.locator(".bx-off").is_visible()
    one.shot("baseline")


def test_boxes_stay_on_their_object(visit: Visit) -> None:
    one = visit().pick()
    one.drag((20, 20), (50, 50))
    for width, height in ((800, 700), (390, 844), (1440, 900)):
        one.page.set_viewport_size({"width": width, "height": height})
        one.page.wait_for_timeout(150)
        one.page.locator(".bx-svg").scroll_into_view_if_needed()
        body = one.page.locator(".bx-body").bounding_box()
        left, top = one.client(20, 20)
        right, bottom = one.client(50, 50)
        assert body is not None
        assert abs(body["x"] - left) < 3
        assert abs(body["y"] - top) < 3
        assert abs(body["width"] - (right - left)) < 5
        assert abs(body["height"] - (bottom - top)) < 5
    one.page.click("[data-do=in]")
    one.drag((40, 40), (45, 40))
    assert one.regions()[0][1] == (25, 20, 55, 50)
    one.page.click("[data-do=fit]")


def test_touch_draws_and_moves(visit: Visit) -> None:
    one = visit(390, 844, has_touch=True).pick()
    one.page.locator(".bx-svg").scroll_into_view_if_needed()
    script = """([kind, x, y]) => document.querySelector('.bx-svg').dispatchEvent(new PointerEvent(kind,
        {pointerId: 1, pointerType: 'touch', clientX: x, clientY: y, bubbles: true, isPrimary: true}))"""
    one.page.evaluate("() => { const svg = document.querySelector('.bx-svg'); svg.setPointerCapture = () => {}; }")
    for kind, x, y in (
        ("pointerdown", 10, 10),
        ("pointermove", 30, 30),
        ("pointermove", 60, 70),
        ("pointerup", 60, 70),
    ):
        one.page.evaluate(script, [kind, *one.client(x, y)])
    assert one.regions() == [("no hint yet", (10, 10, 60, 70))]


def test_a_turned_photo_lines_up(visit: Visit, demo: Demo, tmp_path: Path) -> None:
    photo = Image.new("RGB", (120, 80), "white")
    photo.paste((255, 0, 0), (0, 0, 40, 40))  # stored top left; shown top right after a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    one = visit()
    one.page.set_input_files("#left input[type=file]", str(tmp_path / "turned.jpg"))
    one.notice("80 × 120 pixels")
    one.page.wait_for_selector(".bx[data-empty=false]")
    one.drag((42, 2), (78, 38))
    one.page.keyboard.type("the red part")
    one.page.click("#edit")
    one.done()
    request, plan = demo.backbone.requests[-1], demo.backbone.plans[-1]
    assert plan is not None
    region = request.image.crop(plan.regions[0].box.as_tuple()).getpixel((10, 10))
    assert isinstance(region, tuple)
    assert region[0] > 200
    assert region[1] < 60


def test_export_import_command(visit: Visit, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = visit().pick(2)
    page = one.page
    one.drag((8, 8), (40, 48))
    page.keyboard.type("make this red")
    page.keyboard.press("Enter")
    page.fill("#prompt textarea", "keep the rest")
    page.locator("#seed input").fill("7")
    page.keyboard.press("Tab")
    page.click("#edit")
    one.done()
    page.get_by_role("tab", name="Plan file").click()
    for button, name in (("#export", "plan.json"), ("#save-picture", None), ("#save", "result.png")):
        with page.expect_download() as waiting:
            page.click(button)
        waiting.value.save_as(tmp_path / (name or waiting.value.suggested_filename))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["regions"] == [{"box": [8, 8, 40, 48], "hint": "make this red"}]
    command = page.input_value("#command textarea")
    one.shot("command")

    import shlex

    from typer.testing import CliRunner

    from replan.cli import app
    from replan.edit import Editor
    from replan.record import Setup

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Setup, "open", lambda setup: Editor(None, demo.backbone, setup.config))
    words = shlex.split(command)
    assert words[:2] == ["replan", "edit"]
    told = CliRunner().invoke(app, words[1:])
    assert told.exit_code == 0, told.output
    assert Image.open("edited.png").tobytes() == Image.open("result.png").tobytes()

    page.get_by_label("Delete region 1").click()
    assert one.regions() == []
    page.set_input_files("#tabs input[type=file]", str(tmp_path / "plan.json"))
    one.notice("Plan imported")
    assert one.regions() == [("make this red", (8, 8, 40, 48))]
    page.set_input_files("#tabs input[type=file]", str(tmp_path / "result.png"))
    one.notice("not JSON")
    assert len(one.regions()) == 1


def test_candidates_next_turn_and_history(visit: Visit, demo: Demo) -> None:
    one = visit().pick()
    page = one.page
    one.drag((8, 8), (40, 48))
    page.keyboard.type("make this red")
    page.keyboard.press("Enter")
    page.locator("#candidates input[type=number]").fill("3")
    page.keyboard.press("Tab")
    page.click("#edit")
    one.done()
    picks = page.locator(".vw-picks button")
    assert picks.count() == 3
    picks.nth(2).click()
    assert page.locator(".vw-caption").inner_text() == "seed 2"
    third = picture_in(one, ".vw-after")
    one.shot("candidates")
    page.wait_for_timeout(200)
    page.click("#reuse")
    one.notice("new picture")
    assert one.regions() == []
    page.click("#baseline input")
    page.fill("#instruction textarea", "paint all of it")
    page.click("#both")
    one.notice("Baseline")
    assert demo.backbone.plans[-1] is None
    assert demo.backbone.requests[-1].image.tobytes() == third.tobytes()
    page.get_by_role("tab", name="History").click()
    one.shot("history")
    assert page.locator("#history button").count() == 2
    page.locator("#history button").nth(1).click()
    one.notice("Restored")
    assert one.regions() == [("make this red", (8, 8, 40, 48))]
    assert page.locator(".vw-picks button").count() == 3
    assert not page.locator("#baseline input").is_checked()


def test_the_matrix_has_an_effect_or_says_why_not(visit: Visit, demo: Demo) -> None:
    one = visit().pick()
    page = one.page
    page.get_by_role("tab", name="Attention").click()
    said = page.locator(".mx-said")
    assert "draw a box" in said.inner_text()
    one.drag((8, 8), (40, 48))
    page.keyboard.type("make this red")
    page.keyboard.press("Enter")
    one.drag((60, 60), (90, 90))
    page.keyboard.type("make this blue")
    page.keyboard.press("Enter")
    cell = page.get_by_label("hint 2 reads noise background")
    cell.click()
    page.get_by_label("hint 2 does not read noise background").wait_for()
    page.mouse.move(5, 5)
    assert "1 cell changed" in said.inner_text()
    page.get_by_label("Delete region 1").click()  # the rule stays with its region, which is now the first
    page.get_by_label("hint 1 does not read noise background").wait_for()
    assert page.get_by_label("hint 1 does not read noise background").count() == 1
    one.shot("matrix")
    page.click("#edit")
    one.done()
    mask = demo.backbone.now[2].mask
    assert [phase.until for phase in mask.rules] == [1.0]
    row = next(row for row in mask.rules[0].rows if row.startswith("hint 1:"))
    assert "noise background" not in row
    page.get_by_label("main always reads itself").click()
    assert "cannot be changed" in said.inner_text()
    page.locator(".mx-tabs [data-phase=late]").click()
    assert "Lower the locality share" in said.inner_text()
    page.get_by_label("main reads noise background").click()
    page.get_by_label("main does not read noise background").wait_for()  # the part looked at is still the idle one
    assert "main does not read noise background. No effect: no step is left" in said.inner_text()
    page.click("#reset")
    page.get_by_label("hint 1 reads noise background").wait_for()


def test_cancel_stops_within_one_step(visit: Visit, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    from replan.demo.session import Job

    asked: list[int] = []
    cancel = Job.cancel
    monkeypatch.setattr(Job, "cancel", lambda job: asked.append(demo.backbone.steps) or cancel(job))
    one = visit().pick()
    page = one.page
    one.drag((8, 8), (40, 48))
    page.keyboard.type("make this red")
    page.keyboard.press("Enter")
    page.locator("#steps input[type=number]").fill("60")
    page.keyboard.press("Tab")
    demo.backbone.pause = 0.4
    page.click("#edit")
    one.notice("of 60")
    one.shot("live")
    page.click("#cancel")
    one.notice("Cancelled")
    late = demo.backbone.steps
    page.wait_for_timeout(1000)
    assert demo.backbone.steps == late <= asked[0] + 1  # from when the click arrived: how long that takes varies
    assert one.regions() == [("make this red", (8, 8, 40, 48))]
    assert page.locator(".vw").get_attribute("data-state") == "empty"
    demo.backbone.pause = 0.0
    page.locator("#steps input[type=number]").fill("4")
    page.keyboard.press("Tab")
    page.click("#edit")
    one.done()


def test_no_late_preview_is_drawn_over_a_cancelled_edit(
    visit: Visit, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from replan.demo import work

    monkeypatch.setattr(work, "OFTEN", 0.0)  # so many reports that the page falls behind
    one = visit().pick()
    page = one.page
    one.drag((8, 8), (40, 48))
    page.keyboard.type("make this red")
    page.keyboard.press("Enter")
    page.locator("#steps input[type=number]").fill("100")
    page.keyboard.press("Tab")
    demo.backbone.pause = 0.03
    page.evaluate(CANCEL_SOON)
    page.click("#edit")
    one.notice("Cancelled", 60)
    page.wait_for_selector("#edit:not([disabled])", timeout=60_000)
    page.wait_for_timeout(500)  # whatever is still on its way to the page
    assert page.evaluate("late") == []
    assert "Cancelled" in page.locator("#notice").inner_text()
    assert page.locator(".vw").get_attribute("data-state") == "empty"


def test_a_waiting_job_can_be_cancelled_and_a_closed_page_stops_its_job(visit: Visit, demo: Demo) -> None:
    people = [visit().pick(number) for number in (0, 1)]
    for person in people:
        person.drag((8, 8), (40, 48))
        person.page.keyboard.type("make this red")
        person.page.keyboard.press("Enter")
    people[0].page.locator("#steps input[type=number]").fill("90")
    people[0].page.keyboard.press("Tab")
    demo.backbone.pause = 0.3
    before, first = len(demo.backbone.requests), demo.backbone.steps
    people[0].page.click("#edit")
    people[0].notice("of 90")
    people[1].page.click("#edit")
    wait_until(lambda: "queue" in people[1].page.locator("#notice").inner_text().lower())
    people[1].page.click("#cancel")
    people[1].notice("Cancelled")
    people[0].notice("of 90")  # the other user's job goes on
    people[0].page.context.close()

    def has_stopped() -> bool:
        at = demo.backbone.steps
        people[1].page.wait_for_timeout(1500)
        return demo.backbone.steps == at

    wait_until(has_stopped, 20)  # the whole of it would take longer
    assert demo.backbone.steps < first + 90
    assert len(demo.backbone.requests) == before + 1
    demo.backbone.pause = 0.0
    people[1].page.click("#edit")
    people[1].done()


def test_a_failed_plan_keeps_the_work(visit: Visit) -> None:
    one = visit().pick()
    page = one.page
    one.drag((8, 8), (40, 48))
    page.keyboard.type("mine")
    page.keyboard.press("Enter")
    for words, told in (("nonsense", "Say it in other words"), ("outage", "Your boxes are kept")):
        page.fill("#instruction textarea", words)
        page.click("#both")
        one.notice(told)
        assert one.regions() == [("mine", (8, 8, 40, 48))]
        assert page.locator(".vw").get_attribute("data-state") == "empty"  # no result is made up
    one.shot("failed")
    page.fill(".bx-text", "")
    page.keyboard.press("Enter")
    page.click("#edit")
    one.notice("Region 1 has no hint")
    page.fill("#instruction textarea", "")
    page.click("#plan")
    one.notice("The instruction is empty")


def test_two_users_side_by_side(visit: Visit, demo: Demo) -> None:
    demo.backbone.pause = 0.25
    people = [visit().pick(0), visit().pick(1)]
    for person, hint, box in zip(people, ("one", "two"), ((5, 5, 40, 40), (50, 50, 90, 90)), strict=True):
        person.drag(box[:2], box[2:])
        person.page.keyboard.type(hint)
        person.page.keyboard.press("Enter")
    people[0].page.click("#edit")
    people[0].notice("Step")
    people[1].page.click("#edit")
    wait_until(lambda: "queue" in people[1].page.locator("#notice").inner_text().lower())
    people[1].shot("queued")
    for person in people:
        person.done()
    for number, person in enumerate(people):
        source = examples()[number].picture
        assert picture_in(person, ".vw-before").tobytes() == source.tobytes()
        assert len(person.regions()) == 1
        person.page.get_by_role("tab", name="History").click()
        assert person.page.locator("#history button").count() == 1

"""The editor: stages, seeds, falling back, candidates, cancelling, the background."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeBackbone, FakePlanner, picture, plan_for
from PIL import Image

import replan.edit
from replan import Box, Edit, Editor, EditRequest, Plan, Region, Size
from replan.backbones import EditConfig, Runtime
from replan.background import paste_background
from replan.config import load
from replan.denoise import Cancelled
from replan.errors import ConfigError, PlanError, PlannerError
from replan.plan import AnswerError

CONFIG = load(EditConfig, "edit/mini", ["steps=3", "max_area=1536"])
REGIONS = (Region(Box(4, 4, 20, 20), "make it red"), Region(Box(16, 10, 40, 28), "a blue cup"))
TWO = Plan("", "keep it", REGIONS, Size(48, 32))


def pixels(edit: Edit) -> np.ndarray:
    return np.asarray(edit.image).astype(int)


@pytest.fixture
def fake() -> Editor:
    return Editor(FakePlanner(), FakeBackbone(), CONFIG)


@pytest.fixture(scope="module")
def tiny_editor(flux_folder: Path) -> Editor:
    return Editor.load(str(flux_folder), None, config=CONFIG, runtime=Runtime(device="cpu"))


def test_plans_edits_and_says_how_long_it_took(fake: Editor) -> None:
    edit = fake(EditRequest(picture(), "make it red", seed=7))
    assert edit.plan is not None
    assert edit.plan.regions[0].hint == "make it red"
    assert (edit.notes, edit.image.size, edit.request.seed) == (("made up",), (32, 24), 7)
    assert set(edit.timings) == {"load", "plan", "condition", "sample", "decode"}
    assert min(edit.timings.values()) >= 0


def test_a_given_plan_loads_no_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(replan.edit, "load_backbone", lambda name, runtime: loads.append(name) or FakeBackbone())
    monkeypatch.setattr(replan.edit, "_load_planner", lambda spec, config, runtime: loads.append(spec) or FakePlanner())
    editor = Editor.load("mini", "mini", config=CONFIG)
    assert loads == []
    image = picture()
    editor(EditRequest(image, "x", plan=plan_for(image)))
    editor.baseline(EditRequest(image, "x"))
    assert loads == ["mini"]
    editor(EditRequest(image, "x"))
    assert loads == ["mini", "mini"]


def test_a_given_plan_is_brought_to_the_picture(fake: Editor) -> None:
    image = picture(32, 24)
    plan = Plan("", "keep", (Region(Box(0, 0, 320, 240), "red"),), Size(640, 480))
    assert fake.plan(EditRequest(image, "x", plan=plan)).regions[0].box == Box(0, 0, 16, 12)


class WordyPlanner(FakePlanner):
    def __call__(self, request: EditRequest) -> Plan:
        raise AnswerError("no tags", "the whole answer")


def test_a_bad_plan_falls_back_to_the_instruction_loudly(fake: Editor, caplog: pytest.LogCaptureFixture) -> None:
    request = EditRequest(picture(), "nonsense, please")
    with caplog.at_level(logging.WARNING):
        edit = fake(request)
    assert edit.plan == Plan("", "nonsense, please", (), Size(32, 24), edit.notes)
    assert "planning failed" in edit.notes[0]
    assert "no tags in the answer" in caplog.text
    with pytest.raises(PlanError, match="no tags"):
        fake(request, strict=True)
    with pytest.raises(PlanError, match="no tags"):
        fake.plan(request)
    wordy = Editor(WordyPlanner(), FakeBackbone(), CONFIG)(request)
    assert wordy.plan is not None
    assert wordy.plan.raw == "the whole answer"


def test_a_failed_planner_is_never_papered_over(fake: Editor) -> None:
    with pytest.raises(PlannerError, match="does not answer"):
        fake(EditRequest(picture(), "outage"))
    with pytest.raises(ConfigError, match="no planner"):
        Editor(None, FakeBackbone(), CONFIG)(EditRequest(picture(), "x"))


def test_unknown_backbone_and_no_candidates(fake: Editor) -> None:
    with pytest.raises(ConfigError, match="did you mean mini"):
        Editor.load("minni")
    with pytest.raises(ConfigError, match="candidates = 0"):
        fake.candidates(EditRequest(picture(), "x"), 0)


def test_no_regions_is_the_stock_editor_with_the_plan_s_prompt(tiny_editor: Editor) -> None:
    image = picture(48, 32)
    empty = Plan("", "make it red", (), Size(48, 32))
    planned = tiny_editor(EditRequest(image, "something else", 3, empty))
    assert np.array_equal(pixels(planned), pixels(tiny_editor.baseline(EditRequest(image, "make it red", 3))))
    assert tiny_editor.baseline(EditRequest(image, "make it red", 3, TWO)).plan is None


def test_same_seed_same_bytes_in_any_order(tiny_editor: Editor) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    requests = [EditRequest(picture(48, 32), "x", seed, TWO) for seed in (0, 1, 2)]
    forth = [pixels(tiny_editor(request)) for request in requests]
    torch.manual_seed(99)
    back = [pixels(tiny_editor(request)) for request in reversed(requests)][::-1]
    torch.random.set_rng_state(before)
    [pixels(tiny_editor(request)) for request in requests]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(np.array_equal(one, other) for one, other in zip(forth, back, strict=True))
    assert not np.array_equal(forth[0], forth[1])


def test_candidates_equal_single_edits(tiny_editor: Editor) -> None:
    request = EditRequest(picture(48, 32), "x", 11, TWO)
    edits = tiny_editor.candidates(request, 3)
    assert [edit.request.seed for edit in edits] == [11, 12, 13]
    for edit in edits:
        single = tiny_editor(replace(request, seed=edit.request.seed))
        assert np.abs(pixels(edit) - pixels(single)).max() <= 1


@pytest.mark.parametrize("size", [(48, 32), (50, 31), (7, 90), (1, 1)])
def test_the_result_has_the_source_s_size(tiny_editor: Editor, size: tuple[int, int]) -> None:
    plan = Plan("", "keep", (Region(Box(0, 0, 1, 1), "red"),), Size(*size))
    assert tiny_editor(EditRequest(picture(*size), "x", plan=plan)).image.size == size


def test_steps_are_reported_and_can_be_looked_at(tiny_editor: Editor) -> None:
    seen: list[tuple[int, int, tuple[int, int]]] = []

    def on_step(step: int, total: int, preview: Callable[[], Image.Image]) -> None:
        seen.append((step, total, preview().size))

    request = EditRequest(picture(48, 32), "x", 2, TWO)
    watched = tiny_editor(request, on_step)
    assert seen == [(1, 3, (48, 32)), (2, 3, (48, 32)), (3, 3, (48, 32))]
    assert np.array_equal(pixels(watched), pixels(tiny_editor(request)))
    with pytest.raises(Cancelled):
        tiny_editor(request, lambda step, total, preview: False)


def test_keep_background_restores_it_byte_for_byte(tiny_editor: Editor) -> None:
    image = picture(48, 32)
    editor = Editor(None, tiny_editor.backbone, load(EditConfig, "edit/mini", ["steps=3", "keep_background=true"]))
    kept = pixels(editor(EditRequest(image, "x", 2, TWO)))
    inside = np.zeros((32, 48), bool)
    for region in TWO.regions:
        inside[region.box.top : region.box.bottom, region.box.left : region.box.right] = True
    assert np.array_equal(kept[~inside], np.asarray(image).astype(int)[~inside])
    assert np.abs(kept - np.asarray(image))[inside].max() > 0


def test_the_seam_rises_inside_the_box_but_not_at_the_border() -> None:
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    grey = np.asarray(paste_background(black, white, [Box(0, 16, 48, 64)]))[:, :, 0].astype(int)
    row = grey[40]
    assert row[:42].min() == 255  # the left edge lies on the border: no seam
    assert np.all(np.diff(row[41:49]) < 0)
    assert row[48:].max() == 0
    assert grey[:16].max() == 0
    assert np.all(np.diff(grey[15:22, 20]) > 0)
    assert grey[-1, 20] == 255
    assert paste_background(black, white, [Box(90, 90, 99, 99)]).tobytes() == black.tobytes()
    assert paste_background(black.convert("RGBA"), white, [Box(0, 0, 64, 64)]).tobytes() == white.tobytes()

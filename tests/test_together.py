"""Several requests in one batch: the same edits as one by one, errors kept apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from replan import Editor, EditRequest
from replan.backbones import default_config
from replan.denoise import Cancelled
from replan.edit import BESIDE
from replan.errors import ConfigError
from replan.mini.report import items
from replan.mini.scenes import draw
from replan.types import Box, Edit, Plan, Region, Size

PLAN = Plan("", "keep the rest", (Region(Box(0, 0, 40, 40), "a red cup"),), Size(96, 96))
ROUNDING = 2  # grey levels of 255; other matrix shapes are summed in another order


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load("mini", None, config=replace(default_config("mini"), steps=2))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw(item.scene) for item in items("dev", 3)]


def edited(outcome: object) -> Edit:
    assert isinstance(outcome, Edit), outcome
    return outcome


def far(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def test_seeds_of_one_plan_and_pictures_without_regions(editor: Editor, pictures: list[Image.Image]):
    bare = Plan("", "make everything blue", (), Size(96, 96))
    seeds = [EditRequest(pictures[0], "", seed, PLAN) for seed in (5, 1, 2**40)]
    others = [EditRequest(picture, "", 3, bare) for picture in pictures[1:]]
    requests = [seeds[0], others[0], seeds[1], others[1], seeds[2]]
    together = [edited(outcome) for outcome in editor.together(requests)]
    for request, edit in zip(requests, together, strict=True):
        alone = editor(request)
        assert far(edit.image, alone.image) <= ROUNDING
        assert edit.request.seed == request.seed
        assert edit.plan == request.plan
        assert edit.notes == (BESIDE,)  # which is why the service does not batch unless told to
        assert set(edit.timings) == set(alone.timings)
    assert far(together[0].image, together[2].image) > 5 * ROUNDING  # another seed is another picture


def test_a_request_alone_gives_the_same_bytes_as_a_call(editor: Editor, pictures: list[Image.Image]):
    narrow = replace(PLAN, regions=(Region(Box(50, 50, 90, 90), "a red cup"),))
    requests = [EditRequest(pictures[0], "", 5, plan) for plan in (PLAN, narrow)]  # other masks: two forwards
    for request, outcome in zip(requests, editor.together(requests), strict=True):
        assert edited(outcome).image.tobytes() == editor(request).image.tobytes()
        assert edited(outcome).notes == ()


def test_the_baseline_in_a_batch(editor: Editor, pictures: list[Image.Image]):
    requests = [EditRequest(picture, "make everything blue", 1) for picture in pictures]
    for request, outcome in zip(requests, editor.together(requests, bare=True), strict=True):
        assert edited(outcome).plan is None
        assert far(edited(outcome).image, editor.baseline(request).image) <= ROUNDING


def test_an_error_keeps_to_its_own_place(editor: Editor, pictures: list[Image.Image]):
    bad = EditRequest(pictures[0], "no plan, and this editor has no planner")
    good = EditRequest(pictures[0], "", 1, PLAN)
    first, second = editor.together([bad, good])
    assert isinstance(first, ConfigError)
    assert edited(second).image.tobytes() == editor(good).image.tobytes()


def test_stopping(editor: Editor, pictures: list[Image.Image]):
    requests = [EditRequest(pictures[0], "", seed, PLAN) for seed in (1, 2)]
    with pytest.raises(Cancelled, match="after step 1 of 2"):
        editor.together(requests, lambda step, total, preview: False)

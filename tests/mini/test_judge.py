"""Hand-made results get the scores that a careful person would give."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from replan.errors import JudgeError
from replan.mini.changes import Change, apply_changes
from replan.mini.instructions import Item, make_item
from replan.mini.judge import judge
from replan.mini.scenes import Scene, Thing, draw

SCENE = Scene(
    "shelf",
    0.3,
    (
        Thing("cup", "red", 0, 0, 26),
        Thing("cup", "red", 2, 1, 24),
        Thing("book", "blue", 1, 1, 25),
        Thing("ball", "green", 0, 2, 26),
    ),
)
CHANGES = (
    Change("recolour", 0, "blue"),
    Change("replace", 0, None, "plant"),
    Change("remove", 0),
    Change("add", -1, "orange", "ball", cell=(1, 2)),
)


@pytest.fixture(params=CHANGES, ids=lambda change: change.task)
def item(request: pytest.FixtureRequest) -> Item:
    return make_item(random.Random(0), SCENE, [request.param])


def scores(item: Item, picture: Image.Image) -> tuple[int, int, int, int]:
    verdict = judge(item, picture)
    return verdict.target, verdict.effect, verdict.consistency, verdict.quality


def test_perfect(item: Item):
    verdict = judge(item, draw(item.target))
    assert scores(item, draw(item.target)) == (5, 5, 5, 5)
    assert verdict.success
    assert verdict.overall == 5
    assert verdict.weighted == 5
    assert verdict.outside_psnr > 45


def test_untouched(item: Item):
    assert scores(item, draw(item.scene)) == (1, 1, 5, 5)
    assert judge(item, draw(item.scene)).weighted == pytest.approx((1 + 1 + 10 / 5) / 4)


def elsewhere(change: Change) -> Change:
    """The same change done to the twin, or in another empty place."""
    return replace(change, cell=(2, 2)) if change.task == "add" else replace(change, index=1)


def test_wrong_twin_edited(item: Item):
    wrong = apply_changes(item.scene, [elsewhere(item.changes[0])])
    assert scores(item, draw(wrong)) == (1, 1, 1, 5)


def test_spill_to_the_twin(item: Item):
    both = apply_changes(item.scene, [item.changes[0], elsewhere(item.changes[0])])
    assert scores(item, draw(both)) == (5, 5, 1, 5)


def test_a_faint_tint_costs_consistency(item: Item):
    tinted = np.asarray(draw(item.target)).astype(int) + np.array([15, 0, -15])
    target, effect, consistency, quality = scores(item, Image.fromarray(tinted.clip(0, 255).astype("uint8")))
    assert (target, effect, consistency) == (5, 5, 3)
    assert quality in (3, 4)


def test_blur_costs_quality(item: Item):
    *_, consistency, quality = scores(item, draw(item.target).filter(ImageFilter.GaussianBlur(2)))
    assert consistency < 5
    assert quality <= 3


def test_half_an_edit_is_half_an_effect():
    item = make_item(random.Random(0), SCENE, [Change("recolour", 0, "blue")])
    halfway = Image.blend(draw(item.scene), draw(item.target), 0.5)
    assert scores(item, halfway)[:3] == (5, 3, 5)


def test_garbage(item: Item):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype("uint8")
    _, *rest = scores(item, Image.fromarray(noise))
    assert rest == [1, 1, 1]


def test_keeping_is_judged_too():
    item = make_item(random.Random(0), SCENE, [Change("remove", 0), Change("keep", 1)])
    assert judge(item, draw(item.target)).success
    assert not judge(item, draw(apply_changes(SCENE, [Change("remove", 0), Change("remove", 1)]))).success


def test_another_size_is_refused(item: Item):
    with pytest.raises(JudgeError, match="96"):
        judge(item, draw(item.target).resize((64, 64)))


LAMP = Change("state", 4, kind="lamp", altered=True)


def evening() -> Item:
    """A global change and a local one together."""
    scene = replace(SCENE, things=(*SCENE.things, Thing("lamp", "yellow", 2, 2, 26)))
    return make_item(random.Random(0), scene, [LAMP], "evening")


def test_light_and_a_local_change_together():
    item = evening()
    assert judge(item, draw(item.target)).success
    assert scores(item, draw(item.scene)) == (1, 1, 5, 5)


def test_only_the_light():
    item = evening()
    target, effect, consistency, quality = scores(item, draw(replace(item.scene, light="evening")))
    assert (target, effect, consistency, quality) == (1, 1, 5, 5)


def test_only_the_local_change():
    item = evening()
    target, effect, consistency, _ = scores(item, draw(apply_changes(item.scene, [LAMP])))
    assert (target, effect, consistency) == (1, 1, 5)


def test_another_light_than_asked():
    item = evening()
    *_, effect, consistency, _ = scores(item, draw(replace(item.target, light="night")))
    assert effect < 5
    assert consistency == 1


def test_a_thing_changed_under_the_light_costs_consistency():
    item = evening()
    wrong = apply_changes(item.target, [Change("recolour", 2, "white")])
    assert scores(item, draw(wrong))[:3] == (5, 5, 1)


def test_a_half_done_state_is_no_state():
    item = make_item(random.Random(0), evening().scene, [LAMP])
    assert judge(item, draw(item.target)).success
    assert scores(item, draw(item.scene))[:3] == (1, 1, 5)

"""Instructions are unambiguous, plans box exactly what changes, and training never meets what is held out."""

import random
from collections import Counter

import pytest

from replan.mini.changes import STATE, Change, apply_changes, article, held_out, spread
from replan.mini.instructions import (
    DESCRIPTIONS,
    HELD_OUT_SEEDS,
    KEEP_REST,
    SPLITS,
    item_at,
    make_item,
    odd_one,
    random_item,
    references,
)
from replan.mini.pool import EDITS, pool_edit
from replan.mini.scenes import KINDS, SIZE, Scene, Thing, random_odd_scene, random_scene

SHELF = Scene("shelf", 0.0, (Thing("cup", "red", 0, 0, 25), Thing("book", "blue", 1, 1, 25)))


def test_a_seed_always_gives_the_same_item():
    assert random_item(random.Random(7)) == random_item(random.Random(7))
    assert item_at(5) == item_at(5) != item_at(6)


def test_references_are_unambiguous():
    """A reference by kind and colour fits exactly one thing of the scene."""
    for seed in range(200):
        rng = random.Random(seed)
        scene = random_scene(rng)
        for index, thing in enumerate(scene.things):
            for reference in references(scene, Change("remove", index), rng):
                if (
                    reference.referring == "feature"
                    and thing.colour in reference.words
                    and thing.kind in reference.words
                ):
                    fits = [t for t in scene.things if (t.kind, t.colour) == (thing.kind, thing.colour)]
                    assert fits == [thing]


def test_a_place_beside_a_thing_is_where_the_words_say():
    change = Change("add", -1, "green", "ball", cell=(1, 0))
    words = {r.words for seed in range(40) for r in references(SHELF, change, random.Random(seed))}
    assert words == {
        "in the top middle",
        "to the right of the cup",
        "to the right of the red cup",
        "above the book",
        "above the blue book",
    }


def test_the_odd_one_out_is_understood():
    for seed in range(50):
        scene = random_odd_scene(random.Random(seed))
        odd = odd_one(scene)
        assert odd is not None
        every = references(scene, Change("remove", odd), random.Random(0))
        found = [reference for reference in every if reference.referring == "understanding"]
        others = {thing.kind for index, thing in enumerate(scene.things) if index != odd}
        assert [r.because for r in found] == [f"The others are {others.pop()}".replace("box", "boxe") + "s."]
    assert odd_one(SHELF) is None


def test_every_kind_of_instruction_occurs():
    items = [random_item(random.Random(seed)) for seed in range(1500)]
    assert {item.referring for item in items} == {"feature", "spatial", "knowledge", "understanding", "all"}
    tasks = Counter(change.task for item in items for change in item.changes)
    assert set(tasks) == {"recolour", "replace", "remove", "state", "add", "keep"}
    assert any(item.light != "day" and item.changes for item in items)
    assert any(item.light != "day" and not item.changes for item in items)
    assert any(len(item.changes) == 2 for item in items)
    assert set(DESCRIPTIONS) == set(KINDS)


@pytest.mark.parametrize("first", [0, SPLITS["dev"], SPLITS["test"]])
def test_the_plan_boxes_exactly_what_changes(first: int):
    for seed in range(first, first + 200):
        item = item_at(seed)
        if not item.references:
            assert item.plan.regions == ()
            continue
        assert item.plan.size == SIZE
        assert (item.plan.prompt == KEEP_REST) == (item.light == "day")
        assert [region.box for region in item.plan.regions] == [change.box(item.scene) for change in item.changes]
        for change, region in zip(item.changes, item.plan.regions, strict=True):
            assert region.hint.startswith(change.hint)
            assert f"It is the {change.name(item.scene)}:" in item.plan.reasoning


def test_training_never_meets_what_is_held_out():
    for seed in range(300):
        assert not any(map(held_out, item_at(seed).combinations))
        assert not any(pool_edit(seed, edit).unseen for edit in range(EDITS))
    for first in SPLITS.values():
        assert first in HELD_OUT_SEEDS
        assert all(any(map(held_out, item_at(first + number).combinations)) for number in range(200))


def test_reading_the_hints():
    changes = [Change("replace", 0, None, "apple"), Change("keep", 1)]
    item = make_item(random.Random(0), SHELF, changes)
    assert [region.hint for region in item.plan.regions] == ["replace this with an apple", "keep this unchanged"]
    assert item.target.things == (Thing("apple", "red", 0, 0, 25), SHELF.things[1])
    assert " but " in item.instruction


def test_another_light_is_global_and_every_hint_says_it_too():
    item = make_item(random.Random(0), SHELF, [Change("recolour", 0, "green")], "night")
    assert item.plan.prompt == "make it night"
    assert [region.hint for region in item.plan.regions] == ["make this green, at night"]
    assert item.target.light == "night"
    assert make_item(random.Random(0), SHELF, (), "evening").plan.regions == ()


def test_additions_and_states():
    lamp = Scene("desk", 0.0, (Thing("lamp", "red", 0, 0, 25), Thing("lamp", "blue", 1, 0, 25, altered=True)))
    off = Change("state", 0, kind="lamp", altered=True)
    add = Change("add", -1, "green", "ball", cell=(2, 2))
    assert (off.hint, add.hint) == ("turn off this", "add a green ball here")
    after = apply_changes(lamp, [off, add])
    assert [thing.altered for thing in after.things] == [True, True, False]
    assert after.things[2] == add.added
    assert add.box(lamp).iou(add.added.box) > 0.5
    assert [change.index for change in spread(off, lamp)] == [0]
    assert len(spread(add, lamp)) == 7
    assert {kind for kind, _ in STATE} < set(KINDS)
    assert article("apple") == "an apple"
    with pytest.raises(ValueError, match="adds nothing"):
        _ = off.added

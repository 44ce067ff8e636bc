import random

import numpy as np
import pytest

from replan.mini.instructions import KEEP_REST, Change, apply_changes, make_item, random_item, references
from replan.mini.scenes import CELL, COLOURS, KINDS, SIZE, Scene, Thing, draw, random_scene


def test_a_seed_always_gives_the_same_picture_and_item():
    first, second = (random_item(random.Random(7)) for _ in range(2))
    assert first == second
    assert draw(first.scene).tobytes() == draw(second.scene).tobytes()
    assert draw(random_scene(random.Random(8))).tobytes() != draw(first.scene).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_is_tight_around_what_is_drawn(kind: str):
    empty = Scene("desk", 0.5, ())
    thing = Thing(kind, "purple", 1, 1, 26)
    changed = np.asarray(draw(empty)).astype(int) != np.asarray(draw(Scene("desk", 0.5, (thing,)))).astype(int)
    rows, columns = np.nonzero(changed.any(-1))
    box = thing.box
    drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(drawn) - np.array(box.as_tuple())).max() <= 1


def test_things_keep_to_their_cells():
    for seed in range(300):
        for thing in random_scene(random.Random(seed)).things:
            box = thing.box
            assert thing.column * CELL <= box.left < box.right <= (thing.column + 1) * CELL
            assert thing.row * CELL <= box.top < box.bottom <= (thing.row + 1) * CELL


def test_a_change_moves_only_its_own_cell():
    scene = random_scene(random.Random(3))
    thing = scene.things[0]
    other = next(c for c in COLOURS if c != thing.colour)
    before = np.asarray(draw(scene)).astype(int)
    after = np.asarray(draw(apply_changes(scene, [Change("recolour", 0, other)]))).astype(int)
    rows, columns = np.nonzero((before != after).any(-1))
    assert len(rows) > 0
    assert set(rows // CELL) == {thing.row}
    assert set(columns // CELL) == {thing.column}


def test_references_are_unambiguous():
    """A reference by kind and colour fits exactly one thing of the scene."""
    for seed in range(200):
        rng = random.Random(seed)
        scene = random_scene(rng)
        for index, thing in enumerate(scene.things):
            for reference in references(scene, index, rng):
                if (
                    reference.referring == "feature"
                    and thing.colour in reference.words
                    and thing.kind in reference.words
                ):
                    fits = [t for t in scene.things if (t.kind, t.colour) == (thing.kind, thing.colour)]
                    assert fits == [thing]


def test_the_plan_boxes_exactly_what_changes():
    for seed in range(200):
        item = random_item(random.Random(seed))
        if item.referring == "all":
            assert item.plan.regions == ()
            continue
        assert item.plan.size == SIZE
        assert item.plan.prompt == KEEP_REST
        boxes = [item.scene.things[change.index].box for change in item.changes]
        assert [region.box for region in item.plan.regions] == boxes


def test_reading_the_hints():
    scene = Scene("shelf", 0.0, (Thing("cup", "red", 0, 0, 25), Thing("book", "blue", 1, 1, 25)))
    changes = [Change("replace", 0, None, "apple"), Change("keep", 1)]
    item = make_item(random.Random(0), scene, changes)
    assert [region.hint for region in item.plan.regions] == ["replace this with an apple", "keep this unchanged"]
    assert item.target.things == (Thing("apple", "red", 0, 0, 25), scene.things[1])
    assert " but " in item.instruction

import random

import numpy as np
import pytest

from replan.mini.changes import Change, apply_changes
from replan.mini.scenes import (
    CELL,
    COLOURS,
    KINDS,
    LIGHTS,
    SHAPES,
    Scene,
    Thing,
    draw,
    random_odd_scene,
    random_scene,
)


def test_a_seed_always_gives_the_same_picture():
    first, second = (random_scene(random.Random(7)) for _ in range(2))
    assert first == second
    assert draw(first).tobytes() == draw(second).tobytes()
    assert draw(random_scene(random.Random(8))).tobytes() != draw(first).tobytes()


STATES = [(kind, altered) for kind in KINDS for altered in (False, True) if not altered or SHAPES[kind].altered]


@pytest.mark.parametrize(("kind", "altered"), STATES)
def test_a_box_is_tight_around_what_is_drawn(kind: str, altered: bool):
    empty = Scene("desk", 0.5, ())
    thing = Thing(kind, "purple", 1, 1, 26, altered=altered)
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


def test_a_second_state_shows():
    for kind, shape in SHAPES.items():
        scenes = (Scene("desk", 0.5, (Thing(kind, "red", 1, 1, 24, 0, altered),)) for altered in (False, True))
        plain, other = (np.asarray(draw(scene)) for scene in scenes)
        assert (plain != other).any() == (shape.altered is not None)


def test_light_falls_on_everything():
    scene = random_scene(random.Random(3))
    pictures = [np.asarray(draw(Scene(scene.place, scene.tint, scene.things, light))).astype(int) for light in LIGHTS]
    assert all((picture <= pictures[0]).all() for picture in pictures)
    assert len({picture.mean().round() for picture in pictures}) == len(LIGHTS)


def test_an_odd_scene_has_one_thing_of_another_kind():
    for seed in range(100):
        kinds = [thing.kind for thing in random_odd_scene(random.Random(seed)).things]
        assert sorted(kinds.count(kind) for kind in set(kinds))[0] == 1
        assert len(set(kinds)) == 2
        assert len(kinds) > 3

"""Instructions over scenes: who is meant, what is asked, the exact plan, and the scene as it should look afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from replan.mini.changes import (
    FILLERS,
    LIGHT,
    UNDER_LIGHT,
    Change,
    apply_changes,
    article,
    held_out,
    light_in,
    random_addition,
    random_change,
    say,
    spread,
)
from replan.mini.scenes import SIZE, Scene, Thing, random_odd_scene, random_scene
from replan.types import Plan, Region

SPLITS = {"dev": 1 << 40, "test": 1 << 41}  # first seed of each held-out split
HELD_OUT_SEEDS = range(1 << 40, 1 << 42)  # others are for training

Referring = Literal["feature", "spatial", "knowledge", "understanding", "all"]

KEEP_REST = "keep the rest unchanged"
WHOLE = "This concerns the whole picture, so there is no region."
WHOLE_LIGHT = "The light concerns the whole picture."
DESCRIPTIONS = {
    "cup": "thing one drinks from",
    "plant": "thing that grows",
    "book": "thing one reads",
    "lamp": "thing that gives light",
    "ball": "thing one plays with",
    "box": "thing one packs",
    "bottle": "thing that holds juice",
    "apple": "thing one eats",
}
WHERE = {
    "shelf": ("on the shelf",),
    "desk": ("on the desk", "on the table"),
    "garden": ("in the garden", "on the grass"),
}
EXTREMES: dict[str, tuple[Callable[[Thing], int], tuple[str, ...]]] = {
    "left": (lambda t: t.column, ("the left {}", "the leftmost {}", "the {} on the left")),
    "right": (lambda t: -t.column, ("the right {}", "the rightmost {}", "the {} on the right")),
    "top": (lambda t: t.row, ("the top {}", "the upper {}", "the {} at the top")),
    "bottom": (lambda t: -t.row, ("the bottom {}", "the lower {}", "the {} at the bottom")),
}
ODD = (
    "the odd one out",
    "the thing that is out of place",
    "the thing that does not belong",
    "the one that does not fit in",
)
VERBS = {"state": "change"}
BESIDE = {(-1, 0): "to the left of", (1, 0): "to the right of", (0, -1): "above", (0, 1): "below"}


@dataclass(frozen=True, slots=True)
class Reference:
    """Words that single out one thing or place of a scene; `because` is what one has to think of where they do not
    say what it looks like."""

    words: str
    referring: Referring
    because: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One exactly solved example. `light` is the light asked for; "day" is that of every source picture."""

    scene: Scene
    target: Scene
    instruction: str
    references: tuple[Reference, ...]
    changes: tuple[Change, ...]
    plan: Plan
    light: str = "day"

    @property
    def referring(self) -> Referring:
        return self.references[0].referring if self.references else "all"

    @property
    def combinations(self) -> tuple[str, ...]:
        """What the item does to what (see `changes.held_out`)."""
        light = (light_in(self.light, self.scene.place),) if self.light != "day" else ()
        return (*light, *(c.combination(self.scene) for c in self.changes if c.task != "keep"))


# --- who is meant ----------------------------------------------------------------------------------------------------


def references(scene: Scene, change: Change, rng: random.Random) -> list[Reference]:
    """Every unambiguous way, in one random wording each, to say where a change is to happen."""
    return _to_a_place(scene, change, rng) if change.cell is not None else _to_a_thing(scene, change.index, rng)


def _to_a_thing(scene: Scene, index: int, rng: random.Random) -> list[Reference]:
    thing, found = scene.things[index], list[Reference]()
    kin = tuple(t for t in scene.things if t.kind == thing.kind)
    twins = tuple(t for t in kin if t.colour == thing.colour)
    filler = f"{rng.choice(FILLERS)} " if rng.random() < 0.15 else ""
    where = f" {rng.choice(WHERE[scene.place])}" if rng.random() < 0.15 else ""
    if len(kin) == 1:
        found.append(Reference(f"the {filler}{thing.kind}{where}", "feature"))
        found.append(Reference(f"the {DESCRIPTIONS[thing.kind]}", "knowledge", f"That is {article(thing.kind)}."))
    if len(twins) == 1:
        found.append(Reference(f"the {filler}{thing.colour} {thing.kind}{where}", "feature"))
    same_colour = tuple(t for t in scene.things if t.colour == thing.colour)
    if len(same_colour) == 1:
        found.append(Reference(f"the {thing.colour} {rng.choice(('thing', 'one', 'object'))}", "feature"))
    for group, name in ((kin, thing.kind), (twins, f"{thing.colour} {thing.kind}")):
        for measure, wordings in EXTREMES.values():
            if len(group) > 1 and all(measure(thing) < measure(t) for t in group if t is not thing):
                found.append(Reference(rng.choice(wordings).format(name), "spatial"))
    found.append(Reference(f"the {rng.choice((thing.kind, 'thing'))} in the {thing.position}", "spatial"))
    if odd_one(scene) == index:
        others = next(t.kind for t in scene.things if t is not thing)
        because = f"The others are {'boxes' if others == 'box' else others + 's'}."
        found.append(Reference(rng.choice(ODD), "understanding", because))
    return found


def _to_a_place(scene: Scene, change: Change, rng: random.Random) -> list[Reference]:
    position = change.name(scene).removeprefix("empty place ")
    found = [Reference(f"in the {position}", "spatial")]
    for thing in scene.things:
        offset = (change.added.column - thing.column, change.added.row - thing.row)
        kin = [t for t in scene.things if t.kind == thing.kind]
        twins = [t for t in kin if t.colour == thing.colour]
        if offset in BESIDE and len(twins) == 1:
            name = thing.kind if len(kin) == 1 and rng.random() < 0.5 else f"{thing.colour} {thing.kind}"
            found.append(Reference(f"{BESIDE[offset]} the {name}", "spatial"))
    return found


def odd_one(scene: Scene) -> int | None:
    """The only thing of another kind than all the rest, where the rest are three or more."""
    kinds = [thing.kind for thing in scene.things]
    lone = [index for index, kind in enumerate(kinds) if kinds.count(kind) == 1]
    return lone[0] if len(kinds) > 3 and len(lone) == 1 and len(set(kinds)) == 2 else None


def _choose(options: list[Reference], rng: random.Random) -> Reference:
    """One of one referring type, the type drawn first, so that rare types are not drowned; places always fit."""
    kinds = sorted({o.referring for o in options})
    kind = rng.choices(kinds, [1 if kind == "spatial" else 2 for kind in kinds])[0]
    return rng.choice([o for o in options if o.referring == kind])


# --- what is asked ---------------------------------------------------------------------------------------------------


def _reason(change: Change, scene: Scene, reference: Reference) -> str:
    target = "the place " if change.cell is not None else ""
    because = f" {reference.because}" if reference.because else ""
    verb = VERBS.get(change.task, change.task)
    return f"Look for {target}{reference.words}.{because} It is the {change.name(scene)}: {verb} it."


def _polish(text: str, rng: random.Random) -> str:
    if rng.random() < 0.08:
        text = f"please {text}"
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.15 else "")


def make_item(
    rng: random.Random,
    scene: Scene,
    changes: Sequence[Change],
    light: str = "day",
    chosen: Sequence[Reference] | None = None,
) -> Item:
    """Put changes and a light in words, with a reference for each change, and write down the exact plan.

    A global prompt never reaches a region, so under another light each hint says it too.
    """
    chosen = chosen or [_choose(references(scene, c, rng), rng) for c in changes]
    parts = [say(change, reference.words, rng) for change, reference in zip(changes, chosen, strict=True)]
    joint = " but " if changes and changes[-1].task == "keep" else rng.choice((" and ", ", and ", ", then "))
    if light != "day":
        parts.insert(0 if joint == " but " else rng.choice((0, len(parts))), rng.choice(LIGHT[light]))
    instruction = _polish(joint.join(parts), rng)
    # first everything in sight, in reading order: then choosing is a matter of words
    seen = f"I see {', '.join(thing.name for thing in scene.things)}."
    whole = (WHOLE_LIGHT,) if light != "day" else ()
    reasoning = " ".join((seen, *whole, *(_reason(c, scene, r) for c, r in zip(changes, chosen, strict=True))))
    regions = tuple(Region(c.box(scene), c.hint + UNDER_LIGHT[light]) for c in changes)
    plan = Plan(reasoning if changes else WHOLE, LIGHT[light][0] if light != "day" else KEEP_REST, regions, SIZE)
    target = replace(apply_changes(scene, changes), light=light)
    return Item(scene, target, instruction, tuple(chosen), tuple(changes), plan, light)


def everything_item(rng: random.Random, scene: Scene) -> Item:
    """One change to all things at once: a global edit, planned without regions."""
    first = random_change(rng, scene, rng.randrange(len(scene.things)))
    while first.task == "state":
        first = random_change(rng, scene, rng.randrange(len(scene.things)))
    changes = spread(first, scene)
    words = first.hint.replace("this", "everything")
    target = apply_changes(scene, changes)
    return Item(scene, target, _polish(say(first, "everything", rng), rng), (), changes, Plan(WHOLE, words, (), SIZE))


def random_item(rng: random.Random, scene: Scene | None = None, *, unseen: bool = False) -> Item:
    """An item over `scene` or a random one: mostly one change, sometimes two, a change and a keep, or a global one.

    Training items hold no combination that is held out; `unseen` ones hold at least one (see `changes.held_out`).
    """
    share = rng.random()  # what sort of item: drawn once, so that no sort is more common where more is refused
    odd = rng.random() < 0.15
    while True:
        here = scene or (random_odd_scene(rng) if odd else random_scene(rng))
        item = _any_item(rng, here, share)
        if any(map(held_out, item.combinations)) == unseen:
            return item


def item_at(seed: int) -> Item:
    """The item of a seed; that of a held-out seed holds a combination that training never meets."""
    return random_item(random.Random(seed), unseen=seed in HELD_OUT_SEEDS)


def _any_item(rng: random.Random, scene: Scene, share: float) -> Item:
    """`share` in [0, 1) decides what sort of item it is."""
    light = rng.choice(sorted(LIGHT))
    odd = odd_one(scene)
    if share < 0.03:
        return everything_item(rng, scene)
    if share < 0.06:
        return make_item(rng, scene, (), light)
    if odd is not None and rng.random() < 0.6:
        change = random_change(rng, scene, odd)
        meant = [r for r in references(scene, change, rng) if r.referring == "understanding"]
        return make_item(rng, scene, [change], light if share < 0.12 else "day", meant)
    one, other = rng.sample(range(len(scene.things)), 2)
    changes = [random_addition(rng, scene) if rng.random() < 0.15 else random_change(rng, scene, one)]
    if share < 0.14:
        return make_item(rng, scene, changes, light)
    if share < 0.28:
        changes.append(random_change(rng, scene, other))
    elif share < 0.33:
        changes.append(Change("keep", other))
    return make_item(rng, scene, changes)

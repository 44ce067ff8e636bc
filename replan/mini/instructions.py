"""Instructions over scenes: who is meant, what is asked, the exact plan, and the scene as it should look afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from replan.mini.scenes import COLOURS, KINDS, SIZE, Scene, Thing, random_scene
from replan.types import Plan, Region

SPLITS = {"dev": 1 << 40, "test": 1 << 41}  # first seed of the held-out items; training uses small ones

Task = Literal["recolour", "replace", "remove", "keep"]
Referring = Literal["feature", "spatial", "knowledge", "all"]

KEEP_REST = "keep the rest unchanged"
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
FILLERS = ("used", "old", "little", "nice", "small", "new")
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


@dataclass(frozen=True, slots=True)
class Change:
    """One asked change: the task, the thing it is done to (index), the new colour or kind where the task has one."""

    task: Task
    index: int
    colour: str | None = None
    kind: str | None = None

    @property
    def hint(self) -> str:
        """What to do inside the box. Nothing is left to find there, so it says "this"."""
        if self.task == "recolour":
            return f"make this {self.colour}"
        if self.task == "replace":
            return f"replace this with {_article(self.new)}"
        return "remove this" if self.task == "remove" else "keep this unchanged"

    @property
    def new(self) -> str:
        """The new thing in words, e.g. "red plant"."""
        return f"{self.colour} {self.kind}" if self.colour else str(self.kind)

    def apply(self, thing: Thing) -> Thing | None:
        if self.task == "remove":
            return None
        return replace(thing, colour=self.colour or thing.colour, kind=self.kind or thing.kind)


@dataclass(frozen=True, slots=True)
class Reference:
    """Words that single out one thing of a scene; `described` is its kind where the words do not say it."""

    words: str
    referring: Referring
    described: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One exactly solved example."""

    scene: Scene
    target: Scene
    instruction: str
    references: tuple[Reference, ...]
    changes: tuple[Change, ...]
    plan: Plan

    @property
    def referring(self) -> Referring:
        return self.references[0].referring if self.references else "all"

    @property
    def task(self) -> Task:
        return self.changes[0].task


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"  # no word here begins with a u that sounds like one


def references(scene: Scene, index: int, rng: random.Random) -> list[Reference]:
    """Every unambiguous way, in one random wording each, to name thing `index`."""
    thing, found = scene.things[index], list[Reference]()
    kin = tuple(t for t in scene.things if t.kind == thing.kind)
    twins = tuple(t for t in kin if t.colour == thing.colour)
    filler = f"{rng.choice(FILLERS)} " if rng.random() < 0.15 else ""
    where = f" {rng.choice(WHERE[scene.place])}" if rng.random() < 0.15 else ""
    if len(kin) == 1:
        found.append(Reference(f"the {filler}{thing.kind}{where}", "feature"))
        found.append(Reference(f"the {DESCRIPTIONS[thing.kind]}", "knowledge", thing.kind))
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
    return found


def _say(change: Change, words: str, rng: random.Random) -> str:
    if change.task == "recolour":
        forms = (
            "make {} {}",
            "turn {} {}",
            "paint {} {}",
            "change {} to {}",
            "change the color of {} to {}",
            "color {} {}",
        )
        return rng.choice(forms).format(words, change.colour)
    if change.task == "replace":
        new = _article((f"{rng.choice(FILLERS)} " if rng.random() < 0.15 else "") + change.new)
        return rng.choice(("replace {} with {}", "replace {} with {}", "swap {} for {}", "turn {} into {}")).format(
            words, new
        )
    if change.task == "remove":
        return rng.choice(("remove {}", "remove {}", "delete {}", "erase {}", "take away {}")).format(words)
    return rng.choice(("keep {} unchanged", "leave {} as it is", "do not touch {}")).format(words)


def random_change(rng: random.Random, scene: Scene, index: int) -> Change:
    """A change that shows: another colour, another kind (keeping the colour half of the time), or removal."""
    thing = scene.things[index]
    colour = rng.choice([c for c in COLOURS if c != thing.colour])
    task = rng.choices(("recolour", "replace", "remove"), (0.4, 0.4, 0.2))[0]
    if task == "recolour":
        return Change("recolour", index, colour)
    if task == "replace":
        kind = rng.choice([k for k in KINDS if k != thing.kind])
        return Change("replace", index, colour if rng.random() < 0.5 else None, kind)
    return Change("remove", index)


def apply_changes(scene: Scene, changes: Sequence[Change]) -> Scene:
    for change in sorted(changes, key=lambda c: -c.index):
        scene = scene.swap(change.index, change.apply(scene.things[change.index]))
    return scene


def _reason(thing: Thing, reference: Reference, change: Change) -> str:
    is_a = f" That is {_article(reference.described)}." if reference.described else ""
    return f"Look for {reference.words}.{is_a} It is the {_name(thing)}: {change.task} it."


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.kind} {thing.position}"


def make_item(rng: random.Random, scene: Scene, changes: Sequence[Change]) -> Item:
    """Put changes in words: pick a reference for each, say it, and write down the exact plan."""
    chosen = [rng.choice(_balanced(references(scene, c.index, rng), rng)) for c in changes]
    parts = [_say(change, reference.words, rng) for change, reference in zip(changes, chosen, strict=True)]
    joint = " but " if changes[-1].task == "keep" else rng.choice((" and ", ", and ", ", then "))
    instruction = _polish(joint.join(parts), rng)
    things = [scene.things[c.index] for c in changes]
    # first everything in sight, in reading order: then choosing is a matter of words
    seen = f"I see {', '.join(map(_name, scene.things))}."
    reasoning = " ".join((seen, *(_reason(t, r, c) for t, r, c in zip(things, chosen, changes, strict=True))))
    regions = tuple(Region(t.box, c.hint) for t, c in zip(things, changes, strict=True))
    plan = Plan(reasoning, KEEP_REST, regions, SIZE)
    return Item(scene, apply_changes(scene, changes), instruction, tuple(chosen), tuple(changes), plan)


def _balanced(options: list[Reference], rng: random.Random) -> list[Reference]:
    """All options of one referring type, the type drawn first, so that rare types are not drowned."""
    kinds = sorted({o.referring for o in options})
    kind = rng.choice(kinds)
    return [o for o in options if o.referring == kind]


def _polish(text: str, rng: random.Random) -> str:
    if rng.random() < 0.08:
        text = f"please {text}"
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.15 else "")


def everything_item(rng: random.Random, scene: Scene) -> Item:
    """One change to all things at once: a global edit, planned without regions."""
    first = random_change(rng, scene, rng.randrange(len(scene.things)))
    changes = tuple(replace(first, index=i) for i in range(len(scene.things)))
    words = first.hint.replace("this", "everything")
    plan = Plan("This concerns the whole picture, so there is no region.", words, (), SIZE)
    return Item(scene, apply_changes(scene, changes), _polish(_say(first, "everything", rng), rng), (), changes, plan)


def random_item(rng: random.Random, scene: Scene | None = None) -> Item:
    """An item over `scene` or a random one: mostly one change, sometimes two, a change and a keep, or one for all."""
    scene = scene or random_scene(rng)
    draw = rng.random()
    if draw < 0.04:
        return everything_item(rng, scene)
    indices = rng.sample(range(len(scene.things)), 2)
    changes = [random_change(rng, scene, indices[0])]
    if draw < 0.24:
        changes.append(random_change(rng, scene, indices[1]))
    elif draw < 0.30:
        changes.append(Change("keep", indices[1]))
    return make_item(rng, scene, changes)

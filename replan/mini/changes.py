"""What can be asked of a scene: changes of single things, additions and another light, and how each is put in words."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from replan.mini.scenes import CELL, COLOURS, KINDS, POSITIONS, Cell, Scene, Thing
from replan.types import Box

Task = Literal["recolour", "replace", "remove", "state", "add", "keep"]

FILLERS = ("used", "old", "little", "nice", "small", "new")
ADDED_HEIGHT = 24
MARGIN = 3  # pixels between the box of an addition and the edge of its cell
HELD_OUT_SHARE = 8  # one combination in so many never occurs in training

# Wordings by task; {} is the thing that is meant, the second one what it becomes.
RECOLOUR = (
    "make {} {}",
    "turn {} {}",
    "paint {} {}",
    "change {} to {}",
    "change the color of {} to {}",
    "color {} {}",
)
REPLACE = ("replace {} with {}", "replace {} with {}", "swap {} for {}", "turn {} into {}")
REMOVE = ("remove {}", "remove {}", "delete {}", "erase {}", "take away {}")
KEEP = ("keep {} unchanged", "leave {} as it is", "do not touch {}")
ADD = ("add {} {}", "add {} {}", "put {} {}", "place {} {}")
STATE: dict[tuple[str, bool], tuple[str, ...]] = {
    ("lamp", True): ("turn off {}", "switch off {}", "turn {} off"),
    ("lamp", False): ("turn on {}", "switch on {}", "turn {} on"),
    ("box", True): ("open {}",),
    ("box", False): ("close {}", "shut {}"),
    ("plant", True): ("let {} bloom", "make {} bloom"),
    ("apple", True): ("take a bite out of {}", "bite into {}"),
}
LIGHT = {
    "night": ("make it night", "turn day into night", "show this at night"),
    "evening": ("make it evening", "turn day into evening", "show this in the evening"),
}
UNDER_LIGHT = {"day": "", "night": ", at night", "evening": ", in the evening"}


@dataclass(frozen=True, slots=True)
class Change:
    """One asked change: the task, the thing it is done to, and what the task needs.

    index     the thing in the scene; -1 for an addition
    colour    the new colour (recolour, replace, add); None keeps the thing's own
    kind      the new kind (replace, add); the thing's own kind for a change of state
    altered   the new state (state)
    cell      where an addition goes
    """

    task: Task
    index: int = -1
    colour: str | None = None
    kind: str | None = None
    altered: bool = False
    cell: Cell | None = None

    @property
    def hint(self) -> str:
        """What to do inside the box. Nothing is left to find there, so it says "this" or "here"."""
        match self.task:
            case "recolour":
                return f"make this {self.colour}"
            case "replace":
                return f"replace this with {article(self.new)}"
            case "remove":
                return "remove this"
            case "state":
                return STATE[str(self.kind), self.altered][0].format("this")
            case "add":
                return f"add {article(self.new)} here"
            case "keep":
                return "keep this unchanged"

    @property
    def new(self) -> str:
        """The new thing in words, e.g. "red plant"."""
        return f"{self.colour} {self.kind}" if self.colour else str(self.kind)

    @property
    def added(self) -> Thing:
        """The new thing of an addition. Raises ValueError for another task."""
        if self.cell is None or self.colour is None or self.kind is None:
            raise ValueError(f"a change of task {self.task!r} adds nothing")
        return Thing(self.kind, self.colour, *self.cell, ADDED_HEIGHT)

    def apply(self, thing: Thing) -> Thing | None:
        """The thing afterwards; None when it is gone."""
        match self.task:
            case "remove":
                return None
            case "state":
                return replace(thing, altered=self.altered)
            case "recolour":
                return replace(thing, colour=str(self.colour))
            case "replace":
                return replace(thing, colour=self.colour or thing.colour, kind=str(self.kind), altered=False)
            case _:
                return thing

    def box(self, scene: Scene) -> Box:
        """Where the change is to happen: the thing's tight box, or the inner part of an addition's cell."""
        if self.cell is None:
            return scene.things[self.index].box
        left, top = (CELL * place for place in self.cell)
        return Box(left + MARGIN, top + MARGIN, left + CELL - MARGIN, top + CELL - MARGIN)

    def name(self, scene: Scene) -> str:
        """The thing or the place in the planner's shorthand, e.g. "cup red top left" or "empty place center"."""
        if self.cell is not None:
            return f"empty place {POSITIONS[self.cell[1]][self.cell[0]]}"
        return scene.things[self.index].name

    def combination(self, scene: Scene) -> str:
        """What is done to what, e.g. "recolour red cup blue": the unit that is held out of training."""
        if self.cell is not None:
            return f"add {self.new} {self.name(scene)}"
        thing = scene.things[self.index]
        what = {"recolour": self.colour, "replace": self.new, "state": self.altered}.get(self.task, "")
        return f"{self.task} {thing.colour} {thing.kind} {what}"


def held_out(combination: str) -> bool:
    """Whether a combination never occurs in training: one in `HELD_OUT_SHARE`, by a checksum of its words."""
    return zlib.crc32(combination.encode()) % HELD_OUT_SHARE == 0


def light_in(light: str, place: str) -> str:
    """The combination that another light is."""
    return f"make it {light}: {place}"


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"  # no word here begins with a u that sounds like one


def say(change: Change, words: str, rng: random.Random) -> str:
    """The change as an instruction about what `words` name."""
    if change.task == "recolour":
        return rng.choice(RECOLOUR).format(words, change.colour)
    if change.task == "state":
        return rng.choice(STATE[str(change.kind), change.altered]).format(words)
    if change.task in ("replace", "add"):
        new = article((f"{rng.choice(FILLERS)} " if rng.random() < 0.15 else "") + change.new)
        return rng.choice(ADD).format(new, words) if change.task == "add" else rng.choice(REPLACE).format(words, new)
    return rng.choice(REMOVE if change.task == "remove" else KEEP).format(words)


def random_change(
    rng: random.Random, scene: Scene, index: int, shares: Sequence[float] = (0.32, 0.32, 0.16, 0.4)
) -> Change:
    """A change that shows: another colour, another kind (keeping the colour half of the time), removal, or a state.

    `shares` weigh these four; things without a second state never change it.
    """
    thing = scene.things[index]
    states = (thing.kind, not thing.altered) in STATE
    tasks: tuple[Task, ...] = ("recolour", "replace", "remove", "state")
    task = rng.choices(tasks, (*shares[:3], shares[3] if states else 0))[0]
    colour = rng.choice([c for c in COLOURS if c != thing.colour])
    if task == "recolour":
        return Change("recolour", index, colour)
    if task == "replace":
        kind = rng.choice([k for k in KINDS if k != thing.kind])
        return Change("replace", index, colour if rng.random() < 0.5 else None, kind)
    if task == "state":
        return Change("state", index, kind=thing.kind, altered=not thing.altered)
    return Change("remove", index)


def random_addition(rng: random.Random, scene: Scene) -> Change:
    """Something new in an empty cell; a scene has at most seven things, so there is one."""
    return Change("add", -1, rng.choice(list(COLOURS)), rng.choice(KINDS), cell=rng.choice(scene.empty))


def spread(change: Change, scene: Scene) -> tuple[Change, ...]:
    """The same change done to everything it can be done to."""
    if change.task == "add":
        return tuple(replace(change, cell=cell) for cell in scene.empty)
    things = enumerate(scene.things)
    if change.task == "state":
        return tuple(
            replace(change, index=i) for i, t in things if t.kind == change.kind and t.altered != change.altered
        )
    return tuple(replace(change, index=i) for i, _ in things)


def apply_changes(scene: Scene, changes: Sequence[Change]) -> Scene:
    """The scene after all changes; indices are those of the scene before."""
    after = scene
    for change in sorted(changes, key=lambda c: -c.index):
        if change.task == "add":
            after = replace(after, things=(*after.things, change.added))
        else:
            after = after.swap(change.index, change.apply(scene.things[change.index]))
    return after

"""The gallery: scenes of the mini world with a fitting instruction, made anew at every start from fixed seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = (17, 29, 48, 84, 10, 37)


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and what to ask for."""

    picture: Image
    instruction: str
    name: str


def examples() -> tuple[Example, ...]:
    """The scenes, in a fixed order."""
    from replan.mini.instructions import random_item
    from replan.mini.scenes import draw

    found = []
    for seed in SEEDS:
        item = random_item(random.Random(seed))
        text = item.instruction[0].upper() + item.instruction[1:]
        found.append(Example(draw(item.scene), text, f"{item.scene.place}-{seed}.png"))
    return tuple(found)

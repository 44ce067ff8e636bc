"""The gallery: scenes of the mini world, made anew from fixed seeds, and photographs for the editors that know them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = (42, 33, 36, 51, 11, 1)
PHOTOS = {  # where they come from: photos/README.md
    "coffee": "Replace the cup of coffee with a small potted cactus",
    "cat": "Make the cat's eyes bright blue",
    "astronaut": "Make the orange suit dark green and remove the small model shuttle",
    "rocket": "Turn the clouds of smoke pink",
}
MINI = "mini"
DRAWN_ONLY = (
    "The mini models make nonsense of it: they know their own drawn scenes only. "
    "For photographs: replan demo --backbone flux-kontext."
)


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and what to ask for."""

    picture: Image
    instruction: str
    name: str


def examples(*, photos_first: bool = False) -> tuple[Example, ...]:
    """Scenes and photographs, in a fixed order."""
    scenes, photos = _scenes(), _photos()
    return photos + scenes if photos_first else scenes + photos


def suits(picture: Image, backbone: str) -> bool:
    """Whether a backbone can make sense of a picture; the mini models' own scenes are all of one size."""
    from replan.mini.scenes import SIZE

    return backbone != MINI or picture.size == (SIZE.width, SIZE.height)


def _scenes() -> tuple[Example, ...]:
    from replan.mini.instructions import item_at
    from replan.mini.scenes import draw

    found = []
    for seed in SEEDS:
        item = item_at(seed)
        text = item.instruction[0].upper() + item.instruction[1:]
        found.append(Example(draw(item.scene), text, f"{item.scene.place}-{seed}.png"))
    return tuple(found)


def _photos() -> tuple[Example, ...]:
    from PIL import Image

    found = []
    for name, text in PHOTOS.items():
        with resources.files("replan.demo").joinpath("photos", f"{name}.jpg").open("rb") as file:
            found.append(Example(Image.open(file).convert("RGB"), text, f"{name}.png"))
    return tuple(found)

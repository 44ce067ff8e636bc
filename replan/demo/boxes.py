"""The box editor (static/boxes.*): what it is given, and the way from what it sends back to checked regions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from replan import plan as grammar
from replan.demo.pictures import shown
from replan.demo.widget import stamped
from replan.errors import PlanError
from replan.regions import read_box, read_point
from replan.rules import MAX_REGIONS
from replan.types import Plan, Region, Size

if TYPE_CHECKING:
    from PIL.Image import Image

KEEP_HINT = "keep this unchanged"  # what a negative region says; static/boxes.js spells it the same way
MAX_HINT = 500
MAX_ID = 2**31


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is on the canvas: regions in the picture's pixels, and an id for each that survives reordering."""

    regions: tuple[Region, ...]
    ids: tuple[int, ...]


def fresh(regions: tuple[Region, ...]) -> Drawn:
    """Regions that nobody has seen before, with ids that no others have."""
    return Drawn(regions, tuple(secrets.randbelow(MAX_ID - 1) + 1 for _ in regions))


NOTHING = Drawn((), ())


def picture_value(image: Image, drawn: Drawn = NOTHING) -> dict[str, Any]:
    """The editor's value for a new picture; it forgets its undo steps."""
    size = {"picture": shown(image), "width": image.width, "height": image.height}
    return regions_value(drawn) | size


def regions_value(drawn: Drawn) -> dict[str, Any]:
    """The editor's value for new regions over the same picture; the user can undo them."""
    regions = [
        {
            "id": ident,
            "box": list(region.box.as_tuple()),
            "hint": region.hint,
            "point": None if region.point is None else list(region.point),
        }
        for ident, region in zip(drawn.ids, drawn.regions, strict=True)
    ]
    return stamped({"regions": regions})


def read_canvas(value: Any, size: Size) -> Drawn:
    """Check what a browser sent: boxes are put into the picture of `size`, hints may still be empty.

    Raises PlanError for anything that the editor's own script would not send.
    """
    items = value.get("regions", []) if isinstance(value, Mapping) else None
    if not isinstance(items, list) or len(items) > MAX_REGIONS:
        raise PlanError(f"the canvas must hold a list of at most {MAX_REGIONS} regions; reload the page")
    regions, ids = [], []
    for number, item in enumerate(items, 1):
        regions.append(_region(item, size, number))
        ident = item.get("id")
        if not isinstance(ident, int) or isinstance(ident, bool) or not 0 < ident < MAX_ID or ident in ids:
            raise PlanError(f"region {number}: has no id of its own; reload the page")
        ids.append(ident)
    return Drawn(tuple(regions), tuple(ids))


def _region(item: Any, size: Size, number: int) -> Region:
    if not isinstance(item, Mapping):
        raise PlanError(f"region {number}: is no object; reload the page")
    hint = KEEP_HINT if item.get("keep") is True else item.get("hint")
    if not isinstance(hint, str) or len(hint) > MAX_HINT:
        raise PlanError(f"region {number}: a hint is a text of at most {MAX_HINT} characters")
    name = f"region {number}"
    box, _ = read_box(item.get("box"), size, name)
    point, _ = read_point(item.get("point"), size, name)
    return Region(box, hint.strip(), point)


def drawn_plan(drawn: Drawn, prompt: str, size: Size, reasoning: str = "") -> Plan | None:
    """The plan on screen; None when it holds neither boxes nor a prompt. Raises PlanError for a box without a hint."""
    for number, region in enumerate(drawn.regions, 1):
        if not region.hint:
            raise PlanError(
                f"Region {number} has no hint. Say what should happen inside it, mark it as kept, or delete it."
            )
    if not drawn.regions and not prompt.strip():
        return None
    return Plan(reasoning, prompt.strip() or grammar.KEEP, drawn.regions, size)

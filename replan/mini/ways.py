"""The ways to edit an item that the report compares: its rows, and how each of them makes its picture."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from replan.errors import ConfigError
from replan.mini.instructions import KEEP_REST, Item
from replan.mini.scenes import COLOURS, KINDS, POSITIONS, draw
from replan.planner.base import Outcome
from replan.presets import preset_names
from replan.types import Box, Edit, EditRequest, Plan, Region, Size

if TYPE_CHECKING:
    from replan.edit import Editor
    from replan.planner.local import LocalPlanner

NOISE = (10, 20, 50, 70)  # per cent, as published
# How the answer of a planner without reasoning is begun for it. Were the rest of it left open, a planner that always
# reasoned in training would jump to a hint without a box; so it has to name regions.
BEGUN = f"<think></think><gen_image>{KEEP_REST}</gen_image><region>["
CEILING = "ceiling"
Plans = Literal["none", "exact", "planner", "hasty"]

_NAMED = re.compile(r"\b[Ii]t is (the [\w ,-]+?)\s*(?:[:.;]|$)")
_SHORTHAND = re.compile(rf"^the ({'|'.join(KINDS)}) ({'|'.join(COLOURS)})$")  # the mini planner's: kind, then colour
_KEEP = re.compile(r"\b(?:keep|leave)\b.*\b(?:unchanged|as (?:it|they) (?:is|are|was|were))\b")


@dataclass(frozen=True, slots=True)
class Way:
    """One row of the report.

    plans    whose plan: none, the exact one, the planner's, or that of the planner made to answer without reasoning
    rules    a preset of attention rules; None = the editor's own
    noise    per cent of a box's size by which each of its edges may be off
    rewrite  the plan becomes one instruction for the whole picture, and the stock editor gets that
    named    hints say which thing is meant, as big planners do, although the box says it already
    """

    name: str
    title: str
    group: str
    plans: Plans
    rules: str | None = None
    noise: int = 0
    rewrite: bool = False
    named: bool = False

    @property
    def ceiling(self) -> bool:
        """Not an edit at all: the exact target as the editor's autoencoder gives it back."""
        return self.group == CEILING


def ways() -> dict[str, Way]:
    """Every row by its name, in the report's order; each preset of attention rules has one."""
    stock, rules, whole = "no regions", "exact plan, by attention rules", "the planner's plan"
    boxes, hints = "exact plan, edges of boxes off, own rules", "exact plan, hints that name the thing"
    found = [
        Way("base", "base editor, bare instruction", stock, "none"),
        Way("rephrase", "base editor, instruction rewritten from the plan", stock, "planner", rewrite=True),
        *(
            Way(name, f"rules `{name}`", rules, "exact", rules=name)
            for name in sorted(preset_names(), key=lambda n: (n != "paper", n))
        ),
        Way("own", "the editor's own rules", rules, "exact"),
        *(
            Way(f"named-{name}", f"rules `{name}`", hints, "exact", rules=name, named=True)
            for name in ("paper", "direct")
        ),
        *(Way(f"noise-{share}", f"up to {share} % of its size", boxes, "exact", noise=share) for share in NOISE),
        Way("end-to-end-paper", "end to end, rules `paper`", whole, "planner", rules="paper"),
        Way("no-reasoning", "planner without reasoning, own rules", whole, "hasty"),
        Way("end-to-end", "end to end, own rules", whole, "planner"),
        Way("ceiling", "exact target through the autoencoder", CEILING, "none"),
    ]
    return {way.name: way for way in found}


def choose(names: Sequence[str]) -> list[Way]:
    """The named rows in the report's order; all of them for no names. Raises ConfigError for an unknown one.

    A file of attention rules is a row too: the exact plan under these rules.
    """
    known = ways()
    group = known["own"].group
    for file in (name for name in names if name.endswith((".yaml", ".yml"))):
        known[file] = Way(file, f"rules `{Path(file).stem}`", group, "exact", rules=file)
    known = dict(sorted(known.items(), key=lambda pair: [way.group for way in known.values()].index(pair[1].group)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"row {unknown[0]!r}: unknown; there are {', '.join(known)}")
    return [way for name, way in known.items() if not names or name in names]


def make(editor: Editor, way: Way, item: Item, plan: Outcome | None, seed: int = 0) -> Edit:
    """The item edited in this way; `plan` is the planner's outcome where the way has one.

    A plan that cannot be used falls back to the bare instruction, as the editor itself does it.
    """
    request = EditRequest(draw(item.scene), item.instruction, seed)
    if way.ceiling:
        return _ceiling(editor, item, request)
    usable = plan if way.plans != "none" and isinstance(plan, Plan) else None
    if way.plans == "exact":
        usable = jitter(item.plan, way.noise / 100, seed) if way.noise else item.plan
        usable = name_things(usable) if way.named else usable
    if usable is None:
        return editor.baseline(request)
    if way.rewrite:
        return editor.baseline(replace(request, instruction=rewrite(usable)))
    return editor(replace(request, plan=usable))


def jitter(plan: Plan, share: float, seed: int) -> Plan:
    """The plan with each edge of each box moved by up to `share` of the box's width or height, by a seed."""
    rng = random.Random(f"{seed} {plan.regions}")
    regions = tuple(replace(region, box=_moved(region.box, share, plan.size, rng)) for region in plan.regions)
    return replace(plan, regions=regions)


def _moved(box: Box, share: float, size: Size, rng: random.Random) -> Box:
    """At least one pixel of the picture stays inside."""
    dx, dy = share * box.width, share * box.height
    left, right = sorted(round(edge + rng.uniform(-dx, dx)) for edge in (box.left, box.right))
    top, bottom = sorted(round(edge + rng.uniform(-dy, dy)) for edge in (box.top, box.bottom))
    left, top = min(max(left, 0), size.width - 1), min(max(top, 0), size.height - 1)
    return Box(left, top, max(right, left + 1), max(bottom, top + 1)).clip(size)


def rewrite(plan: Plan) -> str:
    """A plan as one instruction without regions: each hint said of the thing that the reasoning settled on.

    Everything comes from the planner's own answer. Where its reasoning names nothing, the box says where the thing is.
    """
    parts = [region.hint for region in name_things(plan).regions]
    if not plan.regions or not _KEEP.search(plan.prompt):
        parts.insert(0, plan.prompt)
    return " and ".join(parts)


def name_things(plan: Plan) -> Plan:
    """The plan with hints that say which thing is meant: "make the white cup in the top left red"."""
    named = _NAMED.findall(plan.reasoning)
    if len(named) != len(plan.regions):
        named = [""] * len(plan.regions)
    regions = (
        replace(region, hint=_said_of(region, name, plan.size))
        for region, name in zip(plan.regions, named, strict=True)
    )
    return replace(plan, regions=tuple(regions))


def _said_of(region: Region, name: str, size: Size) -> str:
    """ "make this red" -> "make the white cup in the top left red"."""
    place = where(region.box, size)
    words = name or "the thing"
    for known in sum(POSITIONS, ()):
        if known in words:  # the reasoning says the place itself
            words, place = words.replace(f"in the {known}", "").replace(known, "").strip(), known
    words = _SHORTHAND.sub(r"the \2 \1", words)
    hint = region.hint
    if re.search(r"\bhere\b", hint):
        return re.sub(r"\bhere\b", f"in the {place}", hint, count=1)
    words = f"{words} in the {place}"
    return re.sub(r"\bthis\b", words, hint, count=1) if re.search(r"\bthis\b", hint) else f"{hint}: {words}"


def where(box: Box, size: Size) -> str:
    """The ninth of the picture that the middle of a box lies in, in words."""
    column = min(2, (box.left + box.right) * 3 // (2 * size.width))
    row = min(2, (box.top + box.bottom) * 3 // (2 * size.height))
    return POSITIONS[row][column]


def hasty(planner: LocalPlanner) -> LocalPlanner:
    """The same planner made to answer without reasoning: its answer is begun for it, up to the list of regions.

    It was trained to reason first, so this takes something away from it; it is not a planner trained without.
    """
    from replan.planner.local import LocalPlanner, View

    class Hasty(LocalPlanner):
        def view(self, request: EditRequest) -> View:
            view = super().view(request)
            return replace(view, text=view.text + BEGUN)

        def answer(self, *args: Any, **options: Any) -> list[tuple[str, bool]]:
            return [(BEGUN + text, cut) for text, cut in super().answer(*args, **options)]

    found = Hasty.__new__(Hasty)
    vars(found).update(vars(planner))  # the same model, processor and settings
    return found


def _ceiling(editor: Editor, item: Item, request: EditRequest) -> Edit:
    """What the best editor could give: its autoencoder's own blur is all that is left."""
    target = replace(request, image=draw(item.target))
    cond = editor.backbone.condition(target, None, editor.config)
    return Edit(request, None, editor.backbone.decode(cond.tensors["reference"], cond))

"""Measures the mini models on held-out items with the exact judge: planner, editor, both, and the bare editor."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from replan.errors import ConfigError, PlanError, PlannerError
from replan.mini.instructions import SPLITS, Item, random_item
from replan.mini.judge import MiniVerdict, judge
from replan.mini.scenes import draw
from replan.types import EditRequest, Plan

if TYPE_CHECKING:
    from replan.edit import Editor
    from replan.rules import MaskConfig


def items(split: str, count: int) -> list[Item]:
    """The first `count` items of a held-out split."""
    return [random_item(random.Random(SPLITS[split] + number)) for number in range(count)]


def request(item: Item, *, planned: bool = False, seed: int = 0) -> EditRequest:
    """The item as a request; `planned` hands over the exact plan."""
    return EditRequest(draw(item.scene), item.instruction, seed, item.plan if planned else None)


@dataclass(frozen=True, slots=True)
class Rate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int


def rate(values: Sequence[float], draws: int = 2000) -> Rate:
    """Mean and percentile bootstrap interval; the resampling has its own fixed seed."""
    data = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(data), (draws, len(data)))
    low, high = np.percentile(data[picks].mean(1), (2.5, 97.5))
    return Rate(float(data.mean()), float(low), float(high), len(data))


def score_plans(pairs: Sequence[tuple[Item, Plan | PlanError]]) -> Mapping[str, Rate]:
    """valid: a plan at all; object: every asked box found (IoU > 0.5) and no other; hint: right words on the right box;
    reason: the reasoning settles on every boxed thing by colour, kind and position."""
    valid, found, hinted, named = [], [], [], []
    for item, plan in pairs:
        regions = () if isinstance(plan, PlanError) else plan.regions
        wanted = item.plan.regions
        valid.append(not isinstance(plan, PlanError))
        matches = [next((r for r in regions if r.box.iou(w.box) > 0.5), None) for w in wanted]
        found.append(bool(valid[-1]) and len(regions) == len(wanted) and None not in matches)
        hints = [r.hint for r in regions]
        hinted.append(bool(valid[-1]) and sorted(hints) == sorted(w.hint for w in wanted))
        if wanted:
            names = [
                f"It is the {t.colour} {t.kind} {t.position}"
                for t in (item.scene.things[c.index] for c in item.changes)
            ]
            named.append(not isinstance(plan, PlanError) and all(name in plan.reasoning for name in names))
    return {"valid": rate(valid), "object": rate(found), "hint": rate(hinted), "reason": rate(named)}


def score_edits(verdicts: Sequence[MiniVerdict]) -> Mapping[str, Rate]:
    """The judge's columns, the success rate, and the mean outside-box PSNR in dB (equal pictures count as 60)."""
    columns = ("quality", "target", "effect", "consistency", "overall", "weighted", "success")
    rows = {name: rate([float(getattr(v, name)) for v in verdicts]) for name in columns}
    return rows | {"outside_psnr": rate([min(v.outside_psnr, 60.0) for v in verdicts])}


def run(todo: Sequence[Item], edit: Callable[[Item], Image.Image]) -> list[MiniVerdict]:
    """Edit and judge every item."""
    return [judge(item, edit(item)) for item in todo]


def measure(editor: Editor, todo: Sequence[Item], paper: MaskConfig) -> Mapping[str, Mapping[str, Rate]]:
    """Every table of the report: the planner's rates, and the judge's columns for four ways to edit.

    `paper` are the published attention rules; the editor's own configuration is the one it would use anyway.
    """
    planned = plan_all(editor, [request(item) for item in todo])
    plans = {id(item): plan for item, plan in zip(todo, planned, strict=True)}
    own = editor.config
    tables: dict[str, Mapping[str, Rate]] = {"planner": score_plans(list(zip(todo, planned, strict=True)))}

    def end_to_end(item: Item) -> Image.Image:
        plan = plans[id(item)]
        if isinstance(plan, PlanError):  # as the editor does it: the bare instruction
            return editor.baseline(request(item)).image
        return editor(replace(request(item), plan=plan)).image

    tables["base editor, bare instruction"] = score_edits(run(todo, lambda item: editor.baseline(request(item)).image))
    editor.config = replace(own, mask=paper)
    tables["exact plan, the paper's rules"] = score_edits(run(todo, lambda i: editor(request(i, planned=True)).image))
    editor.config = own
    tables["exact plan"] = score_edits(run(todo, lambda item: editor(request(item, planned=True)).image))
    tables["end to end"] = score_edits(run(todo, end_to_end))
    return tables


def plan_all(editor: Editor, requests: Sequence[EditRequest], batch: int = 16) -> list[Plan | PlanError]:
    """Plans of many requests, in batches; a bad answer stands in its own place as its error."""
    planner = editor.planner
    if planner is None:
        raise ConfigError("this editor has no planner")
    found: list[Plan | PlanError] = []
    for start in range(0, len(requests), batch):
        for outcome in planner.plan_many(requests[start : start + batch]):
            if isinstance(outcome, PlannerError):  # an outage of ours is no bad plan
                raise outcome
            found.append(outcome)
    return found


def render_markdown(tables: Mapping[str, Mapping[str, Rate]]) -> str:
    """The report as Markdown: means with 95 % intervals."""
    planner = tables["planner"]
    lines = [
        f"Planner on {next(iter(planner.values())).count} held-out items:",
        "",
        "| measure | mean | 95 % |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {r.mean:.3f} | {r.low:.3f} to {r.high:.3f} |" for name, r in planner.items()]
    rows = {name: table for name, table in tables.items() if name != "planner"}
    columns = list(next(iter(rows.values())))
    lines += ["", "| edited by | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, table in rows.items():
        cells = [f"{table[c].mean:.2f} ({table[c].low:.2f} to {table[c].high:.2f})" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

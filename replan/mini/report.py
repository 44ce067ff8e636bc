"""Measures the mini models on held-out items with the exact judge: planner, editor, both, and the bare editor."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from replan.errors import PlanError
from replan.mini.instructions import Item, random_item
from replan.mini.judge import MiniVerdict, judge
from replan.mini.scenes import draw
from replan.types import EditRequest, Plan

SPLITS = {"dev": 1 << 40, "test": 1 << 41}  # first seed; training uses small ones


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
    reason: the reasoning names every boxed thing by colour, kind and position."""
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
            names = [f"{t.colour} {t.kind} {t.position}" for t in (item.scene.things[c.index] for c in item.changes)]
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

"""Rows, editors and judges for tests of the training: no weights, no network."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from replan.errors import BackboneError, JudgeError
from replan.judge import Case, Dimension, Rating
from replan.mini.rows import item_of
from replan.mini.scenes import draw
from replan.train.build import BuildConfig, build
from replan.train.data import Row, Rows
from replan.types import Edit, EditRequest, Plan


def mini_rows(folder: Path, count: int = 4, split: str = "train") -> Rows:
    """Rows of the mini world."""
    return Rows(
        build(BuildConfig(split=split, model="mini", multiple=16, count=count), folder / f"{split}.parquet").path
    )


def answer(plan: Plan, think: str = "The instruction means what stands in the box, and nothing else.") -> str:
    """A plan in the strict grammar."""
    listed = [{"bbox_2d": list(region.box.as_tuple()), "hint": region.hint} for region in plan.regions]
    return f"<think>{think}</think><gen_image>{plan.prompt}</gen_image><region>{json.dumps(listed)}</region>"


def exact_plan(row: Row) -> Plan:
    """The plan that solves a mini row."""
    item = item_of(row.task.extra)
    assert item is not None
    return item.plan


def alike(plan: Plan, exact: Plan) -> bool:
    """The same regions, boxes within reason and hints word for word."""
    near = [
        any(one.hint == other.hint and one.box.iou(other.box) > 0.5 for one in plan.regions) for other in exact.regions
    ]
    return len(plan.regions) == len(exact.regions) and all(near)


class Editor:
    """Draws the exact target when the plan is right, and leaves the picture alone otherwise."""

    def __init__(self, rows: Rows) -> None:
        self.known = {row.task.instruction: row for row in (rows[k] for k in range(len(rows)))}
        self.calls: list[EditRequest] = []
        self.broken: Callable[[int, EditRequest], Exception | None] = lambda number, request: None
        self._lock = threading.Lock()

    def __call__(self, request: EditRequest) -> Edit:
        with self._lock:
            self.calls.append(request)
            number = len(self.calls)
        error = self.broken(number, request)
        if error is not None:
            raise error
        item = item_of(self.known[request.instruction].task.extra)
        assert item is not None
        assert request.plan is not None
        return Edit(request, request.plan, draw(item.target) if alike(request.plan, item.plan) else request.image)


class Judge:
    """The mini world's exact judge, which may be out of order."""

    def __init__(self) -> None:
        from replan.judge.mini import MiniJudge

        self.exact, self.is_down, self.asked = MiniJudge(), False, 0

    def describe(self) -> Mapping[str, Any]:
        return self.exact.describe()

    def key(self, case: Case, dimension: Dimension) -> str | None:
        return None

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        return 0, 0

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        self.asked += 1
        if self.is_down:
            raise JudgeError("the judge is down")
        return self.exact.rate(case, dimension)

    def stop(self) -> None:
        """Nothing is under way."""


def outage() -> Exception:
    """What an editor in this process raises when its machine fails."""
    return BackboneError("the editor is down")

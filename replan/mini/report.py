"""Measures the mini models on held-out items with the exact judge: the planner, and every way to edit (mini.ways)."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan.config import dump
from replan.errors import ConfigError, PlannerError
from replan.eval.progress import Pace
from replan.eval.statistics import Estimate, estimate
from replan.mini.instructions import Item
from replan.mini.judge import MiniVerdict, judge
from replan.mini.rows import item_of, rows
from replan.mini.scenes import draw
from replan.mini.ways import Plans, Way, hasty, make
from replan.planner.base import Outcome
from replan.presets import apply_preset
from replan.record import sha256, versions
from replan.types import EditRequest, Plan

if TYPE_CHECKING:
    from replan.backbones import EditConfig
    from replan.edit import Editor
    from replan.planner.local import LocalPlanner

FORMAT = 1
CAP = 60.0  # dB; equal pictures count as this
JUDGED = ("quality", "target", "effect", "consistency")
PLANNED: tuple[Plans, ...] = ("planner", "hasty")
COLUMNS = (*JUDGED, "overall", "weighted", "success", "outside_psnr", "seconds")
Say = Callable[[str], None]


# --- items and plans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A held-out item with its categories, as its row in IV-Edit's schema says them."""

    item: Item
    seed: int
    task: str
    referring: str


def cases(split: str, count: int) -> list[Case]:
    """The first `count` items of a split. Raises ConfigError for an unknown split, or when a row is not ours."""
    found = []
    for row in rows(split, count):
        extra = json.loads(row["extra_info"])
        item = item_of(extra)
        if item is None:
            raise ConfigError(f"split {split}: row {len(found)} does not say which item it is")
        found.append(Case(item, extra["mini"]["seed"], extra["task_type"], extra["referring_type"]))
    return found


def items(split: str, count: int) -> list[Item]:
    """The first `count` items of a held-out split."""
    return [case.item for case in cases(split, count)]


def request(item: Item, *, planned: bool = False, seed: int = 0) -> EditRequest:
    """The item as a request; `planned` hands over the exact plan."""
    return EditRequest(draw(item.scene), item.instruction, seed, item.plan if planned else None)


def names(item: Item) -> list[str]:
    """For each asked change the phrase with which a reasoning that found the thing or place names it."""
    return [f"It is the {change.name(item.scene)}:" for change in item.changes]


def score_plan(item: Item, plan: Outcome) -> dict[str, bool | None]:
    """valid: a plan at all; object: every asked box found (IoU > 0.5) and no other; hint: right words on all boxes;
    reason: the reasoning settles on every boxed thing by name, None where nothing is to be boxed."""
    wanted = item.plan.regions
    if not isinstance(plan, Plan):
        return {"valid": False, "object": False, "hint": False, "reason": False if wanted else None}
    matches = [next((r for r in plan.regions if r.box.iou(w.box) > 0.5), None) for w in wanted]
    return {
        "valid": True,
        "object": len(plan.regions) == len(wanted) and None not in matches,
        "hint": sorted(r.hint for r in plan.regions) == sorted(w.hint for w in wanted),
        "reason": all(name in plan.reasoning for name in names(item)) if wanted else None,
    }


def score_plans(pairs: Sequence[tuple[Item, Outcome]]) -> Mapping[str, Estimate]:
    """The rates of `score_plan` over many plans."""
    return rates([score_plan(item, plan) for item, plan in pairs])


def rates(found: Sequence[Mapping[str, bool | None]]) -> Mapping[str, Estimate]:
    """Mean and interval of each measure over the items that have it."""
    told = {name: [float(bit) for one in found if (bit := one[name]) is not None] for name in found[0]}
    return {name: value for name, values in told.items() if (value := estimate(values)) is not None}


def plan_all(planner: Any, requests: Sequence[EditRequest], say: Say = print, batch: int = 16) -> list[Outcome]:
    """Plans of many requests, in batches; a bad answer stands in its own place as its error."""
    found: list[Outcome] = []
    for start in range(0, len(requests), batch):
        for outcome in planner.plan_many(requests[start : start + batch]):
            if isinstance(outcome, PlannerError):  # an outage of ours is no bad plan
                raise outcome
            found.append(outcome)
        say(f"plans: {len(found)} of {len(requests)}")
    return found


# --- edits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Models:
    """What is measured: editor, planner, and settings (a name under configs/ or a file) instead of the editor's own."""

    backbone: str = "mini"
    planner: str = "mini"
    edit: str = ""

    def settings(self, way: Way | None = None) -> EditConfig:
        """The editor's settings, with the rules of a way over them. Raises ConfigError."""
        from replan import config
        from replan.backbones import EditConfig, find

        plain = config.load(EditConfig, self.edit or find(self.backbone)[0].config)
        rules = None if way is None else way.rules
        return plain if rules is None else replace(plain, mask=apply_preset(plain.mask, rules))

    def editor(self) -> Editor:
        """The editor without a planner; it loads when first used."""
        from replan.edit import Editor

        return Editor.load(self.backbone, None, config=self.settings())

    def planners(self) -> tuple[LocalPlanner, LocalPlanner]:
        """The planner as it is, and made to answer at once. Raises ConfigError for one that is not in this process."""
        from replan.planner import load_planner
        from replan.planner.local import LocalPlanner

        planner = load_planner(self.planner)
        if not isinstance(planner, LocalPlanner):
            raise ConfigError(f"planner {self.planner}: only a local model can be made to answer without reasoning")
        return planner, hasty(planner)

    def weights(self, part: str) -> str:
        """A hash of a part's weights in a folder, else its name."""
        spec = self.backbone if part == "editor" else self.planner
        folder = Path(__file__).parent / "weights" / part if spec == "mini" else Path(spec)
        files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
        return " ".join([spec, *(sha256(file) for file in files)])


@dataclass(frozen=True, slots=True)
class Shot:
    """One edit judged; the time is that of the processor on a CPU, that of the clock elsewhere."""

    verdict: MiniVerdict
    seconds: float


@functools.cache
def _editor(models: Models) -> Editor:
    """The editor of this process."""
    return models.editor()


def shoot(models: Models, way: Way, seed: int, plan: Outcome | None) -> Shot:
    """Edit and judge the item with this seed."""
    from replan.edit import Editor

    item = item_of({"mini": {"seed": seed}})
    assert item is not None
    editor = Editor(None, _editor(models).backbone, models.settings(way))
    began = clock()
    edit = make(editor, way, item, plan)
    return Shot(judge(item, edit.image), clock() - began)


def clock() -> float:
    """Seconds of the processor on a CPU, where others may be at work too; of the wall clock with an accelerator."""
    return time.perf_counter() if _accelerated() else time.process_time()


def _accelerated() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _start_worker() -> None:
    """A worker has one thread, says nothing of its own, and leaves Ctrl-C to its parent."""
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def mapper(workers: int) -> Iterator[Callable[..., Iterable[Shot]]]:
    """`map`, in this process or over several of them."""
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


# --- the whole report ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the report. `done` is an earlier report; its rows are kept where nothing has changed."""

    models: Models
    split: str
    count: int
    ways: Sequence[Way]
    workers: int = 1
    done: Mapping[str, Any] | None = None


def measure(job: Job, keep: Callable[[dict[str, Any]], None], say: Say) -> dict[str, Any]:
    """The report as plain JSON; `keep` gets it after each row, so that a stopped run goes on where it was."""
    found = cases(job.split, job.count)
    keys = {way.name: _key(job.models, way, found) for way in job.ways}
    before: Mapping[str, Any] = (job.done or {}).get("rows", {})
    kept = {name: before[name] for name in keys if before.get(name, {}).get("key") == keys[name]}
    todo = [way for way in job.ways if way.name not in kept]
    report = {"format": FORMAT, "about": _about(job), "items": _categories(found), "plans": {}, "rows": kept}
    plans: dict[Plans, tuple[list[Outcome], float]] = {}
    earlier = (job.done or {}).get("plans", {})
    for kind in PLANNED:
        if not any(way.plans == kind for way in job.ways):
            continue
        key = _key(job.models, kind, found)
        if earlier.get(kind, {}).get("key") == key and not any(way.plans == kind for way in todo):
            report["plans"][kind] = earlier[kind]
            continue
        plans[kind] = _plan(job.models, kind, found, say)
        report["plans"][kind] = {"key": key, "seconds": round(plans[kind][1], 3), **_bits(found, plans[kind][0])}
    with mapper(job.workers) as over:
        for way in todo:
            given, seconds = plans.get(way.plans, ([None] * len(found), 0.0))
            shots = over(shoot, repeat(job.models), repeat(way), [case.seed for case in found], given)
            row = _row(list(_told(shots, len(found), way, say)), seconds)
            report["rows"][way.name] = {"title": way.title, "group": way.group, "key": keys[way.name], **row}
            keep(report)
    report["rows"] = {way.name: report["rows"][way.name] for way in job.ways}
    keep(report)
    return report


def _plan(models: Models, kind: Plans, found: Sequence[Case], say: Say) -> tuple[list[Outcome], float]:
    """Plans of all cases by one of the planners, and the seconds that one took."""
    planner = models.planners()[kind == "hasty"]
    began = clock()
    plans = plan_all(planner, [request(case.item) for case in found], lambda text: say(f"{kind}: {text}"))
    return plans, (clock() - began) / len(found)


def _told(shots: Iterable[Shot], total: int, way: Way, say: Say) -> Iterator[Shot]:
    """The same, with a line now and then."""
    pace = Pace(total)
    for shot in shots:
        line = pace.tick(worked=True)
        if line:
            say(f"{way.name}: {line}")
        yield shot
    say(f"{way.name}: done")


def _row(shots: Sequence[Shot], planning: float) -> dict[str, Any]:
    """One row's figures by item; scores have one digit each."""
    digits = {name: "".join(str(getattr(shot.verdict, name)) for shot in shots) for name in JUDGED}
    return digits | {
        "outside_psnr": [round(min(shot.verdict.outside_psnr, CAP), 2) for shot in shots],
        "seconds": [round(shot.seconds + planning, 3) for shot in shots],
    }


def _bits(found: Sequence[Case], plans: Sequence[Outcome]) -> dict[str, str]:
    """A planner's measures by item: 1, 0, or - where there is nothing to measure."""
    scores = [score_plan(case.item, plan) for case, plan in zip(found, plans, strict=True)]
    shown = {True: "1", False: "0", None: "-"}
    return {name: "".join(shown[score[name]] for score in scores) for name in scores[0]}


def _categories(found: Sequence[Case]) -> dict[str, Any]:
    """How many items there are, and which belong to which task and referring type."""
    groups: dict[str, dict[str, list[int]]] = {"task": {}, "referring": {}}
    for number, case in enumerate(found):
        for group in groups:
            groups[group].setdefault(getattr(case, group), []).append(number)
    return {"count": len(found), **groups}


def _about(job: Job) -> dict[str, Any]:
    return {
        "split": job.split,
        "backbone": job.models.backbone,
        "planner": job.models.planner,
        "edit": dump(job.models.settings()),
        "clock": "wall" if _accelerated() else "processor",
        "versions": {name: value for name, value in versions().items() if name != "platform"},
    }


def _key(models: Models, what: Way | Plans, found: Sequence[Case]) -> str:
    """A hash of everything that decides a row's edits, or a planner's plans: weights, settings, items."""
    parts: list[object] = list(found)
    plans = what.plans if isinstance(what, Way) else what
    if isinstance(what, Way):
        parts += [what, models.settings(what), models.weights("editor")]
    if plans in PLANNED:
        parts += [plans, models.weights("planner")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

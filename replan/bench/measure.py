"""Sides that are run alternately in one process, and what is said about each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from replan.bench.watch import Seen, observe
from replan.errors import ReplanError


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One way to do the work.

    prepare  makes the run, outside the measured time: plans, masks, caches
    flops    of one run, given what was prepared (asked after the run)
    check    what is wrong with how it ran, or None; a side that ran something else than its name says gets no figures
    operators  whether a CPU's operators can be watched meanwhile: not while FlexAttention runs uncompiled
    error    relative error of its output against the dense oracle, or None where it is the oracle or has another input
    """

    name: str
    prepare: Callable[[], Callable[[], Tensor]]
    flops: Callable[[], float] | None = None
    check: Callable[[Seen], str | None] = lambda seen: None
    error: Callable[[Tensor], float] | None = None
    more: Callable[[], Mapping[str, Any]] = dict
    operators: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """What came out. Times in seconds; `ratio` against the same round's first side; `problem`: why there are none."""

    group: str
    name: str
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    flops: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def spread(self) -> float | None:
        """Half the distance between slowest and fastest, over the median."""
        middle = self.median
        return (max(self.seconds) - min(self.seconds)) / 2 / middle if middle else None

    @property
    def rate(self) -> float | None:
        """Operations per second."""
        middle = self.median
        return self.flops / middle if self.flops and middle else None


Say = Callable[[str], None]


Clock = Literal["wall", "cpu"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure. `clock`: wall time, or on a CPU that others use too, this process's own CPU time."""

    device: torch.device
    repeats: int
    clock: Clock
    say: Say

    def seconds(self, run: Callable[[], Any]) -> float:
        """How long one run takes."""
        now = time.perf_counter if self.clock == "wall" else time.process_time
        with torch.no_grad():
            self._wait()
            start = now()
            run()
            self._wait()
        return now() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def alternate(group: str, sides: Sequence[Side], plan: Plan) -> list[Row]:
    """Observe every side once, then time all of them in turn, round by round, each round beginning with another one."""
    runs: dict[str, Callable[[], Tensor]] = {}
    sights: dict[str, Seen] = {}
    rows: dict[str, Row] = {}
    for side in sides:
        plan.say(f"{group}: {side.name}")
        rows[side.name], run, seen = _first(group, side, plan.device)
        if run is not None and seen is not None:
            runs[side.name], sights[side.name] = run, seen
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(plan.repeats):
        plan.say(f"{group}: round {number + 1} of {plan.repeats}")
        start = number % max(len(names), 1)
        for name in names[start:] + names[:start]:
            seconds[name].append(plan.seconds(runs[name]))
    base = seconds.get(sides[0].name)
    for side in sides:
        if side.name not in runs:
            continue
        row, own = rows[side.name], tuple(seconds[side.name])
        problem = side.check(sights[side.name])  # once more: a timed run may have gone another way than the watched one
        if problem is not None:
            rows[side.name] = Row(group, side.name, kernels=row.kernels, problem=f"not measured: {problem}")
            continue
        ratios = tuple(mine / theirs for mine, theirs in zip(own, base, strict=True)) if base else ()
        flops = None if side.flops is None else side.flops()
        rows[side.name] = Row(
            group, side.name, own, ratios, flops, row.peak_bytes, row.error, row.kernels, None, dict(side.more())
        )
    return list(rows.values())


def _first(group: str, side: Side, device: torch.device) -> tuple[Row, Callable[[], Tensor] | None, Seen | None]:
    """The first, watched run: whether it did what its name says, its memory and its error."""
    try:
        with torch.no_grad():
            run = side.prepare()
            seen = observe(run, device, operators=side.operators)
            problem = side.check(seen)
            error = None if side.error is None else side.error(seen.output)
    except (ReplanError, RuntimeError, ValueError, NotImplementedError, ImportError) as failure:
        first = (str(failure).strip().splitlines() or [""])[0]
        return Row(group, side.name, problem=f"failed: {type(failure).__name__}: {first[:200]}"), None, None
    kernels = dict(seen.kernels)
    if problem is not None:
        return Row(group, side.name, kernels=kernels, problem=f"not measured: {problem}"), None, None
    row = Row(group, side.name, peak_bytes=seen.peak, error=error, kernels=kernels)
    return row, run, replace(seen, output=seen.output.new_empty(0))


def relative(output: Tensor, oracle: Tensor) -> float:
    """Largest difference over the oracle's largest value."""
    return float((output.float() - oracle.float()).abs().max() / oracle.float().abs().max())

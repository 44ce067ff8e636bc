"""The whole benchmark: every row of one --size, and the report as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from replan.bench.facts import facts
from replan.bench.loops import loop_rows
from replan.bench.measure import Clock, Plan, Row, Say
from replan.bench.model import Scene, build
from replan.bench.plans import plan_rows
from replan.bench.sizes import shapes
from replan.bench.steps import STOCK, step_rows
from replan.errors import ConfigError

Part = Literal["steps", "plans", "loops"]
PARTS: tuple[Part, ...] = ("steps", "loops", "plans")  # plans last: they compile the blocks


@dataclass(frozen=True, slots=True)
class Asked:
    """The command's own words. A loop is long, so it gets a third of the rounds, at least one."""

    size: str
    device: str = "auto"
    dtype: str = "auto"
    regions: int = 2
    area: float = 0.2
    steps: int | None = None
    repeats: int = 6
    clock: str = "wall"
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for name, least in (("regions", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be {least} or more")
        if not 0 < self.area <= 1:
            raise ConfigError(f"area = {self.area}: is a share of the picture and must lie in (0, 1]")
        if self.clock not in ("wall", "cpu"):
            raise ConfigError(f"clock = {self.clock!r}: must be wall or cpu")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"parts = {', '.join(self.parts)!r}: must be some of {', '.join(PARTS)}")


def run(asked: Asked, say: Say, keep: Callable[[dict[str, Any]], None] = lambda report: None) -> dict[str, Any]:
    """The report: what was asked, on what it ran, and the rows. Raises ConfigError.

    `keep` gets the report so far after each group of rows: a run that is stopped has not been for nothing.
    """
    from replan.backbones.runtime import Runtime

    found = shapes(asked.size, asked.steps)
    where = Runtime(device=asked.device, dtype=asked.dtype)
    device, dtype = where.torch_device(), where.torch_dtype()
    if asked.clock == "cpu" and device.type != "cpu":
        raise ConfigError(f"clock = cpu: on {device.type} only wall time means anything")
    clock: Clock = "cpu" if asked.clock == "cpu" else "wall"
    how = Plan(device, asked.repeats, clock, say)
    scene = Scene(asked.regions, asked.area)
    about = facts(device) | {"dtype": str(dtype).removeprefix("torch.")}
    rows: list[Row] = []

    def report(new: list[Row]) -> dict[str, Any]:
        rows.extend(new)
        return {"asked": asdict(asked), "facts": about, "rows": [_row(row) for row in rows]}

    for shape in found:
        say(f"{shape.name}: random weights on {device.type}")
        bench = build(shape, device, dtype)
        if "steps" in asked.parts:
            keep(report(step_rows(bench, scene, how)))
        if "loops" in asked.parts:
            keep(report(loop_rows(bench, scene, replace(how, repeats=max(1, asked.repeats // 3)))))
        if "plans" in asked.parts:
            keep(report(plan_rows(bench, scene, _stock_step(rows, shape.name), how)))
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report([])


def _stock_step(rows: Sequence[Row], shape: str) -> float | None:
    return next((row.median for row in rows if row.name == STOCK and row.group.startswith(shape)), None)


def _row(row: Row) -> dict[str, Any]:
    """A row as JSON, with what is derived from its times."""
    derived = {name: getattr(row, name) for name in ("median", "spread", "ratio", "rate")}
    return asdict(row) | derived

"""From scores to figures: columns with intervals, coverage, categories, pixel measures, and runs against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

from replan.errors import ConfigError
from replan.eval import pixels
from replan.eval.generate import read_json
from replan.eval.score import read_scores
from replan.eval.statistics import Estimate, Paired, estimate, paired
from replan.judge import DIMENSIONS

Missing: TypeAlias = Literal["drop", "zero"]
CONVENTIONS: Mapping[Missing, str] = {
    "drop": "items without all four scores are left out",
    "zero": "a missing score counts as 0, as in the published table",
}
COLUMNS = ("quality", "target", "effect", "consistency", "overall", "weighted", "success")
GROUPS = ("referring", "task")
FEW = 5  # a category with fewer items gets no row of its own in the Markdown


@dataclass(frozen=True, slots=True)
class Row:
    """One item's values by column, under either convention; `drop` is None when a score is missing."""

    referring: str
    task: str
    drop: Mapping[str, float] | None
    zero: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """A scored run: its name, its judge, its items, its pixel measures by item, seconds per item where known."""

    name: str
    judge: Mapping[str, Any]
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    rows: Mapping[int, Row]
    generated: int
    bad_rows: int
    pixels: Mapping[int, Mapping[str, Any]]
    pixel_notes: tuple[str, ...]
    seconds: tuple[float, ...]

    @property
    def scored(self) -> int:
        return sum(row.drop is not None for row in self.rows.values())


@dataclass(frozen=True, slots=True)
class Summary:
    """What is said about one run. Tables: convention -> column -> estimate; groups: group -> category -> column."""

    run: Run
    table: Mapping[str, Mapping[str, Estimate | None]]
    groups: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Estimate | None]]]]
    pixels: Mapping[str, Estimate | None]
    against: Mapping[str, Mapping[str, Paired | None]] = field(default_factory=dict)
    base: str | None = None


def weighted(quality: float, target: float, effect: float, consistency: float) -> float:
    """(T + E + (Q + C) E / 5) / 4: the published code's form, which the published table fits (the paper's text not)."""
    return (target + effect + (quality + consistency) * effect / 5) / 4


def read_run(folder: Path, judge: str | None = None) -> Run:
    """A run's scores and pixel measures. Raises ConfigError when there are no scores, or several to choose from."""
    scores = read_scores(folder, judge)
    measured = read_json(folder / pixels.PIXELS)
    items = scores["items"]
    return Run(
        name=folder.resolve().name,
        judge=scores["judge"],
        settings=scores["run"]["settings"],
        data=scores["run"]["data"],
        rows={item["id"]: _row(item) for item in items},
        generated=sum("missing" not in item for item in items),
        bad_rows=len(scores["run"]["bad_rows"]),
        pixels={int(name): row for name, row in measured.get("items", {}).items()},
        pixel_notes=tuple(measured.get("notes", ())),
        seconds=tuple(item["seconds"] for item in items if item.get("seconds") is not None),
    )


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Each run, and each run after the first against the first. Raises ConfigError for runs over different data."""
    data = [(run.data.get("source"), run.data.get("split")) for run in runs]
    if len(set(data)) > 1:
        raise ConfigError(f"runs over different data cannot be compared: {', '.join(f'{s} {p}' for s, p in set(data))}")
    judges = {run.judge["name"] for run in runs}
    if len(judges) > 1:
        raise ConfigError(f"runs by different judges cannot be compared: {', '.join(sorted(judges))}; see --judge")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs are called {max(names, key=names.count)}; the folders' names name the rows")
    summaries = [_summary(run, None) for run in runs[:1]] + [_summary(run, runs[0]) for run in runs[1:]]
    return summaries


def published() -> Mapping[str, Mapping[str, float]]:
    """The published table: model -> column -> mean."""
    table = json.loads(resources.files("replan.eval").joinpath("published.json").read_text(encoding="utf-8"))
    return {name: dict(zip(table["columns"], values, strict=True)) for name, values in table["rows"].items()}


def to_json(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Everything, as plain JSON."""
    return {
        "format": 1,
        "conventions": dict(CONVENTIONS),
        "weighted": "(T + E + (Q + C) * E / 5) / 4",
        "interval": "95 % percentile bootstrap over items",
        "published": dict(published()),
        "runs": [
            {
                "name": summary.run.name,
                "judge": dict(summary.run.judge),
                "settings": dict(summary.run.settings),
                "data": dict(summary.run.data),
                "coverage": coverage(summary.run),
                "table": _plain(summary.table),
                "groups": _plain(summary.groups),
                "pixels": _plain(summary.pixels) | {"notes": list(summary.run.pixel_notes)},
                "seconds": _plain({"per_item": estimate(summary.run.seconds)})["per_item"],
                "against": {"base": summary.base, "table": _plain(summary.against)} if summary.base else None,
            }
            for summary in summaries
        ],
    }


def coverage(run: Run) -> dict[str, int]:
    """How many items there are, have a picture, have all four scores; and rows of the data that are no items."""
    return {"items": len(run.rows), "generated": run.generated, "scored": run.scored, "bad_rows": run.bad_rows}


def _row(item: Mapping[str, Any]) -> Row:
    ratings = item.get("ratings", {})
    scores = {name: ratings.get(name, {}).get("score") for name in DIMENSIONS}
    known = {name: float(score) for name, score in scores.items() if isinstance(score, int)}
    values = _values({name: known.get(name, 0.0) for name in DIMENSIONS})
    return Row(item["referring"], item["task"], values if len(known) == len(DIMENSIONS) else None, values)


def _values(scores: Mapping[str, float]) -> dict[str, float]:
    right = all(scores[name] == 5 for name in ("target", "effect", "consistency")) and scores["quality"] >= 4
    return {
        **scores,
        "overall": sum(scores.values()) / len(scores),
        "weighted": weighted(**scores),
        "success": float(right),
    }


def _summary(run: Run, base: Run | None) -> Summary:
    kinds: tuple[Missing, ...] = ("drop", "zero")
    groups = {
        kind: {
            group: {
                name: _table([row for row in run.rows.values() if getattr(row, group) == name], kind)
                for name in sorted({getattr(row, group) for row in run.rows.values()})
            }
            for group in GROUPS
        }
        for kind in kinds
    }
    measures = {
        column: estimate([row[column] for row in run.pixels.values() if row.get(column) is not None])
        for column in pixels.COLUMNS
    }
    table = {kind: _table(list(run.rows.values()), kind) for kind in kinds}
    if base is None:
        return Summary(run, table, groups, measures)
    against = {kind: {column: _against(base, run, column, kind) for column in COLUMNS} for kind in kinds}
    return Summary(run, table, groups, measures, against, base.name)


def _table(rows: Sequence[Row], kind: Missing) -> dict[str, Estimate | None]:
    found = [values for row in rows if (values := getattr(row, kind)) is not None]
    return {column: estimate([values[column] for values in found]) for column in COLUMNS}


def _against(base: Run, run: Run, column: str, kind: Missing) -> Paired | None:
    """Over the items of both; under `drop` those that both have all scores of."""
    pairs = [
        (one, other)
        for number in sorted(base.rows.keys() & run.rows.keys())
        if (one := getattr(base.rows[number], kind)) is not None
        and (other := getattr(run.rows[number], kind)) is not None
    ]
    return paired([one[column] for one, _ in pairs], [other[column] for _, other in pairs])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return asdict(value) if isinstance(value, Estimate | Paired) else value

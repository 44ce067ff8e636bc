"""Scores of a run by a judge, resumable: each answer is kept as soon as it is there, under what it depends on.

<run>/scores/<judge>.json    every item with its four ratings, or why there is none
<cache>/ab/abcd….json        one paid answer; the name hashes pictures, prompt, model and settings
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from replan import record
from replan.errors import ConfigError, JudgeError, ReplanError
from replan.eval.data import Bench, Item
from replan.eval.generate import FAILED, PICTURE, SECONDS, read_done, read_json
from replan.eval.pool import in_parallel
from replan.images import load_image
from replan.judge import DIMENSIONS, Case, Dimension, Judge, JudgeDown, Unscored

FORMAT = 1
SCORES = "scores"

Entry = Mapping[str, Any]  # {"score", "reason", "model", "date", ...} or {"unscored": why}


@dataclass(frozen=True, slots=True)
class Ask:
    """One score that is wanted."""

    case: Case
    dimension: Dimension
    key: str | None


@dataclass(frozen=True, slots=True)
class Answered:
    """What a judge said. `down` is set when it was the judge that failed, not the case."""

    ask: Ask
    entry: Entry
    down: str | None = None


@dataclass(slots=True)
class Cost:
    """Calls and tokens, and dollars where the prices are known."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    price_in: float | None = None
    price_out: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, tokens_in: int, tokens_out: int) -> None:
        """One more question, which may have taken several tries. Safe for several threads."""
        with self._lock:
            self.calls += 1
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    @property
    def dollars(self) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / 1e6

    def after(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """With what earlier calls of the command spent on the same run; dollars only where all prices are known."""
        names = ("calls", "tokens_in", "tokens_out")
        total: dict[str, Any] = {name: before.get(name, 0) + getattr(self, name) for name in names}
        parts = ((before.get("calls", 0), before.get("dollars")), (self.calls, self.dollars))
        dollars = [each for calls, each in parts if calls]
        return total | {"dollars": None if None in dollars else sum(filter(None, dollars))}

    def __str__(self) -> str:
        text = f"{self.calls:,} calls, {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        return text if self.dollars is None else f"{text}, {self.dollars:.2f} US dollars"


class Kept:
    """Paid answers on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str | None) -> Entry | None:
        found = read_json(self._path(key)) if key else {}
        return found if isinstance(found.get("score"), int) else None

    def put(self, key: str | None, entry: Entry) -> None:
        if key:
            record.write_json(dict(entry), self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@dataclass(slots=True)
class Scoring:
    """A run on its way to being scored: what is missing, what is known, what is still to ask."""

    folder: Path
    items: Sequence[Item]
    judge: Judge
    kept: Kept
    missing: dict[int, str] = field(default_factory=dict)
    entries: dict[int, dict[str, Entry]] = field(default_factory=dict)
    open: list[Ask] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, bench: Bench, judge: Judge, kept: Kept) -> Scoring:
        """Looks at every item; what was answered before is taken over."""
        self = cls(folder, bench.items, judge, kept)
        for item in bench.items:
            case, why = case_of(folder, item)
            if case is None:
                self.missing[item.id] = why
                continue
            self.entries[item.id] = {}
            for dimension in DIMENSIONS.values():
                key = judge.key(case, dimension)
                entry = kept.get(key)
                if entry is None:
                    self.open.append(Ask(case, dimension, key))
                else:
                    self.entries[item.id][dimension.name] = entry
        return self

    @property
    def known(self) -> int:
        return sum(len(found) for found in self.entries.values())

    def estimate(self, price_in: float | None = None, price_out: float | None = None) -> Cost:
        """About what the open questions will cost, were each answered at once."""
        cost = Cost(price_in=price_in, price_out=price_out)
        for ask in self.open:
            cost.add(*self.judge.estimate(ask.case, ask.dimension))
        return cost

    def run(self, concurrency: int, spent: Cost) -> Iterator[Answered]:
        """Ask all that is open. Raises JudgeError when the judge fails many times on end: it is down, not the cases."""
        patience = max(3, concurrency)
        failures = 0
        answers = in_parallel(lambda ask: self._ask(ask, spent), list(self.open), concurrency, self.judge.stop)
        for answered in answers:
            case, name = answered.ask.case, answered.ask.dimension.name
            self.entries[case.id][name] = answered.entry
            failures = failures + 1 if answered.down else 0
            yield answered
            if failures >= patience:
                raise JudgeError(
                    f"{answered.down}\n{failures} questions on end failed like this, so the judge counts as down; "
                    "what is scored is kept, the same command goes on from here"
                )

    def _ask(self, ask: Ask, spent: Cost) -> Answered:
        """Ask and keep the answer; counted and kept here, so that what comes in after an interrupt is not lost."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            rating = self.judge.rate(ask.case, ask.dimension)
        except Unscored as error:
            spent.add(error.tokens_in, error.tokens_out)
            told = {"unscored": str(error), "tokens_in": error.tokens_in, "tokens_out": error.tokens_out}
            return Answered(ask, told)
        except JudgeError as error:
            if isinstance(error, JudgeDown) and error.tokens_in + error.tokens_out:
                spent.add(error.tokens_in, error.tokens_out)
            return Answered(ask, {"unscored": str(error)}, str(error))
        except ReplanError as error:  # a picture that cannot be read
            return Answered(ask, {"unscored": str(error)})
        spent.add(rating.tokens_in, rating.tokens_out)
        about = self.judge.describe()
        entry = {
            "score": rating.score,
            "reason": rating.reason,
            "model": rating.model,
            "temperature": about["temperature"],
            "prompt": about["prompts"].get(ask.dimension.name),
            "date": now,
            "tokens_in": rating.tokens_in,
            "tokens_out": rating.tokens_out,
        }
        self.kept.put(ask.key, entry)
        self.entries[ask.case.id][ask.dimension.name] = entry
        return Answered(ask, entry)

    def save(self, run: Mapping[str, Any], spent: Cost) -> Path:
        """Write the scores as they are now. Returns the file."""
        about = self.judge.describe()
        path = self.folder / SCORES / f"{about['name']}.json"
        before = read_json(path).get("spent", {})
        record.write_json(
            {
                "format": FORMAT,
                "judge": dict(about),
                "run": {"settings": run["settings"], "data": run["data"], "bad_rows": run["bad_rows"]},
                "spent": spent.after(before),
                "items": [self._row(item) for item in self.items],
            },
            path,
        )
        return path

    def _row(self, item: Item) -> dict[str, Any]:
        found = {"id": item.id, "referring": item.referring, "task": item.task}
        if item.id in self.missing:
            return found | {"missing": self.missing[item.id]}
        entries = self.entries[item.id]
        ratings = {name: dict(entries.get(name, {"unscored": "not asked yet"})) for name in DIMENSIONS}
        seconds = read_json(self.folder / str(item.id) / SECONDS)
        times = {
            stage: value
            for stage, value in seconds.items()
            if isinstance(value, int | float) and stage not in ("load", "queue")
        }
        return found | {"ratings": ratings, "seconds": round(sum(times.values()), 4) if times else None}


def case_of(folder: Path, item: Item) -> tuple[Case | None, str]:
    """The item's edit as a case; None and the reason when there is no finished picture."""
    place = folder / str(item.id)
    if read_done(folder, item.id) is None:
        failure = read_json(place / FAILED).get("error")
        return None, f"failed: {failure}" if failure else "not generated"
    picture = place / PICTURE
    case = Case(
        item.id, item.instruction, item.expression, item.image, lambda: load_image(picture), item.digest(),
        record.sha256(picture), item.extra,
    )  # fmt: skip
    return case, ""


def read_scores(folder: Path, judge: str | None = None) -> dict[str, Any]:
    """The scores of a run by the named judge, or by its only one. Raises ConfigError."""
    found = {path.stem: path for path in sorted((folder / SCORES).glob("*.json"))}
    if not found:
        raise ConfigError(f"{folder}: has no scores; run `replan eval score {folder} --judge ...` first")
    names = [name for name in found if judge is None or name == judge or name.startswith(f"{judge}-")]
    if len(names) != 1:
        raise ConfigError(
            f"{folder}: {'no scores' if not names else 'several scores'} "
            f"{f'by {judge!r}' if judge else ''}; choose with --judge: {', '.join(found)}"
        )
    scores = dict(read_json(found[names[0]]))
    if scores.get("format") != FORMAT:
        raise ConfigError(f"{found[names[0]]}: cannot be read, or is not of format {FORMAT}; score the run again")
    return scores

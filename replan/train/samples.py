"""Sample rollouts as a page to look at: the benchmark's own page, a card for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replan import plan as plans
from replan.eval.browse import data_url, page
from replan.images import write_atomic
from replan.train.data import Row
from replan.train.run import SAMPLES
from replan.train.score import JUDGED, Scored

MOST = 24  # cards on a page


def write(output: Path, name: str, rows: Sequence[Row], answers: Sequence[str], outcomes: Sequence[Scored]) -> Path:
    """Write `<output>/samples/<name>.html` and return it."""
    cards = [_card(at, *each) for at, each in enumerate(zip(rows, answers, outcomes, strict=True)) if at < MOST]
    data = {
        "runs": [{"name": name.replace("-", " "), "judge": None}],
        "dimensions": list(JUDGED),
        "pixels": [],
        "items": cards,
    }
    path = output / SAMPLES / f"{name}.html"
    write_atomic(path, page(data).encode())
    return path


def _card(number: int, row: Row, answer: str, outcome: Scored) -> dict[str, Any]:
    image = row.image()
    state = "not scored" if outcome.value is None else "valid" if outcome.parts.get("valid") else "malformed"
    return {
        "id": number,
        "instruction": row.task.instruction,
        "expression": row.task.expression,
        "referring": f"item {row.task.id}",
        "task": state,
        "size": list(image.size),
        "source": data_url(image, 512),
        "results": [_result(answer, outcome)],
    }


def _result(answer: str, outcome: Scored) -> dict[str, Any]:
    told = f"failed, left out: {outcome.failure.stage}: {outcome.failure.error}" if outcome.failure else ""
    if outcome.value is not None:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in outcome.parts.items())
        told = f"reward {outcome.value:.3f} ({parts})"
    ratings = {
        name: {"score": score, "reason": outcome.reasons.get(name, "")}
        for name, score in (outcome.ratings or {}).items()
    }
    shown = {
        "plan": None if outcome.plan is None else plans.to_json(outcome.plan),
        "notes": [told, f"answer: {answer}"],
        "ratings": ratings,
        "pixels": {},
    }
    if outcome.picture is None:
        return shown | {"missing": "not rendered"}
    return shown | {"picture": data_url(outcome.picture, 512)}

"""The mini world's held-out items as rows of IV-Edit's schema, and the way back to the exact item."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from replan.errors import ConfigError
from replan.images import write_atomic
from replan.mini.instructions import SPLITS, Item, item_at
from replan.mini.scenes import draw
from replan.plan import render

COUNTS = {"dev": 200, "test": 500}


def rows(split: str = "test", count: int | None = None) -> Iterator[dict[str, Any]]:
    """The first `count` items of a split (all of them by default), each as a row with the picture as PNG bytes."""
    if split not in COUNTS:
        raise ConfigError(f"split {split!r}: the mini world has {', '.join(COUNTS)}")
    for number in range(min(count or COUNTS[split], COUNTS[split])):
        seed = SPLITS[split] + number
        yield row(item_at(seed), number, seed)


def row(item: Item, number: int, seed: int) -> dict[str, Any]:
    """image, prompt, answer (the exact plan in the planner's grammar) and extra_info (with the item's seed)."""
    picture = io.BytesIO()
    draw(item.scene).save(picture, format="PNG")
    words = ", ".join(reference.words for reference in item.references) or "everything"
    light = ("light",) if item.light != "day" else ()
    tasks = " + ".join(dict.fromkeys((*light, *(change.task for change in item.changes))))
    extra = {
        "image_id": number,
        "instruction_details": {"editing_instruction": item.instruction, "referring_expression": words},
        "referring_type": item.referring,
        "task_type": tasks,
        "mini": {"seed": seed},
    }
    return {
        "image": picture.getvalue(),
        "prompt": item.instruction,
        "answer": render(item.plan),
        "extra_info": json.dumps(extra),
    }


def item_of(extra: Mapping[str, Any]) -> Item | None:
    """The exact item that a row's extra_info belongs to; None for a row of another world."""
    mini = extra.get("mini")
    seed = mini.get("seed") if isinstance(mini, Mapping) else None
    return item_at(seed) if isinstance(seed, int) else None


def export(folder: Path, split: str = "test", count: int | None = None) -> Path:
    """Write a split as `<folder>/<split>.jsonl` with its pictures beside it. Returns the file."""
    lines = []
    for fields in rows(split, count):
        name = f"images/{json.loads(fields['extra_info'])['image_id']:05d}.png"
        write_atomic(folder / name, fields["image"])
        lines.append(json.dumps(fields | {"image": name}, ensure_ascii=False))
    path = folder / f"{split}.jsonl"
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path

"""The detection reward: boxes and points against known ones. Pure; the assignment is scipy's.

    reward = format (0 .. 1) + accuracy (0 .. 3) + no sentence said twice (0 or 1)

Accuracy gives each matched pair one point for IoU > 0.5, one for corners less than 10 pixels off on average, and one
for a point inside the wanted box and less than 30 pixels from the wanted point; divided by the longer list's length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from replan.train.reward import PLACEHOLDERS, Reward
from replan.types import Size

MOST = 120  # objects; further ones are not looked at
NEAR_BOX, NEAR_POINT, OVERLAP = 10.0, 30.0, 0.5  # pixels, pixels, IoU

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_LIST = re.compile(r"<(region|answer)>(.*?)</\1>", re.DOTALL)
_FAR = 1e9  # no picture is that large
_SENTENCE = re.compile(r"[.!?\n]+")

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spot:
    """A box (left, top, right, bottom) and a point (x, y), each None where it is missing or malformed."""

    box: Numbers | None
    point: Numbers | None


def detection_reward(answer: str, wanted: Sequence[Mapping[str, Any]]) -> Reward:
    """Reward of an answer; `wanted` are objects with bbox_2d and, if known, point_2d."""
    thought, listed = _THINK.search(answer), _LIST.search(answer)
    items = _load(listed[2]) if listed else None
    spots = [_spot(item) for item in (items or [])[:MOST]]
    formed = 0.25 * (thought is not None and listed is not None)
    formed += 0.25 * (items is not None)
    formed += 0.25 * (bool(spots) and all(spot.box for spot in spots))
    formed += 0.25 * (bool(spots) and all(spot.point for spot in spots))
    reasoning = thought[1].strip() if thought else ""
    if reasoning.strip("[]{}()").lower() in PLACEHOLDERS:
        formed -= 20.0
    found = accuracy(spots, [_spot(item) for item in wanted[:MOST]])
    fresh = float(_is_fresh(reasoning))
    return Reward(formed + found + fresh, {"format": formed, "accuracy": found, "fresh": fresh})


def read_objects(answer: str) -> list[dict[str, Any]]:
    """A detection row's known objects: the JSON list that is its answer. Raises ValueError."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON list of objects with bbox_2d: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, dict) and _spot(item).box for item in found):
        raise ValueError("must be a JSON list of objects, each with a bbox_2d of four numbers")
    return found


def rescaled(objects: Sequence[Mapping[str, Any]], source: Size, target: Size) -> list[dict[str, Any]]:
    """Objects known in a picture of size `source`, as they lie in one of size `target`."""
    x, y = target.width / source.width, target.height / source.height
    found: list[dict[str, Any]] = []
    for item in objects:
        spot = _spot(item)
        moved = {"bbox_2d": spot.box, "point_2d": spot.point}
        placed = {
            name: [round(value * (x, y)[at % 2], 2) for at, value in enumerate(numbers)]
            for name, numbers in moved.items() if numbers is not None
        }  # fmt: skip
        found.append({**item, **placed})
    return found


def accuracy(found: Sequence[Spot], wanted: Sequence[Spot]) -> float:
    """Mean points (0 to 3) of the best one-to-one matching, over the longer of both lists."""
    if not found or not wanted:
        return 0.0
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    points = np.array([[_points(one, other) for other in wanted] for one in found])
    rows, columns = linear_sum_assignment(points, maximize=True)
    return float(points[rows, columns].sum()) / max(len(found), len(wanted))


def _points(found: Spot, wanted: Spot) -> float:
    score = 0.0
    if found.box and wanted.box:
        score += _iou(found.box, wanted.box) > OVERLAP
        score += sum(abs(a - b) for a, b in zip(found.box, wanted.box, strict=True)) / 4 < NEAR_BOX
    if found.point and wanted.point and wanted.box:
        left, top, right, bottom = wanted.box
        is_inside = left <= found.point[0] <= right and top <= found.point[1] <= bottom
        score += is_inside and math.dist(found.point, wanted.point) < NEAR_POINT
    return float(score)


def _iou(a: Numbers, b: Numbers) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum(max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def _spot(item: Any) -> Spot:
    entry = item if isinstance(item, Mapping) else {}
    return Spot(_numbers(entry.get("bbox_2d"), 4), _numbers(entry.get("point_2d"), 2))


def _numbers(value: Any, count: int) -> Numbers | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= _FAR for v in value):
        return None  # abs(nan) <= x is false
    return tuple(float(v) for v in value)


def _load(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _is_fresh(reasoning: str) -> bool:
    """No sentence is said twice."""
    sentences = [sentence.strip().lower() for sentence in _SENTENCE.split(reasoning) if sentence.strip()]
    return len(set(sentences)) == len(sentences)

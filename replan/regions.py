"""One region after another: boxes, hints and points read from JSON, however damaged. Pure Python.

Used for planners' answers (`read_regions`: keep what is sound, note the rest) and for plan files (`read_box`,
`read_hint`, `read_point`: raise what cannot be repaired). Every step takes time linear in the length of the text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from itertools import islice

from replan.errors import PlanError
from replan.types import Box, Region, Size

FAR = 10**9  # coordinates beyond this are taken as this, far outside any picture
MAX_REGIONS = 256  # sanity only; how many an editor can separate is the mask's business
_STRING_OR_COMMA = re.compile(r'"(?:[^"\\]++|\\.)*+"?|,(?=\s*+[\]}])', re.DOTALL)
_OBJECT = re.compile(r"\{[^{}]*+\}?")
_LOOSE_BOX = re.compile(r"\b(?:bbox_2d|bbox|box)[\"']?\s{0,8}:\s{0,8}\[([^\[\]]{0,400})\]")
_LOOSE_HINT = re.compile(r"\bhint[\"']?\s{0,8}:\s{0,8}([\"'])")
_NEXT_KEY = re.compile(r"[\"']\s{0,8},\s{0,8}[\"']\w{1,20}[\"']\s{0,8}:")
_BOX_KEYS = ("bbox_2d", "bbox", "box")


def read_regions(
    text: str, size: Size, examples: Collection[tuple[float, ...]], notes: list[str]
) -> tuple[Region, ...]:
    """The usable regions of the JSON list in `text`, boxes in a frame of `size`; repairs are appended to `notes`.

    `examples` are boxes that count as copied. PlanError when regions were proposed and none is usable.
    """
    items = _items(text, notes)
    if len(items) > MAX_REGIONS:
        notes.append(f"regions {MAX_REGIONS + 1} to {len(items)} dropped: at most {MAX_REGIONS} are read")
    regions, reasons = [], []
    for number, item in enumerate(items[:MAX_REGIONS], start=1):
        try:
            regions.append(_region(item, number, size, examples, notes))
        except PlanError as error:
            reasons.append(str(error))
            notes.append(f"dropped {error}")
    if items and not regions:
        raise PlanError(f"none of the {len(items)} proposed regions is usable: {'; '.join(reasons[:3])}")
    return tuple(regions)


def _region(item: object, number: int, size: Size, examples: Collection[tuple[float, ...]], notes: list[str]) -> Region:
    """One item of the wire format; PlanError naming the region when it must be dropped."""
    name = f"region {number}"
    if not isinstance(item, Mapping):
        raise PlanError(f"{name}: {show(item)} is not an object with bbox_2d and hint")
    value = next((item[key] for key in _BOX_KEYS if key in item), None)
    if value is None:
        raise PlanError(f"{name}: bbox_2d is missing")
    if tuple(value if isinstance(value, list) and all(map(_is_number, value)) else ()) in examples:
        raise PlanError(f"{name}: box {show(value)}: copied from the example in the prompt")
    box, repairs = read_box(value, size, name)
    hint = read_hint(item.get("hint"), name)
    try:
        point, moved = read_point(item.get("point_2d"), size, name)
    except PlanError as error:
        point, moved = None, [f"dropped {error}"]
    notes += repairs + moved
    return Region(box, hint, point)


def _items(text: str, notes: list[str]) -> list[object]:
    """The items of a JSON list, however damaged: strict, then without trailing commas, then object by object."""
    body = _unfence(text)
    if not body:
        notes.append("<region> is empty")
        return []
    for candidate, note in ((body, None), (_without_trailing_commas(body), "trailing commas removed from the regions")):
        try:
            value = json.loads(candidate, strict=False)
        except (ValueError, RecursionError):
            continue
        if note is not None and candidate != body:
            notes.append(note)
        return _as_list(value, notes)
    items, damaged = [], 0
    for found in islice(_OBJECT.finditer(body), 4 * MAX_REGIONS):
        item = _loads_object(found[0])
        if item is None:
            damaged += 1
        elif "hint" in item or any(key in item for key in _BOX_KEYS):
            items.append(item)
    if not items:
        raise PlanError(f"<region> holds no readable region: {show(body)}")
    lost = f", {damaged} lost" if damaged else ""
    notes.append(f"the region list is damaged or cut off: {len(items)} rescued{lost}")
    return items


def _as_list(value: object, notes: list[str]) -> list[object]:
    """A parsed <region> as a list: a lone region and an object around the list are accepted."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        inner = next((value[key] for key in ("regions", "region") if isinstance(value.get(key), list)), None)
        notes.append("one object instead of a list of regions")
        return [value] if inner is None else inner
    raise PlanError(f"<region> holds {show(value)}, not a list of regions")


def _unfence(text: str) -> str:
    """The text without white space and a code fence around it."""
    body = text.strip()
    if body.startswith("```"):
        body = re.sub(r"^```\w{0,10}", "", body)
    return body.removesuffix("```").strip()


def _without_trailing_commas(text: str) -> str:
    """Drop commas in front of ] and }, but not those inside strings."""
    return _STRING_OR_COMMA.sub(lambda found: "" if found[0] == "," else found[0], text)


def _loads_object(text: str) -> dict[str, object] | None:
    """One `{...}` of a damaged list, or None. A missing end, single quotes and bare quotes in the hint are mended."""
    candidates = [text]
    if not text.endswith("}"):
        candidates = [text.rstrip(", \t\r\n") + "}", text.rstrip("], \t\r\n") + "}"]
    for candidate in map(_without_trailing_commas, candidates):
        try:
            value = json.loads(candidate, strict=False)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    box, hint = _LOOSE_BOX.search(text), _LOOSE_HINT.search(text)
    if box is None or hint is None or not text.endswith("}"):
        return None
    tail = _NEXT_KEY.search(text, hint.end())
    end = tail.start() if tail else text.rfind(hint[1], hint.end())
    try:
        numbers = [float(number) for number in box[1].split(",")]
    except ValueError:
        return None
    numbers = [int(number) if number.is_integer() else number for number in numbers]
    return {"bbox_2d": numbers, "hint": text[hint.end() : end]} if end > hint.end() else None


# --- values shared by answers and plan files -------------------------------------------------------------------------


def read_box(value: object, size: Size, name: str) -> tuple[Box, list[str]]:
    """A box inside `size` and what was repaired. PlanError for a wrong length, non-finite numbers or no area."""
    label = f"{name}: box {show(value)}"
    left, top, right, bottom = _numbers(value, 4, label)
    notes = []
    if all(0 <= v <= 1 for v in (left, top, right, bottom)) and any(v % 1 for v in (left, top, right, bottom)):
        left, right, top, bottom = left * size.width, right * size.width, top * size.height, bottom * size.height
        notes.append(f"{label}: taken as fractions of the picture")
    if left > right or top > bottom:
        left, right, top, bottom = min(left, right), max(left, right), min(top, bottom), max(top, bottom)
        notes.append(f"{label}: corners swapped, put right")
    if left == right:
        raise PlanError(f"{label}: right must exceed left")
    if top == bottom:
        raise PlanError(f"{label}: bottom must exceed top")
    whole = Box(math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    if whole.as_tuple() != (left, top, right, bottom):
        notes.append(f"{label}: rounded outward to {show(whole.as_tuple())}")
    box = whole.clip(size)
    if box.area == 0:
        raise PlanError(f"{label}: lies outside the {size.width}x{size.height} picture")
    if box != whole:
        notes.append(f"{label}: clipped to {show(box.as_tuple())} by the {size.width}x{size.height} picture")
    return box, notes


def read_point(value: object, size: Size, name: str) -> tuple[tuple[int, int] | None, list[str]]:
    """A point moved to a pixel of the picture, None when there is none, and what was repaired."""
    if value is None:
        return None, []
    label = f"{name}: point {show(value)}"
    x, y = _numbers(value, 2, label)
    point = min(max(math.floor(x), 0), size.width - 1), min(max(math.floor(y), 0), size.height - 1)
    return point, [] if point == (x, y) else [f"{label}: moved to the pixel {show(point)}"]


def read_hint(value: object, name: str) -> str:
    """A hint that says something, as it stands."""
    if not isinstance(value, str) or not value.strip():
        raise PlanError(f"{name}: hint is {'missing' if value is None else 'empty' if value == '' else show(value)}")
    return whole(value, f"{name}: hint")


def whole(text: str, label: str) -> str:
    r"""The text, if it can be written as UTF-8: JSON can spell half a character ("\ud800"), unfit for tokenizers."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"{label}: character {error.start + 1} is half of a surrogate pair; write all of it") from error
    return text


def _numbers(value: object, count: int, label: str) -> list[float]:
    """`count` finite numbers, those far outside any picture brought nearer."""
    if not isinstance(value, list | tuple) or len(value) != count or not all(map(_is_number, value)):
        raise PlanError(f"{label}: needs {count} numbers")
    if not all(isinstance(number, int) or math.isfinite(number) for number in value):
        raise PlanError(f"{label}: must be finite")
    return [min(max(number, -FAR), FAR) for number in value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: object) -> str:
    """A short text for messages, safe for values of any depth and length."""
    if isinstance(value, list | tuple):
        shown = ", ".join(show(item) if not isinstance(item, list | tuple) else "..." for item in value[:5])
        return f"({shown}{', ...' if len(value) > 5 else ''})"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and abs(value) > FAR:
        return "a huge number"
    text = repr(value[:60]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

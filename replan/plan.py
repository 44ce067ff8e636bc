"""The plan grammar: a planner's answer or a plan file to Plan and back. Pure Python.

    answer := <think> text </think> <gen_image> text </gen_image> [<region> JSON list </region>]
    item   := {"bbox_2d": [left, top, right, bottom], "hint": text, "point_2d": [x, y] (optional)}

`<global>` is another name for `<gen_image>`. Answers come from a model, so `parse` keeps what is sound and says in
`Plan.notes` what it repaired, clipped, swapped or dropped; when nothing can be used it raises AnswerError. Plan files
are written by people, so `from_json` repairs the same slips but raises where it would have to drop something.
Every step takes time linear in the length of the answer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from replan.errors import PlanError
from replan.regions import FAR, MAX_REGIONS, read_box, read_hint, read_point, read_regions, show, whole
from replan.types import Plan, Region, Size

KEEP = "keep the rest of the image unchanged"  # the global prompt when nothing concerns the whole picture
MAX_CHARS = 100_000  # of an answer; a long one has 8,000
MAX_FILE_BYTES = 10_000_000

_TAG = re.compile(r"<(/?)[ \t]{0,3}(think|gen_image|global|region)[ \t]{0,3}>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|#\d{1,6});")
_FOUR_NUMBERS = re.compile(r"\[" + r"\s{0,8},".join([r"\s{0,8}(-?\d{1,9}(?:\.\d{1,9})?)"] * 4) + r"\s{0,8}\]")


class AnswerError(PlanError):
    """A planner's answer holds nothing usable; `raw` is that answer."""

    def __init__(self, message: str, raw: str) -> None:
        super().__init__(message)
        self.raw = raw

    def __reduce__(self) -> tuple[type[AnswerError], tuple[str, str]]:
        return type(self), (str(self), self.raw)


# --- answers ---------------------------------------------------------------------------------------------------------


@cache
def default_template(task: Literal["plan", "detect"] = "plan") -> str:
    """The prompt that ships with the package: a planner's, or the one of detection data."""
    return resources.files("replan").joinpath("prompts", f"{task}.txt").read_text(encoding="utf-8")


@cache
def examples_in(template: str) -> frozenset[tuple[float, ...]]:
    """Every `[a, b, c, d]` in a prompt template: boxes that a lazy model may copy instead of looking."""
    return frozenset(tuple(map(float, found.groups())) for found in _FOUR_NUMBERS.finditer(template))


def parse(text: str, seen: Size, examples: Collection[tuple[float, ...]] | None = None) -> Plan:
    """Read a planner's answer whose boxes live in a frame of `seen` pixels.

    `examples` are the boxes shown in the prompt (default: those of the prompt that ships with the package). A region
    that repeats one word for word is a copy, not a find. Raises AnswerError when nothing is usable: no tags, every
    proposed region unusable, an answer cut off before its first region, or an empty prompt without regions.
    """
    examples = examples_in(default_template()) if examples is None else examples
    notes: list[str] = []
    given, text = text, text.encode("utf-8", "replace").decode()  # a server's JSON can spell half a character
    if text != given:
        notes.append("halves of surrogate pairs replaced by ?")
    answer = text
    if len(text) > MAX_CHARS:
        answer = text[:MAX_CHARS]
        notes.append(f"answer of {len(text)} characters cut to {MAX_CHARS}")
    sections, is_closed = _sections(answer, notes)
    if "gen_image" not in sections and "region" not in sections:
        found = "no <gen_image> and no <region> in the answer" if is_closed else "the answer ends before its plan"
        raise AnswerError(found, text)
    prompt = sections.get("gen_image", "")
    regions: tuple[Region, ...] = ()
    try:
        if not sections.get("region", "-").strip() and not is_closed:
            raise PlanError("the answer ends before its first region")
        if "region" in sections:
            regions = read_regions(sections["region"], seen, examples, notes)
        else:
            notes.append("no <region>: the plan is global only")
        if "gen_image" not in sections:
            prompt = KEEP
            notes.append(f"no <gen_image>: the global prompt is {KEEP!r}")
        if not regions and not prompt.strip():
            raise PlanError("neither a global prompt nor a region")
    except PlanError as error:
        raise AnswerError(str(error), text) from None
    return Plan(sections.get("think", ""), prompt, regions, seen, tuple(notes), text)


def render(plan: Plan) -> str:
    """The answer that parses to `plan` (without its notes). Raises PlanError for a plan that no answer can express."""
    _check(plan)
    items = []
    for region in plan.regions:
        item: dict[str, Any] = {"bbox_2d": list(region.box.as_tuple()), "hint": region.hint}
        if region.point is not None:
            item["point_2d"] = list(region.point)
        items.append(json.dumps(item, ensure_ascii=False))
    listed = _TAG.sub(lambda tag: "\\u003c" + tag[0][1:], "[" + ", ".join(items) + "]")
    answer = (
        f"<think>{_escape(plan.reasoning)}</think>\n"
        f"<gen_image>{_escape(plan.prompt)}</gen_image>\n"
        f"<region>{listed}</region>"
    )
    if len(answer) > MAX_CHARS:
        raise PlanError(f"an answer of {len(answer)} characters: at most {MAX_CHARS} are read back")
    return answer


def is_complete(text: str) -> bool:
    """Whether an answer under way has closed its region list, so that generation can stop."""
    reasoning_open = "<think>" in text and "</think>" not in text
    return not reasoning_open and "</region>" in text.rpartition("</think>")[2]


def _sections(text: str, notes: list[str]) -> tuple[dict[str, str], bool]:
    """The text of the first <think>, <gen_image> and <region>, and whether the last of them is closed.

    Prose around the tags is noted and left out.
    """
    tags = [(m.start(), m.end(), m[2].lower().replace("global", "gen_image"), bool(m[1])) for m in _TAG.finditer(text)]
    sections: dict[str, str] = {}
    outside: list[str] = []
    repeated: list[str] = []
    cursor = i = 0
    is_closed = True
    while i < len(tags):
        start, end, name, closing = tags[i]
        i += 1
        if start < cursor:
            continue
        if closing:
            if name == "think" and not sections:  # some chat templates open <think> on the model's behalf
                sections["think"] = _tidy(text[:start])
                notes.append("no <think>: what precedes </think> is taken as the reasoning")
                outside, cursor = [], end
            continue
        if name in sections:
            repeated.append(name)
            continue
        outside.append(text[cursor:start])
        close = next((tag for tag in tags[i:] if tag[3] and tag[2] == name), None)
        if close is None:
            close = next((tag for tag in tags[i:] if not tag[3] and tag[2] not in (*sections, name)), None)
            stop = cursor = len(text) if close is None else close[0]
            is_closed = close is not None
            notes.append(f"<{name}> is not closed")
            if not is_closed and name == "gen_image":
                break  # half a prompt is not sound
        else:
            stop, cursor = close[0], close[1]
        sections[name] = text[end:stop] if name == "region" else _tidy(text[end:stop])
    else:
        outside.append(text[cursor:])
    if any(re.sub(r"```\w{0,10}|<\|\w{1,30}\|>|</?answer>", "", part).strip() for part in outside):
        notes.append("text outside the tags ignored")
    notes += [f"more than one <{name}>: the first one counts" for name in dict.fromkeys(repeated)]
    if "think" not in sections:
        notes.append("no <think>")
    return sections, is_closed


def _tidy(text: str) -> str:
    """Drop the white space around, then undo `_escape`."""
    return _ENTITY.sub(_character, text.strip())


def _character(entity: re.Match[str]) -> str:
    name = entity[0][1:-1]
    if name in ("amp", "lt"):
        return "&" if name == "amp" else "<"
    code = int(name[1:])
    return entity[0] if 0xD800 <= code <= 0xDFFF else chr(code)  # half of a surrogate pair is no character


def _escape(text: str) -> str:
    """Write text so that `_tidy` gives it back: tags, white space at the ends, and what would read as an entity."""
    text = _TAG.sub(lambda tag: "&lt;" + tag[0][1:], _ENTITY.sub(lambda entity: "&amp;" + entity[0][1:], text))
    body = text.strip()
    if body == text:
        return text
    before = len(text) - len(text.lstrip())
    ends = (text[:before], text[before + len(body) :])
    return body.join("".join(f"&#{ord(character)};" for character in end) for end in ends)


# --- plan files ------------------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the plan file."""
    return json.loads(resources.files("replan").joinpath("plan.schema.json").read_text(encoding="utf-8"))


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as the content of a plan file."""
    regions = [
        {"box": list(region.box.as_tuple()), "hint": region.hint}
        | ({} if region.point is None else {"point": list(region.point)})
        for region in plan.regions
    ]
    head = {"version": 1, "size": list(plan.size), "reasoning": plan.reasoning, "prompt": plan.prompt}
    return head | {"regions": regions, "notes": list(plan.notes)} | ({"raw": plan.raw} if plan.raw else {})


def from_json(value: object, size: Size | None = None) -> Plan:
    """Check and read the content of a plan file; `size` stands in when the file names none.

    Swapped corners, boxes that stick out and fractions of pixels are put right and noted, as in an answer. Whatever
    else is wrong raises PlanError naming the key: a person can mend it, so nothing is dropped behind their back.
    """
    schema = json_schema()["properties"]
    entries = _object(value, "plan", schema)
    if entries.get("version", 1) != 1:
        raise PlanError(f"version {show(entries['version'])}: this release reads version 1")
    size = _size(entries["size"]) if "size" in entries else size
    if size is None:
        raise PlanError('size is missing: write "size": [width, height] of the picture that the boxes refer to')
    notes = _list(entries, "notes")
    if not all(isinstance(note, str) for note in notes):
        raise PlanError("notes: must be a list of texts")
    repairs: list[str] = []
    regions = []
    for number, item in enumerate(_list(entries, "regions"), start=1):
        name = f"region {number}"
        region = _object(item, name, schema["regions"]["items"]["properties"])
        if "box" not in region:
            raise PlanError(f'{name}: box is missing: write "box": [left, top, right, bottom]')
        box, repaired = read_box(region["box"], size, name)
        point, moved = read_point(region.get("point"), size, name)
        regions.append(Region(box, read_hint(region.get("hint"), name), point))
        repairs += repaired + moved
    if "prompt" not in entries and regions:
        repairs.append(f"no prompt: the global prompt is {KEEP!r}")
    prompt = _text(entries, "prompt", KEEP if regions else "")
    reasoning, raw = _text(entries, "reasoning", ""), _text(entries, "raw", "")
    plan = Plan(reasoning, prompt, tuple(regions), size, (*notes, *repairs), raw)
    _check(plan)
    return plan


def read_plan(path: str | Path, size: Size | None = None) -> Plan:
    """Read a plan file. Raises PlanError when it is missing, unreadable, empty, too long or no valid plan."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise PlanError(f"plan file {path}: longer than {MAX_FILE_BYTES:,} bytes")
        text = content.decode("utf-8-sig")
        if not text.strip():
            raise PlanError(f"plan file {path} is empty")
        return from_json(json.loads(text), size)
    except OSError as error:
        raise PlanError(f"plan file {path}: {error.strerror or error}") from error
    except PlanError as error:
        if str(path) in str(error):
            raise
        raise PlanError(f"plan file {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise PlanError(f"plan file {path} is not JSON: {error}") from error


def _object(value: object, name: str, known: Iterable[str]) -> dict[str, Any]:
    """A JSON object with known keys only."""
    if not isinstance(value, dict):
        raise PlanError(f"{name}: must be an object, not {show(value)}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:60], list(known), n=1, cutoff=0.4)
            raise PlanError(f"{name}: unknown key {show(key)}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return value


def _list(entries: Mapping[str, Any], key: str) -> list[Any]:
    value = entries.get(key, [])
    if not isinstance(value, list):
        raise PlanError(f"{key}: must be a list, not {show(value)}")
    return value


def _text(entries: Mapping[str, Any], key: str, default: str) -> str:
    value = entries.get(key, default)
    if not isinstance(value, str):
        raise PlanError(f"{key}: must be a text, not {show(value)}")
    return whole(value, key)


def _size(value: object) -> Size:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= FAR for side in value)
    ):
        raise PlanError(f"size {show(value)}: needs width and height in whole pixels")
    return Size(*value)


def _check(plan: Plan) -> None:
    """Raise PlanError when a plan breaks a rule that parsing would repair or refuse."""
    if len(plan.regions) > MAX_REGIONS:
        raise PlanError(f"{len(plan.regions)} regions: at most {MAX_REGIONS}")
    if not plan.regions and not plan.prompt.strip():
        raise PlanError("neither a global prompt nor a region")
    for number, region in enumerate(plan.regions, start=1):
        name = f"region {number}"
        box, repairs = read_box(region.box.as_tuple(), plan.size, name)
        read_hint(region.hint, name)
        point, moved = read_point(region.point, plan.size, name)
        if (box, point) != (region.box, region.point):
            raise PlanError((repairs + moved)[0])

"""Whatever a model answers, parse ends in Plan or PlanError, and soon."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replan.errors import PlanError
from replan.plan import MAX_CHARS, default_template, parse, render
from replan.regions import MAX_REGIONS
from replan.types import Box, Plan, Region, Size

SEEN = Size(640, 480)
GOOD = '{"bbox_2d": [100, 120, 300, 340], "hint": "make this cup red"}'


def answer(regions: str) -> str:
    return f"<think>the cup</think>\n<gen_image>keep the rest</gen_image>\n<region>{regions}</region>"


def item(box: object, hint: object = "make it red", **more: object) -> str:
    return json.dumps({"bbox_2d": box, "hint": hint, **more})


FRAGMENTS = [
    *("<think>", "</think>", "<gen_image>", "</gen_image>", "<global>", "</global>", "<region>", "</region>"),
    *("[", "]", "{", "}", '"', "'", ",", ":", "\\", "\n", " ", "```json\n", "```", "&#65;", "&lt;", "\ud800", "漢"),
    *('"bbox_2d"', '"hint"', '"point_2d"', "NaN", "-Infinity", "1e999", "null", "true", "-1", "9" * 400, "0.5", "1e-5"),
    *(GOOD, item([9, 9, 2, 2]), item([1, 2, 3, 4], point_2d=[1]), "[137, 212, 251, 349]", "[[[[[[[[", "}}}}}}}"),
]  # fmt: skip


def _seeds(rng: random.Random) -> list[str]:
    """Sound answers of many shapes to start from."""
    seeds = [default_template(), answer("[]"), f"<region>{GOOD}</region>", ""]
    for count in range(6):
        regions = []
        for _ in range(count):
            left, top = rng.randrange(640), rng.randrange(480)
            box = Box(left, top, rng.randrange(left, 640) + 1, rng.randrange(top, 480) + 1)
            regions.append(Region(box, rng.choice(["make it red", 'say "no"', "keep, this] as {it} is"]), None))
        seeds.append(render(Plan("some reasons " * count, "keep it", tuple(regions), SEEN)))
    return seeds


def _mutate(text: str, rng: random.Random) -> str:
    """One to four random edits."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randrange(12))
        match rng.randrange(7):
            case 0:
                text = text[:at]
            case 1:
                text = text[:at] + text[end:]
            case 2 | 3:
                text = text[:at] + rng.choice(FRAGMENTS) + text[rng.choice((at, end)) :]
            case 4:
                text = text[:at] + text[at:end] * rng.randrange(4) + text[end:]
            case 5:
                text = text[:at] + chr(rng.randrange(0x250)) + text[end:]
            case _:
                text = text.replace(*rng.sample(FRAGMENTS, 2), 2)
    return text[:3000]


def test_100000_mutated_answers_end_in_plan_or_plan_error() -> None:
    rng = random.Random(20260101)
    seeds = _seeds(rng)
    outcomes: Counter[str] = Counter()
    for number in range(100_000):
        text = _mutate(rng.choice(seeds), rng) if number % 10 else "".join(rng.choices(FRAGMENTS, k=rng.randrange(30)))
        try:
            plan = parse(text, SEEN)
        except PlanError:
            outcomes["error"] += 1
            continue
        outcomes["plan"] += 1
        assert plan.regions or plan.prompt.strip()
        assert len(plan.regions) <= MAX_REGIONS
        for region in plan.regions:
            assert region.box.area > 0
            assert region.box.clip(SEEN) == region.box
            assert region.hint.strip()
        if number % 20 == 1:  # what was accepted is a sound plan: it can be written and read again
            clean = Plan(plan.reasoning, plan.prompt, plan.regions, SEEN)
            assert parse(render(clean), SEEN, examples=()) == clean
    assert outcomes["plan"] > 20_000
    assert outcomes["error"] > 20_000


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=20), st.floats().map(str), st.integers().map(str)),
        max_size=30,
    ).map("".join)
)
def test_generated_answers_end_in_plan_or_plan_error(text: str) -> None:
    for whole in (text, answer(text), f"<region>[{text}"):
        assert len(_complaint(whole)) < 1000


def _complaint(text: str) -> str:
    """What parse says against an answer; empty when it is a plan."""
    try:
        parse(text, SEEN)
    except PlanError as error:
        return str(error)
    return ""


PATHOLOGICAL = [
    *("<", "<think>", "</think>", "<region>", "<gen_image>x", "<region>{", "{", "[", "[{", '{"a":[', "{}", "[1, ", "9"),
    *('"', '\\"', "\\", ",", ", ", " ", "```", "&", "&#", "`", '{"hint":"', "box:[", "hint : '", "\u2003", "<|a"),
    '{"box": [1, 2, 3, 4], "hint": \'"',
]


@pytest.mark.parametrize("piece", PATHOLOGICAL)
def test_time_is_linear_in_the_length(piece: str) -> None:
    body = piece * (MAX_CHARS // len(piece))
    for text in (body, f"<gen_image>x</gen_image><region>{body}", f"<region>[{body}]</region>", body + answer(body)):
        start = time.process_time()
        assert len(_complaint(text)) < 1000
        assert time.process_time() - start < 2.0


def test_long_answers_are_cut() -> None:
    text = answer(f"[{GOOD}]") + "x" * 10_000_000
    plan = parse(text, SEEN)
    assert plan.notes[0] == f"answer of {len(text)} characters cut to {MAX_CHARS}"
    assert [region.box for region in plan.regions] == [Box(100, 120, 300, 340)]

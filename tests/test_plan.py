"""The plan grammar: answers and plan files to Plan and back, and what happens to bad ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replan.errors import PlanError
from replan.plan import (
    KEEP,
    MAX_CHARS,
    AnswerError,
    default_template,
    examples_in,
    from_json,
    is_complete,
    parse,
    render,
    to_json,
)
from replan.regions import MAX_REGIONS
from replan.types import Box, Plan, Region, Size

SEEN = Size(640, 480)
GOOD = '{"bbox_2d": [100, 120, 300, 340], "hint": "make this cup red"}'


def answer(regions: str, prompt: str = "keep the rest", think: str = "the cup") -> str:
    return f"<think>{think}</think>\n<gen_image>{prompt}</gen_image>\n<region>{regions}</region>"


def item(box: object, hint: object = "make it red", **more: object) -> str:
    return json.dumps({"bbox_2d": box, "hint": hint, **more})


def boxes(plan: Plan) -> list[tuple[int, int, int, int]]:
    return [region.box.as_tuple() for region in plan.regions]


# --- round trip ------------------------------------------------------------------------------------------------------

NASTY = [
    "<think>",
    "</think>",
    "</region>",
    "<GEN_IMAGE >",
    "<global>",
    "&lt;",
    "&amp;",
    "&#32;",
    "&",
    "```",
    '"',
    "{",
    "\\",
]
texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=8)), max_size=8).map("".join)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    size = Size(draw(st.integers(1, 5000)), draw(st.integers(1, 5000)))
    regions = []
    for _ in range(draw(st.integers(0, 4))):
        left, top = draw(st.integers(0, size.width - 1)), draw(st.integers(0, size.height - 1))
        box = Box(left, top, draw(st.integers(left + 1, size.width)), draw(st.integers(top + 1, size.height)))
        point = draw(st.none() | st.tuples(st.integers(0, size.width - 1), st.integers(0, size.height - 1)))
        regions.append(Region(box, draw(texts.filter(str.strip)), point))
    prompt = draw(texts if regions else texts.filter(str.strip))
    return Plan(draw(texts), prompt, tuple(regions), size)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(plans())
def test_round_trip_of_answer_and_file(plan: Plan) -> None:
    assert parse(render(plan), plan.size, examples=()) == plan
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


def test_round_trip_keeps_what_an_answer_is() -> None:
    text = answer(f"[{GOOD}]")
    plan = parse(text, SEEN)
    assert plan == Plan(
        "the cup", "keep the rest", (Region(Box(100, 120, 300, 340), "make this cup red"),), SEEN, notes=()
    )
    assert plan.raw == text
    assert from_json(to_json(plan)).raw == text
    assert parse(render(plan), plan.size) == plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("", "", (), SEEN), "neither a global prompt nor a region"),
        (Plan("", "x", (Region(Box(5, 5, 5, 9), "a"),), SEEN), "region 1: box (5, 5, 5, 9): right must exceed left"),
        (Plan("", "x", (Region(Box(9, 5, 5, 9), "a"),), SEEN), "corners swapped"),
        (Plan("", "x", (Region(Box(0, 0, 5, 500), "a"),), SEEN), "clipped"),
        (Plan("", "x", (Region(Box(0, 0, 5, 5), " "),), SEEN), "hint is ' '"),
        (Plan("", "x", (Region(Box(0, 0, 5, 5), "a", (640, 1)),), SEEN), "point (640, 1): moved"),
        (Plan("", "x" * MAX_CHARS, (), SEEN), "are read back"),
        (Plan("", "x", (Region(Box(0, 0, 5, 5), "a"),) * (MAX_REGIONS + 1), SEEN), "at most 256"),
    ],
)
def test_render_refuses_what_would_not_come_back(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        render(plan)
    assert message in str(caught.value)


# --- what is tolerated, and what the notes say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (answer(f"[{GOOD}]").replace("\n", "  \n\n\t"), None),
        (answer(f"[{GOOD}]").upper().replace("BBOX_2D", "bbox_2d").replace("HINT", "hint"), None),
        (answer(f"[{GOOD}]").replace("gen_image", "global"), None),
        (f"```xml\n{answer(f'[{GOOD}]')}\n```<|im_end|>", None),
        (answer(f"\n```json\n[{GOOD}]\n```\n"), None),
        (f"<answer>{answer(f'[{GOOD}]')}</answer>", None),
        (f"Sure, here is the plan:\n{answer(f'[{GOOD}]')}\nEnjoy!", "text outside the tags ignored"),
        (answer(f"[{GOOD},]"), "trailing commas removed from the regions"),
        (answer('[{"bbox_2d": [100, 120, 300, 340,], "hint": "make, ] this cup red",},]'), "trailing commas removed"),
        (answer(f"[{GOOD}")[:-9], "<region> is not closed"),
        (answer(f"[{GOOD}, {{")[:-9], "cut off: 1 rescued"),
        (answer(f"[{GOOD}, " + '{"bbox_2d": [1, 2')[:-9], "cut off: 1 rescued, 1 lost"),
        (answer(f"[{GOOD}, " + '{"bbox_2d": [1, 2, 3, 4], "hint": "half a')[:-9], "cut off: 1 rescued, 1 lost"),
        (answer(f"[{GOOD[:-1]}")[:-9], "cut off: 1 rescued"),
        (answer(f"[{GOOD[:-1]}]"), "cut off: 1 rescued"),
        (answer(GOOD), "one object instead of a list of regions"),
        (answer(f'{{"regions": [{GOOD}]}}'), "one object instead of a list of regions"),
        (answer(f"[{GOOD}]").replace("bbox_2d", "bbox"), None),
        (answer(f"[{GOOD}]".replace('"', "'")), "damaged or cut off: 1 rescued"),
        (answer(f"[{GOOD}]".replace("this cup", 'this "cup"')), "damaged or cut off: 1 rescued"),
        (answer(f"[{GOOD}] {GOOD}"), "damaged or cut off: 2 rescued"),
        (answer(f"[{GOOD}]").replace("<think>", ""), "what precedes </think> is taken as the reasoning"),
        (answer(f"[{GOOD}]").replace("</think>", ""), "<think> is not closed"),
        (answer(f"[{GOOD}]").replace("</gen_image>", ""), "<gen_image> is not closed"),
        (answer(f"[{GOOD}]").replace("<think>the cup</think>", ""), "no <think>"),
        (f"<region>[{GOOD}]</region>", "no <gen_image>"),
        (answer(f"[{GOOD}]") + answer("[]"), "more than one <region>: the first one counts"),
        (answer(f"[{GOOD}]", think="I will write <region> and <gen_image>x</gen_image>"), None),
    ],
)  # fmt: skip
def test_tolerated(text: str, note: str | None) -> None:
    plan = parse(text, SEEN)
    assert set(boxes(plan)) == {(100, 120, 300, 340)}
    if note is None:
        assert plan.notes == ()
    else:
        assert note in "; ".join(plan.notes)


@pytest.mark.parametrize(
    ("box", "expected", "note"),
    [
        ([300, 340, 100, 120], (100, 120, 300, 340), "(300, 340, 100, 120): corners swapped, put right"),
        ([-5, 10, 700, 20], (0, 10, 640, 20), "(-5, 10, 700, 20): clipped to (0, 10, 640, 20) by the 640x480 picture"),
        ([10.5, 20.0, 30.2, 40], (10, 20, 31, 40), "(10.5, 20.0, 30.2, 40): rounded outward to (10, 20, 31, 40)"),
        ([10.0, 20.0, 30.0, 40.0], (10, 20, 30, 40), None),
        ([0.25, 0.5, 0.5, 1.0], (160, 240, 320, 480), "(0.25, 0.5, 0.5, 1.0): taken as fractions of the picture"),
        (
            [0, 0, 10**300, 5],
            (0, 0, 640, 5),
            "(0, 0, a huge number, 5): clipped to (0, 0, 640, 5) by the 640x480 picture",
        ),
    ],
)
def test_boxes_repaired(box: list[float], expected: tuple[int, ...], note: str | None) -> None:
    plan = parse(answer(f"[{item(box)}]"), SEEN)
    assert boxes(plan) == [expected]
    assert plan.notes == (() if note is None else (f"region 1: box {note}",))


@pytest.mark.parametrize(
    ("bad", "note"),
    [
        (item([446, 98, 446, 356]), "region 2: box (446, 98, 446, 356): right must exceed left"),
        (item([1, 98, 446, 98]), "region 2: box (1, 98, 446, 98): bottom must exceed top"),
        (item([700, 10, 800, 20]), "region 2: box (700, 10, 800, 20): lies outside the 640x480 picture"),
        (item([1, 2, 3]), "region 2: box (1, 2, 3): needs 4 numbers"),
        (item([1, 2, 3, 4, 5]), "region 2: box (1, 2, 3, 4, 5): needs 4 numbers"),
        (item([1, 2, 3, "4"]), "region 2: box (1, 2, 3, '4'): needs 4 numbers"),
        (item([True, 2, 3, 4]), "region 2: box (True, 2, 3, 4): needs 4 numbers"),
        (item("1,2,3,4"), "region 2: box '1,2,3,4': needs 4 numbers"),
        (item([1, 2, float("nan"), 4]), "region 2: box (1, 2, nan, 4): must be finite"),
        (item([1, 2, float("inf"), 4]), "region 2: box (1, 2, inf, 4): must be finite"),
        ('{"bbox_2d": [1, 2, 1e999, 4], "hint": "a"}', "region 2: box (1, 2, inf, 4): must be finite"),
        (item([1, 2, 3, 4], ""), "region 2: hint is empty"),
        (item([1, 2, 3, 4], None), "region 2: hint is missing"),
        (item([1, 2, 3, 4], ["a"]), "region 2: hint is ('a')"),
        ('{"bbox_2d": [1, 2, 3, 4]}', "region 2: hint is missing"),
        ('{"hint": "a"}', "region 2: bbox_2d is missing"),
        ("[1, 2, 3, 4]", "region 2: (1, 2, 3, 4) is not an object with bbox_2d and hint"),
        (item([137, 212, 251, 349]), "region 2: box (137, 212, 251, 349): copied from the example in the prompt"),
    ],
)
def test_unusable_region_is_dropped_with_a_note(bad: str, note: str) -> None:
    plan = parse(answer(f"[{GOOD}, {bad}]"), SEEN)
    assert boxes(plan) == [(100, 120, 300, 340)]
    assert plan.notes == (f"dropped {note}",)
    with pytest.raises(AnswerError) as caught:  # alone it leaves nothing but "keep the rest": not a plan
        parse(answer(f"[{bad}]"), SEEN)
    assert note.removeprefix("region 2") in str(caught.value)


def test_points() -> None:
    plan = parse(answer(f"[{item([1, 2, 30, 40], point_2d=[5.5, 900])}, {item([1, 2, 30, 40], point_2d='x')}]"), SEEN)
    assert [region.point for region in plan.regions] == [(5, 479), None]
    assert plan.notes == (
        "region 1: point (5.5, 900): moved to the pixel (5, 479)",
        "dropped region 2: point 'x': needs 2 numbers",
    )


@pytest.mark.parametrize("text", [answer("[]", "snow"), answer("", "snow"), answer("[]", "snow").split("<region>")[0]])
def test_global_only_plans_are_plans(text: str) -> None:
    plan = parse(text, SEEN)
    assert (plan.prompt, plan.regions) == ("snow", ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no <gen_image> and no <region>"),
        ("I cannot help with that.", "no <gen_image> and no <region>"),
        ("<think>hmm", "the answer ends before its plan"),
        ("<think>hmm</think><gen_image>keep the", "the answer ends before its plan"),
        ("<think>hmm</think><gen_image>keep</gen_image><region>", "the answer ends before its first region"),
        ("<think>hmm</think><gen_image>keep</gen_image><region>[{", "no readable region"),
        (answer('[{"bbox_2d": [1, 2')[:-9], "no readable region"),
        (answer("the cup on the left"), "<region> holds no readable region: 'the cup on the left'"),
        (answer("[" * 5000), "no readable region"),
        (answer("null"), "<region> holds None, not a list of regions"),
        (answer("[]", " "), "neither a global prompt nor a region"),
        (answer(f"[{item([137, 212, 251, 349])}, {item([283, 209, 391, 351])}]"), "copied from the example"),
    ],
)
def test_nothing_usable(text: str, message: str) -> None:
    with pytest.raises(AnswerError) as caught:
        parse(text, SEEN)
    assert message in str(caught.value)
    assert caught.value.raw == text
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.raw) == (str(caught.value), text)


def test_examples_are_those_of_the_template_in_use() -> None:
    assert examples_in(default_template()) == {(137, 212, 251, 349), (283, 209, 391, 351)}
    own = examples_in('Answer like <region>[{"bbox_2d": [ 1, 2,3.0 , 40], "hint": "x"}]</region> [1, 2, 3] [9,9,9,9,9]')
    assert own == {(1, 2, 3, 40)}
    copied = answer(f"[{item([1, 2, 3, 40])}]")
    assert boxes(parse(copied, SEEN)) == [(1, 2, 3, 40)]
    with pytest.raises(AnswerError, match="copied from the example"):
        parse(copied, SEEN, own)
    assert boxes(parse(answer(f"[{item([137, 212, 251, 349])}]"), SEEN, own)) == [(137, 212, 251, 349)]


def test_the_prompt_shows_a_plan_that_parses() -> None:
    plan = parse(default_template(), SEEN, examples=())
    assert plan.prompt == KEEP
    assert len(plan.regions) == 2
    assert plan.notes == ("text outside the tags ignored",)


def test_no_limit_of_nineteen_here_but_a_sane_one() -> None:
    many = ", ".join(item([k, k, k + 10, k + 10]) for k in range(40))
    assert len(parse(answer(f"[{many}]"), SEEN).regions) == 40
    plan = parse(answer(f"[{', '.join([GOOD] * 1000)}]"), SEEN)
    assert len(plan.regions) == MAX_REGIONS
    assert plan.notes == ("regions 257 to 1000 dropped: at most 256 are read",)


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        (answer("[]"), True),
        (answer("[]") + "\nmore", True),
        (answer("[]")[:-1], False),
        ("<think>I shall close with </region>", False),
        ("<think>I shall close with </region></think><gen_image>", False),
        ("<gen_image>x</gen_image><region>[]</region>", True),
    ],
)
def test_is_complete(text: str, complete: bool) -> None:
    assert is_complete(text) is complete


def test_import_is_light() -> None:
    code = "import sys, replan.plan; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_a_character_never_gets_into_a_plan() -> None:
    """No tokenizer and no file takes one; JSON and entities can spell it."""
    plan = parse(
        "<think>a\ud800</think><gen_image>b &#55296;</gen_image>"
        '<region>[{"bbox_2d": [1, 2, 3, 4], "hint": "x\\ud800"}, {"bbox_2d": [1, 2, 3, 4], "hint": "ok"}]</region>',
        Size(10, 10),
    )
    assert (plan.reasoning, plan.prompt, [region.hint for region in plan.regions]) == ("a?", "b &#55296;", ["ok"])
    assert any("surrogate" in note for note in plan.notes)
    assert any("region 1: hint" in note for note in plan.notes)
    f"{plan}".encode()

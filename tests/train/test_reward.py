"""Rewards against sums done by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from replan.errors import ConfigError
from replan.plan import default_template
from replan.train.reward import (
    Examples,
    RewardConfig,
    TextScore,
    edit_reward,
    examples_of,
    format_reward,
    is_open,
    plan_reward,
    score_text,
)

THINK = "The instruction means the left cup, which is red and stands on the shelf."  # more than 50 characters
PROMPT = "keep the rest of the image unchanged"  # more than 20
NONE = Examples()
PUBLISHED = RewardConfig()
OURS = RewardConfig(kind="edit", global_plans=True, leak_penalty=1.0)


def region(*box: float, hint: str = "turn this cup blue") -> dict[str, Any]:
    return {"bbox_2d": list(box), "hint": hint}


def answer(regions: Any = None, think: str = THINK, prompt: str = PROMPT) -> str:
    listed = "" if regions is None else f"\n<region>{json.dumps(regions)}</region>"
    return f"<think>{think}</think>\n<gen_image>{prompt}</gen_image>{listed}"


GOOD = answer([region(1, 2, 30, 40)])


def scores(text: str, examples: Examples = NONE, config: RewardConfig = PUBLISHED) -> tuple[float, float, float]:
    found = score_text(text, examples, config)
    return found.format, round(found.content, 6), round(found.regions, 6)


# --- stage 1: 0.5 F + 0.3 K + 0.2 G ----------------------------------------------------------------------------------


def test_the_best_answer_earns_0_905() -> None:
    # F 1; K 0.25 + 0.25 + 0.25; G 0.5 + 0.2 + 0.2
    assert scores(GOOD) == (1.0, 0.75, 0.9)
    assert score_text(GOOD, NONE, PUBLISHED).reward == pytest.approx(0.5 + 0.3 * 0.75 + 0.2 * 0.9) == 0.905


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer(), (1.0, 0.5, 0.0)),  # no list: its part of K and all of G are missing
        (answer([]), (1.0, 0.75, 0.5)),  # a list that says nothing: valid, no count, no hints
        (answer([region(1, 2, 3, 4)] * 6), (1.0, 0.75, 0.7)),  # 0.5 + 0.2 for hints; six are too many
        (GOOD.replace("]</region>", "</region>"), (1.0, 0.25, -0.5)),  # 0.25 - 0.25 + 0.25
        (GOOD.replace("<think>", "<thought>"), (0.0, 0.5, 0.9)),  # no reasoning to be found
        (GOOD + " That is all.", (0.0, 0.75, 0.9)),
        (GOOD + GOOD, (0.0, 0.75, 0.9)),  # a second plan inside
        ("Sure!", (0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0)),
        (GOOD.replace(THINK, "Ten chars."), (1.0, 0.55, 0.9)),  # 0.25 + 0.25 * 10 / 50 + 0.25
        (GOOD.replace(PROMPT, "five!"), (1.0, 0.5625, 0.9)),  # 0.25 + 0.25 + 0.25 * 5 / 20
        (GOOD.replace(THINK, "x" * 513), (1.0, 0.5, 0.9)),
        (GOOD.replace(PROMPT, "x" * 513), (1.0, 0.5, 0.9)),
        (GOOD.replace(PROMPT, ""), (1.0, -19.5, 0.9)),  # empty: 0.25 + 0.25 + 0 - 20
        (GOOD.replace(THINK, "..."), (1.0, -19.485, 0.9)),  # 0.25 + 0.25 * 3 / 50 - 20 + 0.25
    ],
)
def test_format_content_regions(text: str, expected: tuple[float, float, float]) -> None:
    assert scores(text) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (region(1, 2, 3), -0.1),  # 0.5 + 0.2 + 0.2 - 1: the hint is fine, the box is not
        (region(1, 2, 3, 4, hint=""), -0.3),  # 0.5 + 0.2 - 1
        (region(1, 2, 3, 4, hint="..."), -0.3),
        ({"bbox_2d": "1, 2, 3, 4", "hint": "turn it blue"}, -0.1),
        ({"bbox_2d": [1, 2, 3, True], "hint": "turn it blue"}, -0.1),
        ("a region", -1.3),  # 0.5 + 0.2 - 1 - 1
    ],
)
def test_bad_regions_cost_one_each(item: Any, expected: float) -> None:
    assert scores(answer([item]))[2] == pytest.approx(expected)


def test_space_around_brackets_does_not_count() -> None:
    assert scores(GOOD.replace("<", " <\n").replace(">", " > ").replace("/", " / ")) == scores(GOOD)


def test_the_variant_without_reasoning() -> None:
    config = RewardConfig(think=False)
    bare = GOOD.partition("\n")[2]
    assert scores(bare, config=config) == (1.0, 1.0, 0.9)  # K 0.5 + 0.5
    assert scores(GOOD, config=config)[0] == 0.0
    assert scores(bare.replace(PROMPT, "abc"), config=config)[1] == pytest.approx(0.8)  # 0.5 + 0.5 * 3 / 5
    assert scores(bare.replace(PROMPT, "x" * 513), config=config)[1] == pytest.approx(0.5)  # 0.5 + 0.5 - 0.5
    assert scores(bare.replace(PROMPT, "..."), config=config)[1] == pytest.approx(-19.2)  # 0.5 + 0.5 * 3 / 5 - 20
    assert scores(bare.replace("]</region>", "</region>"), config=config)[1] == pytest.approx(0.0)  # 0.5 - 0.5


def test_copies_of_the_prompts_example() -> None:
    examples = examples_of(default_template())
    assert (137.0, 212.0, 251.0, 349.0) in examples.boxes
    copied = answer([region(137, 212, 251, 349)])
    assert scores(copied, examples) == (1.0, 0.75, pytest.approx(-0.1))  # 0.9 - 1
    copied_hint = answer([region(1, 2, 3, 4, hint="Turn this mug into a small brass lamp.")])
    assert scores(copied_hint, examples)[2] == pytest.approx(-0.3)
    assert score_text(copied, examples, PUBLISHED).leaks == score_text(copied_hint, examples, PUBLISHED).leaks == 1
    reasoning = next(text for text in default_template().splitlines() if text.startswith("<think>"))[7:-8]
    assert scores(GOOD.replace(THINK, reasoning), examples)[1] == pytest.approx(-19.25)


def test_a_leak_costs_what_the_switch_says() -> None:
    examples = examples_of(default_template())
    copied = score_text(answer([region(137, 212, 251, 349)]), examples, PUBLISHED)
    published = format_reward(copied, PUBLISHED).value
    assert published == pytest.approx(0.5 + 0.225 - 0.02)
    assert format_reward(copied, OURS).value == pytest.approx(published - 1.0)


def test_stage_one_takes_a_plan_without_regions_for_right_where_the_row_has_none_either() -> None:
    whole = score_text(answer([]), NONE, PUBLISHED)
    missing = score_text(answer(), NONE, PUBLISHED)
    assert format_reward(whole, OURS, answer([])).value == pytest.approx(0.5 + 0.225 + 0.2 * 0.9)  # as with a region
    assert format_reward(missing, OURS, answer([])).value == pytest.approx(0.5 + 0.3 * 0.5 + 0.2 * 0.9)
    for config, expected in ((PUBLISHED, answer([])), (OURS, GOOD), (OURS, "a red cup"), (OURS, "")):
        assert format_reward(whole, config, expected).value == pytest.approx(0.5 + 0.225 + 0.2 * 0.5)
    malformed = score_text(answer([]).replace("</think>", ""), NONE, PUBLISHED)
    assert format_reward(malformed, OURS, answer([])) == format_reward(malformed, PUBLISHED)
    assert format_reward(score_text(GOOD, NONE, OURS), OURS, answer([])).value == pytest.approx(0.905)


# --- stage 2: P + 0.2 R1 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "effect", "consistency", "expected"),
    [
        (5, 5, 5, 1.0),
        (5, 5, 3, 2 / 3),
        (5, 3, 5, 1 / 3),  # consistency counts only with the effect
        (1, 5, 5, 2 / 3),
        (1, 1, 5, 0.0),
        (4, 4, 4, 1.0),
    ],
)
def test_sharp(target: int, effect: int, consistency: int, expected: float) -> None:
    ratings = {"target": target, "effect": effect, "consistency": consistency}
    assert plan_reward(ratings, PUBLISHED) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "effect", "consistency", "expected"),
    [
        (5, 5, 5, (5 + 5 + 0.4 * 5) / 15),
        (5, 4, 5, (5 + 4 + 0.2 * 5) / 15),
        (5, 3, 5, 8 / 15),
        (1, 1, 5, 2 / 15),
    ],
)
def test_soft(target: int, effect: int, consistency: int, expected: float) -> None:
    ratings = {"target": target, "effect": effect, "consistency": consistency}
    assert plan_reward(ratings, RewardConfig(soft=True)) == pytest.approx(expected)


RIGHT = {"target": 5, "effect": 5, "consistency": 5}


def test_stage_two_adds_a_fifth_of_stage_one() -> None:
    config = RewardConfig(kind="edit")
    found = edit_reward(score_text(GOOD, NONE, config), RIGHT, config)
    assert found.value == pytest.approx(1 + 0.2 * 0.905)
    assert found.parts["success"] == 1.0
    assert edit_reward(score_text(GOOD, NONE, config), None, config).value == pytest.approx(0.2 * 0.905)


def test_the_gate() -> None:
    config = RewardConfig(kind="edit")
    assert is_open(score_text(GOOD, NONE, config), config)
    assert is_open(score_text(answer([region(1, 2, 3, 4)] * 6), NONE, config), config)  # G is exactly 0.7
    for shut in (GOOD + "!", answer([]), answer(), answer([region(1, 2, 3)])):
        assert not is_open(score_text(shut, NONE, config), config), shut


def test_global_plans_published_and_ours() -> None:
    for text in (answer([]), answer()):
        found = score_text(text, NONE, OURS)
        assert is_open(found, OURS)
        right, wrong = (edit_reward(found, {**RIGHT, "effect": effect, "target": effect}, OURS) for effect in (5, 1))
        with_regions = edit_reward(score_text(GOOD, NONE, OURS), RIGHT, OURS)
        missing = 0.2 * 0.3 * (0.75 - found.content)  # what no list costs in K stays
        assert right.value == pytest.approx(with_regions.value - missing)
        assert wrong.value < 0.2
    assert not is_open(score_text(answer([], prompt=""), NONE, RewardConfig(kind="edit")), RewardConfig(kind="edit"))


def test_a_leak_shuts_our_gate() -> None:
    examples = examples_of(default_template())
    two = score_text(answer([region(137, 212, 251, 349), region(1, 2, 3, 4)]), examples, OURS)
    assert not is_open(two, OURS)
    assert edit_reward(two, None, OURS).value < 0


def test_parts_add_up() -> None:
    text = TextScore(1.0, 0.75, 0.9, 1)
    found = edit_reward(text, RIGHT, PUBLISHED)
    assert found.value == pytest.approx(
        found.parts["plan"] + 0.2 * (0.5 * found.parts["format"] + 0.3 * found.parts["content"] + 0.2 * 0.9)
    )


@pytest.mark.parametrize("wrong", [{"kind": "guess"}, {"threshold": 6}, {"leak_penalty": -1.0}, {"longest": 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RewardConfig(**wrong)


def test_numbers_too_large_for_a_float() -> None:
    """A policy that repeats a digit does not stop the training."""
    found = score_text(answer([region(10**400, 2, 30, 40)]), examples_of(default_template()), PUBLISHED)
    assert (found.format, found.leaks) == (1.0, 0)

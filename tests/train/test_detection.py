"""The detection reward against sums done by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from replan.train.detection import detection_reward

CUP = {"bbox_2d": [10, 10, 50, 50], "point_2d": [30, 30]}
LAMP = {"bbox_2d": [200, 100, 260, 180], "point_2d": [230, 140]}
WANTED = [CUP, LAMP]


def answer(items: Any, think: str = "A cup on the left. A lamp on the right.") -> str:
    return f"<think>{think}</think><answer>{json.dumps(items)}</answer>"


def test_all_right() -> None:
    found = detection_reward(answer([LAMP, CUP]), WANTED)  # in any order
    assert found.value == pytest.approx(1.0 + 3.0 + 1.0)
    assert found.parts == {"format": 1.0, "accuracy": 3.0, "fresh": 1.0}


def test_a_region_list_counts_as_well() -> None:
    text = answer([LAMP, CUP]).replace("answer>", "region>")
    assert detection_reward(text, WANTED).value == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("items", "accuracy"),
    [
        ([CUP], 1.5),  # 3 points over two wanted
        ([CUP, LAMP, LAMP], 2.0),  # 6 points over three found
        ([{**CUP, "point_2d": [49, 49]}, LAMP], 3.0),  # 27 pixels off, inside
        ([{**CUP, "point_2d": [51, 30]}, LAMP], 2.5),  # outside the box
        ([{"bbox_2d": [0, 0, 40, 40], "point_2d": [30, 30]}, LAMP], 2.0),  # IoU 900 / 2300; corners exactly 10 off
        ([{"bbox_2d": [19, 19, 59, 59], "point_2d": [30, 30]}, LAMP], 2.5),  # corners 9 off, IoU 961 / 2239
        ([], 0.0),
    ],
)
def test_accuracy(items: list[Any], accuracy: float) -> None:
    assert detection_reward(answer(items), WANTED).parts["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "formed"),
    [
        ("a cup", 0.0),
        ("<think>a cup</think>", 0.0),
        (answer("none"), 0.25),
        (answer([]), 0.5),
        (answer([{"bbox_2d": [1, 2, 3, 4]}]), 0.75),
        (answer([CUP], think="..."), -19.0),
    ],
)
def test_format_in_quarters(text: str, formed: float) -> None:
    assert detection_reward(text, WANTED).parts["format"] == pytest.approx(formed)


def test_saying_a_sentence_twice_costs_one() -> None:
    repeated = detection_reward(answer(WANTED, think="A cup. A lamp. A cup."), WANTED)
    assert repeated.value == pytest.approx(4.0)


def test_many_objects_stay_quick() -> None:
    many = [{"bbox_2d": [k, k, k + 20, k + 20], "point_2d": [k + 10, k + 10]} for k in range(500)]
    assert detection_reward(answer(many), many).parts["accuracy"] == pytest.approx(3.0)


def test_numbers_too_large_for_a_float() -> None:
    assert (
        detection_reward(answer([{"bbox_2d": [10**400, 2, 3, 4], "point_2d": [1, 2]}]), WANTED).parts["accuracy"] == 0
    )

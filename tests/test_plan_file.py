"""Plan files: read, checked, mended where the slip is plain, refused with the name of the key otherwise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from replan.errors import PlanError
from replan.plan import KEEP, from_json, json_schema, read_plan, to_json
from replan.regions import MAX_REGIONS
from replan.types import Box, Plan, Region, Size

SEEN = Size(640, 480)
FILE: dict[str, Any] = {
    "version": 1,
    "size": [640, 480],
    "reasoning": "the cup",
    "prompt": "keep the rest",
    "regions": [{"box": [100, 120, 300, 340], "hint": "make this cup red", "point": [200, 220]}],
    "notes": [],
}


def edited(**changes: object) -> dict[str, Any]:
    return {key: value for key, value in (copy.deepcopy(FILE) | changes).items() if value is not None}


def region(**changes: object) -> dict[str, Any]:
    return edited(regions=[FILE["regions"][0], FILE["regions"][0] | changes])


def test_file_round_trip_and_shortest_file() -> None:
    assert to_json(from_json(FILE)) == FILE
    short = from_json({"size": [64, 48], "regions": [{"box": [1, 2, 3, 4], "hint": "x"}]})
    note = f"no prompt: the global prompt is {KEEP!r}"
    assert short == Plan("", KEEP, (Region(Box(1, 2, 3, 4), "x"),), Size(64, 48), (note,))
    assert from_json({"prompt": "snow"}, Size(5, 6)) == Plan("", "snow", (), Size(5, 6))
    assert from_json(FILE, Size(5, 6)).size == SEEN  # the file knows better


def test_file_repairs_are_noted() -> None:
    plan = from_json(region(box=[300, -5, 100.5, 340], point=[900, 1]))
    assert plan.regions[1] == Region(Box(100, 0, 300, 340), "make this cup red", (639, 1))
    assert [note.partition("): ")[2].split(" ")[0] for note in plan.notes] == ["corners", "rounded", "clipped", "moved"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "plan: must be an object, not ()"),
        (edited(sice=[1, 2]), "plan: unknown key 'sice' (did you mean 'size'?)"),
        (edited(whatever=1), "plan: unknown key 'whatever'"),
        (edited(version=2), "version 2: this release reads version 1"),
        (edited(size=None), 'size is missing: write "size": [width, height]'),
        (edited(size=[640]), "size (640): needs width and height in whole pixels"),
        (edited(size=[640, 0]), "size (640, 0): needs width and height in whole pixels"),
        (edited(size=[640, 480.5]), "size (640, 480.5): needs"),
        (edited(prompt=5), "prompt: must be a text, not 5"),
        (edited(reasoning=["a"]), "reasoning: must be a text, not ('a')"),
        (edited(notes="a"), "notes: must be a list, not 'a'"),
        (edited(notes=[1]), "notes: must be a list of texts"),
        (edited(regions={}), "regions: must be a list, not an object"),
        (edited(regions=[5]), "region 1: must be an object, not 5"),
        (edited(regions=[], prompt=""), "neither a global prompt nor a region"),
        (edited(regions=FILE["regions"] * 300), "300 regions: at most 256"),
        (region(bbox_2d=[1, 2, 3, 4]), "region 2: unknown key 'bbox_2d' (did you mean 'box'?)"),
        (edited(regions=[{"hint": "x"}]), 'region 1: box is missing: write "box": [left, top, right, bottom]'),
        (region(box=[446, 98, 446, 356]), "region 2: box (446, 98, 446, 356): right must exceed left"),
        (region(box=[1, 2, 3]), "region 2: box (1, 2, 3): needs 4 numbers"),
        (region(box=[1, 2, float("nan"), 4]), "region 2: box (1, 2, nan, 4): must be finite"),
        (region(box=[700, 2, 800, 4]), "region 2: box (700, 2, 800, 4): lies outside the 640x480 picture"),
        (region(box=[1, 2, 10**5000, 2]), "region 2: box (1, 2, a huge number, 2): bottom must exceed top"),
        (region(hint=""), "region 2: hint is empty"),
        (region(hint=7), "region 2: hint is 7"),
        (region(point=[1]), "region 2: point (1): needs 2 numbers"),
    ],
)
def test_bad_file_content(value: object, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        from_json(value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"size": [1, 2], "prompt": 3}', "prompt: must be a text"),
        (b" " * 10_000_001, "longer than 10,000,000 bytes"),
        (b'{"size": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"plan file {path}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match="directory"):
        read_plan(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text("\ufeff" + json.dumps(FILE), encoding="utf-8")  # editors on Windows write a byte order mark
    assert to_json(read_plan(path)) == FILE


def test_schema_and_reader_agree() -> None:
    """The shipped schema lists exactly the keys that the reader knows and the writer writes."""
    properties = json_schema()["properties"]
    assert set(properties) == {*FILE, "raw"}
    assert set(properties["regions"]["items"]["properties"]) == set(FILE["regions"][0])
    assert properties["regions"]["maxItems"] == MAX_REGIONS


def test_half_a_character_in_a_plan_file() -> None:
    with pytest.raises(PlanError, match="prompt: character 1 is half of a surrogate pair"):
        from_json({"size": [9, 9], "prompt": "\ud800"})

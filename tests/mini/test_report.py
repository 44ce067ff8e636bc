"""The report: its rows, what it keeps between runs, and how it shows."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from replan import Editor, config
from replan.backbones import EditConfig
from replan.errors import ConfigError, PlanError
from replan.mini import report, table
from replan.mini.instructions import KEEP_REST
from replan.mini.judge import MiniVerdict
from replan.mini.report import Job, Models, Shot, cases, items, measure, request, score_plan, shoot
from replan.mini.ways import Way, choose, hasty, jitter, make, name_things, rewrite, ways, where
from replan.planner.local import LocalPlanner
from replan.presets import preset_names
from replan.rules import schedule
from replan.types import Box, Plan, Region, Size

ASSETS = Path(__file__).parents[2] / "assets" / "mini"
SIZE = Size(96, 96)
CUP = "I see cup white top left, box red center. Look for the cup. It is the cup white top left: recolour it."


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load("mini", "mini")


def plan_of(*regions: tuple[Box, str], reasoning: str = "", prompt: str = "keep the rest unchanged") -> Plan:
    return Plan(reasoning, prompt, tuple(Region(box, hint) for box, hint in regions), SIZE)


# rows


def test_every_preset_has_a_row_and_names_choose_rows_in_the_reports_order() -> None:
    assert set(preset_names()) <= set(ways())
    assert [way.name for way in choose(["end-to-end", "base", "paper"])] == ["base", "paper", "end-to-end"]
    assert [way.name for way in choose([])] == list(ways())
    with pytest.raises(ConfigError, match=r"row 'bse': unknown; there are base, rephrase, "):
        choose(["bse"])


def test_a_rules_file_is_a_row_beside_the_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("expand: 0.25\nrules: {region i: hint i}\n")
    first, mine, last = choose(["ceiling", str(file), "base"])
    assert (first.name, mine.title, last.name) == ("base", "rules `mine`", "ceiling")
    assert Models().settings(mine).mask.expand == 0.25


@pytest.mark.parametrize("file", sorted((ASSETS / "rules").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_tried_rules_still_load(file: Path) -> None:
    assert schedule(2, Models().settings(choose([str(file)])[0]).mask)


def test_a_rewrite_says_each_hint_of_the_thing_that_the_reasoning_names() -> None:
    box = (Box(4, 4, 28, 28), "make this red")
    assert rewrite(plan_of(box, reasoning=CUP)) == "make the white cup in the top left red"
    keep = (Box(40, 40, 60, 60), "keep this unchanged")
    two = CUP + " Look for the box. It is the box red center: keep it."
    assert rewrite(plan_of(box, keep, reasoning=two)) == (
        "make the white cup in the top left red and keep the red box in the center unchanged"
    )


def test_a_rewrite_without_names_says_where_the_box_is() -> None:
    right = (Box(70, 36, 94, 60), "remove this")
    assert rewrite(plan_of(right)) == "remove the thing in the middle right"
    assert rewrite(plan_of((right[0], "a red hat"))) == "a red hat: the thing in the middle right"


def test_a_rewrite_keeps_what_is_asked_of_the_whole_picture() -> None:
    assert rewrite(plan_of(prompt="make everything red")) == "make everything red"
    box = (Box(4, 4, 28, 28), "make this red")
    assert rewrite(plan_of(box, reasoning=CUP, prompt="make it night")) == (
        "make it night and make the white cup in the top left red"
    )


def test_named_hints_are_those_of_the_rewrite_one_by_one() -> None:
    for item in items("dev", 30):
        if item.plan.regions:
            whole = [] if item.plan.prompt == KEEP_REST else [item.plan.prompt]
            named = [region.hint for region in name_things(item.plan).regions]
            assert rewrite(item.plan) == " and ".join(whole + named)
            assert "this" not in rewrite(item.plan).split()


@pytest.mark.parametrize(("box", "words"), [((0, 0, 10, 10), "top left"), ((40, 80, 60, 96), "bottom middle")])
def test_the_place_of_a_box_in_words(box: tuple[int, int, int, int], words: str) -> None:
    assert where(Box(*box), SIZE) == words


def test_jitter_moves_edges_by_at_most_its_share_and_by_a_seed() -> None:
    rng = random.Random(0)
    for _ in range(300):
        left, top = rng.randrange(0, 80), rng.randrange(0, 80)
        box = Box(left, top, left + rng.randrange(1, 16), top + rng.randrange(1, 16))
        plan, share = plan_of((box, "x")), rng.choice((0.1, 0.5, 0.7, 3.0))
        (moved,) = (region.box for region in jitter(plan, share, 3).regions)
        assert 0 <= moved.left < moved.right <= 96
        assert 0 <= moved.top < moved.bottom <= 96
        if share < 0.5:  # the edges cannot change places
            assert all(
                abs(a - b) <= share * side + 1
                for a, b, side in zip(moved.as_tuple(), box.as_tuple(), (box.width, box.height) * 2, strict=True)
            )
        assert jitter(plan, share, 3) == jitter(plan, share, 3)
    far = plan_of((Box(10, 10, 80, 80), "x"))
    assert len({jitter(far, 0.5, seed).regions for seed in range(5)}) == 5
    assert jitter(far, 0.0, 0) == far


def test_without_reasoning_the_planner_answers_at_once(editor: Editor) -> None:
    assert isinstance(editor.planner, LocalPlanner)
    requests = [request(item) for item in items("dev", 2)]
    for slow, quick in zip(editor.planner.plan_many(requests), hasty(editor.planner).plan_many(requests), strict=True):
        assert isinstance(slow, Plan)
        assert isinstance(quick, Plan)
        assert (bool(slow.reasoning), quick.reasoning) == (True, "")
        assert quick.regions
        assert quick.raw.startswith("<think></think>")


def test_a_plan_is_scored_by_box_hint_and_reasoning() -> None:
    item = next(item for item in items("dev", 20) if len(item.plan.regions) == 1)
    right = {"valid": True, "object": True, "hint": True, "reason": True}
    assert score_plan(item, item.plan) == right
    assert score_plan(item, replace(item.plan, reasoning="hm")) == right | {"reason": False}
    far = replace(item.plan, regions=(Region(Box(0, 0, 2, 2), item.plan.regions[0].hint),))
    assert score_plan(item, far) == right | {"object": False}
    assert score_plan(item, PlanError("no")) == dict.fromkeys(right, False)


@pytest.mark.parametrize("name", ["base", "rephrase", "direct", "named-direct", "noise-50", "ceiling"])
def test_ways_make_the_edits_that_they_say(name: str, editor: Editor) -> None:
    item = next(item for item in items("dev", 20) if item.plan.regions)
    way = ways()[name]
    config_of = Models().settings(way)
    asked: list[Any] = []

    class Watched(Editor):
        def baseline(self, request: Any, on_step: Any = None) -> Any:
            asked.append((request.instruction, None))
            return super().baseline(request, on_step)

        def __call__(self, request: Any, on_step: Any = None, *, strict: bool = False) -> Any:
            asked.append((request.instruction, request.plan))
            return super().__call__(request, on_step, strict=strict)

    edit = make(Watched(None, editor.backbone, config_of), way, item, item.plan)
    assert edit.image.size == (96, 96)
    want = {
        "base": [(item.instruction, None)],
        "rephrase": [(rewrite(item.plan), None)],
        "direct": [(item.instruction, item.plan)],
        "named-direct": [(item.instruction, name_things(item.plan))],
        "noise-50": [(item.instruction, jitter(item.plan, 0.5, 0))],
        "ceiling": [],
    }
    assert asked == want[name]


def test_an_unusable_plan_falls_back_to_the_bare_instruction(editor: Editor) -> None:
    item = items("dev", 1)[0]
    bare = editor.baseline(request(item)).image.tobytes()
    for name in ("end-to-end", "rephrase"):
        assert make(editor, ways()[name], item, PlanError("no")).image.tobytes() == bare


# measuring


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Edits take no time and count themselves."""
    calls: Counter[str] = Counter()

    def fake(models: Models, way: Way, seed: int, plan: Any) -> Shot:
        calls[way.name] += 1
        return Shot(MiniVerdict(5, 3 if way.name == "paper" else 5, 5, 4, float("inf")), 0.25)

    monkeypatch.setattr(report, "shoot", fake)
    return calls


def job(names: str, count: int = 4, done: Any = None, **models: str) -> Job:
    return Job(Models(**models), "dev", count, choose(names.split(",")), done=done)


def test_what_is_done_is_kept_and_what_has_changed_is_not(counted: Counter[str], tmp_path: Path) -> None:
    kept: list[Any] = []
    first = measure(job("base,paper"), lambda so_far: kept.append(table.to_text(so_far)), lambda text: None)
    assert counted == {"base": 4, "paper": 4}
    assert [list(json.loads(text)["rows"]) for text in kept] == [["base"], ["base", "paper"], ["base", "paper"]]
    file = tmp_path / "r.json"
    file.write_text(kept[0])
    again = measure(job("base,paper", done=table.read(file)), lambda so_far: None, lambda text: None)
    assert counted == {"base": 4, "paper": 8}
    assert table.markdown(again) == table.markdown(first)
    measure(job("base,paper", count=3, done=first), lambda so_far: None, lambda text: None)
    assert counted == {"base": 7, "paper": 11}
    measure(job("base", done=first, edit="edit/flux_kontext"), lambda so_far: None, lambda text: None)
    assert counted["base"] == 11


def test_the_tables_say_what_was_measured(counted: Counter[str], tmp_path: Path) -> None:
    found = measure(job("base,paper,ceiling"), lambda so_far: None, lambda text: None)
    row = table.estimates(found["rows"]["paper"])
    assert {name: value.mean for name, value in row.items() if value} == {
        "quality": 4.0, "target": 5.0, "effect": 3.0, "consistency": 5.0, "overall": 4.25,
        "weighted": pytest.approx((5 + 3 + 9 * 3 / 5) / 4), "success": 0.0, "outside_psnr": 60.0, "seconds": 0.25,
    }  # fmt: skip
    text = table.markdown(found)
    assert "| rules `paper` | 4.00 ± 0.00 | 5.00 ± 0.00 | 3.00 ± 0.00 |" in text
    assert text.startswith("4 items of the split `dev`")
    for case in cases("dev", 4):
        assert f"| {case.task} |" in text
        assert f"| {case.referring} |" in text
    for suffix in ("png", "svg"):
        table.picture(found, tmp_path / f"t.{suffix}")
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width > 1000
    assert "base editor, bare instruction" in (tmp_path / "t.svg").read_text()
    with pytest.raises(ConfigError, match=r"a picture is a \.png, \.svg or \.pdf"):
        table.picture(found, tmp_path / "t.gif")


def test_plans_are_measured_with_and_without_reasoning(counted: Counter[str]) -> None:
    found = measure(job("no-reasoning,end-to-end", count=2), lambda so_far: None, lambda text: None)
    assert set(found["plans"]) == {"planner", "hasty"}
    assert found["plans"]["planner"]["valid"] == "11"
    assert "1" not in found["plans"]["hasty"]["reason"]
    assert min(found["rows"]["end-to-end"]["seconds"]) > 0.25  # planning counts
    assert "| planner without reasoning |" in table.markdown(found)


@pytest.mark.slow
def test_several_processes_make_the_same_edits_as_one() -> None:
    def scores(workers: int) -> Any:
        found = measure(replace(job("base,direct"), workers=workers), lambda so_far: None, lambda text: None)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"].values()]

    assert scores(1) == scores(2)


def test_a_shot_is_one_edit_judged() -> None:
    (case,) = cases("dev", 1)
    shot = shoot(Models(), ways()["direct"], case.seed, None)
    assert shot.verdict.consistency >= 3
    assert 0 < shot.seconds < 60


# the verb


def run(*words: str) -> Any:
    from replan.cli import app

    return CliRunner().invoke(app, ["mini", "report", *words])


def test_the_verb_writes_json_and_reads_it_again(counted: Counter[str], tmp_path: Path) -> None:
    file, plot = tmp_path / "a" / "report.json", tmp_path / "report.png"
    options = ["--n", "2", "--split", "dev", "--rows", "base,paper", "--workers", "1"]
    first = run(*options, "--json", str(file))
    assert first.exit_code == 0, first.output
    again = run("--from", str(file), "--plot", str(plot))
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert plot.stat().st_size > 1000
    assert json.loads(file.read_text())["rows"]["base"]["means"]["success"] == [1.0, 1.0, 1.0]
    assert counted == {"base": 2, "paper": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "bse"], "row 'bse': unknown"),
        (["--split", "tset"], "split = 'tset'"),
        (["--from", "gone.json"], "gone.json: cannot be read"),
        (["--rows", "gone.yaml", "--workers", "1"], "gone.yaml"),
        (["--edit", "edit/mni", "--rows", "base"], "did you mean edit/mini?"),
    ],
)
def test_mistakes_are_the_users(words: list[str], message: str) -> None:
    result = run("--n", "2", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_another_json_is_no_report(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text in ("[]", "{}", "no", '{"format": 1, "rows": {"base": {}}}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is no report"):
            table.read(file)
    file.write_text('{"format": 9}')
    with pytest.raises(ConfigError, match="format 9"):
        table.read(file)


def test_the_rows_need_only_settings_of_the_editor() -> None:
    own = config.load(EditConfig, "edit/mini")
    assert Models().settings() == own
    assert Models().settings(ways()["paper"]).mask.pooled == "main"


@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.json")), ids=lambda file: file.stem)
def test_the_published_reports_can_be_shown_again(file: Path) -> None:
    text = table.markdown(table.read(file))
    assert "base editor, bare instruction" in text
    assert "rules `paper`" in text

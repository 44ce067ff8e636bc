"""The shipped models do the main job, on items that training never saw."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from replan import Editor, EditRequest
from replan.mini.changes import Change
from replan.mini.instructions import Item, make_item
from replan.mini.judge import judge
from replan.mini.report import items, request, score_plans
from replan.mini.scenes import draw
from replan.mini.sheet import contact_sheet

ASSETS = Path(__file__).parents[2] / "assets"
COUNT = 24


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load("mini", "mini")


@pytest.fixture(scope="module")
def dev() -> list[Item]:
    return items("dev", COUNT)


def desk() -> Item:
    """The quick start's own edit as an item, so that the exact judge can look at it."""
    import importlib.util
    import random

    spec = importlib.util.spec_from_file_location("figure", ASSETS.parent / "scripts" / "figure.py")
    assert spec is not None
    assert spec.loader is not None
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    scene = figure.SCENES["desk.png"]
    apple = next(index for index, thing in enumerate(scene.things) if thing.kind == "apple")
    changes = [Change("replace", 1, None, "plant"), Change("recolour", apple, "green")]
    item = make_item(random.Random(0), scene, changes)
    return replace(item, instruction=figure.INSTRUCTION)


def test_the_shipped_pictures_are_the_drawn_scenes():
    assert Image.open(ASSETS / "desk.png").tobytes() == draw(desk().scene).tobytes()


def test_the_quick_start_edit_is_right_and_the_baseline_is_not(editor: Editor):
    item = desk()
    edit = editor(EditRequest(Image.open(ASSETS / "desk.png"), item.instruction))
    verdict = judge(item, edit.image)
    assert (verdict.target, verdict.effect) == (5, 5)
    assert verdict.consistency >= 3  # nothing else changed; the autoencoder blurs a little
    assert verdict.quality >= 4
    assert judge(item, editor.baseline(request(item)).image).consistency == 1


def test_plans_of_unseen_scenes(editor: Editor, dev: list[Item]):
    assert editor.planner is not None
    plans = editor.planner.plan_many([request(item) for item in dev])
    rates = score_plans(list(zip(dev, plans, strict=True)))
    assert rates["valid"].mean == 1.0
    assert rates["hint"].mean >= 0.95
    assert rates["object"].mean >= 0.9


def test_regions_beat_the_bare_instruction(editor: Editor, dev: list[Item]):
    local = [item for item in dev if item.plan.regions]
    regional = [judge(item, editor(request(item, planned=True)).image) for item in local]
    bare = [judge(item, editor.baseline(request(item)).image) for item in local]
    successes = sum(verdict.success for verdict in regional) / len(local)
    assert successes >= 0.75
    assert successes >= sum(verdict.success for verdict in bare) / len(local) + 0.2
    assert sum(verdict.outside_psnr for verdict in regional) / len(local) > 33


def test_the_same_seed_gives_the_same_bytes(editor: Editor, dev: list[Item]):
    first, other, again = (editor(request(dev[number], planned=True, seed=5)).image.tobytes() for number in (0, 1, 0))
    assert first == again != other


def test_the_sheet_and_its_verb(tmp_path: Path, dev: list[Item]):
    from replan.cli import app

    sheet = tmp_path / "sheet.png"
    result = CliRunner().invoke(app, ["mini", "show", "--n", "4", "-o", str(sheet)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(sheet)
    with Image.open(sheet) as picture:
        assert picture.size == contact_sheet(dev[:4]).size


def test_an_unknown_split_is_the_users_mistake():
    from replan.cli import app

    result = CliRunner().invoke(app, ["mini", "show", "--split", "tset", "-o", "x.png"])
    assert result.exit_code == 2

"""The matrix's state, the settings and the command, without a browser."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from replan.backbones import default_config
from replan.backbones.base import EditConfig
from replan.backbones.runtime import Runtime
from replan.config import load
from replan.demo.board import Board, mask_config, name_of, presets, role_of, tables, with_preset
from replan.demo.forms import with_seed
from replan.demo.jobs import reasoning_of
from replan.demo.matrix import NO_BOXES, matrix_value, share_line
from replan.demo.settings import Settings, command, edit_config, runtime_words
from replan.errors import ConfigError
from replan.rules import MaskConfig, Role, RoleKind, load_rules, phase_rules, schedule

OWN = MaskConfig(expand=0.1, isolate=0.5)
HINT_1, BACKGROUND = Role(RoleKind.HINT, 1), Role(RoleKind.NOISE_BACKGROUND)
PLAIN = Settings("mini", "mini", 7, 8, 1.0, 0.0, 1, False, False)


def test_an_untouched_board_is_the_backbone_itself() -> None:
    board = with_preset("backbone", OWN)
    assert mask_config(board, (5, 9), OWN, 0.1) == OWN


@pytest.mark.parametrize("name", presets()[1:])
def test_presets_are_the_rules_files(name: str) -> None:
    from replan.config import config_path

    board = with_preset(name, OWN)
    phases = load_rules(config_path(f"rules/{name}"))
    want = tuple((phase.until, phase_rules(phase, 2, OWN)) for phase in phases)
    assert schedule(2, mask_config(board, (5, 9), OWN, 0.1)) == want


def test_a_cell_follows_its_region() -> None:
    ids = (5, 9)
    board = Board("backbone", 0.5).toggled(
        "late", name_of(Role(RoleKind.HINT, 2), ids), name_of(BACKGROUND, ids), False
    )
    early, late = tables(board, ids, OWN)
    assert BACKGROUND in early[Role(RoleKind.HINT, 2)]
    assert BACKGROUND not in late[Role(RoleKind.HINT, 2)]
    _, late = tables(board, (9,), OWN)
    assert BACKGROUND not in late[HINT_1]
    _, late = tables(board, (5,), OWN)
    assert BACKGROUND in late[HINT_1]  # its region is gone: no other region inherits the rule
    assert role_of((RoleKind.HINT, 9), (5,)) is None


def test_a_cell_set_back_leaves_no_rules() -> None:
    ids = (5,)
    cell = (name_of(HINT_1, ids), name_of(BACKGROUND, ids))
    board = Board("backbone", 0.5).toggled("early", *cell, False)
    assert mask_config(board, ids, OWN, 0.1).rules
    assert not mask_config(board.toggled("early", *cell, True), ids, OWN, 0.1).rules
    with pytest.raises(ConfigError):
        board.toggled("late", cell[0], cell[0], False)


def test_the_matrix_says_when_it_has_no_effect() -> None:
    value = matrix_value(Board("backbone", 0.0), (), OWN, 8, vision=False, baseline=False)
    assert value["note"] == NO_BOXES
    assert value["live"] == {"early": False, "late": True}
    assert "Raise the locality share" in value["why"]["early"]
    assert "baseline" in matrix_value(Board(), (5,), OWN, 8, vision=False, baseline=True)["note"]
    assert "none of 8" in share_line(0.1, 8)  # a tenth of eight steps is no step
    assert "first 4 of 8" in share_line(0.5, 8)
    assert "all 8" in share_line(1.0, 8)


def test_the_command_means_the_same_settings() -> None:
    from replan.cli.options import Flags, positionals

    own = default_config("mini")
    board = with_preset("separate", own.mask)
    settings = replace(PLAIN, steps=5, guidance=2.5, expand=0.25, keep_background=True)
    wanted = edit_config(settings, board, (5, 9), own)
    words = shlex.split(command("a.png", "make it 'red'; $(rm)", settings, wanted, own, plan=True))
    assert words[:6] == ["replan", "edit", "./a.png", "make it 'red'; $(rm)", "--plan", "plan.json"]
    assert words[words.index("--seed") + 1] == "7"
    _, _, rest = positionals([word for word in words if word.startswith("mask.")], 0)
    again = load(
        EditConfig, "edit/mini", [*rest, "steps=5", "guidance=2.5", "mask.expand=0.25", "keep_background=true"]
    )
    assert again == replace(wanted, mask=replace(wanted.mask, isolate=own.mask.isolate))
    assert "--keep-background" in words
    assert Flags(backbone="mini").setup().config == own


def test_the_command_runs_the_models_as_the_demo_does(tmp_path: Path) -> None:
    own = default_config("mini")
    (tmp_path / "style.safetensors").touch()
    loras = (str(tmp_path / "style.safetensors"), "owner/name")
    runtime = Runtime(offload="model", vae_tiling=True, lora=loras)
    words = runtime_words(runtime)
    assert words == ("--offload", "model", "--vae-tiling", "--lora", loras[0], "--lora", loras[1])
    assert runtime_words(Runtime()) == ()
    line = shlex.split(command("a.png", "redder", PLAIN, own, own, plan=False, runtime=words))
    assert line[-len(words) - 2 : -2] == list(words)


@pytest.mark.parametrize("text", ["--help", "steps=3", "-", "= =", "a=b"])
@pytest.mark.parametrize("plan", [True, False])
def test_no_instruction_is_read_as_an_option(text: str, plan: bool) -> None:
    from typer.testing import CliRunner

    from replan.cli import app

    own = default_config("mini")
    words = shlex.split(command("missing.png", text, PLAIN, own, own, plan=plan))
    told = CliRunner().invoke(app, words[1:])
    assert told.exit_code == 2
    assert "missing.png" in told.output  # the picture is what was looked for, nothing before it went wrong


@pytest.mark.parametrize("bad", [{"steps": 0}, {"candidates": 99}, {"seed": -1}, {"expand": 2.0}, {"guidance": True}])
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(PLAIN, **bad)  # type: ignore[arg-type]


def test_a_random_seed_is_told() -> None:
    assert with_seed(PLAIN, False) == PLAIN
    assert len({with_seed(PLAIN, True).seed for _ in range(4)}) > 1


def test_the_reasoning_of_an_answer_under_way() -> None:
    assert reasoning_of("<thi") == "<thi"
    assert reasoning_of("<think> a cup") == "a cup"
    assert reasoning_of("<think>a</think><gen_image>b") == "a"


def test_a_preset_brings_its_other_settings() -> None:
    own = replace(OWN, pooled="main")
    assert mask_config(with_preset("direct", own), (5,), own, 0.1).pooled == "none"
    assert mask_config(with_preset("backbone", own), (5,), own, 0.1).pooled == "main"


def test_a_history_of_large_pictures_is_short() -> None:
    from replan.demo.boxes import NOTHING
    from replan.demo.session import MOST_ENTRIES, Entry, Session

    def entry(side: int) -> Entry:
        picture = SimpleNamespace(width=side, height=side)
        edit = SimpleNamespace(image=picture)
        return Entry(picture, "a.png", "", "", None, NOTHING, PLAIN, Board(), (edit,))  # type: ignore[arg-type]

    session = Session()
    for _ in range(20):
        session.remember(entry(96))
    assert len(session.entries) == MOST_ENTRIES
    session.remember(entry(8000))
    assert len(session.entries) == MOST_ENTRIES
    session.remember(entry(8000))
    assert len(session.entries) == 1
    session.remember(entry(12_000))
    assert len(session.entries) == 1  # the last one stays, whatever its size

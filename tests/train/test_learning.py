"""The trainer learns: both stages in short. The long form is `replan train prove`."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rollouts import Editor, Judge, mini_rows
from typer.testing import CliRunner

from replan import config as configs
from replan.cli import app
from replan.errors import ConfigError
from replan.train import proof
from replan.train.engine_trl import train
from replan.train.grpo import GrpoConfig
from replan.train.proof import Curve, draw, holds, prove
from replan.train.run import read
from replan.train.score import Scorer
from replan.train.weaken import weaken

pytest.importorskip("trl", reason="trl is not installed: pip install replan[train]")


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weaken("mini", tmp_path_factory.mktemp("weak"), 0.4)


def rise(output: Path, steps: int = 3) -> float:
    """By how many standard errors the last steps' mean reward exceeds the first ones'."""
    found = [entry["rewards"] for entry in read(output / "rollouts.jsonl")]
    first, last = ([reward for step in part for reward in step] for part in (found[:steps], found[-steps:]))
    error = (statistics.variance(first) / len(first) + statistics.variance(last) / len(last)) ** 0.5
    return (statistics.fmean(last) - statistics.fmean(first)) / error


def short(stage: str, folder: Path, planner: Path, *overrides: str) -> GrpoConfig:
    """A proof's settings with few items, so that a few steps show something."""
    rows = mini_rows(folder, 2)
    given: list[Any] = [
        ("planner", str(planner)), ("train", str(rows.path)), ("val", None), ("output", str(folder / stage)),
        "rollout.prompts=2", "optim.micro=16", "rollout.max_new=128", "optim.lr=1e-4", "loggers=[]", "save_every=100",
    ]  # fmt: skip
    return configs.load(GrpoConfig, f"grpo/mini_{stage}", [*given, *overrides])


def test_stage_one_in_short(tmp_path: Path, weak: Path) -> None:
    train(short("stage1", tmp_path, weak, "steps=12"))
    assert rise(tmp_path / "stage1") > 3


def test_stage_two_in_short(tmp_path: Path, weak: Path) -> None:
    """Rewards come from rendering and judging, and rise. The editor draws exactly, so that it takes no time."""
    config = short("stage2", tmp_path, weak, "steps=12")
    rows = mini_rows(tmp_path, 2)
    train(config, Scorer(config.reward, Editor(rows), Judge()))
    assert rise(tmp_path / "stage2") > 3


def test_weakening_is_reproducible(tmp_path: Path, weak: Path) -> None:
    done = CliRunner().invoke(app, ["train", "weaken", str(tmp_path / "again"), "--noise", "0.4"])
    assert done.exit_code == 0, done.output
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (weak / name).read_bytes()
    other = weaken("mini", tmp_path / "other", 0.4, seed=1)
    assert (other / name).read_bytes() != (weak / name).read_bytes()
    with pytest.raises(ConfigError, match="noise"):
        weaken("mini", tmp_path / "none", 0.0)


def test_the_proofs_verdict_and_picture() -> None:
    rising = Curve(1, {1: 0.3, 2: 0.9}, {0: 0.5, 50: 0.995})
    flat = replace(rising, held_out={0: 0.5, 50: 0.55})
    assert holds("stage1", [rising, rising])
    assert holds("stage2", [rising])
    assert all(holds("stage2", [replace(rising, held_out={0: at / 200, 50: (at + 20) / 200})]) for at in range(181))
    assert not any(holds("stage2", [replace(rising, held_out={0: at / 200, 50: (at + 19) / 200})]) for at in range(181))
    assert not holds("stage1", [rising, flat])
    assert not holds("stage2", [rising, flat])
    assert draw("stage1", [rising, flat]).startswith(b"\x89PNG")


def test_an_unknown_stage(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["train", "prove", "stage3", str(tmp_path)]).exit_code == 2


def test_a_proof_tells_what_ran_and_refuses_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are not claimed for settings or a start that they never had."""
    monkeypatch.setattr(proof, "HELD_OUT", 2)
    monkeypatch.setattr(proof, "_data", lambda folder: (mini_rows(folder, 2).path,) * 2)
    given = ["steps=1", "rollout.prompts=1", "optim.micro=8", "rollout.max_new=8", "val_items=2", "loggers=[]"]
    prove("stage1", tmp_path, 2, given, jobs=2)
    told = json.loads(prove("stage1", tmp_path, 1, given)[0].read_bytes())
    assert (told["config"]["steps"], told["held_out_items"], told["holds"]) == (1, 2, False)
    assert told["weakened_by"]["noise"] == proof.NOISE["stage1"]
    with pytest.raises(ConfigError, match="finished with other settings of steps"):
        prove("stage1", tmp_path, 1, ["steps=2", *given[1:]])
    monkeypatch.setitem(proof.NOISE, "stage1", 0.1)
    with pytest.raises(ConfigError, match="weakened by"):
        prove("stage1", tmp_path, 1, given)


def test_the_second_proof_begins_with_a_short_first_stage_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_data", lambda folder: (mini_rows(folder, 2).path,) * 2)
    small = ("rollout.prompts=1", "optim.micro=8", "rollout.max_new=8", "val_items=2", "loggers=[]")
    monkeypatch.setattr(proof, "FORM", ("steps=2", *small))
    told = json.loads(prove("stage2", tmp_path, 1, ["steps=1", *small])[0].read_bytes())
    assert told["weakened_by"]["noise"] == proof.NOISE["stage2"]
    assert told["then"].startswith("stage 1, seed 1, steps=2")
    start, ran = (json.loads((tmp_path / f"stage2-{name}" / "run.json").read_bytes()) for name in ("start", "seed1"))
    assert (start["config"]["reward"]["kind"], start["config"]["steps"]) == ("format", 2)
    assert ran["config"]["planner"] == str(tmp_path / "stage2-start" / "planner")
    assert not (tmp_path / "weak").exists()  # the first proof's

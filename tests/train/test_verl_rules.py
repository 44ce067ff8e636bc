"""The verl engine's own rules, which need no verl: settings in its words, failures, groups, checkpoints."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from replan import config as configs
from replan.errors import ConfigError, ServiceError
from replan.train import engine_verl, verl_score
from replan.train.data import Row, Task, write_rows
from replan.train.grpo import GrpoConfig
from replan.train.patience import Outage
from replan.train.score import Scored
from replan.train.verl_groups import first_prompts, group_keys, mean_parts, select
from replan.train.verl_score import RolloutLost, Waiting
from replan.types import Failure, Size

GOOD = (
    "<think>The red circle is on the left; it should turn blue, nothing else changes.</think>"
    "<gen_image>Keep the image unchanged.</gen_image>"
    '<region>[{"bbox_2d": [10, 10, 40, 40], "hint": "make it blue"}]</region>'
)


def settings(**values: Any) -> GrpoConfig:
    named = {"planner": "mini", "train": "train.parquet", "output": "run", "steps": 3, "engine": "verl"}
    return configs.load(GrpoConfig, named | values)


def row(index: int = 0, extra: Mapping[str, Any] | None = None) -> Row:
    png = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 30, index)).save(png, format="PNG")
    task = Task(index, f"make {index} blue", "the circle", "", Size(96, 96), extra=extra or {})
    return Row(index, f"<image>make {index} blue", png.getvalue(), task)


class Flaky:
    """A scorer that fails as told: one entry per call, None for a failure."""

    def __init__(self, outcomes: Sequence[float | None]) -> None:
        self.outcomes = list(outcomes)

    async def score_one(self, row: Row, answer: str) -> Scored:
        value = self.outcomes.pop(0)
        return Scored(value, failure=None if value is not None else Failure("judge", "connection refused"))


class Clock:
    def __init__(self) -> None:
        self.time = 0.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds


def waiting(outcomes: Sequence[float | None], **services: Any) -> tuple[Waiting, Clock]:
    clock = Clock()
    config = settings(
        rollout={"prompts": 2, "group": 4}, services={"backoff": 10, "longest": 40, "patience": 300, **services}
    )
    return Waiting(Flaky(outcomes), config, clock.sleep, clock.now), clock  # type: ignore[arg-type]


def test_a_service_that_comes_back_costs_a_pause_not_a_reward() -> None:
    wait, clock = waiting([None, 0.5])
    assert asyncio.run(wait.score(row(), GOOD)).value == 0.5
    assert len(clock.waits) == 1
    assert 10 <= clock.waits[0] <= 12.5
    assert (wait.tally.scored, wait.tally.lost.total(), wait.tally.pauses) == (1, 0, 1)


def test_a_failed_rollout_is_lost_and_counted_never_scored() -> None:
    wait, _ = waiting([None, None, 0.7])
    with pytest.raises(RolloutLost, match="row 0: the judge failed 2 times: connection refused"):
        asyncio.run(wait.score(row(), GOOD))
    assert wait.tally.lost == {"judge": 1}
    assert asyncio.run(wait.score(row(), GOOD)).value == 0.7


def test_beyond_the_allowed_share_rollouts_wait_with_back_off() -> None:
    # a quarter of 8 may be lost; the third stays until the judge is back
    wait, clock = waiting([None] * 2 + [None] * 2 + [None] * 4 + [0.9])
    for _ in range(2):
        with pytest.raises(RolloutLost):
            asyncio.run(wait.score(row(), GOOD))
    clock.waits.clear()
    assert asyncio.run(wait.score(row(), GOOD)).value == 0.9
    assert [round(w / 10) for w in clock.waits[:2]] in ([1, 2], [1, 3])
    assert len(clock.waits) == 4
    assert max(clock.waits) <= 50


def test_patience_ends() -> None:
    wait, clock = waiting([None] * 50, most_failed=0.0)
    with pytest.raises(Outage, match=r"could not be scored for \d+ s .*judge: connection refused"):
        asyncio.run(wait.score(row(), GOOD))
    assert clock.time <= 300
    assert wait.tally.lost == {"judge": 1}


def test_losses_are_forgotten_with_the_batch() -> None:
    wait, _ = waiting([None, None] * 2 + [0.5] * 8 + [None, None])
    for expected in ["lost"] * 2 + ["ok"] * 8 + ["lost"]:
        if expected == "ok":
            asyncio.run(wait.score(row(), GOOD))
            continue
        with pytest.raises(RolloutLost):
            asyncio.run(wait.score(row(), GOOD))


def call(text: str, config: GrpoConfig, item: Row, **extra: Any) -> dict[str, float]:
    """As verl calls it."""
    return asyncio.run(
        verl_score.compute_score(
            data_source="replan/format",
            solution_str=text,
            ground_truth=item.task.to_json(),
            extra_info={"index": item.index, **extra},
            settings=json.dumps(configs.dump(config)),
            reward_router_address=None,
        )
    )


def test_sample_rollouts_become_pages(tmp_path: Path) -> None:
    config = settings(output=str(tmp_path), samples=2, rollout={"prompts": 1, "group": 2})
    for step in (1, 2):
        for text in (GOOD, "<think>no plan</think>"):
            call(text, config, row(), png=row().png, step=step, split="train")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["train-step-000002.html"]
    assert "no plan" in (tmp_path / "samples" / "train-step-000002.html").read_text()


def test_a_malformed_plan_scores() -> None:
    good, bad = (call(text, settings(), row(), png=row().png) for text in (GOOD, "<think>no plan</think>"))
    assert good["score"] == pytest.approx(0.905)
    assert good["format"] == 1
    assert bad["score"] < 0.2
    assert bad["format"] == 0
    assert bad["valid"] == 0
    assert set(good) == set(bad)  # verl averages by name


def test_an_outage_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from replan.train import services
    from replan.train.score import Scorer

    def broken(request: Any) -> Any:
        raise ServiceError("the editor is gone")

    config = settings(
        reward={"kind": "edit"}, output="outage", services={"backoff": 0.0, "editor": "mini", "judge": "mini"}
    )
    monkeypatch.setattr(services, "open_scorer", lambda _: Scorer(config.reward, broken, SimpleNamespace(rate=None)))
    with pytest.raises(RolloutLost, match="the editor is gone"):
        call(GOOD, config, row(), png=row().png)
    told = call("<think>no plan</think>", config, row(), png=row().png)  # the policy's own fault all the same
    assert told["plan"] == told["success"] == 0
    assert told["score"] < 0.1


def test_the_picture_is_found_in_the_data_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [row(0), row(1)], {"settings": {"kind": "format", "split": "train"}})
    other = replace(row(7), index=0)
    write_rows(tmp_path / "val.parquet", [other], {"settings": {"kind": "format", "split": "dev"}})
    config = settings(train=str(tmp_path / "train.parquet"), val=str(tmp_path / "val.parquet"))
    for item in (row(1), other):  # the other has the number of a row of the training file
        assert call(GOOD, config, item)["score"] == pytest.approx(0.905)
    with pytest.raises(ConfigError, match="row 9: is in none of the run's data files"):
        call(GOOD, config, row(9))


def tags(**lost: int) -> dict[str, dict[str, Any]]:
    """Two prompts of four rollouts, `lost` of them without a reward; one more prompt still runs."""
    found: dict[str, dict[str, Any]] = {}
    for step, name in enumerate(("aa", "bb")):
        status = "failure" if lost.get(name) else "finished"
        found[name] = {"is_prompt": True, "status": status, "global_steps": 2 - step}
        found |= {f"{name}_{number}_0": {"seq_len": 9} for number in range(4 - lost.get(name, 0))}
    return found | {"cc": {"is_prompt": True, "status": "running", "global_steps": 0}, "cc_0_0": {"seq_len": 9}}


def test_only_rollouts_with_a_reward_are_trained_on() -> None:
    found = tags(aa=1)
    assert first_prompts(found, 5) == ["bb", "aa"]  # the oldest first, and only what has ended
    kept, told = select(group_keys(found, ["aa", "bb"]), group=4, most_failed=0.25)
    assert sorted(kept) == [*(f"aa_{k}_0" for k in range(3)), *(f"bb_{k}_0" for k in range(4))]
    assert told == {"rollouts/lost": 1, "rollouts/alone": 0, "rollouts/kept": 7}


def test_a_single_survivor_has_nobody_to_be_compared_with() -> None:
    kept, told = select(group_keys(tags(aa=3), ["aa", "bb"]), group=4, most_failed=0.5)
    assert {key[:2] for key in kept} == {"bb"}
    assert told == {"rollouts/lost": 3, "rollouts/alone": 1, "rollouts/kept": 4}


@pytest.mark.parametrize(("lost", "most"), [({"aa": 3}, 0.25), ({"aa": 4, "bb": 4}, 1.0)])
def test_too_many_losses_end_the_run(lost: Mapping[str, int], most: float) -> None:
    with pytest.raises(Outage, match=r"of 8 rollouts have no reward \(services.most_failed allows"):
        select(group_keys(tags(**lost), ["aa", "bb"]), group=4, most_failed=most)


def test_parts_are_averaged_for_the_log() -> None:
    assert mean_parts([{"format": 1.0, "note": "x"}, {"format": 0.0, "plan": float("nan")}]) == {"reward/format": 0.5}


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "k=true"), (None, "k=null"), (1e-6, "k=1e-06"), (["a", 2], "k=['a',2]"), ({"a": "b"}, "k={a:'b'}")],
)
def test_values_in_hydras_grammar(value: Any, text: str) -> None:
    assert engine_verl.arguments({"k": value}) == [text]


def test_extra_keys_have_the_last_word() -> None:
    keys = engine_verl.overrides(settings(extra={"trainer.logger": ["wandb"], "+new.key": 1}))
    assert keys["trainer.logger"] == ["wandb"]
    assert keys["+new.key"] == 1


def test_workers_get_whole_paths() -> None:
    keys = engine_verl.overrides(settings(train="a.parquet", output="runs/x"))
    told = json.loads(keys["+reward.custom_reward_function.reward_kwargs.settings"])
    assert Path(told["train"]).is_absolute()
    assert Path(keys["trainer.default_local_dir"]).is_absolute()


def checkpoint(folder: Path, world: int, present: int) -> Path:
    actor = folder / "actor"
    actor.mkdir(parents=True)
    for rank in range(present):
        (actor / f"model_world_size_{world}_rank_{rank}.pt").write_bytes(b"")
    return actor


def test_the_newest_checkpoint_by_number(tmp_path: Path) -> None:
    for step in (5, 10, 20, 9):
        checkpoint(tmp_path / "checkpoints" / f"global_step_{step}", 1, 1)
    newest = tmp_path / "checkpoints" / "global_step_20"
    for given in (tmp_path, tmp_path / "checkpoints", newest):
        assert engine_verl.checkpoint_of(given) == newest / "actor"
    with pytest.raises(ConfigError, match="no checkpoint of verl"):
        engine_verl.checkpoint_of(tmp_path / "elsewhere")


def test_all_shards_or_none(tmp_path: Path) -> None:
    whole, half = checkpoint(tmp_path / "whole", 2, 2), checkpoint(tmp_path / "half", 2, 1)
    assert len(engine_verl.shards_of(whole)) == 2
    assert engine_verl.shards_of(half) == []


def test_more_prompts_than_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "train.parquet", [row(0)], {"settings": {"kind": "format", "split": "train"}})
    monkeypatch.setattr(engine_verl, "compose", lambda config: None)
    config = settings(train=str(tmp_path / "train.parquet"), output=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"1 rows are fewer than rollout\.prompts = 16"):
        engine_verl.train(config)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_verl_does_not_heed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.freeze_vision.*engine trl"):
        engine_verl.train(settings(policy={"freeze_vision": True}))


def test_without_verl_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'replan\[verl\]'"):
        engine_verl.compose(settings())
    monkeypatch.setattr(metadata, "version", lambda name: "0.8.0")
    with pytest.raises(ConfigError, match=r"needs verl 0\.9\.1, found 0\.8\.0"):
        engine_verl.compose(settings())


def test_the_plugin_is_light_and_leaves_others_alone() -> None:
    code = (
        "import sys; import replan.train.verl_plugin; print(sorted({'torch', 'verl', 'ray', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_plugin_hides_trl_wherever_verl_looks() -> None:
    code = """
import sys, types
for name in ("verl.utils.import_utils", "verl.models.transformers.monkey_patch"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].is_trl_available = lambda: True
import replan.train.verl_plugin
print([module.is_trl_available() for name, module in sys.modules.items() if name.startswith("verl.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False]"

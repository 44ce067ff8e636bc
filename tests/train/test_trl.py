"""Training on TRL itself: failures have no gradient, stops cost nothing, results load as ordinary folders."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import STEPS, TextScorer, settings
from typer.testing import CliRunner

from replan.errors import ConfigError
from replan.train.data import Rows
from replan.train.engine_trl import last_checkpoint, train
from replan.train.patience import Outage, Patience
from replan.train.run import PLANNER, read
from replan.types import EditRequest

pytest.importorskip("trl", reason="trl is not installed: pip install replan[train]")
NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[dict[str, Any]]:
    """Every step's items and rewards of a run that nothing stops."""
    train(settings(folder, "quiet"), TextScorer())  # type: ignore[arg-type]
    return read(folder / "quiet" / "rollouts.jsonl")


def trainer_with(folder: Path, rewards: Sequence[float | None], *overrides: str) -> Any:
    """A trainer whose next batch gets these rewards."""
    from trl.trainer.grpo_config import GRPOConfig

    from replan.train.engine_trl import _arguments, _trainer
    from replan.train.score import Scored
    from replan.types import Failure

    class Given(TextScorer):
        async def score(self, rows: Any, answers: Any) -> list[Scored]:
            down = Failure("editor", "down")
            return [Scored(one, failure=down if one is None else None) for one in rewards]

    config = settings(folder, "unused", "services.most_failed=1.0", *overrides)
    arguments = GRPOConfig(**_arguments(config, 0))
    made = _trainer(config, arguments, Rows(config.train), None, Patience(Given(), config.services))  # type: ignore[arg-type]
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def scored(made: Any) -> dict[str, Any]:
    """The first batch, generated and scored."""
    inputs = next(iter(made.get_train_dataloader()))
    torch.manual_seed(0)
    return made._generate_and_score_completions(inputs)


def test_failures_leave_mean_and_deviation(folder: Path) -> None:
    rewards = [1.0, 2.0, None, 4.0, 0.5, 0.5, 0.0, 1.0]
    found = scored(trainer_with(folder, rewards))["advantages"].tolist()
    for group in (slice(0, 4), slice(4, 8)):
        known = torch.tensor([one for one in rewards[group] if one is not None])
        for reward, advantage in zip(rewards[group], found[group], strict=True):
            hand = 0.0 if reward is None else float((reward - known.mean()) / (known.std() + 1e-4))
            assert advantage == pytest.approx(hand, abs=1e-5)


def test_a_group_with_one_survivor_teaches_nothing(folder: Path) -> None:
    rewards = [None, None, None, 4.0, None, None, None, None]
    made = trainer_with(folder, rewards)
    found = scored(made)
    assert found["advantages"].tolist() == [0.0] * 8
    assert all(grad.abs().max() == 0 for grad in gradients(made, found))


def gradients(made: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    made.model.zero_grad()
    made._compute_loss(made.model, batch).backward()
    return [p.grad.clone() for p in made.model.parameters() if p.grad is not None]


def without(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The batch as if those rollouts had never been."""
    count = len(batch["advantages"])
    kept = torch.tensor([at for at in range(count) if at not in rows])
    patches = len(batch["pixel_values"]) // count
    left: dict[str, Any] = {}
    for name, value in batch.items():
        if name == "pixel_values":
            left[name] = value.view(count, patches, -1)[kept].flatten(0, 1)
        elif name == "num_items_in_batch":
            left[name] = batch["completion_mask"][kept].sum()
        elif isinstance(value, list):
            left[name] = [value[int(at)] for at in kept]
        elif name != "tool_mask":
            left[name] = value[kept]
    return left


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_failed_rollout_has_no_gradient(folder: Path, kl: float) -> None:
    """Also none from the KL term, and none through the mean over tokens."""
    made = trainer_with(folder, [1.0, 2.0, None, 4.0, None, 0.5, 0.0, 1.0], f"policy.kl={kl}")
    with torch.no_grad():  # away from the start, or the KL term would have no slope
        for parameter in made.model.parameters():
            parameter.add_(0.05)
    batch = scored(made)
    with_failures, alone = gradients(made, batch), gradients(made, without(batch, [2, 4]))
    assert max(float(grad.abs().max()) for grad in alone) > 1e-4
    for one, other in zip(with_failures, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    del batch["tool_mask"]  # what TRL alone would do
    if kl:
        stock = gradients(made, batch)
        assert any(
            not torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(stock, alone, strict=True)
        )


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    keys = ("step", "items", "rewards")
    assert [[one[key] for key in keys] for one in found] == [[one[key] for key in keys] for one in expected]


def test_sigkill_costs_nothing(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    """After SIGKILL the run sees the same items in the same order, and even draws the same answers."""
    settings(folder)
    call = [sys.executable, str(Path(tiny_run.__file__)), str(folder), "0.3"]
    environment = os.environ | {"PYTHONPATH": str(Path(tiny_run.__file__).parent.parent.parent)}
    log = folder / "killed" / "rollouts.jsonl"
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None and len(read(log)) < 4:
            time.sleep(0.02)
        process.kill()
    reached = len(read(log))
    assert 4 <= reached < STEPS, "it was over before it could be killed"
    last = last_checkpoint(folder / "killed")
    assert last is not None
    (folder / "killed" / "checkpoint-99").mkdir()  # as a kill in the middle of saving leaves one
    assert last_checkpoint(folder / "killed") == last
    train(settings(folder, "killed"), TextScorer())  # type: ignore[arg-type]
    same(read(log), undisturbed)
    starts = json.loads((folder / "killed" / "run.json").read_text())["starts"]
    assert len(starts) == 2


def test_an_outage_stops_cleanly_and_the_rest_is_as_if_nothing_had_been(
    folder: Path, undisturbed: list[dict[str, Any]]
) -> None:
    config = settings(folder, "outage", "save_every=100")
    with pytest.raises(Outage, match="stopped after step 3, with a checkpoint"):
        train(config, TextScorer(fails=lambda call, at: call > 3))  # type: ignore[arg-type]
    last = last_checkpoint(config.output)
    assert last is not None
    assert last.name == "checkpoint-3"
    train(config, TextScorer())  # type: ignore[arg-type]
    found = read(config.output / "rollouts.jsonl")
    assert [one["items"] for one in found] == [one["items"] for one in undisturbed]
    assert [one["rewards"] for one in found[:3]] == [one["rewards"] for one in undisturbed[:3]]


def test_failures_in_passing_change_no_count_and_become_no_number(folder: Path) -> None:
    config = settings(folder, "chaos", "services.most_failed=0.25", "services.patience=100")
    scorer = TextScorer(fails=lambda call, at: call in (2, 3) or (call == 5 and at == 1))
    train(config, scorer)  # type: ignore[arg-type]
    found = read(config.output / "rollouts.jsonl")
    assert [one["step"] for one in found] == list(range(STEPS))
    assert [one["rewards"].count(None) for one in found] == [0, 0, 1, 0, 0, 0]
    assert found[2]["failures"] == ["editor: down"]


def test_the_record_of_a_run(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    found = json.loads((folder / "quiet" / "run.json").read_text())
    assert found["config"]["steps"] == STEPS
    assert found["engine"]["max_steps"] == STEPS
    assert found["data"]["train"]["sha256"] == Rows(folder / "train.parquet").fingerprint
    assert found["starts"][0]["versions"]["trl"].startswith("1.")
    assert len(undisturbed) == STEPS


def test_other_data_or_settings_are_another_run(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    del undisturbed
    with pytest.raises(ConfigError, match="other settings of rollout"):
        train(settings(folder, "quiet", "rollout.temperature=0.7"), TextScorer())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="other train data"):
        train(settings(folder, "quiet", f"train={folder / 'dev.parquet'}"), TextScorer())  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [0, 4])
def test_results_load_as_ordinary_folders(folder: Path, lora: int, undisturbed: list[dict[str, Any]]) -> None:
    from replan.planner import PlannerConfig, load_planner

    del undisturbed
    output = folder / "quiet"
    if lora:
        config = settings(folder, "lora", f"optim.lora={lora}", "steps=1", "save_every=1")
        output = train(config, TextScorer()).parent  # type: ignore[arg-type]
    exported = folder / f"exported{lora}"
    done = CliRunner().invoke(
        _app(), ["train", "export", str(output / f"checkpoint-{1 if lora else STEPS}"), str(exported)]
    )
    assert done.exit_code == 0, done.output
    answers = []
    for place in (output / PLANNER, exported):
        planner: Any = load_planner(str(place), PlannerConfig(max_new_tokens=4))
        row = Rows(folder / "train.parquet")[0]
        view = planner.view(EditRequest(row.image(), row.task.instruction))
        answers.append(planner.answer([view], [0], 0.0))
        beside = json.loads((place / "preprocessor_config.json").read_text())
        assert beside["processor_class"] == "Qwen3VLProcessor"
        assert not (place / "processor_config.json").exists()
        assert (place / "replan_prompt.txt").read_text() == "{instruction}"
    assert answers[0] == answers[1]


def test_a_run_goes_on_in_a_later_epoch_as_if_nothing_had_been(folder: Path) -> None:
    """Twelve rows at two a step: every epoch is six steps and has an order of its own."""
    whole = settings(folder, "epochs", "steps=10", "save_every=100")
    train(whole, TextScorer())  # type: ignore[arg-type]
    stopped = settings(folder, "stopped", "steps=10", "save_every=100")
    for last in (8, 1):
        with pytest.raises(Outage):
            train(stopped, TextScorer(fails=lambda call, at, last=last: call > last))  # type: ignore[arg-type,misc]
    train(stopped, TextScorer())  # type: ignore[arg-type]
    expected, found = (read(run.output / "rollouts.jsonl") for run in (whole, stopped))
    assert [one["items"] for one in found] == [one["items"] for one in expected]
    assert [one["items"] for one in expected[:4]] != [one["items"] for one in expected[6:]]


def test_a_run_that_goes_on_is_exported_as_it_is_now(folder: Path, tmp_path: Path) -> None:
    """An unfinished run gives its newest checkpoint, also where an earlier end of it has left a planner."""
    run = settings(folder, "longer", "steps=1", "save_every=1")
    train(run, TextScorer())  # type: ignore[arg-type]
    name = "model.safetensors"
    assert _same_bytes(_exported(run.output, tmp_path / "end") / name, run.output / PLANNER / name)
    more = settings(folder, "longer", "steps=4", "save_every=1")
    with pytest.raises(Outage):
        train(more, TextScorer(fails=lambda call, at: call > 2))  # type: ignore[arg-type]
    last = last_checkpoint(run.output)
    assert last is not None
    assert last.name == "checkpoint-3"
    assert _same_bytes(_exported(run.output, tmp_path / "stopped") / name, last / name)
    settings_then = [
        start["settings"]["steps"] for start in json.loads((run.output / "run.json").read_text())["starts"]
    ]
    assert settings_then == [1, 4]


def _exported(source: Path, folder: Path) -> Path:
    done = CliRunner().invoke(_app(), ["train", "export", str(source), str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def _same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_a_frozen_vision_tower_is_frozen_with_lora_too(folder: Path) -> None:
    from peft import get_peft_model

    from replan.train.engine_trl import _load, _lora

    trained: dict[bool, list[str]] = {}
    for frozen in (True, False):
        config = settings(folder, "frozen", "optim.lora=4", f"policy.freeze_vision={str(frozen).lower()}")
        model = get_peft_model(_load(config)[0], _lora(config))
        trained[frozen] = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained[True]
    assert not any("visual" in name for name in trained[True])
    assert any("visual" in name for name in trained[False])


def test_processes_wait_for_one_that_pauses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is given where the processes are connected; later it has no effect."""
    import accelerate

    from replan.train.engine_trl import _arguments

    asked: list[Any] = []

    class Watched(accelerate.PartialState):
        def __init__(self, *given: Any, **named: Any) -> None:
            asked.append(named.get("timeout"))
            super().__init__(*given, **named)

    monkeypatch.setattr(accelerate, "PartialState", Watched)
    found = _arguments(settings(folder, "never", "services.patience=5000"), 0)
    assert asked[0].total_seconds() == found["ddp_timeout"] == 6800


def _app() -> Any:
    from replan.cli import app

    return app


def test_held_out_items_and_samples(folder: Path) -> None:
    config = settings(
        folder,
        "checks",
        f"val={folder / 'dev.parquet'}",
        "steps=2",
        "val_every=2",
        "samples=2",
        "loggers=[tensorboard]",
    )
    train(config, TextScorer())  # type: ignore[arg-type]
    last = last_checkpoint(config.output)
    assert last is not None
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_plan/failed" in entry] == [0, 2]
    pages = sorted(path.name for path in (config.output / "samples").iterdir())
    assert pages == ["train-step-000000.html", "val-step-000000.html", "val-step-000002.html"]
    assert "answer: " in (config.output / "samples" / pages[0]).read_text()
    assert list(config.output.rglob("events.out.tfevents*"))


def test_a_folder_of_a_loggers_name_is_no_logger(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B leaves a folder `wandb` where it ran, which Python takes for an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "wandb").is_dir())])
    with pytest.raises(ConfigError, match="wandb is not installed"):
        train(settings(folder, "never", "loggers=[wandb]"), TextScorer())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.micro=3", "must divide the 8 rollouts"),
        ("rollout.prompts=13", r"12 rows are fewer than rollout\.prompts = 13"),
        ("extra={lerning_rate: 1}", "did you mean learning_rate"),
        pytest.param("rollout.vllm=colocate", "vLLM is not installed", marks=NO_VLLM),
        pytest.param("rollout.vllm=server", "vLLM is not installed", marks=NO_VLLM),
    ],
)
def test_settings_that_do_not_fit(folder: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train(settings(folder, "never", override), TextScorer())  # type: ignore[arg-type]
    assert not (folder / "never" / "run.json").exists()

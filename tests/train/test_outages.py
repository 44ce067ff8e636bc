"""Stage 2 while its services break: the same number of steps, and not one reward that came from an outage.

The quick form scores batches as a trainer does, over real HTTP, on fakes. The slow one trains:

    python -m pytest tests/train/test_outages.py -m slow      minutes; replicas on Ray Serve, one of them killed
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeBackbone, FakePlanner
from rollouts import answer, exact_plan, mini_rows

from replan import Editor
from replan.backbones import EditConfig, default_config
from replan.judge import Case, Dimension, Rating, load_judge
from replan.serve.client import ClientConfig, EditClient, JudgeClient
from replan.serve.door import Door
from replan.serve.editing import EditEngine
from replan.serve.editor import editor_service
from replan.serve.limits import Limits
from replan.serve.run import free_port, judge_app, running
from replan.train.data import Row, Rows
from replan.train.grpo import GrpoConfig, ServiceConfig
from replan.train.patience import Patience
from replan.train.reward import RewardConfig
from replan.train.score import Scored, Scorer
from replan.types import Edit, EditRequest

REWARD = RewardConfig(kind="edit", global_plans=True)


class MoodyJudge:
    """The mini world's exact judge, as slow as it is told to be."""

    def __init__(self) -> None:
        self.exact, self.delay = load_judge("mini"), 0.0

    def describe(self) -> Mapping[str, Any]:
        return self.exact.describe()

    def key(self, case: Case, dimension: Dimension) -> str | None:
        return None

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        return 0, 0

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        time.sleep(self.delay)
        return self.exact.rate(case, dimension)

    def stop(self) -> None:
        """Nothing is under way."""


class House:
    """A service on one port, which can be taken away in the middle of everything and come back."""

    def __init__(self, make: Callable[[], Door]) -> None:
        self._make, self._port, self._context = make, free_port("127.0.0.1"), None
        self.url = f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        self._context = running(self._make(), port=self._port, grace=0)
        self._context.__enter__()

    def down(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    @contextmanager
    def open(self) -> Iterator[str]:
        self.up()
        try:
            yield self.url
        finally:
            self.down()


class Watched(Scorer):
    """A scorer that keeps what it gave, and tells how many batches it was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.given: list[tuple[Row, str, Scored]] = []
        self.batches = 0

    async def score(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Scored]:
        self.batches += 1
        outcomes = await super().score(rows, answers)
        self.given += zip(rows, answers, outcomes, strict=True)
        return outcomes

    @property
    def failures(self) -> list[str]:
        return [one.failure.stage for _, _, one in self.given if one.failure is not None]


def assert_no_reward_from_an_outage(given: Sequence[tuple[Row, str, Scored]], clean: Scorer) -> None:
    """Every reward is the very one that healthy services give to the same answer; a failure has none."""

    async def again() -> list[Scored]:
        return await clean.score([row for row, _, _ in given], [text for _, text, _ in given])

    for (_, _, one), healthy in zip(given, asyncio.run(again()), strict=True):
        assert healthy.value is not None
        assert one.value is None if one.failure else one.value == healthy.value


def answers(rows: Rows) -> list[str]:
    """For each row a good plan, one elsewhere, and one that is none."""
    found = []
    for row in (rows[number] for number in range(len(rows))):
        plan = exact_plan(row)
        moved = replace(plan, regions=tuple(replace(r, hint="a grey wall") for r in plan.regions))
        found += [answer(plan), answer(moved), "no plan at all"]
    return found


class Late(FakeBackbone):
    """A fake editor that says when it is at work, and takes a moment over it."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = threading.Event()

    def condition(self, request: EditRequest, plan: Any, config: EditConfig) -> Any:
        self.busy.set()
        time.sleep(0.05)
        return super().condition(request, plan, config)


def test_scoring_goes_on_through_outages_and_nothing_of_them_becomes_a_reward(tmp_path: Path):
    rows = mini_rows(tmp_path, 4)
    batch = [rows[number // 3] for number in range(3 * len(rows))]
    texts = answers(rows)
    config = default_config("mini")
    backbone, judge = Late(), MoodyJudge()

    def editor() -> Door:
        return editor_service(EditEngine(mini_setup(), Limits(), lambda: Editor(None, backbone, config)), Limits())

    homes = House(editor), House(lambda: judge_app(judge))
    quick = ClientConfig(timeout=0.7, retries=1, backoff=0.02, patience=3)
    patient = ServiceConfig(most_failed=0.0, backoff=0.05, longest=0.2, patience=60)
    with homes[0].open() as edits, homes[1].open() as verdicts:
        scorer = Watched(REWARD, EditClient(edits, quick, strict=True), JudgeClient(verdicts, quick), 5)
        patience = Patience(scorer, patient)

        def score() -> list[Scored]:
            return asyncio.run(patience.score(batch, texts))

        def later(seconds: float, act: Callable[[], None]) -> None:
            threading.Timer(seconds, act).start()

        steps = [score()]
        homes[1].down()  # the judge is out
        later(1.0, homes[1].up)
        steps.append(score())
        assert "judge" in scorer.failures

        before = len(scorer.failures)
        backbone.busy.clear()
        threading.Thread(target=lambda: (backbone.busy.wait(10), homes[0].down(), later(0.5, homes[0].up))).start()
        steps.append(score())  # the editor dies over a request
        assert "editor" in scorer.failures[before:]

        before = len(scorer.failures)
        judge.delay = 1.0  # slower than anybody waits
        later(2.0, lambda: setattr(judge, "delay", 0.0))
        steps.append(score())
        assert "judge" in scorer.failures[before:]

    assert [[one.value for one in step] for step in steps] == [[one.value for one in steps[0]]] * 4
    assert all(one.value is not None for step in steps for one in step)
    assert len({one.value for one in steps[0]}) > 1
    assert patience.tally.pauses >= 3

    lock, alone = threading.Lock(), Editor(FakePlanner(), FakeBackbone(), config)

    def in_process(request: EditRequest) -> Edit:
        with lock:
            return alone(request, strict=True)

    assert_no_reward_from_an_outage(scorer.given, Scorer(REWARD, in_process, load_judge("mini"), 5))


@pytest.mark.slow
def test_training_survives_a_dead_judge_a_killed_replica_and_a_slow_judge(tmp_path: Path):
    pytest.importorskip("trl", reason="trl is not installed: pip install replan[train]")
    pytest.importorskip("ray", reason="ray is not installed: pip install replan[serve]")
    from replan import config as configs
    from replan.serve.cluster import Cluster
    from replan.serve.cluster import running as replicas
    from replan.train.engine_trl import train
    from replan.train.services import open_editor, open_scorer

    rows = mini_rows(tmp_path, 24)
    judge = MoodyJudge()
    house = House(lambda: judge_app(judge, Limits(queue=64)))
    down = float(os.environ.get("REPLAN_CHAOS_SECONDS", "30"))
    log: list[str] = []
    with replicas(mini_setup(), Limits(queue=32), Cluster(2, port=free_port("127.0.0.1"), gpus=0, cpus=0.5)) as url:
        over: list[Any] = [
            ("planner", "mini"), ("train", str(rows.path)), ("val", None), ("output", str(tmp_path / "run")),
            ("steps", 5), ("save_every", 5), ("rollout.prompts", 2), ("rollout.group", 4), ("optim.micro", 8),
            ("services.editor", url), ("services.judge", house.url), ("services.edit", {"steps": 2}),
            ("services.timeout", 4.0), ("services.backoff", 1.0), ("services.longest", 5.0),
            ("services.most_failed", 0.0),
        ]  # fmt: skip
        config = configs.load(GrpoConfig, "grpo/mini_stage2", over)
        plain = open_scorer(config)
        scorer = Watched(config.reward, plain.edit, plain.judge, config.seed, config.services.workers)

        def trouble() -> None:
            def batch(number: int) -> None:
                while scorer.batches < number:
                    time.sleep(0.02)

            batch(2)
            house.down()
            log.append("judge down")
            time.sleep(down)
            house.up()
            seen = scorer.batches
            batch(seen + 1)
            while "replan_inside 0.0" in httpx.get(url + "/metrics").text:
                time.sleep(0.01)
            os.kill(load_test().replicas(os.getpid())[0], signal.SIGKILL)
            log.append("replica killed")
            batch(scorer.batches + 1)
            judge.delay = 5.0  # longer than anybody waits
            log.append("judge slow")
            time.sleep(12)
            judge.delay = 0.2

        house.up()
        troubles = threading.Thread(target=trouble, daemon=True)
        troubles.start()
        try:
            train(config, scorer)
        finally:
            judge.delay = 0.0
            house.down()
    assert log == ["judge down", "replica killed", "judge slow"]
    (state,) = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    assert json.loads(state.read_text())["global_step"] == config.steps
    assert "judge" in scorer.failures
    local = replace(config.services, editor="mini", judge="mini")
    clean = Scorer(config.reward, open_editor(local), load_judge("mini"), config.seed)
    assert_no_reward_from_an_outage(scorer.given, clean)
    rewarded = [one.value for _, _, one in scorer.given if one.value is not None]
    assert len(rewarded) == config.steps * config.rollouts  # each rollout got one, in the end
    print(f"\nsteps {config.steps}, rollouts {len(rewarded)}, scorings that failed and were made again "
          f"{len(scorer.failures)}: {log}")  # fmt: skip


def load_test() -> Any:
    """The load test's way to find the replicas' processes."""
    path = Path(__file__).parents[2] / "scripts" / "load_test.py"
    spec = importlib.util.spec_from_file_location("load_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def mini_setup() -> Any:
    """The mini editor's setup, without a planner."""
    from replan.cli.options import Flags

    return replace(Flags(settings=["steps=2"]).setup(), planner=None)

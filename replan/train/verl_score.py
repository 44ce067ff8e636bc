"""verl's reward function: one rollout in, its reward out; or an exception, which takes the rollout out of its group.

verl's synchronous trainer leaves out a rollout whose reward raised: it is in neither mean, std nor gradient. So an
outage raises, and a malformed plan, which is the policy's own fault, scores.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

from replan import config as configs
from replan.errors import ConfigError, ServiceError
from replan.train import samples
from replan.train.data import Row, Rows, Task
from replan.train.grpo import GrpoConfig
from replan.train.patience import Outage, Tally
from replan.train.score import Scored, Scorer
from replan.types import Failure

log = logging.getLogger(__name__)

PNG, STEP = "png", "step"  # keys of extra_info under which replan's reward loop hands over picture and step


class RolloutLost(ServiceError):
    """Editor or judge failed for this one rollout; it has no reward."""


class Waiting:
    """Scores rollouts that arrive one by one, as they do in verl; the same rules as for whole batches.

    A rollout that could not be scored is tried again after a pause. Then it is lost, as long as no more than
    `services.most_failed` of the last batch's worth of rollouts were; beyond that it waits, with back-off, until the
    service is back or `services.patience` seconds have passed.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: GrpoConfig,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scorer, self.services, self.tally = scorer, config.services, Tally()
        self._recent: deque[bool] = deque(maxlen=config.rollouts)  # True: lost
        self._allowed = int(config.services.most_failed * config.rollouts)
        self._sleep, self._now, self._jitter = sleep, now, random.Random(config.seed)

    async def score(self, row: Row, answer: str) -> Scored:
        """The outcome, which has a value. Raises RolloutLost, and Outage when patience has run out."""
        begin, pause, tries = self._now(), self.services.backoff, 1
        outcome = await self.scorer.score_one(row, answer)
        while outcome.value is None:
            stage, why = (outcome.failure.stage, outcome.failure.error) if outcome.failure else ("reward", "unknown")
            spent = self._now() - begin
            if tries > 1 and sum(self._recent) < self._allowed:
                raise self._lost(stage, RolloutLost(f"row {row.index}: the {stage} failed {tries} times: {why}"))
            if spent + pause > self.services.patience:
                told = f"rollouts could not be scored for {spent:.0f} s ({stage}: {why})"
                raise self._lost(stage, Outage(f"{told}; mend the service and start the same command again"))
            await self._pause(pause, stage, why)
            pause, tries = min(pause * 2, self.services.longest), tries + 1
            outcome = await self.scorer.score_one(row, answer)
        self._recent.append(False)
        self.tally.scored += 1
        return outcome

    async def _pause(self, pause: float, stage: str, why: str) -> None:
        wait = pause * (1 + self._jitter.random() / 4)
        log.warning("a rollout waits %.1f s for the %s (%s)", wait, stage, why)
        self.tally.pauses += 1
        self.tally.paused += wait
        await self._sleep(wait)

    def _lost(self, stage: str, error: ServiceError) -> ServiceError:
        self._recent.append(True)
        self.tally.lost[stage] += 1
        log.warning("%s (%d lost so far, %d scored)", error, self.tally.lost.total(), self.tally.scored)
        return error


class Pages:
    """Sample rollouts of every `samples`-th step as a page, collected as they come."""

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self._name, self._cards = "", list[tuple[Row, str, Scored]]()

    def add(self, name: str, row: Row, answer: str, outcome: Scored) -> None:
        """One rollout for the page `name`, which ends with the step's number."""
        if not self.config.samples or int(name.rpartition("-")[2]) % self.config.samples:
            return
        if name != self._name:
            self.write()
            self._name, self._cards = name, []
        most = min(samples.MOST, self.config.rollouts)
        if len(self._cards) < most:
            self._cards.append((row, answer, outcome))
            if len(self._cards) == most:
                self.write()

    def write(self) -> None:
        """Write what there is: a page that never filled up is written when the next one begins."""
        if self._cards:
            rows, answers, outcomes = zip(*self._cards, strict=True)
            samples.write(self.config.output, self._name, rows, answers, outcomes)


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any], *, settings: str, **_: Any
) -> dict[str, float]:
    """verl's `custom_reward_function`: `score`, and the parts for the log. `settings` is the run's GrpoConfig as JSON.

    Raises RolloutLost or Outage when editor or judge failed: never a number from an outage.
    """
    row = _row(data_source, ground_truth, extra_info, settings)
    page = f"{extra_info.get('split', 'train')}-step-{int(extra_info.get(STEP, 0)):06d}"
    try:
        outcome = await _waiting(settings).score(row, solution_str)
    except ServiceError as error:
        _pages(settings).add(page, row, solution_str, Scored(None, failure=Failure("reward", str(error))))
        raise
    _pages(settings).add(page, row, solution_str, outcome)
    assert outcome.value is not None  # else it would have raised
    parts = dict(outcome.parts)
    if "plan" in parts:  # every rollout reports the same names, or verl could not average them
        parts.setdefault("success", 0.0)
    return {"score": float(outcome.value), **{name: float(value) for name, value in parts.items()}}


@cache
def _waiting(settings: str) -> Waiting:
    """One scorer per process: its clients, its threads and its count of failures are shared by all rollouts."""
    from replan.train.services import open_scorer

    config = configs.load(GrpoConfig, json.loads(settings))
    return Waiting(open_scorer(config), config)


@cache
def _pages(settings: str) -> Pages:
    return Pages(configs.load(GrpoConfig, json.loads(settings)))


@cache
def _files(settings: str) -> tuple[Rows, ...]:
    config = configs.load(GrpoConfig, json.loads(settings))
    return tuple(Rows(path) for path in (config.train, config.val) if path is not None)


def _row(data_source: str, ground_truth: str, extra_info: Mapping[str, Any], settings: str) -> Row:
    """The row that was asked. Its picture comes along from replan's reward loop, or from the data file."""
    index = int(extra_info["index"])
    if PNG in extra_info:
        return Row(index, "", extra_info[PNG], Task.from_json(ground_truth))
    task = Task.from_json(ground_truth)
    for rows in _files(settings):  # training and held-out file number their rows alike
        if index < len(rows) and (row := rows[index]).task == task:
            return row
    raise ConfigError(f"{data_source}, row {index}: is in none of the run's data files")

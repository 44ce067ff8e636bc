"""What training does while editor or judge are out of order: score again what failed, pause, and in the end give up."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replan.errors import ServiceError
from replan.train.score import Scored, Scorer

if TYPE_CHECKING:
    from replan.train.data import Row
    from replan.train.grpo import ServiceConfig

log = logging.getLogger(__name__)


class Outage(ServiceError):
    """The services stayed out of order for longer than training is willing to wait."""


@dataclass(slots=True)
class Tally:
    """Counts over a run: rollouts scored, rollouts lost to failures by stage, pauses and seconds spent in them."""

    scored: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    pauses: int = 0
    paused: float = 0.0


class Patience:
    """Scores batches. A few failures leave their groups; too many pause the training and are scored again."""

    def __init__(
        self,
        scorer: Scorer,
        config: ServiceConfig,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        seed: int = 0,
    ) -> None:
        self.scorer, self.config, self.tally = scorer, config, Tally()
        self._sleep, self._jitter = sleep, random.Random(seed)

    async def score(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Scored]:
        """One outcome per answer; at most `most_failed` of them are failures. Raises Outage."""
        outcomes = await self.scorer.score(rows, answers)
        begin, pause = time.monotonic(), self.config.backoff
        while len(failed := [at for at, one in enumerate(outcomes) if one.value is None]) > self._allowed(len(rows)):
            first = outcomes[failed[0]].failure
            why = f"{first.stage}: {first.error}" if first else "unknown"
            spent = time.monotonic() - begin
            if spent + pause > self.config.patience:
                raise Outage(
                    f"{len(failed)} of {len(rows)} rollouts could not be scored for {spent:.0f} s ({why}); "
                    "mend the service and start the same command again"
                )
            wait = pause * (1 + self._jitter.random() / 4)
            log.warning(
                "training pauses for %.1f s: %d of %d rollouts could not be scored (%s)",
                wait, len(failed), len(rows), why,
            )  # fmt: skip
            self.tally.pauses += 1
            self.tally.paused += wait
            await self._sleep(wait)
            pause = min(pause * 2, self.config.longest)
            again = await self.scorer.score([rows[at] for at in failed], [answers[at] for at in failed])
            for at, outcome in zip(failed, again, strict=True):
                outcomes[at] = outcome
        self._count(outcomes)
        return outcomes

    def _allowed(self, count: int) -> int:
        return int(self.config.most_failed * count)

    def _count(self, outcomes: Sequence[Scored]) -> None:
        lost = Counter(one.failure.stage for one in outcomes if one.failure is not None)
        self.tally.lost += lost
        self.tally.scored += len(outcomes) - lost.total()
        for stage, number in sorted(lost.items()):
            log.warning("%d of %d rollouts leave their groups: the %s failed", number, len(outcomes), stage)

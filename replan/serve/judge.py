"""`replan serve judge`: the judges' protocol over HTTP. One call rates an edit on some or all dimensions."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from replan.errors import ImageError, JudgeError, ServiceError
from replan.judge import DIMENSIONS, Case, Judge, Unscored
from replan.serve import wire
from replan.serve.app import Service
from replan.serve.desk import Ticket
from replan.serve.door import Door
from replan.serve.editing import picture
from replan.serve.engine import Engine, Health, Local, in_time, name_of, seconds
from replan.serve.limits import Limits, invalid


@dataclass(frozen=True, slots=True)
class Question:
    """A case and the dimensions asked for."""

    case: Case
    dimensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores by dimension and the seconds they took."""

    scores: dict[str, wire.Scored]
    seconds: float


class JudgeEngine:
    """A judge behind a desk. `threads` cases are judged at once: judges wait for a service most of the time."""

    def __init__(self, judge: Judge, limits: Limits, threads: int = 8) -> None:
        self.judge, self.limits = judge, limits
        self.local: Local[Question, Judged] = Local(self._load, self._work, limits, threads)
        self._about: dict[str, Any] = {}

    @property
    def capacity(self) -> int:
        return self.local.capacity

    def start(self) -> None:
        self.local.start()

    def close(self) -> None:
        self.judge.stop()
        self.local.close()

    async def health(self) -> Health:
        return await self.local.health()

    def describe(self) -> dict[str, Any]:
        return self._about

    async def answer(self, call: wire.JudgeCall) -> wire.JudgeReply:
        """Raises Problem."""
        async with in_time(call.timeout, self.limits):
            name = name_of(call, call.id)
            question = await asyncio.to_thread(self.read, call)
            judged, ticket = await self.local.ask(name, question, name)
        return wire.JudgeReply(
            id=name[0], scores=judged.scores, timings=seconds({"judge": judged.seconds}, ticket.waited)
        )

    def read(self, call: wire.JudgeCall) -> Question:
        """A call checked and decoded. Raises Problem 413 or 422 that names the field."""
        source, result = (picture(getattr(call, field), field, self.limits) for field in ("source", "result"))
        if not call.instruction.strip():
            raise invalid("instruction", "is empty; a judge must know what was asked")
        digests = (hashlib.sha256(image.tobytes()).hexdigest() for image in (source, result))
        case = Case(
            call.case, call.instruction, call.expression, lambda: source, lambda: result, *digests, extra=call.extra
        )
        return Question(case, tuple(dict.fromkeys(call.dimensions)))

    def _load(self) -> None:
        """Let the judge answer once: a case that is none may go unscored, but the judge must be there to say so."""
        from PIL import Image

        about = dict(self.judge.describe())
        grey = Image.new("RGB", (32, 32), "grey")
        case = Case(0, "make it brighter", "everything", lambda: grey, lambda: grey, "", "")
        self._about = about | {"free": self.judge.key(case, DIMENSIONS["target"]) is None}
        try:
            self.judge.rate(case, DIMENSIONS["target"])
        except Unscored:
            return

    def _work(self, tickets: Sequence[Ticket[Question, Judged]]) -> None:
        for ticket in tickets:
            if ticket.work is not None:
                self._judge(ticket, ticket.work)

    def _judge(self, ticket: Ticket[Question, Judged], question: Question) -> None:
        start = time.monotonic()
        scores: dict[str, wire.Scored] = {}
        for name in question.dimensions:
            if ticket.abandoned:
                return
            try:
                rating = self.judge.rate(question.case, DIMENSIONS[name])
            except Unscored as error:
                scores[name] = wire.Scored(unscored=str(error), tokens_in=error.tokens_in, tokens_out=error.tokens_out)
            except ImageError as error:
                ticket.fail(invalid("result", error))
                return
            except JudgeError as error:  # the judge itself is out, or cannot look at such a picture: no score at all
                ticket.fail(ServiceError(str(error)))
                return
            else:
                scores[name] = wire.Scored(
                    score=rating.score,
                    reason=rating.reason,
                    model=rating.model,
                    tokens_in=rating.tokens_in,
                    tokens_out=rating.tokens_out,
                )
        ticket.finish(Judged(scores, time.monotonic() - start))


def judge_service(engine: Engine[wire.JudgeCall, wire.JudgeReply], limits: Limits) -> Door:
    """The app around an engine, which it starts and closes."""
    service = Service(engine, limits, "judge", "replan judge")

    @service.app.post("/v1/verdicts", tags=["judge"], summary="Judge an edit", response_model_exclude_none=True)
    async def verdicts(request: Request, call: wire.JudgeCall) -> wire.JudgeReply:
        """A score on its published scale per dimension, or why there is none. An outage is a 503, never a score."""
        reply = await service.watched(request, engine.answer(call), call.id)
        service.metrics.worked(reply.timings)
        return reply

    return service.finished()

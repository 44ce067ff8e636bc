"""Clients of the services: an edit or a verdict over HTTP, patient with what may pass, honest about what does not.

A trainer takes `edit: Callable[[EditRequest], Edit]`; an EditClient is one, and nobody downstream can tell.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from replan import plan as plans
from replan.errors import ConfigError, ImageError, JudgeError, PlanError, ServiceError
from replan.images import PILLOW_CEILING
from replan.judge import Case, Dimension, Rating, Unscored
from replan.serve import wire
from replan.serve.line import ClientConfig, Line, wait_ready
from replan.types import Edit, EditRequest, Size

if TYPE_CHECKING:
    from replan.serve.wire import JudgeReply, Message

__all__ = ["ClientConfig", "EditClient", "JudgeClient", "JudgeServiceError"]
M = TypeVar("M", bound="Message")


class JudgeServiceError(ServiceError, JudgeError):
    """The judge's service is out; `except JudgeError` and `except ServiceError` both catch it."""


class EditClient:
    """Edits by a service. `settings` go over those that the service was started with, for every call."""

    def __init__(
        self,
        url: str,
        config: ClientConfig | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        baseline: bool | None = None,
        strict: bool = False,
    ) -> None:
        self.line = Line(url, config or ClientConfig(), ServiceError)
        self.settings, self.baseline, self.strict = dict(settings or {}), baseline, strict

    def __enter__(self) -> EditClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, request: EditRequest) -> Edit:
        """One edit. Raises ServiceError for an outage; PlanError, ConfigError, ImageError for a request refused."""
        return _edit(request, self.line.ask("/v1/edits", self._call(request), wire.EditReply))

    async def acall(self, request: EditRequest) -> Edit:
        """The same in asyncio; many may be under way at once."""
        return _edit(request, await self.line.aask("/v1/edits", self._call(request), wire.EditReply))

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Return once the service is ready. Raises ServiceError with its last word when the time is over."""
        wait_ready(self.line, seconds)

    def close(self) -> None:
        """Calls under way in other threads end with ServiceError after their present try."""
        self.line.close()

    async def aclose(self) -> None:
        await self.line.aclose()

    def _call(self, request: EditRequest) -> wire.EditCall:
        fields = {
            "image": wire.encode(request.image),
            "extra_images": [wire.encode(image) for image in request.extra_images],
            "instruction": request.instruction,
            "seed": request.seed,
            "plan": None if request.plan is None else plans.to_json(request.plan),
            "baseline": self.baseline,
            "strict": self.strict,
            "settings": self.settings,
            "timeout": min(self.line.config.timeout, 3600.0),
        }
        return _built(wire.EditCall, {"id": uuid.uuid4().hex, **fields})


class JudgeClient:
    """Verdicts by a service: a replan.judge.Judge, and one call for all dimensions of a case."""

    def __init__(self, url: str, config: ClientConfig | None = None) -> None:
        self.line = Line(url, config or ClientConfig(), JudgeServiceError)
        self._about: Mapping[str, Any] | None = None

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def describe(self) -> Mapping[str, Any]:
        """What the service's own judge says of itself. Raises JudgeServiceError."""
        if self._about is None:
            self._about = wire.About.model_validate(self.line.get("/v1/about")).model
        return {name: value for name, value in self._about.items() if name != "free"}

    def key(self, case: Case, dimension: Dimension) -> str | None:
        """What the score depends on, as a hash; None when asking is free."""
        about = self.describe()
        if self._about is not None and self._about.get("free"):
            return None
        pictures = [case.source_sha256 if dimension.sees_source else None, case.result_sha256]
        fields = [about, dimension.name, case.instruction, case.expression, pictures]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        """Nothing: whoever runs the service pays."""
        return 0, 0

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        """Raises Unscored for this case alone, JudgeServiceError for an outage, JudgeError for a call refused."""
        rating = self.rate_all(case, (dimension.name,))[dimension.name]
        if isinstance(rating, Unscored):
            raise rating
        return rating

    def rate_all(
        self, case: Case, names: Sequence[str] = ("target", "effect", "consistency", "quality")
    ) -> dict[str, Rating | Unscored]:
        """Ratings by dimension in one call; Unscored stands where the judge gave no usable score. Raises as `rate`."""
        return _ratings(self.line.ask("/v1/verdicts", _judge_call(case, names), wire.JudgeReply), names)

    async def arate_all(
        self, case: Case, names: Sequence[str] = ("target", "effect", "consistency", "quality")
    ) -> dict[str, Rating | Unscored]:
        """The same in asyncio."""
        return _ratings(await self.line.aask("/v1/verdicts", _judge_call(case, names), wire.JudgeReply), names)

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Return once the service is ready. Raises JudgeServiceError with its last word when the time is over."""
        wait_ready(self.line, seconds)

    def stop(self) -> None:
        self.line.close()

    async def aclose(self) -> None:
        await self.line.aclose()


def _judge_call(case: Case, names: Sequence[str]) -> wire.JudgeCall:
    fields = {
        "id": uuid.uuid4().hex,
        "case": case.id,
        "source": wire.encode(case.source()),
        "result": wire.encode(case.result()),
        "instruction": case.instruction,
        "expression": case.expression,
        "dimensions": list(names),
        "extra": dict(case.extra),
    }
    return _built(wire.JudgeCall, fields)


def _ratings(reply: JudgeReply, names: Sequence[str]) -> dict[str, Rating | Unscored]:
    found: dict[str, Rating | Unscored] = {}
    for name in names:
        scored = reply.scores.get(name)
        if scored is None:
            raise JudgeServiceError(f"the judge's answer has no {name}")
        spent = (scored.tokens_in, scored.tokens_out)
        if scored.score is None:
            found[name] = Unscored(scored.unscored or "no reason given", *spent)
        else:
            found[name] = Rating(scored.score, scored.reason, scored.model, *spent)
    return found


def _edit(request: EditRequest, reply: wire.EditReply) -> Edit:
    try:
        image = wire.decode(reply.image, PILLOW_CEILING)
        plan = None if reply.plan is None else plans.from_json(reply.plan, Size(*request.image.size))
    except (ImageError, PlanError) as error:
        raise ServiceError(f"the edit that came back cannot be read: {error}") from error
    return Edit(request, plan, image, tuple(reply.notes), dict(reply.timings))


def _built(kind: type[M], fields: Mapping[str, Any]) -> M:
    """A message; what the schema refuses is the caller's mistake. Raises ConfigError that names the field."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(fields)
    except ValidationError as failure:
        lines = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in failure.errors(include_input=False)]
        raise ConfigError("; ".join(lines)) from failure

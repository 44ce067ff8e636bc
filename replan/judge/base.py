"""What every judge shares: the four dimensions with their scales, a case to judge, a rating, the protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from replan.errors import ConfigError, JudgeError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Dimension:
    """One question to a judge: its name, the allowed scores, and whether the judge sees the original as well."""

    name: str
    scale: tuple[int, ...]
    sees_source: bool = True


DIMENSIONS: Mapping[str, Dimension] = {
    dimension.name: dimension
    for dimension in (
        Dimension("target", (1, 5)),
        Dimension("effect", (1, 3, 5)),
        Dimension("consistency", (1, 3, 5)),
        Dimension("quality", (1, 2, 3, 4, 5), sees_source=False),
    )
}


class Unscored(JudgeError):
    """The judge worked but gave no usable score for this one case; it stays without a score. `tokens` were spent."""

    def __init__(self, text: str, tokens_in: int = 0, tokens_out: int = 0) -> None:
        super().__init__(text)
        self.tokens_in, self.tokens_out = tokens_in, tokens_out


class JudgeDown(JudgeError):
    """The judge itself failed at a case on which `tokens` had been spent before, on answers of no use."""

    def __init__(self, text: str, tokens_in: int = 0, tokens_out: int = 0) -> None:
        super().__init__(text)
        self.tokens_in, self.tokens_out = tokens_in, tokens_out


@dataclass(frozen=True, slots=True)
class Case:
    """An edit to judge. The pictures are loaded when they are looked at; the digests are of their files' bytes."""

    id: int
    instruction: str
    expression: str
    source: Callable[[], Image] = field(repr=False)
    result: Callable[[], Image] = field(repr=False)
    source_sha256: str
    result_sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rating:
    """A score on its dimension's scale, the judge's reason, which model gave it, and the tokens that it cost."""

    score: int
    reason: str
    model: str
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """How a judge is asked.

    temperature  None leaves it to the service
    max_tokens   of an answer, thoughts included
    structured   send a JSON schema that allows only the scale; false for servers that know none
    tries        asks per score when an answer is off the scale, unparsable or refused
    retries      further tries after a 408, 409, 429, 5xx, lost connection or timeout
    backoff      seconds before the first retry, doubled each time, where the server asks for no other wait
    timeout      seconds to wait for one answer
    concurrency  requests under way at once
    price_in     US dollars per million tokens, for the estimate of the cost; also price_out
    base_url     another address of the same API
    """

    temperature: float | None = 0.0
    max_tokens: int = 4096
    structured: bool = True
    tries: int = 3
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 120.0
    concurrency: int = 8
    price_in: float | None = None
    price_out: float | None = None
    base_url: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "tries", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"judge.{name} = {getattr(self, name)}: must be 1 or more")
        for name in ("temperature", "retries", "backoff", "timeout", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"judge.{name} = {value}: must be finite and not negative")
        if self.timeout == 0:
            raise ConfigError("judge.timeout = 0: must exceed 0")


class Judge(Protocol):
    """Scores one dimension of one case. Safe for calls from several threads."""

    def describe(self) -> Mapping[str, Any]:
        """Everything that decides scores: model, settings, prompt hashes. Its `name` becomes a file name."""
        ...

    def key(self, case: Case, dimension: Dimension) -> str | None:
        """What the score depends on, as a hash; None when asking is free and nothing need be kept."""
        ...

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        """About how many tokens the question and the answer will cost."""
        ...

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        """Raises Unscored for this case alone, JudgeError when the judge itself does not work."""
        ...

    def stop(self) -> None:
        """Ask nothing new and wait for nothing any more."""
        ...


def load_judge(spec: str, config: JudgeConfig | None = None) -> Judge:
    """mini: the mini world's exact judge; else a vision-language model behind a service, see replan.chat.open_service.

    Raises ConfigError or JudgeError.
    """
    if spec == "mini":
        from replan.judge.mini import MiniJudge

        return MiniJudge()
    from replan.judge.vlm import load_vlm

    return load_vlm(spec, config or JudgeConfig())

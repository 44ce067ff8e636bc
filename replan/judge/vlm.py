"""A vision-language model as judge: one call per score, answers that must lie on the scale, and no guessing."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from replan.chat import ChatError, Patient, Question, Refused, Reply, Service, open_service
from replan.errors import JudgeError
from replan.judge.base import DIMENSIONS, Case, Dimension, JudgeConfig, JudgeDown, Rating, Unscored

if TYPE_CHECKING:
    from PIL.Image import Image

_FIELD = re.compile(r"\{(instruction|expression)\}")
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_ANSWER_TOKENS = 250  # of a typical answer, for the estimate
_AGAIN = "\n\nYour last answer could not be used: {}. Answer with the JSON object only."


class BadAnswer(ValueError):
    """An answer is no JSON object with a score on the scale."""


class VlmJudge:
    """Asks a service. The same model, settings, pictures and prompt have the same key, so that no score is paid twice;
    the address is not part of it: a server that comes back elsewhere is the same judge."""

    def __init__(self, service: Service, spec: str, model: str, config: JudgeConfig) -> None:
        self.patient = Patient(service, config.retries, config.backoff)
        self.spec = spec
        self.model = model
        self.config = config
        self._sizes: dict[str, tuple[int, int]] = {}  # of results, by digest: a picture is not decoded per question

    def describe(self) -> Mapping[str, Any]:
        prompts = {name: prompt_hash(name) for name in DIMENSIONS}
        settings = {"model": self.model, **self._settings(), "prompts": prompts}
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', self.model)}-{mark}"
        return {"name": name, "service": self.spec.partition("#")[0], **settings}

    def key(self, case: Case, dimension: Dimension) -> str | None:
        fields = {
            "model": self.model,
            "settings": self._settings(),
            "prompt": fill(dimension, case),
            "pictures": [case.source_sha256 if dimension.sees_source else None, case.result_sha256],
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        if case.result_sha256 not in self._sizes:
            self._sizes[case.result_sha256] = case.result().size
        pictures = 2 if dimension.sees_source else 1
        seen = pictures * self._picture_tokens(*self._sizes[case.result_sha256])
        return seen + len(fill(dimension, case)) // 4, _ANSWER_TOKENS

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        """Ask, and ask again while the answer cannot be used. Every outcome says what all tries cost."""
        spent_in = spent_out = 0
        why = ""
        for _ in range(self.config.tries):
            try:
                reply: Reply | Refused = self.patient.ask(self._question(case, dimension, why))
            except Refused as refusal:
                reply, why = refusal, str(refusal)
            except ChatError as error:
                raise JudgeDown(f"judge {self.spec}: {error}", spent_in, spent_out) from error
            spent_in, spent_out = spent_in + reply.tokens_in, spent_out + reply.tokens_out
            if isinstance(reply, Refused):
                continue
            try:
                score, reason = read_answer(reply, dimension)
            except BadAnswer as error:
                why = str(error)
            else:
                return Rating(score, reason, reply.model, spent_in, spent_out)
        raise Unscored(f"{why} ({self.config.tries} tries)", spent_in, spent_out)

    def stop(self) -> None:
        self.patient.stopped.set()

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {"temperature": config.temperature, "max_tokens": config.max_tokens, "structured": config.structured}

    def _question(self, case: Case, dimension: Dimension, why: str) -> Question:
        prompt = fill(dimension, case) + (_AGAIN.format(why) if why else "")
        parts: list[str | bytes] = [prompt]
        if dimension.sees_source:
            parts += ["Original picture:", _png(case.source())]
        parts += ["Edited picture:", _png(case.result())]
        schema = answer_schema(dimension) if self.config.structured else None
        return Question(parts, self.config.max_tokens, self.config.temperature, schema)

    def _picture_tokens(self, width: int, height: int) -> int:
        """Gemini counts tiles of 768 pixels, others patches of about 28."""
        if self.spec.startswith(("gemini:", "vertex:")):
            small = max(width, height) <= 384
            return 258 if small else 258 * math.ceil(width / 768) * math.ceil(height / 768)
        return math.ceil(width / 28) * math.ceil(height / 28)


def answer_schema(dimension: Dimension) -> dict[str, Any]:
    """The JSON schema of an answer: the reason comes first, so that the score follows from it."""
    properties = {"reasoning": {"type": "string"}, "score": {"type": "integer", "enum": list(dimension.scale)}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def read_answer(reply: Reply, dimension: Dimension) -> tuple[int, str]:
    """Score and reason. Raises BadAnswer, never guesses: not the first digit, not the nearest score."""
    text = reply.text.strip()
    if not text:
        raise BadAnswer("the answer was empty" + (" (its tokens were spent before it)" if reply.is_cut else ""))
    fenced = _FENCE.fullmatch(text)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        cut = ", cut off at the token limit" if reply.is_cut else ""
        raise BadAnswer(f"the answer was not JSON{cut}: {text[:80]!r}") from None
    if not isinstance(answer, dict):
        raise BadAnswer(f"the answer was a {type(answer).__name__}, not an object")
    score = answer.get("score")
    if isinstance(score, bool) or not isinstance(score, int) or score not in dimension.scale:
        allowed = ", ".join(map(str, dimension.scale))
        raise BadAnswer(f"the score was {score!r}; on this scale are {allowed}")
    return score, str(answer.get("reasoning") or "")


@cache
def template(name: str) -> str:
    """The prompt of a dimension."""
    return resources.files("replan").joinpath("prompts", f"judge_{name}.txt").read_text(encoding="utf-8")


def prompt_hash(name: str) -> str:
    """First 16 digits of the SHA-256 of a dimension's prompt."""
    return hashlib.sha256(template(name).encode()).hexdigest()[:16]


def fill(dimension: Dimension, case: Case) -> str:
    """The prompt for a case. What an instruction says about braces stays as it is."""
    words = {"instruction": case.instruction, "expression": case.expression or "(not given; see the instruction)"}
    return _FIELD.sub(lambda found: words[found[1]], template(dimension.name))


def _png(image: Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG", compress_level=1)
    return content.getvalue()


def load_vlm(spec: str, config: JudgeConfig) -> VlmJudge:
    """Raises ConfigError for a spec or key that is missing, JudgeError when the server cannot be asked."""
    try:
        service, model = open_service(spec, config.timeout, config.base_url)
    except ChatError as error:
        raise JudgeError(f"judge {spec}: {error}") from error
    return VlmJudge(service, spec, model, config)

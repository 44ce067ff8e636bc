"""Remote planners: OpenAI-compatible chat completions (vLLM, OpenAI and many more) and Gemini."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    wait_exponential_jitter,
)

from replan.errors import PlannerError
from replan.images import ImageLimits, check_size, fit_area, to_rgb
from replan.planner.base import Frame, Outcome, PlannerConfig, frame_of, message, read_answer, read_template
from replan.types import EditRequest, Plan, Size

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

BACKOFF = 1.0  # seconds before the first retry; doubled each time, plus up to as much at random
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is given up at once
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_NEED = "the remote planners need two more packages: pip install 'replan[remote]'"


class Unavailable(PlannerError):
    """A failure that may pass; `after` is how many seconds the server asked to wait."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


@dataclass(frozen=True, slots=True)
class Question:
    """What is sent: parts of one user turn, the picture as PNG, how to draw the answer."""

    content: Sequence[dict[str, Any]]
    png: bytes
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the answer, and whether it stopped at the token limit."""

    text: str
    is_cut: bool


class Service(Protocol):
    """One wire format. Raises Unavailable for what may pass and PlannerError for what will not."""

    def ask(self, question: Question) -> Reply: ...


class RemotePlanner:
    """Plans with a service; safe for calls from several threads."""

    def __init__(self, service: Service, config: PlannerConfig, known_frame: Frame) -> None:
        self.service = service
        self.config = config
        self.template = read_template(config)
        self.known_frame: Frame = known_frame

    def __call__(self, request: EditRequest) -> Plan:
        """One plan. Raises PlanError for a bad answer, PlannerError when the service failed."""
        outcome = self._plan(request, self.config.temperature)
        if isinstance(outcome, Plan):
            return outcome
        raise outcome

    def plan_many(self, requests: Sequence[EditRequest], *, sampled: bool = False) -> list[Outcome]:
        """One outcome per request, in order, with at most `concurrency` requests under way."""
        temperature = self.config.candidate_temperature if sampled else self.config.temperature
        pool = ThreadPoolExecutor(max_workers=max(1, min(self.config.concurrency, len(requests))))
        try:
            return list(pool.map(lambda request: self._plan(request, temperature), requests))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing new is sent

    def _plan(self, request: EditRequest, temperature: float) -> Outcome:
        source = Size(*request.image.size)
        check_size(source, ImageLimits(min_side=1))
        # Sides of the server's own multiple and below its limit: what it sees is what we sent.
        seen = fit_area(source, self.config.max_pixels, self.config.multiple)
        frame = frame_of(self.config, self.known_frame, seen, source)
        content = message(self.template, request.instruction, frame, self.config.image_first)
        png = io.BytesIO()
        to_rgb(request.image).resize(seen).save(png, format="PNG", compress_level=1)
        try:
            reply = self._ask(Question(content, png.getvalue(), temperature, request.seed))
        except PlannerError as error:
            return error
        cut = f"the answer was cut off at {self.config.max_new_tokens} tokens" if reply.is_cut else None
        return read_answer(reply.text, frame, source, self.template, cut)

    def _ask(self, question: Question) -> Reply:
        """Ask, again and again while the failure may pass."""
        tries = Retrying(
            stop=self._is_enough,
            wait=_wait,
            retry=retry_if_exception_type(Unavailable),
            before_sleep=_log_retry,
            reraise=True,
        )
        reply = tries(self.service.ask, question)
        if not reply.text.strip():
            why = "all tokens were spent before it; raise planner.max_new_tokens" if reply.is_cut else "it is empty"
            raise PlannerError(f"the planner service sent no answer: {why}")
        return reply

    def _is_enough(self, state: RetryCallState) -> bool:
        """Whether to give up: all tries are spent, or the server wants too long a pause."""
        return state.attempt_number > self.config.retries or (_server_wait(state) or 0.0) > LONGEST_WAIT


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: what the server asked for, or growing pauses."""
    asked = _server_wait(state)
    return wait_exponential_jitter(initial=BACKOFF, max=30, jitter=BACKOFF)(state) if asked is None else asked


def _server_wait(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.after if isinstance(error, Unavailable) else None


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    pause = state.next_action.sleep if state.next_action else 0.0
    log.warning("%s; try %d failed, next in %.1f s", error, state.attempt_number, pause)


def retry_after(headers: Any) -> float | None:
    """Seconds that a response's headers ask to wait: Retry-After as seconds or as a date."""
    value = headers.get("retry-after") if headers is not None else None
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


# --- chat completions ------------------------------------------------------------------------------------------------


class ChatService:
    """The chat completions of OpenAI's API."""

    def __init__(self, client: OpenAI, model: str, config: PlannerConfig) -> None:
        self.client = client
        self.model = model
        self.config = config
        self._refused: set[str] = set()  # settings that this model does not take, such as a temperature

    def ask(self, question: Question) -> Reply:
        """One request."""
        import openai

        url = "data:image/png;base64," + base64.b64encode(question.png).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        content = [image if part["type"] == "image" else part for part in question.content]
        turns: Any = [{"role": "user", "content": content}]
        settings: dict[str, Any] = {"temperature": question.temperature}
        settings["max_completion_tokens"] = self.config.max_new_tokens
        if question.temperature > 0:
            settings |= {"seed": question.seed, "top_p": self.config.top_p}
        settings = {name: value for name, value in settings.items() if name not in self._refused}
        try:
            completion = self.client.chat.completions.create(model=self.model, messages=turns, **settings)
        except openai.BadRequestError as error:
            if error.param in settings:
                log.warning("%s does not take %s; asking without it", self.model, error.param)
                self._refused.add(str(error.param))
                return self.ask(question)
            raise PlannerError(f"the planner service refused the request: {error}") from error
        except openai.APITimeoutError as error:
            raise Unavailable(f"no answer from {self.client.base_url} within {self.config.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise Unavailable(f"no connection to {self.client.base_url}: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            text = f"the planner service answered with status {error.status_code}: {error.message}"
            if error.status_code in _TRANSIENT and error.code != "insufficient_quota":
                raise Unavailable(text, retry_after(error.response.headers)) from error
            raise PlannerError(text) from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON
            raise PlannerError(f"the planner service sent no valid answer: {error}") from error
        return _read_completion(completion)


def _read_completion(completion: Any) -> Reply:
    """The answer in a chat completion; the client library checks next to nothing, so every part may be missing."""
    choices = getattr(completion, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    reply, finish = getattr(first, "message", None), getattr(first, "finish_reason", None)
    if reply is None:
        raise PlannerError("the planner service sent no valid answer: no choices in it")
    if getattr(reply, "refusal", None):
        raise PlannerError(f"the planner refused: {reply.refusal}")
    if finish == "content_filter":
        raise PlannerError("the planner refused: its content filter stopped the answer")
    text = getattr(reply, "content", None) or ""
    if not isinstance(text, str):
        raise PlannerError("the planner service sent no valid answer: its content is no text")
    return Reply(text, finish == "length")


def chat_planner(spec: str, config: PlannerConfig) -> RemotePlanner:
    """`openai:model` with OPENAI_API_KEY, or `http(s)://host/v1#model` with REPLAN_API_KEY if the server wants one."""
    try:
        import openai
    except ImportError as error:
        raise PlannerError(_NEED) from error
    if spec.startswith("openai:"):
        model, url, key = spec.removeprefix("openai:"), None, os.environ.get("OPENAI_API_KEY")
        if not key or not model:
            raise PlannerError(f"planner {spec!r}: needs openai:MODEL and the key in OPENAI_API_KEY")
    else:
        url, _, model = spec.partition("#")
        key = os.environ.get("REPLAN_API_KEY") or "none"
    client = openai.OpenAI(base_url=url, api_key=key, timeout=config.timeout, max_retries=0)
    model = model or _only_model(client, spec)
    known: Frame = "thousand" if "qwen3" in model.lower() else "seen"
    return RemotePlanner(ChatService(client, model, config), config, known)


def _only_model(client: OpenAI, spec: str) -> str:
    """The one model that a server offers."""
    import openai

    try:
        names = [model.id for model in client.models.list()]
    except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
        raise PlannerError(f"planner {spec!r}: cannot ask which models it has ({error}); write {spec}#MODEL") from error
    if len(names) != 1:
        raise PlannerError(f"planner {spec!r}: write {spec}#MODEL with one of: {', '.join(names) or 'none offered'}")
    return names[0]


# --- Gemini ----------------------------------------------------------------------------------------------------------


class GeminiService:
    """Google's generateContent."""

    def __init__(self, client: Any, model: str, config: PlannerConfig) -> None:
        self.client = client
        self.model = model
        self.config = config

    def ask(self, question: Question) -> Reply:
        """One request."""
        from google.genai import errors, types

        image = types.Part.from_bytes(data=question.png, mime_type="image/png")
        parts = [image if part["type"] == "image" else types.Part(text=part["text"]) for part in question.content]
        settings = types.GenerateContentConfig(
            temperature=question.temperature,
            max_output_tokens=self.config.max_new_tokens,
            seed=question.seed % 2**31 if question.temperature > 0 else None,  # the wire has 32 bits
            top_p=self.config.top_p if question.temperature > 0 else None,
        )
        try:
            response = self.client.models.generate_content(model=self.model, contents=parts, config=settings)
        except errors.APIError as error:
            text = f"the planner service answered with status {error.code}: {error.message}"
            if error.code in _TRANSIENT:
                raise Unavailable(text, _gemini_wait(error)) from error
            raise PlannerError(text) from error
        except (*_http_errors("TimeoutException"), TimeoutError) as error:
            raise Unavailable(f"no answer from Gemini within {self.config.timeout:g} s") from error
        except (*_http_errors("TransportError"), OSError) as error:
            raise Unavailable(f"no connection to Gemini: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # no JSON, or not of the expected form
            raise PlannerError(f"the planner service sent no valid answer: {error}") from error
        return _read_gemini(response)


def _http_errors(name: str) -> tuple[type[Exception], ...]:
    """An error class of httpx and, where it is installed, of its fork: google-genai works with either."""
    import httpx

    fork = importlib.import_module("httpx2") if importlib.util.find_spec("httpx2") else httpx
    return (getattr(httpx, name), getattr(fork, name))


def _gemini_wait(error: Any) -> float | None:
    """Seconds that Gemini asks to wait: the header, or RetryInfo among the error's details."""
    asked = retry_after(getattr(error.response, "headers", None))
    body = error.details.get("error", error.details) if isinstance(error.details, dict) else {}
    for detail in body.get("details", []) if isinstance(body, dict) else []:
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if asked is None and isinstance(delay, str):
            asked = retry_after({"retry-after": delay.removesuffix("s")})
    return asked


def _read_gemini(response: Any) -> Reply:
    """The answer in a generateContent response, without the model's thoughts."""
    blocked = response.prompt_feedback.block_reason if response.prompt_feedback else None
    if blocked:
        raise PlannerError(f"the planner refused: the request was blocked ({blocked.value})")
    if not response.candidates:
        raise PlannerError("the planner service sent no valid answer: no candidates in it")
    first = response.candidates[0]
    finish = first.finish_reason.value if first.finish_reason else "STOP"
    if finish not in ("STOP", "MAX_TOKENS"):
        raise PlannerError(f"the planner refused: it stopped for {finish}")
    parts = (first.content.parts if first.content else None) or []
    return Reply("".join(part.text or "" for part in parts if not part.thought), finish == "MAX_TOKENS")


def gemini_planner(spec: str, config: PlannerConfig) -> RemotePlanner:
    """`gemini:model` with GEMINI_API_KEY or GOOGLE_API_KEY."""
    try:
        from google import genai
        from google.genai import types
    except ImportError as error:
        raise PlannerError(_NEED) from error
    key = os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY")
    model = spec.removeprefix("gemini:")
    if not key or not model:
        raise PlannerError(f"planner {spec!r}: needs gemini:MODEL and the key in GEMINI_API_KEY")
    once = types.HttpRetryOptions(attempts=1)  # RemotePlanner retries
    options = types.HttpOptions(timeout=int(config.timeout * 1000), retry_options=once)
    client = genai.Client(api_key=key, http_options=options, vertexai=False)
    return RemotePlanner(GeminiService(client, model, config), config, "thousand")

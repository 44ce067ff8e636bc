"""Chat services over HTTP, in the wire formats of OpenAI (vLLM and many more) and Gemini; patient with their limits."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol

from replan.errors import ConfigError, ReplanError

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

LONGEST_WAIT = 300.0  # seconds
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_NEED = "remote models need two more packages: pip install 'replan[remote]'"


class ChatError(ReplanError, RuntimeError):
    """The service does not work and asking again will not help: a wrong key, an unknown model, a bad request."""


class Unavailable(ChatError):
    """A failure that may pass; `after` is how many seconds the server asked to wait."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


class Garbled(Unavailable):
    """What came back is no valid response: a login page, a cut body, a response without its parts."""

    def __init__(self, why: object) -> None:
        super().__init__(f"the service sent no valid answer: {why}")


class Refused(ReplanError, RuntimeError):
    """The model, or a filter before it, would not answer this question, which may have cost tokens all the same."""

    def __init__(self, text: str, tokens_in: int = 0, tokens_out: int = 0) -> None:
        super().__init__(text)
        self.tokens_in, self.tokens_out = tokens_in, tokens_out


@dataclass(frozen=True, slots=True)
class Question:
    """One user turn: texts and pictures (PNG bytes) in order, and how the answer is drawn.

    `schema` is a JSON schema that the answer must follow; what is None is left to the service.
    """

    parts: Sequence[str | bytes]
    max_tokens: int
    temperature: float | None = 0.0
    schema: Mapping[str, Any] | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer, whether it ended at the token limit, which model gave it, and the tokens that it cost."""

    text: str
    is_cut: bool
    model: str
    tokens_in: int = 0
    tokens_out: int = 0


class Service(Protocol):
    """One wire format. Raises Unavailable for what may pass, Refused, and ChatError for what will not pass."""

    def ask(self, question: Question) -> Reply: ...


class Patient:
    """Asks again while a failure may pass. When the server says how long to wait, every thread waits that long.

    backoff: seconds before the first retry; doubled each time, plus up to as much at random. longest_wait: seconds; a
    server that asks for more is given up at once. level: how loud a retry is logged.
    """

    def __init__(
        self, service: Service, retries: int, backoff: float = 1.0, *,
        longest_wait: float = LONGEST_WAIT, retry_garbled: bool = True, level: int = logging.INFO,
    ) -> None:  # fmt: skip
        self.service = service
        self.retries = retries
        self.backoff = backoff
        self.longest_wait = longest_wait
        self.retry_garbled = retry_garbled
        self.level = level
        self.stopped = threading.Event()  # set it and nothing new is asked
        self._open_at = 0.0
        self._lock = threading.Lock()

    def ask(self, question: Question) -> Reply:
        """One reply. Raises as Service.ask, once the tries are spent."""
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception,
            sleep_using_event,
            wait_exponential_jitter,
        )

        def may_pass(error: BaseException) -> bool:
            return isinstance(error, Unavailable) and (self.retry_garbled or not isinstance(error, Garbled))

        def is_enough(state: RetryCallState) -> bool:
            is_spent = self.stopped.is_set() or state.attempt_number > self.retries
            return is_spent or (_asked(state) or 0) > self.longest_wait

        def pause(state: RetryCallState) -> float:
            growing = wait_exponential_jitter(initial=self.backoff, max=30, jitter=self.backoff)
            asked = _asked(state)
            if asked is not None and asked <= self.longest_wait:  # this runs before is_enough gives up
                with self._lock:
                    self._open_at = max(self._open_at, time.monotonic() + asked)
            return growing(state) if asked is None else asked

        def tell(state: RetryCallState) -> None:
            wait = state.next_action.sleep if state.next_action else 0.0
            log.log(self.level, "%s; try %d failed, next in %.1f s", _error(state), state.attempt_number, wait)

        tries = Retrying(
            stop=is_enough, wait=pause, retry=retry_if_exception(may_pass),
            before_sleep=tell, sleep=sleep_using_event(self.stopped), reraise=True,
        )  # fmt: skip
        return tries(self._ask, question)

    def _ask(self, question: Question) -> Reply:
        wait = self._open_at - time.monotonic()
        if wait > 0:
            self.stopped.wait(wait)
        if self.stopped.is_set():
            raise ChatError("stopped before it was asked")
        return self.service.ask(question)


def _error(state: Any) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _asked(state: Any) -> float | None:
    error = _error(state)
    return error.after if isinstance(error, Unavailable) else None


def open_service(spec: str, timeout: float, base_url: str | None = None) -> tuple[Service, str]:
    """A service and the name of its model.

    http(s)://host/v1#model (key in REPLAN_API_KEY if it wants one), openai:MODEL (OPENAI_API_KEY), gemini:MODEL
    (GEMINI_API_KEY), vertex:MODEL (GOOGLE_CLOUD_PROJECT, GOOGLE_CLOUD_LOCATION and Google's own login).
    Raises ConfigError for another spec or a missing key, ChatError when the server cannot name its model.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("http", "https"):
        url, _, model = spec.partition("#")
        return _chat(url, os.environ.get("REPLAN_API_KEY") or "none", model, timeout)
    if not is_service(spec):
        raise ConfigError(
            f"{spec!r}: write http(s)://host/v1#MODEL, openai:MODEL, gemini:MODEL or vertex:MODEL (or mini for a judge)"
        )
    if not rest:
        raise ConfigError(f"{spec!r}: has no model; write {kind}:MODEL")
    if kind == "openai":
        return _chat(base_url, _key(spec, "OPENAI_API_KEY"), rest, timeout)
    return _gemini(kind, rest, spec, timeout, base_url), rest


def is_service(spec: str) -> bool:
    """Whether a spec names a service rather than a local model."""
    return spec.partition(":")[0] in ("http", "https", "openai", "gemini", "vertex")


def _key(spec: str, *names: str) -> str:
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    raise ConfigError(f"{spec}: needs its key in the environment variable {names[0]}")


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

    def __init__(self, client: OpenAI, model: str, timeout: float) -> None:
        self.client = client
        self.model = model
        self.timeout = timeout
        self._refused: set[str] = set()  # settings that this model does not take, such as a temperature

    def ask(self, question: Question) -> Reply:
        """One request."""
        import openai

        turns: Any = [{"role": "user", "content": [_chat_part(part) for part in question.parts]}]
        drawn = {"temperature": question.temperature, "top_p": question.top_p, "seed": question.seed}
        settings: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
        settings["max_completion_tokens"] = question.max_tokens
        if question.schema is not None:
            shape = {"name": "answer", "strict": True, "schema": dict(question.schema)}
            settings["response_format"] = {"type": "json_schema", "json_schema": shape}
        settings = {name: value for name, value in settings.items() if name not in self._refused}
        try:
            completion = self.client.chat.completions.create(model=self.model, messages=turns, **settings)
        except openai.BadRequestError as error:
            if error.param in settings:
                log.warning("%s does not take %s; asking without it", self.model, error.param)
                self._refused.add(str(error.param))
                return self.ask(question)
            raise ChatError(f"the service refused the request: {error}") from error
        except openai.APITimeoutError as error:
            raise Unavailable(f"no answer from {self.client.base_url} within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise Unavailable(f"no connection to {self.client.base_url}: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            text = f"the service answered with status {error.status_code}: {error.message}"
            if error.status_code in _TRANSIENT and error.code != "insufficient_quota":
                raise Unavailable(text, retry_after(error.response.headers)) from error
            raise ChatError(text) from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON
            raise Garbled(error) from error
        return _read_completion(completion, self.model)


def _chat_part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(part).decode()}}


def _read_completion(completion: Any, model: str) -> Reply:
    """The answer in a chat completion; the client library checks next to nothing, so every part may be missing."""
    choices = getattr(completion, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    reply, finish = getattr(first, "message", None), getattr(first, "finish_reason", None)
    if reply is None:
        raise Garbled("no choices in it")
    usage = getattr(completion, "usage", None)
    spent = (int(getattr(usage, "prompt_tokens", None) or 0), int(getattr(usage, "completion_tokens", None) or 0))
    if getattr(reply, "refusal", None):
        raise Refused(f"refused: {reply.refusal}", *spent)
    if finish == "content_filter":
        raise Refused("refused: the content filter stopped the answer", *spent)
    text = getattr(reply, "content", None) or ""
    if not isinstance(text, str):
        raise Garbled("its content is no text")
    return Reply(text, finish == "length", str(getattr(completion, "model", None) or model), *spent)


def _chat(url: str | None, key: str, model: str, timeout: float) -> tuple[ChatService, str]:
    try:
        import openai
    except ImportError as error:
        raise ConfigError(_NEED) from error
    client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0)  # Patient retries
    if not model:
        try:
            names = [found.id for found in client.models.list()]
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            raise ChatError(f"{url}: cannot ask which models it has ({error}); write {url}#MODEL") from error
        if len(names) != 1:
            raise ConfigError(f"{url}: write {url}#MODEL with one of: {', '.join(names) or 'none offered'}")
        model = names[0]
    return ChatService(client, model, timeout), model


# --- Gemini ----------------------------------------------------------------------------------------------------------


class GeminiService:
    """Google's generateContent, by API key or on Vertex."""

    def __init__(self, client: Any, model: str, timeout: float) -> None:
        self.client = client
        self.model = model
        self.timeout = timeout

    def ask(self, question: Question) -> Reply:
        """One request."""
        from google.genai import errors, types

        parts = [
            types.Part(text=part) if isinstance(part, str) else types.Part.from_bytes(data=part, mime_type="image/png")
            for part in question.parts
        ]
        settings = types.GenerateContentConfig(
            temperature=question.temperature,
            top_p=question.top_p,
            seed=None if question.seed is None else question.seed % 2**31,  # the wire has 32 bits
            max_output_tokens=question.max_tokens,
            response_mime_type=None if question.schema is None else "application/json",
            response_json_schema=None if question.schema is None else dict(question.schema),
        )
        try:
            response = self.client.models.generate_content(model=self.model, contents=parts, config=settings)
        except errors.APIError as error:
            text = f"the service answered with status {error.code}: {error.message}"
            if error.code in _TRANSIENT:
                raise Unavailable(text, _gemini_wait(error)) from error
            raise ChatError(text) from error
        except (*_http_errors("TimeoutException"), TimeoutError) as error:
            raise Unavailable(f"no answer from Gemini within {self.timeout:g} s") from error
        except (*_http_errors("TransportError"), OSError) as error:
            raise Unavailable(f"no connection to Gemini: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # no JSON, or not of the expected form
            raise Garbled(error) from error
        return _read_gemini(response, self.model)


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


def _read_gemini(response: Any, model: str) -> Reply:
    """The answer in a generateContent response, without the model's thoughts (which are paid all the same)."""
    usage = response.usage_metadata
    spent = (
        getattr(usage, "prompt_token_count", 0) or 0,
        (getattr(usage, "candidates_token_count", 0) or 0) + (getattr(usage, "thoughts_token_count", 0) or 0),
    )
    blocked = response.prompt_feedback.block_reason if response.prompt_feedback else None
    if blocked:
        raise Refused(f"refused: the request was blocked ({blocked.value})", *spent)
    if not response.candidates:
        raise Garbled("no candidates in it")
    first = response.candidates[0]
    finish = first.finish_reason.value if first.finish_reason else "STOP"
    if finish not in ("STOP", "MAX_TOKENS"):
        raise Refused(f"refused: it stopped for {finish}", *spent)
    parts = (first.content.parts if first.content else None) or []
    text = "".join(part.text or "" for part in parts if not part.thought)
    return Reply(text, finish == "MAX_TOKENS", response.model_version or model, *spent)


def _gemini(kind: str, model: str, spec: str, timeout: float, base_url: str | None) -> GeminiService:
    try:
        from google import genai
        from google.genai import types
    except ImportError as error:
        raise ConfigError(_NEED) from error
    once = types.HttpRetryOptions(attempts=1)  # Patient retries
    options = types.HttpOptions(timeout=int(timeout * 1000), retry_options=once, base_url=base_url)
    if kind == "gemini":
        key = _key(spec, "GEMINI_API_KEY", "GOOGLE_API_KEY")
        return GeminiService(genai.Client(api_key=key, http_options=options, vertexai=False), model, timeout)
    project = _key(spec, "GOOGLE_CLOUD_PROJECT")
    location = os.environ.get("GOOGLE_CLOUD_LOCATION") or "global"
    try:
        client = genai.Client(vertexai=True, project=project, location=location, http_options=options)
    except Exception as error:  # google.auth's errors have no common standard base and are importable only with it
        raise ConfigError(f"{spec}: cannot log in to Vertex: {error}") from error
    return GeminiService(client, model, timeout)

"""The way to a service: connections, retries with back-off and jitter, and statuses turned into typed errors."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from replan.chat import retry_after
from replan.errors import ConfigError, ImageError, PlanError, ReplanError, ServiceError

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

    from replan.serve.wire import Message

log = logging.getLogger(__name__)
R = TypeVar("R", bound="Message")

PASSING = frozenset({408, 425, 429, 499, 500, 502, 503, 504})  # statuses that another try may cure


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How patient a client is.

    timeout       seconds that one try may take
    retries       further tries after the first
    backoff       seconds before the first retry; doubled each time, plus up to as much at random. Where the service
                  says how long to wait, that and up to as much again
    longest_wait  seconds; no wait is longer before jitter, whatever the service asks for
    patience      seconds for a call in all; retries end at whichever comes first
    connections   requests under way at once; more wait here
    """

    timeout: float = 120.0
    retries: int = 8
    backoff: float = 0.5
    longest_wait: float = 30.0
    patience: float = 600.0
    connections: int = 64

    def __post_init__(self) -> None:
        for name in ("timeout", "longest_wait", "patience"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"client.{name} = {getattr(self, name)}: must exceed 0")
        if self.retries < 0 or self.backoff < 0 or self.connections < 1:
            raise ConfigError("client: retries and backoff must not be negative, connections must be 1 or more")


class _Passing(ServiceError):
    """A failure that another try may cure; `after` is how many seconds the service asked to wait."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


class Line:
    """One service's address with its connections; asks again while a failure may pass. Safe for many threads."""

    def __init__(self, url: str, config: ClientConfig, outage: type[ServiceError]) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"service {url!r}: must be an address such as http://127.0.0.1:8001")
        self.url, self.config, self.outage = url.rstrip("/"), config, outage
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._async: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None

    def ask(self, path: str, call: Message, kind: type[R]) -> R:
        """The reply to a call. Raises the line's outage, or ReplanError's children for a call that is refused."""
        from tenacity import Retrying, sleep_using_event

        body = call.model_dump_json(exclude_defaults=True).encode()
        try:
            return Retrying(**self._policy(), sleep=sleep_using_event(self.stopped))(self._once, path, body, kind)
        except _Passing as error:
            raise self.outage(str(error)) from error

    async def aask(self, path: str, call: Message, kind: type[R]) -> R:
        """The same in asyncio."""
        from tenacity import AsyncRetrying

        body = call.model_dump_json(exclude_defaults=True).encode()
        try:
            return await AsyncRetrying(**self._policy())(self._aonce, path, body, kind)
        except _Passing as error:
            raise self.outage(str(error)) from error

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object by GET, with one try. Raises the line's outage."""
        import httpx

        try:
            response = self._sync().get(self.url + path)
            found = response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            raise self.outage(f"{self.url}{path}: {error or type(error).__name__}") from error
        if not isinstance(found, dict):
            raise self.outage(f"{self.url}{path}: status {response.status_code}: {_message(response)}")
        return found

    def use(self, client: httpx.AsyncClient) -> None:
        """Take another client for asyncio in the running loop, made with `settings`; for those who watch the tries."""
        self._async = (asyncio.get_running_loop(), client)

    def close(self) -> None:
        """Wait for nothing any more and let go of the connections."""
        self.stopped.set()
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    async def aclose(self) -> None:
        """The same for the connections of asyncio."""
        self.close()
        if self._async is not None and self._async[0] is asyncio.get_running_loop():
            await self._async[1].aclose()
            self._async = None

    def _policy(self) -> dict[str, Any]:
        from tenacity import retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_exponential_jitter

        config = self.config
        growing = wait_exponential_jitter(initial=config.backoff, max=config.longest_wait, jitter=config.backoff)

        def pause(state: RetryCallState) -> float:
            """What the service asked for and up to as much again, so that those it turned away do not return together;
            where it asked for nothing, longer with every try."""
            error = state.outcome.exception() if state.outcome else None
            if not isinstance(error, _Passing) or error.after is None:
                return growing(state)
            asked = min(max(error.after, 0.0), config.longest_wait)
            return asked + random.uniform(0.0, max(asked, config.backoff))

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            wait = state.next_action.sleep if state.next_action else 0.0
            log.info("%s; try %d failed, next in %.1f s", error, state.attempt_number, wait)

        is_spent = stop_after_attempt(config.retries + 1) | stop_after_delay(config.patience)
        return {
            "stop": lambda state: self.stopped.is_set() or is_spent(state),
            "wait": pause,
            "retry": retry_if_exception_type(_Passing),
            "before_sleep": tell,
            "reraise": True,
        }

    def _once(self, path: str, body: bytes, kind: type[R]) -> R:
        import httpx

        if self.stopped.is_set():
            raise self.outage(f"{self.url}: the client is closed")
        try:
            response = self._sync().post(self.url + path, content=body, headers=_JSON)
        except httpx.HTTPError as error:
            raise _Passing(f"{self.url}: {_why(error, self.config.timeout)}") from error
        return self._read(response, kind)

    async def _aonce(self, path: str, body: bytes, kind: type[R]) -> R:
        import httpx

        if self.stopped.is_set():
            raise self.outage(f"{self.url}: the client is closed")
        loop = asyncio.get_running_loop()
        if self._async is None or self._async[0] is not loop:  # connections belong to the loop that opened them
            self._async = (loop, httpx.AsyncClient(**self.settings()))
        try:
            response = await self._async[1].post(self.url + path, content=body, headers=_JSON)
        except httpx.HTTPError as error:
            raise _Passing(f"{self.url}: {_why(error, self.config.timeout)}") from error
        return self._read(response, kind)

    def _sync(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._client is None:
                self._client = httpx.Client(**self.settings())
            return self._client

    def settings(self) -> dict[str, Any]:
        """What its HTTP clients are made with."""
        import httpx

        config = self.config
        most = config.connections
        return {
            # no limit on the wait for a connection of our own: it is no fault of the service's
            "timeout": httpx.Timeout(config.timeout, connect=min(10.0, config.timeout), pool=None),
            # an idle connection goes before the service lets go of it (uvicorn: 5 s), or a call would meet its end
            "limits": httpx.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=3.0),
            "trust_env": False,  # a proxy of the environment is not meant for a service on this machine
        }

    def _read(self, response: httpx.Response, kind: type[R]) -> R:
        """The reply, or the error that its status stands for."""
        status = response.status_code
        if status == 200:
            try:
                return kind.model_validate_json(response.content)
            except ValueError as error:
                raise _Passing(f"{self.url}: sent no valid answer ({type(error).__name__})") from error
        text = f"{self.url}: status {status}: {_message(response)}"
        if status in PASSING:
            raise _Passing(text, retry_after(response.headers))
        raise (_refused(response) or self.outage)(text)


_JSON = {"content-type": "application/json"}


def wait_ready(line: Line, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            line.get("/ready")
            return
        except ServiceError:
            if time.monotonic() >= end or line.stopped.wait(0.2):
                raise


def _message(response: httpx.Response) -> str:
    """The message in an error's body, or the start of a body that is not ours."""
    try:
        error = response.json()["error"]
        return f"{error['field']}: {error['message']}" if error.get("field") else str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:200]


def _refused(response: httpx.Response) -> type[ReplanError] | None:
    """The error type of a refusal: the request is at fault and would be refused again. None: it is not ours."""
    try:
        field = str(response.json()["error"]["field"] or "")
    except (ValueError, KeyError, TypeError):
        return None  # no answer of this service: a wrong address, a proxy in between
    if field.startswith("plan"):
        return PlanError
    return ImageError if field.startswith(("image", "extra_images", "source", "result", "body")) else ConfigError


def _why(error: httpx.HTTPError, timeout: float) -> str:
    import httpx

    if isinstance(error, httpx.ReadTimeout):
        return f"no answer within {timeout:g} s"
    return str(error) or type(error).__name__

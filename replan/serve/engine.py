"""What stands between a request and a model: decode, check, queue, work, answer. One model, one worker thread.

An engine is asked by the web app in the same process, or by a Ray Serve replica; both know only `answer` and `state`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from replan.errors import JudgeError, PlannerError, ReplanError, ServiceError
from replan.serve.desk import Conflict, Desk, Full, Ticket
from replan.serve.limits import Limits, Problem

if TYPE_CHECKING:
    from replan.serve.wire import Message

log = logging.getLogger(__name__)
State = Literal["loading", "ready", "failed"]
C_contra = TypeVar("C_contra", bound="Message", contravariant=True)
A_co = TypeVar("A_co", bound="Message", covariant=True)
W = TypeVar("W")
R = TypeVar("R")


class Engine(Protocol[C_contra, A_co]):
    """Answers calls. `health` is what /live, /ready and /status show."""

    async def answer(self, call: C_contra) -> A_co:
        """Raises Problem."""
        ...

    async def health(self) -> Health: ...

    @property
    def capacity(self) -> int:
        """Requests that may be inside at once, running ones included."""
        ...

    def describe(self) -> dict[str, Any]:
        """What works here, for /v1/about."""
        ...

    def start(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Health:
    """How an engine is: its state and why, requests that wait and run, workers that live, and how many on a GPU."""

    state: State
    why: str = ""
    waiting: int = 0
    running: int = 0
    workers: int = 0
    gpus: int = 0


class Local(Generic[W, R]):
    """What engines in this process share: loading in the background, a desk, and errors turned into Problems.

    `load` makes the model and lets it answer once; then `work` does a batch at a time, in the desk's threads only.
    """

    def __init__(
        self, load: Callable[[], None], work: Callable[[Sequence[Ticket[W, R]]], None], limits: Limits, threads: int = 1
    ) -> None:
        self.limits = limits
        self.desk: Desk[W, R] = Desk(work, limits.queue, limits.batch, threads)
        self._load, self._why = load, ""  # what clients are told, without paths and addresses of the inside
        self._cause = ""
        self._state: State = "loading"
        self._loaded = threading.Event()
        self.again = 5.0  # seconds between tries to load when something behind the model is out
        self.gpus = 0

    def start(self) -> None:
        """Begin to load; returns at once."""
        threading.Thread(target=self._begin, daemon=True, name="replan-load").start()

    def wait(self) -> None:
        """Until it is loaded. Raises ServiceError when that failed."""
        self._loaded.wait()
        if self._state == "failed":
            raise ServiceError(self._cause)

    def close(self) -> None:
        self.desk.close()

    def _begin(self) -> None:
        while True:
            try:
                self._load()
            except (ServiceError, PlannerError, JudgeError) as error:  # something behind us is out: it may come back
                log.warning("not ready, next try in %g s: %s", self.again, error)
                self._why = "what is behind the service does not answer yet; the log says why"
                if self.desk.closing.wait(self.again):
                    return
            except Exception as error:  # whatever the model's libraries raise: the service must say that it failed
                log.exception("loading failed")
                self._cause = f"loading failed: {type(error).__name__}: {error}"
                self._state, self._why = "failed", "loading failed; the log says why"
                self._loaded.set()
                return
            else:
                self.desk.start()
                self._state, self._why = "ready", ""
                self._loaded.set()
                return

    @property
    def capacity(self) -> int:
        return self.limits.queue + self.limits.batch * self.desk.threads

    async def health(self) -> Health:
        desk = self.desk
        state, why = self._state, self._why
        if state == "ready" and desk.alive < desk.threads:
            state, why = "failed", "a worker thread has ended"
        if desk.busy_for > self.limits.stuck:
            state, why = "failed", f"a batch has been under way for {desk.busy_for:.0f} s"
        return Health(state, why, waiting=desk.waiting, running=desk.running, workers=desk.alive, gpus=self.gpus)

    async def ask(self, name: tuple[str, str], work: W, key: object) -> tuple[R, Ticket[W, R]]:
        """The result of a piece of work called (id, digest). Raises Problem."""
        health = await self.health()
        if health.state != "ready":
            after = 5 if health.state == "loading" else None
            raise Problem(503, "loading" if after else "failed", health.why or "the model is loading", after=after)
        try:
            return await self.desk.ask(*name, work, key)
        except Full as error:
            raise Problem(429, "busy", str(error), after=error.after) from error
        except Conflict as error:
            raise Problem(409, "conflict", str(error), "id") from error
        except (PlannerError, ServiceError) as error:
            raise Problem(503, "unavailable", str(error), after=5) from error
        except Problem:
            raise
        except asyncio.CancelledError:
            raise
        except ReplanError as error:
            raise Problem(500, "failed", str(error)) from error
        except Exception as error:  # a bug or a full device: the log has the traceback, the caller a sentence
            memory = type(error).__name__ == "OutOfMemoryError"
            text = "the device is out of memory" if memory else "the service failed; its log says how"
            raise Problem(503 if memory else 500, "failed", text, after=5 if memory else None) from error


@asynccontextmanager
async def in_time(timeout: float | None, limits: Limits) -> AsyncIterator[None]:
    """Whatever is done inside is stopped when the request's time is over. Raises Problem 504."""
    seconds = min(timeout or limits.timeout, limits.timeout)
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise Problem(504, "timeout", f"not done within {seconds:g} s; it was stopped", "timeout") from error


def name_of(call: Message, id: str | None) -> tuple[str, str]:
    """(id, digest of the content): what makes a repeated call the same work."""
    content = call.model_dump(exclude={"id", "timeout"})
    return id or uuid.uuid4().hex, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seconds(timings: Mapping[str, float], waited: float) -> dict[str, float]:
    """Timings for an answer: rounded, with the wait."""
    return {"queue": round(waited, 4), **{stage: round(value, 4) for stage, value in timings.items()}}

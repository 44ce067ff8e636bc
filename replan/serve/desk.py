"""A bounded queue before a model: what does not fit is turned away, what nobody waits for any more is not done.

One thread works (one model must not serve two at once); `threads` > 1 is for models behind a network. Calls of one id
and one content share a ticket, so that a retry joins the work under way or gets the answer once more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Generic, TypeVar

from replan.errors import ConfigError, ReplanError, ServiceError

W = TypeVar("W")
R = TypeVar("R")
log = logging.getLogger(__name__)

KEPT = 8  # finished answers that a repeated id gets once more; each holds pictures


class Full(ReplanError, RuntimeError):
    """Every place in the queue is taken; `after` are seconds until one should be free."""

    def __init__(self, waiting: int, after: int) -> None:
        super().__init__(f"{waiting} requests are waiting and no more fit; try again in {after} s")
        self.after = after


class Conflict(ReplanError, ValueError):
    """An id came with another content than before."""


class Ticket(Generic[W, R]):
    """A piece of work and who waits for it. `started` is set when a worker takes it."""

    def __init__(self, id: str, digest: str, work: W, key: object) -> None:
        self.id, self.digest, self.key = id, digest, key
        self.work: W | None = work
        self.future: Future[R] = Future()
        self.waiters = 0
        self.queued = time.monotonic()
        self.started: float | None = None

    def finish(self, result: R) -> None:
        """Answer those who wait; without effect when it is settled already."""
        with suppress(InvalidStateError):
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Tell those who wait what went wrong; without effect when it is settled already."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more."""
        return self.waiters <= 0

    @property
    def is_good(self) -> bool:
        """Its answer is there, or will be: a call of the same id may share it."""
        return self.future.exception() is None if self.future.done() else not self.abandoned

    @property
    def waited(self) -> float:
        """Seconds in the queue."""
        return (self.started or time.monotonic()) - self.queued


Act = Callable[[Sequence[Ticket[W, R]]], None]


class Desk(Generic[W, R]):
    """`act` gets the tickets of one batch, equal in key, and finishes or fails each of them that is not abandoned."""

    def __init__(self, act: Act[W, R], size: int, batch: int = 1, threads: int = 1) -> None:
        for name, value in (("queue", size), ("batch", batch), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")
        self.act, self.size, self.batch, self.threads = act, size, batch, threads
        self._waiting: deque[Ticket[W, R]] = deque()
        self._known: OrderedDict[str, Ticket[W, R]] = OrderedDict()
        self._condition = threading.Condition()
        self._running: dict[int, float] = {}  # thread -> since when it has been at work
        self._pace = 1.0  # seconds per ticket, a running mean
        self._open = True
        self.closing = threading.Event()
        self._workers = [threading.Thread(target=self._work, daemon=True, name="replan-desk") for _ in range(threads)]

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """Take nothing new; whoever waits is told so, and what runs is abandoned."""
        self.closing.set()
        with self._condition:
            self._open = False
            for ticket in (*self._waiting, *self._known.values()):
                ticket.fail(ServiceError("the service is stopping"))
                ticket.waiters = 0
            self._waiting.clear()
            self._condition.notify_all()

    @property
    def waiting(self) -> int:
        with self._condition:
            return sum(not ticket.abandoned for ticket in self._waiting)

    @property
    def running(self) -> int:
        """Workers at work."""
        return len(self._running)

    @property
    def alive(self) -> int:
        """Workers that live."""
        return sum(worker.is_alive() for worker in self._workers)

    @property
    def busy_for(self) -> float:
        """Seconds that the longest batch under way has taken so far."""
        now = time.monotonic()
        return max((now - since for since in list(self._running.values())), default=0.0)

    def check(self) -> None:
        """Raise Full when nothing more fits: a hint before a request's body is even read."""
        with self._condition:
            self._check()

    def _check(self) -> None:
        waiting = sum(not ticket.abandoned for ticket in self._waiting)
        idle = self.threads - len(self._running)  # each is about to take one, which then needs no place
        if waiting >= self.size + idle:
            raise Full(waiting, max(1, math.ceil(self._pace * waiting / self.threads)))

    async def ask(self, id: str, digest: str, work: W, key: object) -> tuple[R, Ticket[W, R]]:
        """The result of a piece of work. Raises Full, Conflict, ServiceError when stopping, and what the work raised.

        However the wait ends (also by the task being cancelled), the ticket is left, and when it is left by all,
        `abandoned` says so to the worker.
        """
        ticket = self._take(id, digest, work, key)
        future = asyncio.wrap_future(ticket.future)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # also when nobody waits any more
        try:
            return await asyncio.shield(future), ticket  # others may wait for it too
        finally:
            self._leave(ticket)

    def _take(self, id: str, digest: str, work: W, key: object) -> Ticket[W, R]:
        with self._condition:
            if not self._open:
                raise ServiceError("the service is stopping")
            known = self._known.get(id)
            if known is not None and known.digest != digest:
                raise Conflict(f"id {id!r} was used for another request; give every request its own")
            if known is not None and known.is_good:
                known.waiters += 1
                return known
            self._check()
            ticket: Ticket[W, R] = Ticket(id, digest, work, key)
            ticket.waiters = 1
            self._known[id] = ticket
            self._waiting.append(ticket)
            self._condition.notify()
            return ticket

    def _leave(self, ticket: Ticket[W, R]) -> None:
        with self._condition:
            ticket.waiters -= 1
            if ticket.abandoned and not ticket.future.done() and self._known.get(ticket.id) is ticket:
                del self._known[ticket.id]

    def _work(self) -> None:
        me = threading.get_ident()
        while True:
            batch = self._next()
            if not batch:
                return
            start = self._running[me]
            try:
                self.act(batch)
            except BaseException as error:  # the worker must outlive one bad request; the waiting callers are told
                log.exception("a batch of %d failed", len(batch))
                for ticket in batch:
                    ticket.fail(error)
            finally:
                del self._running[me]
            self._pace += 0.2 * ((time.monotonic() - start) / len(batch) - self._pace)
            self._settle(batch)

    def _next(self) -> list[Ticket[W, R]]:
        """The oldest ticket and those like it, at most `batch`; empty when the desk is closed."""
        with self._condition:
            while self._open:
                while self._waiting and self._waiting[0].abandoned:
                    self._waiting.popleft()
                if self._waiting:
                    break
                self._condition.wait()
            if not self._open:
                return []
            first = self._waiting[0]
            batch = [ticket for ticket in self._waiting if ticket.key == first.key and not ticket.abandoned]
            batch = batch[: self.batch]
            now = self._running[threading.get_ident()] = time.monotonic()
            for ticket in batch:
                self._waiting.remove(ticket)
                ticket.started = now
            return batch

    def _settle(self, batch: Sequence[Ticket[W, R]]) -> None:
        """Forget what was worked on; keep the newest answers, and no failures, which a retry should try again."""
        with self._condition:
            for ticket in batch:
                ticket.work = None
                ticket.fail(ServiceError("given up, as nobody waited for it"))
                mine = self._known.get(ticket.id) is ticket
                if mine and ticket.future.exception() is not None:
                    del self._known[ticket.id]
            done = [id for id, ticket in self._known.items() if ticket.future.done()]
            for id in done[: max(0, len(done) - KEPT)]:
                del self._known[id]

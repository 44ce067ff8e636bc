"""The door of a service: who comes in. It looks before a body is read, and every refusal is a clear status.

Plain ASGI, because a framework's middleware sees a request only after much of what must be refused has happened.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from replan.serve.limits import Limits, Problem

if TYPE_CHECKING:
    from replan.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 60  # in which a request's body must have arrived, as it holds a place meanwhile


class Door:
    """Around an app. `capacity()` is how many requests with a body may be inside at once; the next gets 429."""

    def __init__(self, app: Asgi, limits: Limits, capacity: Callable[[], int], metrics: Metrics) -> None:
        self.app, self.limits, self.capacity, self.metrics = app, limits, capacity, metrics
        self.routes: frozenset[str] = frozenset()
        self.inside = 0
        self._pace = 1.0  # seconds per request, a running mean

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._enter(scope, receive, noted)
        except Problem as problem:
            await reply(problem, noted)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.done(route, status, time.monotonic() - start)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if headers.get(b"sec-fetch-site", b"none") in (b"cross-site", b"same-site"):
            raise Problem(403, "invalid", "a page of another site may not use this service")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.max_bytes:
            raise self._too_large()
        capacity = self.capacity()
        if self.inside >= capacity:
            after = max(1, math.ceil(self._pace * self.inside))
            raise Problem(
                429, "busy", f"{self.inside} requests are inside and no more fit; try again in {after} s", after=after
            )
        self.inside += 1
        self.metrics.inside.set(self.inside)
        start = time.monotonic()
        try:
            await self.app(scope, await self._read(receive), send)
        finally:
            share = (time.monotonic() - start) / self.inside
            self._pace += 0.1 * (share - self._pace)
            self.inside -= 1
            self.metrics.inside.set(self.inside)

    async def _read(self, receive: Receive) -> Receive:
        """The body, read within the limits, as a new `receive` that gives it once and then what comes after it."""
        messages, size, more = [], 0, True
        try:
            async with asyncio.timeout(min(self.limits.timeout, BODY_SECONDS)):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(499, "timeout", "the client has gone before its request was whole")
                    messages.append(message)
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if size > self.limits.max_bytes:
                        raise self._too_large()
        except TimeoutError as error:
            raise Problem(408, "timeout", "the request's body did not arrive in time", "body") from error
        messages.reverse()

        async def again() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        return again

    def _too_large(self) -> Problem:
        return Problem(413, "too_large", f"the request has more than {self.limits.max_bytes:,} bytes", "body")


def body_of(problem: Problem) -> dict[str, Any]:
    """The JSON of a refusal. `detail` is where clients of other services look."""
    error = {"type": problem.type, "message": problem.message, "field": problem.field, "id": problem.id}
    return {"error": error, "detail": problem.message}


def headers_of(problem: Problem) -> Iterable[tuple[str, str]]:
    """Retry-After, where there is a time to name."""
    return [] if problem.after is None else [("retry-after", str(problem.after))]


async def reply(problem: Problem, send: Send) -> None:
    """A refusal as a whole response."""
    body = json.dumps(body_of(problem)).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), *headers_of(problem)]
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})

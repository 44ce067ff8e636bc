"""What both services are: one app with limits, errors, health, metrics and docs, around an engine."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from replan import __version__
from replan.errors import ReplanError
from replan.serve import wire
from replan.serve.door import Door, body_of, headers_of
from replan.serve.engine import Engine
from replan.serve.limits import Limits, Problem
from replan.serve.metrics import Metrics

log = logging.getLogger(__name__)
T = TypeVar("T")
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": wire.ErrorReply, "description": "Not JSON, or no form that can be read."},
    403: {"model": wire.ErrorReply, "description": "A page of another site asked."},
    408: {"model": wire.ErrorReply, "description": "The request's body did not arrive in time."},
    409: {"model": wire.ErrorReply, "description": "The id was used for another request."},
    413: {"model": wire.ErrorReply, "description": "Too many bytes or pixels; the field is named."},
    422: {"model": wire.ErrorReply, "description": "Not a valid request; the field is named."},
    429: {"model": wire.ErrorReply, "description": "The queue is full; Retry-After says when to come back."},
    499: {"model": wire.ErrorReply, "description": "The client hung up; for logs and metrics only."},
    500: {"model": wire.ErrorReply, "description": "The work failed. Never a score, never a picture."},
    503: {"model": wire.ErrorReply, "description": "Loading, stopping, or something behind it is out."},
    504: {"model": wire.ErrorReply, "description": "Not done in time; the work was stopped."},
}

_NOT_WELL: dict[int | str, dict[str, Any]] = {503: {"description": "The same body, when it is not so."}}


class Service:
    """An app and what belongs to it. `app` has the routes, `asgi` is what a server runs: the app behind its door."""

    def __init__(self, engine: Engine[Any, Any], limits: Limits, name: Literal["editor", "judge"], title: str) -> None:
        self.engine, self.limits = engine, limits
        self.name: Literal["editor", "judge"] = name
        self.metrics = Metrics()
        self.app = FastAPI(
            title=title, version=f"{__version__}, schema {wire.VERSION}", lifespan=self._lifespan, responses=REFUSALS
        )
        self.asgi = Door(self.app, limits, lambda: engine.capacity, self.metrics)
        self.app.add_exception_handler(Problem, _problem)
        self.app.add_exception_handler(RequestValidationError, _validation)
        self.app.add_exception_handler(HTTPException, _http)
        self.app.add_exception_handler(Exception, _bug)
        self._add_routes()

    def finished(self) -> Door:
        """What a server runs; called when all routes are there."""
        self.asgi.routes = frozenset(getattr(route, "path", "") for route in self.app.routes)
        return self.asgi

    async def watched(self, request: Request, work: Coroutine[Any, Any, T], id: str | None) -> T:
        """The result of some work, which is stopped when the client hangs up. A Problem gets the call's id."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Problem(499, "timeout", "the client has gone; the work was stopped")
        except Problem as problem:
            problem.id = id
            raise
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            self.engine.close()

    def _add_routes(self) -> None:
        app, engine = self.app, self.engine

        @app.get("/live", tags=["health"], summary="Whether the process should go on running", responses=_NOT_WELL)
        async def live() -> Response:
            """503 means: restart it. A model that is still loading is alive."""
            health = await engine.health()
            body = {"live": health.state != "failed", "why": health.why}
            return JSONResponse(body, 200 if body["live"] else 503)

        @app.get("/ready", tags=["health"], summary="Whether requests are welcome")
        async def ready() -> Response:
            """200 only when a model is loaded and has answered once."""
            health = await engine.health()
            if health.state == "ready":
                return JSONResponse({"ready": True})
            raise Problem(503, "loading" if health.state == "loading" else "failed", health.why or "loading", after=2)

        @app.get("/health", tags=["health"], summary="State, as other editing services tell it", responses=_NOT_WELL)
        async def health() -> Response:
            """503 unless ready."""
            now = await engine.health()
            is_ready = now.state == "ready"
            body = {"status": now.state, "gpu_manager_ready": is_ready, "timestamp": time.time()}
            return JSONResponse(body, 200 if is_ready else 503)

        @app.get("/status", tags=["health"], summary="Queue and workers, in the shape of other editing services")
        async def status() -> dict[str, int | bool]:
            now = await engine.health()
            return {
                "active_workers": now.workers,
                "task_queue_size": now.waiting,
                "result_queue_size": 0,
                "pending_tasks": now.waiting + now.running,
                "total_gpus": now.gpus,
                "system_ready": now.state == "ready",
            }

        @app.get("/metrics", tags=["health"], summary="For Prometheus")
        async def metrics() -> Response:
            page = self.metrics.page(await engine.health())
            return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

        @app.get("/v1/about", tags=["about"], summary="What answers here, and its limits")
        async def about() -> wire.About:
            limits = {name: getattr(self.limits, name) for name in type(self.limits).__slots__}
            return wire.About(replan=__version__, service=self.name, model=engine.describe(), limits=limits)


async def _hung_up(request: Request) -> None:
    """Return when the client closes the connection; its body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _answer(problem: Problem) -> JSONResponse:
    return JSONResponse(body_of(problem), problem.status, dict(headers_of(problem)))


async def _problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return _answer(error)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    """The first mistakes by field; never the input itself, which may be a picture."""
    assert isinstance(error, RequestValidationError)
    found = [(_field(each), str(each["msg"])) for each in error.errors()]
    field = found[0][0] if found else "body"
    problem = Problem(422, "invalid", "; ".join(f"{name}: {text}" for name, text in found[:8]), field)
    id = error.body.get("id") if isinstance(error.body, dict) else None
    problem.id = id if isinstance(id, str) and re.fullmatch(wire.ID, id) else None
    return _answer(problem)


def _field(mistake: Mapping[str, Any]) -> str:
    """The field of a mistake; what is no JSON has none, only a place in the body."""
    inner = () if mistake["type"] == "json_invalid" else mistake["loc"][1:]
    return ".".join(map(str, inner)) or "body"


async def _http(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths, wrong methods, bodies that cannot be parsed."""
    assert isinstance(error, HTTPException)
    kind = "unknown" if error.status_code in (404, 405) else "invalid"
    return _answer(Problem(error.status_code, kind, str(error.detail), "body" if kind == "invalid" else None))


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """The traceback goes to the log."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    text = str(error) if isinstance(error, ReplanError) else "the service failed; its log says how"
    return _answer(Problem(500, "failed", text))

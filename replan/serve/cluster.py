"""Many editors: replicas on Ray Serve, which does balancing, health checks, restarts and back-pressure.

    HTTP -> front (our app, no model) -> Ray's queue -> one of N replicas, one GPU each

The front is the very app of a single editor around another engine. A replica that dies takes nothing with it: the
front sends its requests to another one. With RAY_ADDRESS set, the replicas spread over that cluster.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from replan.errors import ConfigError, ServiceError
from replan.serve import wire
from replan.serve.editing import EditEngine, describe
from replan.serve.engine import Health, in_time
from replan.serve.limits import Limits, Problem

if TYPE_CHECKING:
    from replan.record import Setup
    from replan.serve.door import Door

log = logging.getLogger(__name__)
APP, EDITOR, FRONT = "replan", "editor", "front"
TRIES = 5  # replicas that one request may outlive, itself included


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many replicas, and where they are heard. `gpus` and `cpus` are what Ray sets aside for each replica."""

    replicas: int = 2
    host: str = "127.0.0.1"
    port: int = 8001
    gpus: float = 1.0
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas = {self.replicas}: must be 1 or more")


class Replica:
    """One editor in a process of its own. Ray counts it in when its model has answered once."""

    def __init__(self, setup: Setup, limits: Limits) -> None:
        self._engine = EditEngine(setup, limits)
        self._engine.start()
        self._engine.local.wait()

    async def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """A reply or a problem, as data: exceptions of ours would arrive in the wrappings of Ray's."""
        try:
            reply = await self._engine.answer(wire.EditCall.model_validate(call))
        except Problem as problem:
            return {"problem": problem.plain()}
        return {"reply": reply.model_dump()}

    async def check_health(self) -> None:
        """Raises when the worker has died or hangs; Ray then starts another replica."""
        health = await self._engine.health()
        if health.state == "failed":
            raise ServiceError(health.why)


class RayEngine:
    """An engine whose work is done by replicas."""

    def __init__(self, about: dict[str, Any], limits: Limits, replicas: int) -> None:
        from ray import serve

        self._about, self._limits, self._replicas = about, limits, replicas
        self._handle: Any = serve.get_deployment_handle(EDITOR, app_name=APP)
        self._outstanding = 0
        self._health, self._asked = Health("loading"), 0.0

    @property
    def capacity(self) -> int:
        return self._limits.queue + self._replicas * ongoing(self._limits)

    def start(self) -> None:
        """Ray starts the replicas."""

    def close(self) -> None:
        """Ray stops them."""

    def describe(self) -> dict[str, Any]:
        return self._about

    async def health(self) -> Health:
        """What Ray says of the replicas, asked at most once a second."""
        now = time.monotonic()
        if now - self._asked >= 1.0:
            self._asked = now
            workers = await asyncio.to_thread(_running)
            state = "ready" if workers else "loading"
            self._health = Health(state, "" if workers else "no replica is ready", workers=workers)
        running = min(self._outstanding, self._health.workers)
        gpus = self._health.workers if self._about.get("gpu") else 0
        waiting = self._outstanding - running
        return Health(self._health.state, self._health.why, waiting, running, self._health.workers, gpus)

    async def answer(self, call: wire.EditCall) -> wire.EditReply:
        """Raises Problem."""
        self._outstanding += 1
        try:
            async with in_time(call.timeout, self._limits):
                found = await self._retried(call.model_dump())
                if "problem" in found:
                    raise Problem(**found["problem"])
                return wire.EditReply.model_validate(found["reply"])
        finally:
            self._outstanding -= 1

    async def _retried(self, call: dict[str, Any]) -> dict[str, Any]:
        """The answer of a replica; when one dies over it, that of another. Raises Problem."""
        from ray.exceptions import RayActorError, TaskCancelledError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        last = ""
        for attempt in range(1, TRIES + 1):
            response = self._handle.answer.remote(call)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()  # the replica stops after the step under way
                raise
            except BackPressureError as error:
                raise Problem(429, "busy", "all replicas are busy and the queue is full", after=2) from error
            except (RayActorError, ReplicaUnavailableError, TaskCancelledError) as error:
                log.warning("a replica was lost over a request (%s); try %d", type(error).__name__, attempt)
                last = type(error).__name__
            except DeploymentUnavailableError as error:
                raise Problem(503, "unavailable", "the replicas cannot be started", after=5) from error
            await asyncio.sleep(random.uniform(0.1, 0.2) * 2**attempt)
        raise Problem(503, "unavailable", f"{TRIES} replicas were lost over this request ({last})", after=5)


def ongoing(limits: Limits) -> int:
    """Requests that a replica holds: a batch, and one to go on with while an answer is written."""
    return limits.batch + 1


def application(setup: Setup, limits: Limits, cluster: Cluster) -> Any:
    """The Ray Serve application: front and editors."""
    from ray import serve

    # built here and carried over: the front's process needs no model and no git
    about, replicas = describe(setup) | {"gpu": cluster.gpus > 0}, cluster.replicas

    def build() -> Door:
        from replan.serve.editor import editor_service

        return editor_service(RayEngine(about, limits, replicas), limits)

    deployed: Any = serve.deployment
    editor = deployed(Replica).options(
        name=EDITOR,
        num_replicas=replicas,
        max_ongoing_requests=ongoing(limits),
        max_queued_requests=limits.queue,
        ray_actor_options={"num_gpus": cluster.gpus, "num_cpus": cluster.cpus},
        max_constructor_retry_count=3,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
    )
    ingress: Any = serve.ingress(build)
    front = deployed(ingress()).options(
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=10_000,  # the door refuses what is too much, with its own words
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
    )
    return front.bind(editor.bind(setup, limits))


@contextmanager
def running(setup: Setup, limits: Limits, cluster: Cluster) -> Iterator[str]:
    """Replicas and front while the context lasts; the address, once every part has answered. Raises ServiceError."""
    import os

    try:
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions
    except ImportError as error:
        raise ConfigError("--replicas needs Ray Serve: install replan[serve]") from error

    if not ray.is_initialized():
        own = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False, "num_cpus": max(4, cluster.replicas)}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises bare exceptions, of a start that takes too long as of a wrong address
            where = f" at RAY_ADDRESS = {os.environ['RAY_ADDRESS']}" if "RAY_ADDRESS" in os.environ else ""
            raise ServiceError(f"Ray did not start{where}: {error}") from error
    try:
        serve.start(
            proxy_location="HeadOnly", http_options=HTTPOptions(host=cluster.host, port=cluster.port),
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )  # fmt: skip
        try:
            serve.run(application(setup, limits, cluster), name=APP, route_prefix="/")
        except RuntimeError as error:  # Ray's word for replicas that do not come up
            raise ServiceError(f"the replicas did not start: {_why() or error}") from error
        yield f"http://{cluster.host}:{cluster.port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _running() -> int:
    """How many replicas Ray routes to."""
    deployment = _deployment()
    states = {} if deployment is None else deployment.replica_states
    return sum(count for state, count in states.items() if str(state).rpartition(".")[2] == "RUNNING")


def _why() -> str:
    """The last line of what Ray tells of the replicas: the error that stopped them."""
    deployment = _deployment()
    lines = [] if deployment is None else [line for line in deployment.message.splitlines() if line.strip()]
    return next((line.strip() for line in reversed(lines) if "Error" in line), "")


def _deployment() -> Any:
    from ray import serve

    application = serve.status().applications.get(APP)
    return None if application is None else application.deployments.get(EDITOR)

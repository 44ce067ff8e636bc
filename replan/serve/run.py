"""Services on a port: for the command line until they are stopped, for tests while a context lasts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from replan.errors import ConfigError, ServiceError
from replan.serve.door import Door
from replan.serve.limits import Limits

if TYPE_CHECKING:
    from replan.judge import Judge
    from replan.record import Setup

LOOPBACK = "127.0.0.1"
GRACE = 10  # seconds for requests under way when the service stops


def editor_app(setup: Setup, limits: Limits | None = None) -> Door:
    """An editor service in this process."""
    from replan.serve.editing import EditEngine
    from replan.serve.editor import editor_service

    limits = limits or Limits()
    return editor_service(EditEngine(setup, limits), limits)


def judge_app(judge: Judge, limits: Limits | None = None, threads: int = 8) -> Door:
    """A judge service in this process; `threads` questions are asked at once."""
    from replan.serve.judge import JudgeEngine, judge_service

    limits = limits or Limits()
    return judge_service(JudgeEngine(judge, limits, threads), limits)


def serve_on(app: Door, listener: socket.socket) -> None:
    """Until a signal stops it."""
    server(app).run([listener])


@contextmanager
def running(app: Door, host: str = LOOPBACK, port: int = 0, grace: int = GRACE) -> Iterator[str]:
    """The service in a thread of this process; its address, once it accepts connections.

    `grace` is how many seconds requests under way have when the context ends.
    """
    listener = listen(host, port)
    made = server(app, grace)
    thread = threading.Thread(target=made.run, args=([listener],), daemon=True, name="replan-serve")
    thread.start()
    try:
        while not made.started:
            if not thread.is_alive():
                raise ServiceError("the service did not start; its log says why")
            time.sleep(0.01)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        made.should_exit = True
        thread.join(grace + 10)
        listener.close()


def server(app: Door, grace: int = GRACE) -> uvicorn.Server:
    """A server that says no more of itself than it must."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace,
            lifespan="on",
        )
    )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host}:{port}: cannot listen there: {error.strerror or error}; choose --port") from error
    listener.listen(512)
    return listener


def free_port(host: str) -> int:
    """A port that is free now."""
    with listen(host, 0) as probe:
        return int(probe.getsockname()[1])

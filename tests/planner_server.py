"""A scripted HTTP server on this machine, for planners that ask one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server does with one request."""

    body: object = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Server:
    """A scripted server: answers in order, the last one for ever; keeps what it was asked."""

    url: str = ""
    script: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    choose: Callable[[dict[str, Any]], Answer] | None = None

    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body, _ in self.asked]


@contextmanager
def serve() -> Iterator[Server]:
    """A running server; its script is set by the test."""
    state, lock, busy = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
            with lock:
                busy[0] += 1
                state.most_at_once = max(state.most_at_once, busy[0])
                state.asked.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
                state.times.append(time.monotonic())
                answer = state.script.pop(0) if len(state.script) > 1 else next(iter(state.script), Answer(status=404))
            answer = state.choose(body) if state.choose else answer
            time.sleep(answer.delay)
            with lock:
                busy[0] -= 1
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hung up."""

    http = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()

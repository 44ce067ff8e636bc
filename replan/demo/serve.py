"""Starts the app: on loopback unless asked otherwise, with a private folder for uploads that goes when it stops."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from replan.demo.studio import Studio

LOOPBACK = "127.0.0.1"
CLOSED = ("/gradio_api/file", "/gradio_api/proxy", "/gradio_api/stream")  # Gradio's routes that give files


class NoFiles:
    """Answers 404 where Gradio gives out files: this page shows none, so an upload is nobody's but the handler's."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """An ASGI application around the app."""
        if scope["type"] == "http" and scope["path"].startswith(CLOSED):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("Not Found", 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen; port 0 takes a free one."""

    host: str = LOOPBACK
    port: int = 8080
    share: bool = False


@contextmanager
def running(studio: Studio, place: Place) -> Iterator[str]:
    """The app while the context lasts; its address."""
    with tempfile.TemporaryDirectory(prefix="replan-demo-") as folder:  # mode 0700
        os.environ["GRADIO_TEMP_DIR"] = folder  # read by Gradio when components are made; the shared default is not
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from starlette.middleware import Middleware

        from replan.demo.app import build, style
        from replan.demo.theme import theme
        from replan.demo.uploads import MOST_BYTES

        demo = build(studio)
        demo.queue(default_concurrency_limit=4, max_size=64, status_update_rate=1)
        _, local, shared = demo.launch(
            server_name=place.host, server_port=_port(place), share=place.share, prevent_thread_lock=True, quiet=True,
            show_error=False, max_file_size=MOST_BYTES, footer_links=[], allowed_paths=[], enable_monitoring=False,
            ssr_mode=False, pwa=False, mcp_server=False, strict_cors=True, state_session_capacity=200,
            app_kwargs={"middleware": [Middleware(NoFiles)]}, theme=theme(), css=style(),
        )  # fmt: skip
        try:
            yield shared or local
        finally:
            demo.close(verbose=False)


def _port(place: Place) -> int:
    """The port asked for, or a free one."""
    import socket

    if place.port:
        return place.port
    with socket.socket() as probe:
        probe.bind((place.host, 0))
        return probe.getsockname()[1]

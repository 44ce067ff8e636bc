"""Starts the app: on loopback unless asked otherwise, with a private folder for uploads that goes when it stops."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from replan.errors import ConfigError

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
    """The app while the context lasts; its address. Raises ConfigError when it cannot be opened there."""
    place = replace(place, port=_port(place))
    with tempfile.TemporaryDirectory(prefix="replan-demo-") as folder:  # mode 0700
        os.environ["GRADIO_TEMP_DIR"] = folder  # read by Gradio when components are made; the shared default is not
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = _unproxied()
        from starlette.middleware import Middleware

        from replan.demo.app import build, style
        from replan.demo.theme import theme
        from replan.demo.uploads import MOST_BYTES

        demo = build(studio)
        demo.queue(default_concurrency_limit=4, max_size=64, status_update_rate=1)
        launch = partial(
            demo.launch,
            server_name=place.host, server_port=place.port, share=place.share, prevent_thread_lock=True, quiet=True,
            show_error=False, max_file_size=MOST_BYTES, footer_links=[], allowed_paths=[], enable_monitoring=False,
            ssr_mode=False, pwa=False, mcp_server=False, strict_cors=True, state_session_capacity=200,
            app_kwargs={"middleware": [Middleware(NoFiles)]}, theme=theme(), css=style(),
        )  # fmt: skip
        try:
            try:
                _, local, shared = launch()
            except ValueError as error:  # Gradio asks itself for its page, and gives up after three seconds
                raise ConfigError(
                    f"the app does not answer at {place.host}:{place.port}: start it again when this machine is less "
                    f"busy, or see to its proxy settings ({error})"
                ) from error
            yield shared or local
        finally:
            demo.close(verbose=False)


def _port(place: Place) -> int:
    """The port asked for, or a free one. Raises ConfigError when the place cannot be had."""
    import socket

    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((place.host, place.port))
            return probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"port {place.port} of {place.host} cannot be had ({error.strerror}): "
            "choose another with --port, or 0 for a free one"
        ) from error


def _unproxied() -> str:
    """NO_PROXY with this machine in it: Gradio asks itself for its page before it opens."""
    before = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    return ",".join(filter(None, (before, LOOPBACK, "localhost")))

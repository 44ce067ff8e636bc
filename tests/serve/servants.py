"""Editor services around fakes: real HTTP, no weights, every step under the test's control."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fakes import FakeBackbone, FakePlanner, picture
from torch import Tensor

from replan import Editor
from replan.backbones.base import Conditioning
from replan.cli.options import Flags
from replan.record import Setup
from replan.serve import wire
from replan.serve.editing import EditEngine
from replan.serve.editor import editor_service
from replan.serve.limits import Limits
from replan.serve.run import running
from replan.types import EditRequest


def setup(*settings: str, **flags: Any) -> Setup:
    """The mini editor's setup, with few steps."""
    return Flags(settings=["steps=3", *settings], **flags).setup()


class Servant(FakeBackbone):
    """A fake editor whose every step waits for `gate`, and which counts its steps."""

    def __init__(self, before: Callable[[EditRequest], Any] | None = None) -> None:
        super().__init__(before)
        self.gate, self.stepping = threading.Event(), threading.Event()
        self.gate.set()
        self.steps = 0

    def velocity(self, cond: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        plain = super().velocity(cond)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.steps += 1
            self.stepping.set()
            assert self.gate.wait(20)
            return plain(x, sigma)

        return velocity

    def close(self) -> None:
        """Let go whatever still waits."""
        self.gate.set()


@contextmanager
def service(
    servant: Servant, limits: Limits | None = None, made: Setup | None = None, planner: FakePlanner | None = None
) -> Iterator[str]:
    """A ready service; its address."""
    made = made or setup()
    limits = limits or Limits(queue=2, max_pixels=10_000, max_bytes=400_000, max_steps=10)
    engine = EditEngine(made, limits, lambda: Editor(planner or FakePlanner(), servant, made.config))
    with running(editor_service(engine, limits)) as url:
        try:
            until(lambda: httpx.get(url + "/ready").status_code == 200)
            servant.steps = 0
            servant.requests.clear()
            servant.stepping.clear()
            yield url
        finally:
            servant.close()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a state."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def body(**changes: Any) -> dict[str, Any]:
    """A good call of /v1/edits, changed; None takes a field away."""
    call = {"image": wire.encode(picture()), "instruction": "make it red", "seed": 3} | changes
    return {name: value for name, value in call.items() if value is not None}


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A call under way, and where its result will be."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results

"""A job in its own thread: what it reports arrives as a stream, and cancelling reaches it after the step under way."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from replan.errors import PlanError
from replan.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from replan.demo.session import Job
    from replan.demo.studio import Studio
    from replan.edit import Editor, OnStep
    from replan.types import Edit, EditRequest, Plan

T = TypeVar("T")
OFTEN = 0.1  # seconds between two reports: a page that is told faster than it can draw falls behind
SPARE = 4  # decoding previews may take this share of the time: one part in four


@dataclass(frozen=True, slots=True)
class Text:
    """The planner's answer so far."""

    answer: str


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step is over; `left` are seconds to go, the preview is there when it is time for a new one."""

    number: int
    total: int
    left: float
    preview: Image | None


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The end of a job."""

    result: T


Event = Text | Step
Say = Callable[[Event], None]


def run(act: Callable[[Say], T], job: Job) -> Iterator[Event | Done[T]]:
    """Yield what `act` says while it runs in a thread of its own, then Done; its errors are raised here.

    When the caller stops listening (the page is gone), the job is cancelled and waited for.
    """
    channel: queue.SimpleQueue[Event | Done[T] | BaseException] = queue.SimpleQueue()

    def target() -> None:
        try:
            channel.put(Done(act(channel.put)))
        except BaseException as error:  # carried over to the listening thread, which raises it
            channel.put(error)

    thread = threading.Thread(target=target, name="replan-demo-job", daemon=True)
    thread.start()
    over = False
    try:
        while not over:
            event = channel.get()
            if isinstance(event, BaseException):
                raise event
            over = isinstance(event, Done)
            yield event
    finally:
        if not over:
            job.cancelled = True
        thread.join()


def make_plan(studio: Studio, planner: str, request: EditRequest, job: Job) -> Callable[[Say], Plan]:
    """Planning as an act for `run`. Raises PlanError, PlannerError, Cancelled."""

    def act(say: Say) -> Plan:
        from replan.denoise import Cancelled

        with studio.busy():
            if job.cancelled:
                raise Cancelled("stopped before planning")
            model = studio.planner(planner)

            def on_text(answer: str) -> bool:
                say(Text(answer))
                return not job.cancelled

            stream = getattr(model, "stream", None)
            try:
                plan: Plan = model(request) if stream is None else stream(request, on_text)
            except PlanError as error:  # an answer that was stopped half-way is no bad answer
                if job.cancelled:
                    raise Cancelled("stopped while planning") from error
                raise
            if job.cancelled:
                raise Cancelled("stopped while planning")
            return plan.to(Size(*request.image.size))

    return act


def make_edits(
    studio: Studio, open_editor: Callable[[], Editor], request: EditRequest, count: int, baseline: bool, job: Job
) -> Callable[[Say], tuple[Edit, ...]]:
    """Editing as an act for `run`. Raises BackboneError, ConfigError, Cancelled."""

    def act(say: Say) -> tuple[Edit, ...]:
        from replan.denoise import Cancelled

        with studio.busy():
            if job.cancelled:
                raise Cancelled("stopped before the first step")
            editor = open_editor()
            on_step = _reporter(say, job)
            if not baseline:
                return tuple(editor.candidates(request, count, on_step, strict=True))
            requests: Sequence[EditRequest] = [replace(request, seed=request.seed + n) for n in range(count)]
            return tuple(editor.baseline(one, on_step) for one in requests)

    return act


def _reporter(say: Say, job: Job) -> OnStep:
    """An on_step that tells step, time left and, as often as it can be afforded, a preview."""
    start = time.monotonic()
    said, shown, cost = 0.0, 0.0, 0.0

    def on_step(step: int, total: int, preview: Callable[[], Image]) -> bool:
        nonlocal said, shown, cost
        if job.cancelled:
            return False
        now = time.monotonic()
        image = None
        if step < total and now - shown >= max(0.15, SPARE * cost):
            image = preview()
            shown = time.monotonic()
            cost = shown - now
        if image is not None or step in (1, total) or now - said >= OFTEN:
            said = now
            say(Step(step, total, (time.monotonic() - start) / step * (total - step), image))
        return not job.cancelled

    return on_step

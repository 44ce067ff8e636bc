"""The editor behind a desk: calls become requests, requests become edits, edits become replies."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from replan import config as configs
from replan import plan as plans
from replan import record
from replan.errors import ConfigError, ImageError, PlanError, ReplanError
from replan.record import Setup
from replan.serve import wire
from replan.serve.desk import Ticket
from replan.serve.engine import Health, Local, in_time, name_of, seconds
from replan.serve.limits import Limits, Problem, invalid
from replan.types import Edit, EditRequest, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from replan.backbones import EditConfig
    from replan.edit import Editor
    from replan.planner import Outcome, Planner


@dataclass(frozen=True, slots=True)
class Work:
    """A request and how it is to be done."""

    request: EditRequest
    config: EditConfig
    bare: bool
    strict: bool


MOST = 100_000  # characters of a plan, or of settings, as JSON
EditTicket = Ticket[Work, Edit]


class EditEngine:
    """One editor, one thread. `open_editor` is for tests; by default the setup's own editor is loaded."""

    def __init__(self, setup: Setup, limits: Limits, open_editor: Callable[[], Editor] | None = None) -> None:
        self.setup, self.limits = setup, limits
        self._about = describe(setup)  # once: it asks git for the revision
        self._open = open_editor or setup.open
        self.local: Local[Work, Edit] = Local(self._load, self._work, limits)

    @property
    def capacity(self) -> int:
        return self.local.capacity

    def start(self) -> None:
        self.local.start()

    def close(self) -> None:
        self.local.close()

    async def health(self) -> Health:
        return await self.local.health()

    def describe(self) -> dict[str, Any]:
        return self._about

    async def answer(self, call: wire.EditCall) -> wire.EditReply:
        """Raises Problem."""
        async with in_time(call.timeout, self.limits):
            name = name_of(call, call.id)
            work = await asyncio.to_thread(self.read, call)
            key = (configs.dump(work.config), work.bare, work.strict, work.request.image.size)
            edit, ticket = await self.local.ask(name, work, repr(key))
            return await asyncio.to_thread(self._reply, edit, name[0], ticket.waited)

    def read(self, call: wire.EditCall) -> Work:
        """A call checked and decoded. Raises Problem 413 or 422 that names the field."""
        for field in ("plan", "settings"):
            _refuse_much(field, getattr(call, field))
        image = picture(call.image, "image", self.limits)
        extra = [picture(text, f"extra_images.{n}", self.limits) for n, text in enumerate(call.extra_images)]
        bare = self.setup.baseline if call.baseline is None else call.baseline
        plan = None
        if call.plan is not None and not bare:
            try:
                plan = record.read_plan(call.plan, Size(*image.size))
            except PlanError as error:
                raise invalid("plan", error) from error
        if plan is None and not call.instruction.strip():
            raise invalid("instruction", "is empty; say what to change, or send a plan")
        if plan is None and not bare and self.setup.planner is None:
            raise invalid("plan", "this service has no planner: send a plan, or baseline = true")
        config = self._config(call.settings)
        return Work(EditRequest(image, call.instruction, call.seed, plan, tuple(extra)), config, bare, call.strict)

    def _config(self, settings: dict[str, Any]) -> EditConfig:
        from replan.backbones import EditConfig

        if not settings:
            return self.setup.config
        for name, value in settings.items():
            _refuse_files(name, value)
        try:
            config = configs.load(EditConfig, configs.dump(self.setup.config), list(settings.items()))
        except ConfigError as error:
            raise invalid("settings", error) from error
        if config.steps > self.limits.max_steps:
            raise invalid("settings", f"steps = {config.steps}: this service does at most {self.limits.max_steps}")
        most = self.setup.config.max_area
        if config.max_area > most:
            raise invalid("settings", f"max_area = {config.max_area}: this service works at no more than {most}")
        return config

    def _load(self) -> None:
        """Load the models and let them answer once."""
        from PIL import Image

        from replan.edit import Editor

        opened = self._open()
        self._planner = None if self.setup.baseline or opened.planner is None else Stoppable(opened.planner)
        self._backbone = opened.backbone
        first = replace(self.setup.config, steps=min(2, self.setup.config.steps))
        request = EditRequest(Image.new("RGB", (64, 64), "grey"), "make it brighter", 0)
        whole = Plan("", "make it brighter", (), Size(64, 64))
        if self._planner is not None:
            with suppress(PlanError):  # an answer, if a bad one: the planner works
                self._planner(request)
        Editor(None, self._backbone, first)(replace(request, plan=whole))
        self.local.gpus = int(str(self.setup.runtime.torch_device()).startswith("cuda"))

    def _work(self, tickets: Sequence[EditTicket]) -> None:
        """Do a batch; called in the desk's thread. A batch that nobody waits for any more stops at the next step."""
        from replan.denoise import Cancelled
        from replan.edit import Editor

        works = [(ticket, ticket.work) for ticket in tickets if ticket.work is not None]
        first = works[0][1]
        waited_for = {id(work.request): ticket for ticket, work in works}
        if self._planner is not None:
            self._planner.stopped = lambda request: waited_for[id(request)].abandoned
        editor = Editor(self._planner, self._backbone, first.config)

        def on_step(step: int, total: int, preview: Callable[[], Image]) -> bool:
            return not all(ticket.abandoned for ticket in tickets)

        try:
            outcomes = editor.together(
                [work.request for _, work in works], on_step, strict=first.strict, bare=first.bare
            )
        except Cancelled:
            return  # nobody is left to be told
        for (ticket, _), outcome in zip(works, outcomes, strict=True):
            if isinstance(outcome, Edit):
                ticket.finish(outcome)
            else:
                ticket.fail(told(outcome))

    def _reply(self, edit: Edit, id: str, waited: float) -> wire.EditReply:
        return wire.EditReply(
            id=id,
            image=wire.encode(edit.image),
            seed=edit.request.seed,
            plan=None if edit.plan is None else plans.to_json(edit.plan),
            notes=list(edit.notes),
            timings=seconds(edit.timings, waited),
            model=self.setup.backbone,
        )


class Stoppable:
    """A planner that stops at the next token when nobody waits for its answer any more."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.stopped: Callable[[EditRequest], bool] = lambda request: False

    def __call__(self, request: EditRequest) -> Plan:
        """Raises as the planner does, and Cancelled."""
        from replan.denoise import Cancelled

        if self.stopped(request):
            raise Cancelled("stopped before planning")
        stream = getattr(self.planner, "stream", None)
        try:
            plan = self.planner(request) if stream is None else stream(request, lambda _: not self.stopped(request))
        except PlanError as error:
            if self.stopped(request):  # an answer that was stopped half-way is no bad answer
                raise Cancelled("stopped while planning") from error
            raise
        if self.stopped(request):
            raise Cancelled("stopped after planning")
        return plan

    def plan_many(self, requests: Sequence[EditRequest], *, sampled: bool = False) -> list[Outcome]:
        return self.planner.plan_many(requests, sampled=sampled)


def picture(text: str, field: str, limits: Limits) -> Image:
    """A picture of a call. Raises Problem: 413 when it has too many pixels, 422 when it is none."""
    try:
        return wire.decode(text, limits.max_pixels)
    except ImageError as error:
        large = "more than" in str(error) or "at most" in str(error)
        raise Problem(413 if large else 422, "too_large" if large else "invalid", str(error), field) from error


def _refuse_much(field: str, value: object) -> None:
    """Raise Problem for more than anybody writes: reading it would keep the service from others."""
    length = len(json.dumps(value))
    if length > MOST:
        raise invalid(field, f"{length:,} characters of JSON: at most {MOST:,}")


def _refuse_files(name: str, value: object) -> None:
    """Raise Problem for a setting that may name a file of this machine. Texts that are no names are told apart by
    place: the negative prompt, and the lines of rules, which come in lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_files(f"{name}.{key}", inner)
    is_name = isinstance(value, str) and name.rpartition(".")[2] != "negative_prompt"
    if is_name and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(value)):
        raise invalid("settings", f"{name} = {value!r}: must be a name; files of this machine are not read")


def told(error: ReplanError) -> ReplanError:
    """What the caller is told: a request at fault names its field, an outage stays what it is."""
    if isinstance(error, PlanError):
        return invalid("plan", error)
    if isinstance(error, ConfigError):
        return invalid("settings", error)
    if isinstance(error, ImageError):
        return invalid("image", error)
    return error


def describe(setup: Setup) -> dict[str, Any]:
    """What an editor service says of itself. Folders of this machine are named by their last part only."""
    names = {"backbone": setup.backbone, "planner": setup.planner}
    shown = {key: None if name is None else name.rstrip("/").rpartition("/")[2] for key, name in names.items()}
    return {**shown, "baseline": setup.baseline, "config": configs.dump(setup.config), "versions": record.versions()}

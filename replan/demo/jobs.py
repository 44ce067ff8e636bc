"""The events that run a model: planning, editing, both, and how a job begins, ends and is cancelled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from replan.demo import viewer
from replan.demo.board import Board, with_preset
from replan.demo.boxes import NOTHING, Drawn, fresh, regions_value
from replan.demo.forms import Form, with_seed
from replan.demo.matrix import matrix_value, share_line
from replan.demo.notice import notice
from replan.demo.session import Entry, Job, Session
from replan.demo.settings import command, edit_config, runtime_words
from replan.demo.strip import strip_value
from replan.demo.studio import sees_picture
from replan.demo.work import Done, Step, Text, make_edits, make_plan, run
from replan.errors import BackboneError, PlanError, PlannerError, ReplanError
from replan.types import EditRequest, Plan, Size

if TYPE_CHECKING:
    from replan.demo.app import Ui
    from replan.demo.studio import Studio

log = logging.getLogger(__name__)
Update = dict[Any, Any]
NO_PICTURE = "Choose a picture first: drop one on the canvas, upload one, or pick an example."
UNCHANGED = "picture, boxes and prompts are as they were."
STOPPING = "Stopping after the step under way …"
BROKEN = "The editor cannot run; your work is kept. Choose another backbone or other settings, then press Edit again."
MEMORY = "The device is out of memory. Use fewer candidates or start the demo with --offload model."


class Jobs:
    """Jobs of all users run one after another; each streams what it does to its own page only."""

    def __init__(self, studio: Studio, ui: Ui) -> None:
        self.studio, self.ui = studio, ui

    @property
    def button_outputs(self) -> list[Any]:
        return [self.ui.session, *self.ui.buttons, self.ui.cancel, self.ui.notice]

    @property
    def plan_outputs(self) -> list[Any]:
        ui = self.ui
        return [ui.reasoning, ui.prompt, ui.canvas, ui.matrix, ui.share_line, ui.command, ui.notice]

    @property
    def job_outputs(self) -> list[Any]:
        return [*self.plan_outputs, self.ui.viewer, self.ui.history, self.ui.seed, *self.ui.buttons, self.ui.cancel]

    # --- begin, end, cancel ---
    def opened(self, session: Session) -> Session:
        """A page was opened. Handing the session back starts its clock: one hour after its page has gone Gradio drops
        it, but only a state that was written once has a clock.
        """
        return session

    def begin(self, session: Session) -> Update:
        """A button was pressed: from here on the job can be cancelled, also while it waits."""
        session.job = Job()
        return self._buttons(running=True) | {self.ui.session: session, self.ui.notice: notice("Waiting …", "wait")}

    def end(self, session: Session) -> Update:
        """The stream of a job is over, whichever way. Gradio may call this twice for a job that left the queue."""
        job, update = session.job, self._buttons(running=False)
        if job is not None and job.stage == "running":  # a call that came late: the next job has begun
            return {self.ui.cancel: gr.update()}
        if job is not None and job.cancelled and job.stage == "waiting":
            update[self.ui.notice] = notice(f"Cancelled, {UNCHANGED}", "warn")
        if job is not None and (job.cancelled or job.stage == "over"):
            session.job = None
        return update

    def cancel(self, session: Session) -> Update:
        """Stop after the step under way, or leave the queue.

        A running job tells its end itself, in its own stream: what is written from here could be overtaken by an
        older preview that still waits to be drawn.
        """
        ui, job = self.ui, session.job
        if job is None or job.stage == "over":
            return {ui.leave: {}, ui.notice: notice("There is nothing left to cancel.")}
        return {ui.leave: {"waits": job.cancel()}}

    def _buttons(self, *, running: bool) -> Update:
        states: Update = {button: gr.update(interactive=not running) for button in self.ui.buttons}
        return states | {self.ui.cancel: gr.update(interactive=running)}

    # --- the three jobs ---
    def plan(self, session: Session, *values: Any) -> Iterator[Update]:
        """Plan; the boxes appear on the canvas."""
        form, job = Form(*values), session.job or Job()
        yield from self._guarded(session, job, self._plan(session, form, job))

    def edit(self, session: Session, *values: Any) -> Iterator[Update]:
        """Edit by what is on screen."""
        form, job = Form(*values), session.job or Job()
        yield from self._guarded(session, job, self._edit(session, form, job, None))

    def plan_and_edit(self, session: Session, *values: Any) -> Iterator[Update]:
        """Both in one go; with the baseline there is nothing to plan."""
        form, job = Form(*values), session.job or Job()
        yield from self._guarded(session, job, self._both(session, form, job))

    def _both(self, session: Session, form: Form, job: Job) -> Iterator[Update]:
        drawn = None
        if not form.baseline:
            drawn = yield from self._plan(session, form, job)
            if drawn is None:
                return
            form = replace(form, prompt=session.plan.prompt if session.plan else "")
        yield from self._edit(session, form, job, drawn)

    def _guarded(self, session: Session, job: Job, updates: Iterator[Update]) -> Iterator[Update]:
        """The updates; an error becomes a line that says what to do, and the last true result comes back.

        A job that left the queue before its turn does nothing.
        """
        from replan.denoise import Cancelled

        ui = self.ui
        if not job.start():
            return
        yield self._buttons(running=True)
        try:
            yield from updates
        except Cancelled as error:
            text = f"Cancelled, {error}; {UNCHANGED}"
            yield {ui.notice: notice(text, "warn"), ui.viewer: self._last(session)}
        except BackboneError as error:
            yield {ui.notice: notice(f"{BROKEN} {error}", "error"), ui.viewer: self._last(session)}
        except ReplanError as error:
            yield {ui.notice: notice(str(error), "error"), ui.viewer: self._last(session)}
        except RuntimeError as error:  # torch's own, out of memory above all
            log.exception("a job failed")
            text = MEMORY if type(error).__name__ == "OutOfMemoryError" else f"The model failed: {error}"
            yield {ui.notice: notice(text, "error"), ui.viewer: self._last(session)}
        finally:
            job.stage = "over"

    # --- planning ---
    def _plan(self, session: Session, form: Form, job: Job) -> Iterator[Update]:
        """Yields updates; its value is what was drawn, None when there is no plan."""
        ui, words = self.ui, form.words()
        if session.picture is None:
            raise ReplanError(NO_PICTURE)
        yield {ui.notice: notice("Planning …", "busy"), ui.reasoning: ""}
        request = EditRequest(session.picture, words, form.settings().seed)
        try:
            for event in run(make_plan(self.studio, str(form.planner), request, job), job):
                if isinstance(event, Text):
                    yield {ui.reasoning: reasoning_of(event.answer)}
                elif isinstance(event, Done):
                    update, drawn = self.show_plan(session, form, event.result, "")
                    yield update
                    return drawn
        except PlanError as error:
            raw = getattr(error, "raw", "")
            text = f"The planner's answer cannot be used: {error}. Say it in other words, or draw the boxes yourself."
            yield {ui.notice: notice(text, "error")} | ({ui.reasoning: raw} if raw else {})
        except PlannerError as error:
            text = f"The planner failed: {error}. Your boxes are kept; you can draw and press Edit without it."
            yield {ui.notice: notice(text, "error")}
        return None

    def show_plan(self, session: Session, form: Form, plan: Plan, text: str) -> tuple[Update, Drawn]:
        """A plan on canvas and in the fields; undo on the canvas brings back what was there before."""
        ui, drawn = self.ui, fresh(plan.regions)
        session.plan = plan
        count = len(plan.regions)
        found = f"{count} region{'s' * (count != 1)}: correct what you like, then press Edit." if count else (
            "The plan concerns the whole picture; press Edit, or draw a box."
        )  # fmt: skip
        notes = f" Note: {'; '.join(plan.notes)}." if plan.notes else ""
        form = replace(form, prompt=plan.prompt)
        update: Update = {
            ui.reasoning: plan.reasoning or plan.raw, ui.prompt: plan.prompt, ui.canvas: regions_value(drawn),
            ui.notice: notice(f"{text} {found}{notes}".strip(), "warn" if notes else "done"),
        }  # fmt: skip
        return update | self.refreshed(session, form, drawn), drawn

    def board(self, session: Session, form: Form) -> Board:
        """The session's board; at first the backbone's own."""
        if session.board is None:
            session.board = with_preset("backbone", self.studio.config(form.backbone).mask)
        return session.board

    def _drawn(self, session: Session, form: Form) -> Drawn:
        return NOTHING if session.picture is None else form.drawn(Size(*session.picture.size))

    def refreshed(self, session: Session, form: Form, drawn: Drawn | None) -> Update:
        """What follows from the state: the matrix, the line on locality, and the command."""
        ui = self.ui
        try:
            settings = form.settings()
            own = self.studio.config(settings.backbone)
            drawn = self._drawn(session, form) if drawn is None else drawn
        except ReplanError as error:
            return {ui.command: "", ui.share_line: notice(str(error), "error")}
        board = self.board(session, form)
        vision = sees_picture(settings.backbone)
        table = matrix_value(board, drawn.ids, own.mask, settings.steps, vision=vision, baseline=settings.baseline)
        wanted = edit_config(settings, board, drawn.ids, own)
        has_plan = bool(drawn.regions or form.prompt.strip())
        runtime = () if self.studio.runtime is None else runtime_words(self.studio.runtime)
        line = command(session.name, form.instruction, settings, wanted, own, plan=has_plan, runtime=runtime)
        return {
            ui.matrix: table, ui.share_line: notice(share_line(board.share, settings.steps)),
            ui.command: "" if session.picture is None else line,
        }  # fmt: skip

    # --- editing ---
    def _edit(self, session: Session, form: Form, job: Job, drawn: Drawn | None) -> Iterator[Update]:
        ui = self.ui
        if session.picture is None:
            raise ReplanError(NO_PICTURE)
        size = Size(*session.picture.size)
        settings = with_seed(form.settings(), bool(form.random_seed))
        drawn = form.drawn(size) if drawn is None else drawn
        plan = None if settings.baseline else form.plan(drawn, size, session.plan.reasoning if session.plan else "")
        if plan is None:  # the baseline, or nothing drawn and no prompt: the instruction is for the whole picture
            plan = Plan("", form.words(), (), size)
        config = edit_config(settings, self.board(session, form), drawn.ids, self.studio.config(settings.backbone))
        request = EditRequest(session.picture, str(form.instruction).strip(), settings.seed, plan)
        yield {
            ui.notice: notice("Loading the editor …", "busy"), ui.seed: settings.seed,
            ui.viewer: viewer.waiting(session.picture, "starting"),
        }  # fmt: skip
        act = make_edits(
            self.studio, lambda: self.studio.editor(settings.backbone, config), request, settings.candidates,
            settings.baseline, job,
        )  # fmt: skip
        for event in run(act, job):
            if isinstance(event, Step):
                text = f"Step {event.number} of {event.total}, about {event.left:.1f} s left"
                shown = viewer.step(text, event.number / event.total, event.preview)
                yield {ui.notice: notice(f"{text} …", "busy"), ui.viewer: shown}
            elif isinstance(event, Done):
                entry = Entry(
                    session.picture, session.name, form.instruction, form.prompt, session.plan, drawn, settings,
                    self.board(session, form), event.result,
                )  # fmt: skip
                yield self._finished(session, entry)

    def _finished(self, session: Session, entry: Entry) -> Update:
        ui = self.ui
        session.remember(entry)
        session.edits, session.chosen = entry.edits, 0
        seconds = sum(entry.edits[0].timings.values())
        what = "Baseline, without boxes" if entry.settings.baseline else "Done"
        notes = f" Note: {'; '.join(entry.edits[0].notes)}." if entry.edits[0].notes else ""
        return {
            ui.viewer: viewer.finished(entry.source, entry.edits),
            ui.history: strip_value([(old.edits[0].image, _title(old)) for old in session.entries], "History"),
            ui.notice: notice(f"{what} in {seconds:.1f} s, seed {entry.settings.seed}.{notes}", "done"),
        }

    def _last(self, session: Session) -> dict[str, Any]:
        """The last true result of this picture, or none."""
        if not session.edits or session.picture is None:
            return viewer.empty()
        return viewer.finished(session.picture, session.edits, session.chosen)


def reasoning_of(answer: str) -> str:
    """The reasoning in an answer that may still be under way; the plan's own part is left out."""
    text = answer.partition("</think>")[0]
    return text.rpartition("<think>")[2].strip()


def _title(entry: Entry) -> str:
    words = entry.instruction.strip() or entry.prompt.strip() or "edit"
    kind = "baseline, " if entry.settings.baseline else ""
    return f"{kind}seed {entry.settings.seed}: {words[:80]}"

"""What happens on each event. Every handler gets the user's own session and gives values for named components back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from replan import plan as grammar
from replan.demo import viewer
from replan.demo.board import name_of, role_at, tables, with_preset
from replan.demo.boxes import picture_value
from replan.demo.examples import DRAWN_ONLY, suits
from replan.demo.forms import Form
from replan.demo.jobs import NO_PICTURE, Jobs, Update
from replan.demo.notice import notice
from replan.demo.pictures import data_address, exact
from replan.demo.session import Session
from replan.demo.settings import safe_name, strength
from replan.demo.studio import Studio, sees_picture
from replan.demo.uploads import MOST_BYTES, read_picture, read_plan_upload
from replan.errors import ReplanError
from replan.types import Size

if TYPE_CHECKING:
    from replan.demo.app import Ui
    from replan.demo.examples import Example


class Handlers(Jobs):
    """The events that run no model; those that do are in `Jobs`."""

    def __init__(self, studio: Studio, ui: Ui, shelf: Sequence[Example]) -> None:
        super().__init__(studio, ui)
        self.shelf = shelf

    # --- which components each kind of handler may write ---
    @property
    def scene_outputs(self) -> list[Any]:
        ui = self.ui
        return [ui.canvas, ui.instruction, ui.prompt, ui.reasoning, ui.viewer, ui.notice]

    @property
    def board_outputs(self) -> list[Any]:
        return [self.ui.share, self.ui.matrix, self.ui.share_line, self.ui.command]

    @property
    def restore_outputs(self) -> list[Any]:
        ui = self.ui
        panel = [ui.backbone, ui.planner, ui.seed, ui.steps, ui.guidance, ui.expand, ui.candidates]
        return [*self.scene_outputs, *panel, ui.keep_background, ui.baseline, ui.preset, *self.board_outputs]

    # --- pictures ---
    def example(self, session: Session, backbone: str, event: gr.EventData) -> Update:
        """A picture of the gallery and its instruction."""
        example = self.shelf[_index(event, self.shelf)]
        session.show(example.picture, example.name)
        text = f"{example.name}: press Plan & edit, or Plan to look at the boxes first."
        return self._scene(session, text, backbone) | {self.ui.instruction: example.instruction}

    def uploaded(self, session: Session, path: str, backbone: str) -> Update:
        """A picture from the user's disk; what cannot be read changes nothing."""
        try:
            picture = read_picture(path)
        except ReplanError as error:
            return {self.ui.notice: notice(f"{error}. Choose another file.", "error")}
        name = safe_name(path)
        session.show(picture, name)
        return self._scene(session, f"{name}, {picture.width} × {picture.height} pixels. Say what to change.", backbone)

    def refused(self, event: gr.EventData) -> Update:
        """A file that is too large was not even sent."""
        size = _data(event).get("bytes")
        told = f"That file has {size / 1e6:.1f} MB" if isinstance(size, int) else "That file is too large"
        return {
            self.ui.notice: notice(
                f"{told}: at most {MOST_BYTES / 1e6:.0f} MB. Make it smaller or choose another file.", "error"
            )
        }

    def reused(self, session: Session) -> Update:
        """The chosen result becomes the picture of the next turn."""
        if not session.edits:
            return {self.ui.notice: notice("There is no result yet to use as input.", "warn")}
        stem = session.name.removesuffix(".png").removesuffix("-edited")
        session.show(session.edits[session.chosen].image, f"{stem}-edited.png")
        return self._scene(session, "The result is the new picture. Say what to change next.")

    def _scene(self, session: Session, text: str, backbone: str = "") -> Update:
        """A new picture on an empty canvas, with a word of warning when the backbone cannot make sense of it."""
        ui = self.ui
        assert session.picture is not None
        size, fits = f"{session.picture.width} × {session.picture.height} pixels", suits(session.picture, backbone)
        said = notice(text) if fits else notice(f"{session.name}, {size}. {DRAWN_ONLY}", "warn")
        return {
            ui.canvas: picture_value(session.picture), ui.prompt: "", ui.reasoning: "",
            ui.viewer: viewer.empty(), ui.notice: said,
        }  # fmt: skip

    def restored(self, session: Session, event: gr.EventData) -> Update:
        """A run of the history with everything that led to it."""
        ui, entry = self.ui, session.entries[_index(event, session.entries)]
        session.show(entry.source, entry.name)
        session.plan, session.board, session.edits = entry.plan, entry.board, entry.edits
        settings = entry.settings
        reasoning = entry.plan.reasoning if entry.plan else ""
        update: Update = {
            ui.canvas: picture_value(entry.source, entry.drawn), ui.instruction: entry.instruction,
            ui.prompt: entry.prompt, ui.reasoning: reasoning, ui.viewer: viewer.finished(entry.source, entry.edits),
            ui.notice: notice("Restored from the history.", "done"), ui.backbone: settings.backbone,
            ui.planner: settings.planner, ui.seed: settings.seed, ui.steps: settings.steps,
            ui.guidance: settings.guidance, ui.expand: settings.expand, ui.candidates: settings.candidates,
            ui.keep_background: settings.keep_background, ui.baseline: settings.baseline,
            ui.preset: entry.board.preset, ui.share: entry.board.share,
        }  # fmt: skip
        form = Form(
            entry.instruction, entry.prompt, None, settings.backbone, settings.planner, settings.seed, False,
            settings.steps, settings.guidance, settings.expand, settings.candidates, settings.keep_background,
            settings.baseline,
        )  # fmt: skip
        return update | self.refreshed(session, form, entry.drawn)

    # --- plan files and downloads ---
    def imported(self, session: Session, path: str, *values: Any) -> Update:
        """A plan file or a sidecar, onto the canvas."""
        ui = self.ui
        try:
            if session.picture is None:
                raise ReplanError(NO_PICTURE)
            plan = read_plan_upload(path, Size(*session.picture.size))
        except ReplanError as error:
            return {ui.notice: notice(str(error), "error")}
        return self.show_plan(session, Form(*values), plan, "Plan imported.")[0]

    def exported(self, session: Session, *values: Any) -> Update:
        """plan.json of what is on screen, as `replan edit --plan` reads it."""
        form = Form(*values)
        try:
            if session.picture is None:
                raise ReplanError(NO_PICTURE)
            size = Size(*session.picture.size)
            plan = form.plan(form.drawn(size), size, session.plan.reasoning if session.plan else "")
            if plan is None:
                raise ReplanError("There is no plan to export: draw a box, or let the planner make one.")
            content = json.dumps(grammar.to_json(plan), indent=2, ensure_ascii=False).encode()
        except ReplanError as error:
            return {self.ui.parcel: {}, self.ui.notice: notice(str(error), "error")}
        return self._parcel("plan.json", data_address(content, "application/json"))

    def saved(self, session: Session, *values: Any) -> Update:
        """The chosen result, every pixel."""
        if not session.edits:
            return {self.ui.parcel: {}, self.ui.notice: notice("There is no result yet to download.", "warn")}
        name = f"{session.name.removesuffix('.png')}-result.png"
        return self._parcel(name, exact(session.edits[session.chosen].image))

    def saved_picture(self, session: Session, *values: Any) -> Update:
        """The picture that is being edited, upright, every pixel."""
        if session.picture is None:
            return {self.ui.parcel: {}, self.ui.notice: notice(NO_PICTURE, "warn")}
        return self._parcel(session.name, exact(session.picture))

    def _parcel(self, name: str, address: str) -> Update:
        return {self.ui.parcel: {"name": name, "href": address}, self.ui.notice: notice(f"{name} saved.", "done")}

    def chosen(self, session: Session, event: gr.EventData) -> None:
        """Another candidate was clicked: downloads and the next turn take that one."""
        session.chosen = _index(event, session.edits)

    # --- the matrix ---
    def refresh(self, session: Session, *values: Any) -> Update:
        """Matrix, its lines and the command, after anything changed."""
        return self.refreshed(session, Form(*values), None)

    def backbone_chosen(self, session: Session, *values: Any) -> Update:
        """Another backbone brings its own settings."""
        ui, form = self.ui, Form(*values)
        own = self.studio.config(form.backbone)
        session.board = with_preset("backbone", own.mask)
        form = replace(form, steps=own.steps, guidance=strength(own), expand=own.mask.expand)
        fields: Update = {ui.steps: own.steps, ui.guidance: strength(own), ui.expand: own.mask.expand}
        return fields | {ui.preset: "backbone", ui.share: own.mask.isolate} | self.refreshed(session, form, None)

    def preset_chosen(self, preset: str, session: Session, *values: Any) -> Update:
        """A fresh matrix; cells changed by hand are given up."""
        form = Form(*values)
        session.board = with_preset(preset, self.studio.config(form.backbone).mask)
        return {self.ui.share: session.board.share} | self.refreshed(session, form, None)

    def reset(self, session: Session, *values: Any) -> Update:
        """Back to the backbone's own rules."""
        return {self.ui.preset: "backbone"} | self.preset_chosen("backbone", session, *values)

    def share_set(self, share: float, session: Session, *values: Any) -> Update:
        """The locality slider."""
        form = Form(*values)
        session.board = replace(self.board(session, form), share=min(max(float(share), 0.0), 1.0))
        return self.refreshed(session, form, None)

    def toggled(self, session: Session, event: gr.EventData, *values: Any) -> Update:
        """A cell of the matrix was clicked."""
        form, data = Form(*values), _data(event)
        try:
            drawn = self._drawn(session, form)
            vision = sees_picture(form.backbone)
            reader = role_at(data.get("reader"), len(drawn.ids), vision=vision)
            read = role_at(data.get("read"), len(drawn.ids), vision=vision)
            board = self.board(session, form)
            part = str(data.get("phase"))
            own = self.studio.config(form.backbone).mask
            table = tables(board, drawn.ids, own)[part == "late"]
            session.board = board.toggled(
                part, name_of(reader, drawn.ids), name_of(read, drawn.ids), read not in table[reader]
            )
        except ReplanError as error:
            return {self.ui.notice: notice(str(error), "error")}
        return self.refreshed(session, form, drawn)


def _data(event: gr.EventData) -> Mapping[str, Any]:
    found = event._data
    return found if isinstance(found, Mapping) else {}


def _index(event: gr.EventData, among: Sequence[Any]) -> int:
    """The index that a click brought; clicks on what is not there (any more) are refused."""
    index = _data(event).get("index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(among):
        raise gr.Error("That is not there any more; reload the page.")
    return index

"""The page: which controls there are, where they stand, and which handler each of them calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from replan.demo.board import OWN, presets, with_preset
from replan.demo.boxes import MAX_HINT
from replan.demo.examples import MINI, Example, examples
from replan.demo.forms import MOST_WORDS
from replan.demo.handlers import Handlers
from replan.demo.jobs import STOPPING
from replan.demo.matrix import matrix_value, share_line
from replan.demo.notice import notice
from replan.demo.session import Session
from replan.demo.settings import MOST_CANDIDATES, MOST_SEED, MOST_STEPS, strength
from replan.demo.strip import strip_value
from replan.demo.studio import Studio, sees_picture
from replan.demo.viewer import empty
from replan.demo.widget import asset, widget

UNCLAIMED = (60, 600)  # seconds: how often to look for uploads that no handler took, and how old they may be
WELCOME = "Choose a picture, say what to change, then press Plan & edit."
DOWNLOAD = """(d) => { if (!d || !d.href) return; const [head, body] = d.href.split(','), bytes = atob(body);
const data = Uint8Array.from(bytes, (c) => c.charCodeAt(0)), a = document.createElement('a');
a.href = URL.createObjectURL(new Blob([data], {type: head.slice(5).split(';')[0]})); a.download = d.name; a.click();
setTimeout(() => URL.revokeObjectURL(a.href), 10000); }"""
LEAVE = "(told) => { if (told && told.waits) document.querySelector('#leave-queue').click(); }"
HEADER = """<header class="top"><h1>RePlan</h1><p>Plan the regions, correct them, then edit each by its own hint.</p>
<button type="button" class="dark-switch" aria-label="Light or dark">◐</button></header>"""
SWITCH = "element.querySelector('.dark-switch').addEventListener('click', () => document.body.classList.toggle('dark'))"


@dataclass(slots=True)
class Ui:
    """Every component that a handler reads or writes."""

    session: gr.State
    notice: gr.HTML
    examples: gr.HTML
    upload: gr.UploadButton
    instruction: gr.Textbox
    both: gr.Button
    plan: gr.Button
    edit: gr.Button
    cancel: gr.Button
    baseline: gr.Checkbox
    reasoning: gr.Textbox
    canvas: gr.HTML
    prompt: gr.Textbox
    viewer: gr.HTML
    save: gr.Button
    reuse: gr.Button
    backbone: gr.Dropdown
    planner: gr.Dropdown
    seed: gr.Number
    random_seed: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider
    expand: gr.Slider
    candidates: gr.Slider
    keep_background: gr.Checkbox
    preset: gr.Dropdown
    reset: gr.Button
    share: gr.Slider
    share_line: gr.HTML
    matrix: gr.HTML
    history: gr.HTML
    export_plan: gr.Button
    import_plan: gr.UploadButton
    save_picture: gr.Button
    command: gr.Textbox
    parcel: gr.JSON
    leave: gr.JSON
    out: gr.Button

    @property
    def form(self) -> list[Any]:
        """The inputs of `forms.Form`, in its order."""
        return [
            self.instruction, self.prompt, self.canvas, self.backbone, self.planner, self.seed, self.random_seed,
            self.steps, self.guidance, self.expand, self.candidates, self.keep_background, self.baseline,
        ]  # fmt: skip

    @property
    def buttons(self) -> list[gr.Button]:
        """The buttons that start a job."""
        return [self.both, self.plan, self.edit]


def build(studio: Studio) -> gr.Blocks:
    """The whole app around these models; launch it with `serve.launch`."""
    with gr.Blocks(title="RePlan", analytics_enabled=False, fill_width=True, delete_cache=UNCLAIMED) as demo:
        parts: dict[str, Any] = {"session": gr.State(Session())}
        shelf = examples(photos_first=studio.backbones[0] != MINI)
        gr.HTML(HEADER, js_on_load=SWITCH, apply_default_css=False, padding=False)
        with gr.Row(elem_id="desk", equal_height=False):
            with gr.Column(elem_id="left", min_width=260):
                parts |= _ask(shelf)
            with gr.Column(elem_id="middle", min_width=320):
                parts |= _canvas()
            with gr.Column(elem_id="right", min_width=320):
                parts |= _result()
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Settings"):
                        parts |= _settings(studio)
                    with gr.Tab("Attention"):
                        parts |= _attention(studio)
                    with gr.Tab("History"):
                        parts["history"] = widget(
                            "strip", strip_value((), "History", "Finished edits are kept here."), "history"
                        )
                    with gr.Tab("Plan file & command"):
                        parts |= _share()
        parts["parcel"], parts["leave"] = gr.JSON(visible=False), gr.JSON(visible=False)
        parts["out"] = gr.Button(visible="hidden", elem_id="leave-queue")
        ui = Ui(**parts)
        on = Handlers(studio, ui, shelf)
        demo.load(on.opened, [ui.session], [ui.session], **QUIET)
        _wire(ui, on)
    return demo


def _ask(shelf: Sequence[Example]) -> dict[str, Any]:
    shown = [(example.picture, example.instruction) for example in shelf]
    parts: dict[str, Any] = {
        "examples": widget("strip", strip_value(shown, "Examples"), "examples"),
        "upload": gr.UploadButton("Upload a picture", elem_id="upload", size="sm", type="filepath"),
        "instruction": gr.Textbox(
            label="Instruction", placeholder="make the left cup red", lines=2, max_lines=4, max_length=MOST_WORDS,
            elem_id="instruction",
        ),
        "both": gr.Button("Plan & edit", variant="primary", elem_id="both"),
    }  # fmt: skip
    with gr.Row(elem_classes="tight"):
        parts["plan"] = gr.Button("Plan", elem_id="plan", min_width=60)
        parts["edit"] = gr.Button("Edit", elem_id="edit", min_width=60)
        parts["cancel"] = gr.Button("Cancel", elem_id="cancel", min_width=60, interactive=False)
    parts["baseline"] = gr.Checkbox(label="Baseline: the stock editor, no boxes", elem_id="baseline", container=False)
    parts["notice"] = gr.HTML(notice(WELCOME), elem_id="notice", apply_default_css=False, padding=False)
    parts["reasoning"] = gr.Textbox(
        label="Reasoning", lines=5, max_lines=9, interactive=False, elem_id="reasoning",
        placeholder="What the planner thinks appears here while it thinks.",
    )  # fmt: skip
    return parts


def _canvas() -> dict[str, Any]:
    return {
        "canvas": widget("boxes", {}, "canvas"),
        "prompt": gr.Textbox(
            label="Global prompt", lines=1, max_lines=3, max_length=MAX_HINT, elem_id="prompt",
            placeholder="what holds for the whole picture; the planner fills it in",
        ),
    }  # fmt: skip


def _result() -> dict[str, Any]:
    viewer = widget("viewer", empty(), "viewer")
    with gr.Row(elem_classes="tight"):
        save = gr.Button("Download", size="sm", elem_id="save", min_width=60)
        reuse = gr.Button("Use as input", size="sm", elem_id="reuse", min_width=60)
    return {"viewer": viewer, "save": save, "reuse": reuse}


def _settings(studio: Studio) -> dict[str, Any]:
    own = studio.config(studio.backbones[0])
    with gr.Row(elem_classes="tight", visible=len(studio.backbones) + len(studio.planners) > 2):
        backbone = gr.Dropdown(studio.backbones, value=studio.backbones[0], label="Backbone", elem_id="backbone")
        planner = gr.Dropdown(studio.planners, value=studio.planners[0], label="Planner", elem_id="planner")
    with gr.Row(elem_classes="tight"):
        steps = gr.Slider(1, MOST_STEPS, own.steps, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(0, 10, strength(own), step=0.1, label="Guidance", elem_id="guidance")
    with gr.Row(elem_classes="tight"):
        expand = gr.Slider(0, 1, own.mask.expand, step=0.01, label="Expand", elem_id="expand")
        candidates = gr.Slider(1, MOST_CANDIDATES, 1, step=1, label="Candidates", elem_id="candidates")
    with gr.Row(elem_classes="tight bottom"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, elem_id="seed")
        with gr.Column(min_width=120):
            random_seed = gr.Checkbox(False, label="New seed each time", elem_id="random", container=False)
            keep = gr.Checkbox(own.keep_background, label="Keep background pixels", elem_id="keep", container=False)
    return {
        "backbone": backbone, "planner": planner, "steps": steps, "guidance": guidance, "expand": expand,
        "candidates": candidates, "seed": seed, "random_seed": random_seed, "keep_background": keep,
    }  # fmt: skip


def _attention(studio: Studio) -> dict[str, Any]:
    name = studio.backbones[0]
    own = studio.config(name)
    board = with_preset(presets()[0], own.mask)
    with gr.Row(elem_classes="tight bottom"):
        offered = [("default" if one == OWN else one, one) for one in presets()]
        preset = gr.Dropdown(offered, value=presets()[0], label="Preset", elem_id="preset", min_width=100, scale=2)
        share = gr.Slider(0, 1, board.share, step=0.05, label="Locality", elem_id="share", min_width=120, scale=3)
        reset = gr.Button("Reset", size="sm", elem_id="reset", min_width=60, scale=1)
    line = gr.HTML(
        notice(share_line(board.share, own.steps)), elem_id="share-line", apply_default_css=False, padding=False
    )
    value = matrix_value(board, (), own.mask, own.steps, vision=sees_picture(name), baseline=False)
    return {
        "preset": preset, "reset": reset, "share": share, "share_line": line,
        "matrix": widget("matrix", value, "matrix"),
    }  # fmt: skip


def _share() -> dict[str, Any]:
    with gr.Row(elem_classes="tight"):
        export = gr.Button("Export plan.json", size="sm", elem_id="export", min_width=80)
        imported = gr.UploadButton("Import a plan", size="sm", type="filepath", elem_id="import", min_width=80)
        picture = gr.Button("Save the picture", size="sm", elem_id="save-picture", min_width=80)
    command = gr.Textbox(
        label="The same on the command line", lines=3, max_lines=6, interactive=False, buttons=["copy"],
        elem_id="command", info="Run it beside the saved picture and plan.json.",
    )  # fmt: skip
    return {"export_plan": export, "import_plan": imported, "save_picture": picture, "command": command}


QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def _wire(ui: Ui, on: Handlers) -> None:
    state = [ui.session, *ui.form]
    scene = on.scene_outputs
    ui.examples.picked(on.example, [ui.session, ui.backbone], scene, **QUIET)
    ui.upload.upload(on.uploaded, [ui.session, ui.upload, ui.backbone], scene, **QUIET)
    ui.canvas.refused(on.refused, None, [ui.notice], **QUIET)
    ui.reuse.click(on.reused, [ui.session], scene, **QUIET)
    ui.history.picked(on.restored, [ui.session], on.restore_outputs, **QUIET)
    ui.import_plan.upload(on.imported, [ui.session, ui.import_plan, *ui.form], on.plan_outputs, **QUIET)
    _wire_jobs(ui, on, state)
    for handler, button in ((on.saved, ui.save), (on.exported, ui.export_plan), (on.saved_picture, ui.save_picture)):
        sent = button.click(handler, state, [ui.parcel, ui.notice], **QUIET)
        sent.then(None, [ui.parcel], None, js=DOWNLOAD, **QUIET)
    ui.viewer.chosen(on.chosen, [ui.session], None, **QUIET)

    refreshed = [ui.matrix, ui.share_line, ui.command]
    last: dict[str, Any] = QUIET | {"trigger_mode": "always_last"}
    ui.canvas.edited(on.refresh, state, refreshed, **last)
    watched: list[Any] = [ui.instruction, ui.prompt, ui.steps, ui.guidance, ui.expand, ui.candidates]
    for control in [*watched, ui.seed, ui.keep_background, ui.baseline, ui.planner]:
        control.change(on.refresh, state, refreshed, **last)
    own = [ui.steps, ui.guidance, ui.expand, ui.preset]
    ui.backbone.input(on.backbone_chosen, state, [*own, *on.board_outputs], **QUIET)
    ui.preset.input(on.preset_chosen, [ui.preset, *state], on.board_outputs, **QUIET)
    ui.reset.click(on.reset, state, [ui.preset, *on.board_outputs], **QUIET)
    ui.share.change(on.share_set, [ui.share, *state], refreshed, **last)
    ui.matrix.toggle(on.toggled, state, [*refreshed, ui.notice], **QUIET)


def _wire_jobs(ui: Ui, on: Handlers, state: list[Any]) -> None:
    """Jobs wait in Gradio's queue, one at a time over all users; the notice shows a waiting job's place in it."""
    jobs = []
    for button, handler in ((ui.both, on.plan_and_edit), (ui.plan, on.plan), (ui.edit, on.edit)):
        begun = button.click(on.begin, [ui.session], on.button_outputs, **QUIET)
        job = begun.then(
            handler, state, on.job_outputs, concurrency_id="models", concurrency_limit=1, api_visibility="private",
            show_progress="minimal", show_progress_on=[ui.notice],
        )  # fmt: skip
        job.then(on.end, [ui.session], on.button_outputs, **QUIET)
        jobs.append(job)
    ui.cancel.click(None, None, ui.notice, js=f"() => {json.dumps(notice(STOPPING, 'wait'))}", **QUIET)
    asked = ui.cancel.click(on.cancel, [ui.session], [ui.leave, ui.notice], **QUIET)
    # Gradio's own cancelling is for jobs that wait: it cuts the stream of a running one, and its last previews, still
    # on their way, would be drawn over whatever is written after them.
    asked.then(None, [ui.leave], None, js=LEAVE, **QUIET)
    ui.out.click(None, None, None, cancels=jobs, **QUIET)


def style() -> str:
    """All of the page's CSS."""
    return "\n".join(asset(f"{name}.css") for name in ("page", "boxes", "matrix", "viewer", "strip"))

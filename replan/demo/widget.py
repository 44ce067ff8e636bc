"""A custom component: a gr.HTML whose template and script are files in static/ and whose value is plain JSON.

The template is fixed, so no value ever becomes HTML: the script writes text with textContent and pictures only from
`data:image/` addresses. Not a subclass, because Gradio writes a stub file beside the module of every subclass.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib import resources
from typing import Any

import gradio as gr


def asset(name: str) -> str:
    """The text of a file in static/."""
    return resources.files("replan.demo").joinpath("static", name).read_text(encoding="utf-8")


def widget(name: str, value: Mapping[str, Any], elem_id: str) -> gr.HTML:
    """The component made of static/`name`.html and .js. The events that its script triggers are attributes of it."""
    return gr.HTML(
        stamped(value), html_template=asset(f"{name}.html"), js_on_load=asset(f"{name}.js"), elem_id=elem_id,
        apply_default_css=False, container=False, padding=False,
    )  # fmt: skip


def stamped(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a fresh stamp, by which a script tells news from its own echo."""
    return {**value, "stamp": secrets.token_hex(6)}

"""The line that says how things stand, and what to do when they do not."""

from __future__ import annotations

from html import escape
from typing import Literal

Kind = Literal["calm", "wait", "busy", "done", "warn", "error"]


def notice(text: str, kind: Kind = "calm") -> str:
    """The line as HTML; whatever `text` holds stays text."""
    role = "alert" if kind in ("warn", "error") else "status"
    return f'<p class="nt nt-{kind}" role="{role}">{escape(text)}</p>'

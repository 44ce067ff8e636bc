"""The result: before and after under one slider, the difference, the candidates, and the preview while it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from replan.demo.pictures import heat_map, shown
from replan.demo.widget import stamped

if TYPE_CHECKING:
    from PIL.Image import Image

    from replan.types import Edit


def empty() -> dict[str, Any]:
    """No result."""
    return stamped({"state": "empty", "shots": [], "chosen": 0})


def waiting(before: Image, text: str) -> dict[str, Any]:
    """An edit was asked for; the picture stands in for a preview."""
    picture = shown(before)
    return stamped({"state": "live", "before": picture, "live": picture, "steps": text, "share": 0})


def step(text: str, share: float, preview: Image | None) -> dict[str, Any]:
    """`share` of the steps is done."""
    live = {} if preview is None else {"live": shown(preview, 768)}
    return stamped({"state": "live", "steps": text, "share": share} | live)


def finished(before: Image, edits: Sequence[Edit], chosen: int = 0) -> dict[str, Any]:
    """The finished candidates."""
    shots = [
        {
            "after": shown(edit.image),
            "heat": shown(heat_map(before, edit.image)),
            "caption": f"seed {edit.request.seed}",
        }
        for edit in edits
    ]
    return stamped({"state": "done", "before": shown(before), "shots": shots, "chosen": chosen})

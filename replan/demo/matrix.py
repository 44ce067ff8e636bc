"""The attention matrix as a clickable heat map, and the line below it that says what a change does, or why nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replan.demo.board import Board, early_steps, tables
from replan.rules import MaskConfig, matrix

NO_BOXES = "Without boxes everything reads everything: draw a box to use the matrix."
NO_BASELINE = "The baseline runs without boxes, so the matrix has no effect; turn the baseline off to use it."


def share_line(share: float, steps: int) -> str:
    """What the locality share does, in one line."""
    early = early_steps(share, steps)
    if early == 0:
        return f"Locality for none of {steps} steps: the background sees the regions from the start; changes may spill."
    if early == steps:
        return f"Locality for all {steps} steps: the background never sees what happens inside the boxes."
    first = "the first step" if early == 1 else f"the first {early}"
    return f"Locality for {first} of {steps} steps: nothing spills; then edges blend with their surroundings."


def matrix_value(
    board: Board, ids: Sequence[int], own: MaskConfig, steps: int, *, vision: bool, baseline: bool
) -> dict[str, Any]:
    """The component's value: the names, both tables, which of them rules over any step, and a note."""
    early_rules, late_rules = tables(board, ids, own)
    names, early = matrix(early_rules, vision=vision)
    _, late = matrix(late_rules, vision=vision)
    count = early_steps(board.share, steps)
    rest = steps - count
    labels = {
        "early": _steps("First", count) if count else "Early steps (none)",
        "late": _steps("Last", rest) if rest else "Late steps (none)",
    }
    why = {
        "early": "No effect: no step follows these rules. Raise the locality share to use them.",
        "late": "No effect: no step is left for these rules. Lower the locality share to use them.",
    }
    idle = NO_BASELINE if baseline else NO_BOXES if not ids else ""
    changed = len([cell for cell in board.cells if (cell.part == "early" and count) or (cell.part == "late" and rest)])
    cells = f"{changed} cell{'s' * (changed != 1)} changed by hand." if changed else "Click a cell to change it."
    return {
        "names": list(names), "early": early, "late": late, "labels": labels, "why": why, "idle": idle,
        "note": idle or cells, "live": {"early": count > 0, "late": rest > 0},
    }  # fmt: skip


def _steps(which: str, count: int) -> str:
    return f"{which} step" if count == 1 else f"{which} {count} steps"

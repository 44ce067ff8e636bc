"""What one user has: a picture, the last plan, the matrix, the job under way, the results so far. Never on disk."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from replan.demo.board import Board

if TYPE_CHECKING:
    from PIL.Image import Image

    from replan.demo.boxes import Drawn
    from replan.demo.settings import Settings
    from replan.types import Edit, Plan

MOST_ENTRIES = 12
MOST_PIXELS = 200_000_000  # of all the pictures in one history: 0.6 GB


class Job:
    """One press of a button: waiting in the queue, then running, then over.

    `cancelled` is set by the user or when the page goes away, and read after each step.
    """

    __slots__ = ("_lock", "cancelled", "stage")

    def __init__(self) -> None:
        self.cancelled = False
        self.stage: Literal["waiting", "running", "over"] = "waiting"
        self._lock = threading.Lock()

    def start(self) -> bool:
        """Its turn has come; False when it was cancelled before that."""
        with self._lock:
            if not self.cancelled:
                self.stage = "running"
            return not self.cancelled

    def cancel(self) -> bool:
        """Ask it to stop; True when it was still waiting, so that it will never start."""
        with self._lock:
            self.cancelled = True
            return self.stage == "waiting"


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished run in the history, with everything that restoring it takes."""

    source: Image
    name: str
    instruction: str
    prompt: str
    plan: Plan | None
    drawn: Drawn
    settings: Settings
    board: Board
    edits: tuple[Edit, ...]

    @property
    def pixels(self) -> int:
        """How many pixels its pictures have."""
        return sum(picture.width * picture.height for picture in (self.source, *(edit.image for edit in self.edits)))


@dataclass(slots=True)
class Session:
    """Belongs to one open page; Gradio keeps it by that page's own key and drops it after the page has gone."""

    picture: Image | None = None
    name: str = "picture.png"
    plan: Plan | None = None
    board: Board | None = None
    job: Job | None = None
    edits: tuple[Edit, ...] = ()
    chosen: int = 0
    entries: list[Entry] = field(default_factory=list)

    def remember(self, entry: Entry) -> None:
        """Put a run in front of the history; the oldest ones make room."""
        self.entries.insert(0, entry)
        del self.entries[MOST_ENTRIES:]
        while len(self.entries) > 1 and sum(one.pixels for one in self.entries) > MOST_PIXELS:
            self.entries.pop()

    def show(self, picture: Image, name: str) -> None:
        """Start over with another picture; the history stays."""
        self.picture, self.name, self.plan = picture, name, None
        self.edits, self.chosen = (), 0
        self.board = None if self.board is None else Board(self.board.preset, self.board.share)

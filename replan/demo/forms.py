"""The controls as one record: what a handler is given, checked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from replan.demo.boxes import Drawn, drawn_plan, read_canvas
from replan.demo.settings import MOST_SEED, Settings
from replan.errors import ConfigError
from replan.types import Plan, Size

MOST_WORDS = 2000


@dataclass(frozen=True, slots=True)
class Form:
    """Values of the controls, in the order of `app.Ui.form`; unchecked until `settings` or `plan` reads them."""

    instruction: str
    prompt: str
    canvas: Any
    backbone: str
    planner: str
    seed: float | None
    random_seed: bool
    steps: float
    guidance: float
    expand: float
    candidates: float
    keep_background: bool
    baseline: bool

    def words(self) -> str:
        """The instruction. Raises ConfigError when it is empty or far too long."""
        text = _text(self.instruction, "the instruction")
        if not text:
            raise ConfigError("The instruction is empty: say what to change, then press the button again.")
        return text

    def settings(self) -> Settings:
        """The panel. Raises ConfigError."""
        return Settings(
            str(self.backbone), str(self.planner), int(self.seed or 0), int(self.steps), float(self.guidance),
            float(self.expand), int(self.candidates), bool(self.keep_background), bool(self.baseline),
        )  # fmt: skip

    def drawn(self, size: Size) -> Drawn:
        """The canvas. Raises PlanError."""
        return read_canvas(self.canvas, size)

    def plan(self, drawn: Drawn, size: Size, reasoning: str) -> Plan | None:
        """The plan on screen, None without boxes and prompt. Raises PlanError, ConfigError."""
        return drawn_plan(drawn, _text(self.prompt, "the global prompt"), size, reasoning)


def with_seed(settings: Settings, random: bool) -> Settings:
    """The settings with a new seed if one is wanted."""
    return replace(settings, seed=secrets.randbelow(MOST_SEED + 1)) if random else settings


def _text(value: object, name: str) -> str:
    text = str(value or "").strip()
    if len(text) > MOST_WORDS:
        raise ConfigError(f"{name} has {len(text)} characters: at most {MOST_WORDS}; shorten it")
    return text

"""The settings panel: checked values, the EditConfig they mean, and the command line that does the same."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from replan import config
from replan.demo.board import Board, mask_config
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.backbones.base import EditConfig

MOST_STEPS, MOST_CANDIDATES, MOST_SEED = 100, 8, 2**32 - 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the panel says. Raises ConfigError for values that its controls would not give."""

    backbone: str
    planner: str
    seed: int
    steps: int
    guidance: float
    expand: float
    candidates: int
    keep_background: bool
    baseline: bool

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seed", 0, MOST_SEED),
            ("steps", 1, MOST_STEPS),
            ("guidance", 0, 30),
            ("expand", 0, 1),
            ("candidates", 1, MOST_CANDIDATES),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"{name} = {value!r}: must lie between {least} and {most}")


def edit_config(settings: Settings, board: Board, ids: Sequence[int], own: EditConfig) -> EditConfig:
    """The backbone's settings `own` with what the panel and the matrix say."""
    mask = mask_config(board, ids, own.mask, settings.expand)
    guided = {"true_cfg" if own.guided else "guidance": settings.guidance}
    return replace(own, steps=settings.steps, mask=mask, keep_background=settings.keep_background, **guided)


def strength(own: EditConfig) -> float:
    """What the guidance control means for a backbone: the true CFG scale where it runs with one."""
    return own.true_cfg if own.guided and own.true_cfg is not None else own.guidance


def command(name: str, instruction: str, settings: Settings, wanted: EditConfig, own: EditConfig, plan: bool) -> str:
    """The shell command that repeats the state on screen, run beside the saved picture and plan.json."""
    words = ["replan", "edit", f"./{name}"]
    if instruction.strip() or not plan:
        words.append(instruction.strip())
    if settings.baseline:
        words.append("--baseline")
    elif plan:
        words += ["--plan", "plan.json"]
    mini = "mini"
    if settings.backbone != mini:
        words += ["--backbone", settings.backbone]
    if not plan and not settings.baseline and settings.planner != mini:
        words += ["--planner", settings.planner]
    words += ["--seed", str(settings.seed)]
    words += _changed("--steps", wanted.steps, own.steps)
    words += _changed("--guidance", strength(wanted), strength(own))
    words += _changed("--expand", wanted.mask.expand, own.mask.expand)
    plain, before = config.dump(wanted.mask), config.dump(own.mask)
    shown = ("expand", "isolate", "rules")  # by the words around this
    words += [f"mask.{k}={json.dumps(plain[k])}" for k in plain if k not in shown and plain[k] != before[k]]
    if wanted.mask.rules:
        phases = [config.dump(phase) for phase in wanted.mask.rules]
        words.append(f"mask.rules={json.dumps(phases)}")
    else:
        words += _changed("--isolate", wanted.mask.isolate, own.mask.isolate)
    if wanted.keep_background != own.keep_background:
        words.append("--keep-background" if wanted.keep_background else "keep_background=false")
    if settings.candidates > 1:
        words += ["--candidates", str(settings.candidates), "-o", "edited"]
    else:
        words += ["-o", "edited.png"]
    return shlex.join(words)


def _changed(flag: str, value: Any, own: Any) -> list[str]:
    return [] if value == own else [flag, f"{value:g}" if isinstance(value, float) else str(value)]


def safe_name(path: str) -> str:
    """A file name from an uploaded one: letters, digits, `-` and `_` only, short, and always a .png."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(path.replace("\\", "/")).stem)[:40].strip("-")
    return f"{stem or 'picture'}.png"

"""The settings panel: checked values, the EditConfig they mean, and the command line that does the same."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from replan import config
from replan.demo.board import Board, mask_config
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.backbones.base import EditConfig
    from replan.backbones.runtime import Runtime

SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)  # as the command line tells a setting from an instruction
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


def command(
    name: str, instruction: str, settings: Settings, wanted: EditConfig, own: EditConfig, *,
    plan: bool, runtime: Sequence[str] = (),
) -> str:  # fmt: skip
    """The shell command that repeats the state on screen, run beside the saved picture and plan.json.

    `runtime` are the options that the demo itself was started with.
    """
    words, options, more = [f"./{name}"], [], _masks(wanted, own)
    text = instruction.strip()
    # beside a plan the instruction is a note, and one written key=value would be read as a setting
    if not plan or (text and (settings.baseline or not SETTING.fullmatch(text))):
        words.append(text)
    if settings.baseline:
        options.append("--baseline")
    elif plan:
        options += ["--plan", "plan.json"]
    mini = "mini"
    if settings.backbone != mini:
        options += ["--backbone", settings.backbone]
    if not plan and not settings.baseline and settings.planner != mini:
        options += ["--planner", settings.planner]
    options += ["--seed", str(settings.seed)]
    options += _changed("--steps", wanted.steps, own.steps)
    options += _changed("--guidance", strength(wanted), strength(own))
    options += _changed("--expand", wanted.mask.expand, own.mask.expand)
    if not wanted.mask.rules:
        options += _changed("--isolate", wanted.mask.isolate, own.mask.isolate)
    if wanted.keep_background != own.keep_background:
        options.append("--keep-background" if wanted.keep_background else "keep_background=false")
    options += runtime
    options += ["--candidates", str(settings.candidates)] if settings.candidates > 1 else []
    options += ["-o", "edited" if settings.candidates > 1 else "edited.png"]
    if text.startswith("-"):  # an instruction that looks like an option
        return shlex.join(["replan", "edit", *options, "--", *words, *more])
    return shlex.join(["replan", "edit", *words, *options, *more])


def _masks(wanted: EditConfig, own: EditConfig) -> list[str]:
    """Settings of the mask that no option of the command line has."""
    plain, before = config.dump(wanted.mask), config.dump(own.mask)
    shown = ("expand", "isolate", "rules")
    words = [f"mask.{k}={json.dumps(plain[k])}" for k in plain if k not in shown and plain[k] != before[k]]
    if wanted.mask.rules:
        phases = [config.dump(phase) for phase in wanted.mask.rules]
        words.append(f"mask.rules={json.dumps(phases)}")
    return words


def runtime_words(runtime: Runtime) -> tuple[str, ...]:
    """The options that make `replan edit` run its models as this demo does; a file is named by its full path."""
    words: list[str] = []
    for field in fields(runtime):
        value, flag = getattr(runtime, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        if value is True:
            words.append(flag)
        for one in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
            words += [flag, str(Path(one).resolve()) if Path(one).exists() else one]
    return tuple(words)


def _changed(flag: str, value: Any, own: Any) -> list[str]:
    return [] if value == own else [flag, f"{value:g}" if isinstance(value, float) else str(value)]


def safe_name(path: str) -> str:
    """A file name from an uploaded one: letters, digits, `-` and `_` only, short, and always a .png."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(path.replace("\\", "/")).stem)[:40].strip("-")
    return f"{stem or 'picture'}.png"

"""The default preset of speed: the fastest one whose success on the mini world is within one point of `exact`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from replan.backbones import BACKBONES, EditConfig, find
from replan.config import config_path, load
from replan.errors import ConfigError
from replan.images import write_atomic
from replan.speed import load_speed

WITHIN = 0.01  # of the success rate
LEAST = 100  # items; with fewer, a single one is more than a point
_LINE = re.compile(r"^speed:.*\n(?:[ \t]+.*\n)*", re.MULTILINE)


def fastest(presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The rule. `presets`: a report's rows, with the mean success and the speed-up of each."""
    least = presets["exact"]["success"]["mean"] - WITHIN - 1e-9
    fine = [name for name, row in presets.items() if row["success"]["mean"] >= least]
    return max(fine, key=lambda name: presets[name]["speedup"])


def settings_of(backbone: str) -> tuple[str, ...]:
    """The settings that a measured mini editor speaks for: its own and those of published editors of its very pipeline.

    Raises as `find`.
    """
    row = find(backbone)[0]
    others = [other.config for other in BACKBONES if other.pipeline == row.pipeline]
    return tuple(dict.fromkeys([row.config, *others]))


def set_default(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Write the report's default into every file that it speaks for, and say which these are.

    Raises ConfigError on a report of too few items.
    """
    if report["count"] < LEAST:
        raise ConfigError(f"n = {report['count']}: a default rests on {LEAST} items or more")
    names = settings_of(report["backbone"])
    for name in names:
        path = config_path(name)
        text = _LINE.sub("", path.read_text(encoding="utf-8").rstrip("\n") + "\n").rstrip("\n")
        line = f"speed: {report['default']}  # measured: the fastest within one point of exact (replan bench quality)"
        write_atomic(path, f"{text}\n{line}\n".encode())
        assert load(EditConfig, name).speed == load_speed(report["default"])
    return names

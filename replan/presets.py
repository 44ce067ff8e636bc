"""Named attention rules: configs/rules/NAME.yaml, or a file of the user's own, as settings over a backbone's mask.

A file holds rules alone (replan.rules says how they are written), or settings of MaskConfig with the rules among them:

    pooled: none
    rules:
      - until: 0.5
        from: local
      - from: paper
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from replan import config
from replan.errors import ConfigError
from replan.rules import MaskConfig, load_rules

FOLDER = "rules"
_SETTINGS = frozenset(field.name for field in dataclasses.fields(MaskConfig))


def preset_names() -> list[str]:
    """Every preset that comes with the package, sorted."""
    prefix = f"{FOLDER}/"
    return [name.removeprefix(prefix) for name in config.config_names() if name.startswith(prefix)]


def preset_path(spec: str | Path) -> Path:
    """The file of a preset's name, or the file itself. Raises ConfigError for a name that is neither."""
    path = Path(spec)
    if isinstance(spec, Path) or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return path
    names = preset_names()
    if str(spec) not in names:
        close = config.nearest(str(spec), names)
        raise ConfigError(f"rules {str(spec)!r}: unknown{close}; use {', '.join(names)}, or a YAML file")
    return config.config_path(f"{FOLDER}/{spec}")


def load_preset(spec: str | Path) -> dict[str, Any]:
    """Settings of MaskConfig by name: always `rules`, and whatever else the file sets. Raises ConfigError."""
    path = preset_path(spec)
    phases = load_rules(path)  # says everything that is wrong with the file or its rules
    content: Any = config.parse_yaml(path.read_text(encoding="utf-8"), str(path))
    settings = dict(content) if isinstance(content, dict) and FOLDER in content else {}
    unknown = [str(key) for key in settings if key not in _SETTINGS]
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: unknown{config.nearest(unknown[0], _SETTINGS)}")
    return settings | {"rules": phases}


def apply_preset(mask: MaskConfig, spec: str | Path) -> MaskConfig:
    """`mask` with a preset's settings over it. Raises ConfigError."""
    try:
        return dataclasses.replace(mask, **load_preset(spec))
    except ConfigError as error:
        raise ConfigError(f"rules {spec}: {error}") from error


def spelled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an edit in which `rules: NAME` stands for the preset's settings of `mask`."""
    given = dict(values)
    spec = given.pop("rules", None)
    if spec is None:
        return given
    if not isinstance(spec, str | Path):
        raise ConfigError(f"rules = {spec!r}: must be a preset's name ({', '.join(preset_names())}) or a file")
    preset = load_preset(spec)
    preset["rules"] = [config.dump(phase) for phase in preset["rules"]]
    return given | {"mask": preset | dict(given.get("mask") or {})}

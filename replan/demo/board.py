"""Who reads whom, as the user sets it: a preset, the share of steps under the locality rules, and single cells.

Cells are remembered by the region's id, not by its number: deleting or reordering a region moves no rule to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from replan import config
from replan.errors import ConfigError
from replan.presets import apply_preset
from replan.rules import (
    MaskConfig,
    Role,
    RoleKind,
    RulePhase,
    Rules,
    builtin_rules,
    load_rules,
    phase_rules,
    roles,
    spell,
)

OWN = "backbone"
PREFIX = "rules/"
Part = Literal["early", "late"]
Name = tuple[RoleKind, int]  # a role by its region's id instead of its number; 0 = no region


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell that the user set."""

    part: Part
    reader: Name
    read: Name
    on: bool


@dataclass(frozen=True, slots=True)
class Board:
    """The state of the matrix. `share` of the steps follows the early (locality) rules, the rest the late ones."""

    preset: str = OWN
    share: float = 0.0
    cells: tuple[Cell, ...] = ()

    def toggled(self, part: str, reader: Name, read: Name, on: bool) -> Board:
        """The board with one cell set. Raises ConfigError for a part that does not exist or a role's own cell."""
        if part not in get_args(Part) or reader == read:
            raise ConfigError(f"{part}: this cell cannot be changed")
        cell = Cell("early" if part == "early" else "late", reader, read, on)
        others = [c for c in self.cells if (c.part, c.reader, c.read) != (cell.part, reader, read)]
        return replace(self, cells=(*others, cell))


def presets() -> list[str]:
    """The backbone's own rules, then every rules file in configs/ that has one or two phases."""
    files = [name for name in config.config_names() if name.startswith(PREFIX)]
    return [OWN, *(name.removeprefix(PREFIX) for name in files if len(load_rules(config.config_path(name))) <= 2)]


def with_preset(preset: str, own: MaskConfig) -> Board:
    """A fresh board for a preset; its share is the preset's own. Raises ConfigError for an unknown one."""
    if preset not in presets():
        raise ConfigError(f"preset {preset!r}: there are {', '.join(presets())}")
    if preset == OWN:
        return Board(OWN, own.isolate)
    phases = load_rules(config.config_path(PREFIX + preset))
    return Board(preset, phases[0].until if len(phases) == 2 else 0.0)


def tables(board: Board, ids: Sequence[int], own: MaskConfig) -> tuple[Rules, Rules]:
    """(early, late) rules for regions with these ids: the preset's, then the user's cells whose regions still exist."""
    count, own = len(ids), _under(board.preset, own)
    if board.preset == OWN:
        early = builtin_rules(count, own, isolated=True)
        late = builtin_rules(count, own, isolated=False)
    else:
        phases = load_rules(config.config_path(PREFIX + board.preset))
        late = phase_rules(phases[-1], count, own)
        # a preset without a phase of its own for the early steps lends its rules minus what locality forbids
        early = phase_rules(phases[0], count, own) if len(phases) == 2 else _local(late)
    return _with_cells(early, board, "early", ids), _with_cells(late, board, "late", ids)


def _under(preset: str, own: MaskConfig) -> MaskConfig:
    """The backbone's settings with those that a preset has beside its rules, such as the pooled vector's prompt."""
    return own if preset == OWN else replace(apply_preset(own, preset), rules=own.rules)


def _local(rules: Rules) -> Rules:
    inside = {role for role in rules if role.kind is RoleKind.NOISE_REGION}
    return {q: k - inside if q.kind is RoleKind.NOISE_BACKGROUND else k for q, k in rules.items()}


def _with_cells(rules: Rules, board: Board, part: Part, ids: Sequence[int]) -> Rules:
    table = dict(rules)
    for cell in board.cells:
        reader, read = role_of(cell.reader, ids), role_of(cell.read, ids)
        if cell.part == part and reader is not None and read is not None:
            table[reader] = table[reader] | {read} if cell.on else table[reader] - {read}
    return table


def role_of(name: Name, ids: Sequence[int]) -> Role | None:
    """The role that a name stands for now; None when its region is gone."""
    kind, ident = name
    if ident == 0:
        return Role(kind)
    return Role(kind, ids.index(ident) + 1) if ident in ids else None


def name_of(role: Role, ids: Sequence[int]) -> Name:
    """A role's lasting name."""
    return role.kind, ids[role.index - 1] if role.index else 0


def mask_config(board: Board, ids: Sequence[int], own: MaskConfig, expand: float) -> MaskConfig:
    """The settings that carry out a board; rules are spelled out only where the built-in ones do not say the same."""
    plain = replace(_under(board.preset, own), expand=expand, isolate=board.share)
    if not ids:
        return plain
    early, late = tables(board, ids, own)
    as_built_in = (builtin_rules(len(ids), plain, isolated=True), builtin_rules(len(ids), plain, isolated=False))
    if (early, late) == as_built_in:
        return replace(plain, rules=())
    phases: list[RulePhase] = []
    if board.share > 0:
        phases.append(spell(early, board.share))
    if board.share < 1:
        phases.append(spell(late))
    return replace(plain, rules=tuple(phases))


def early_steps(share: float, steps: int) -> int:
    """How many of the steps follow the early rules."""
    return int(share * steps)


def role_at(position: object, regions: int, *, vision: bool) -> Role:
    """The role in a row or column of the shown table. Raises ConfigError for a place outside of it."""
    known = [role for role in roles(regions) if vision or role.kind is not RoleKind.VISION]
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < len(known):
        raise ConfigError(f"cell {position!r}: the table has {len(known)} rows")
    return known[position]

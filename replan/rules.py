"""Who reads whom: roles, the built-in rules, and rules of the user's own. Pure Python, no torch.

Every token of the joint sequence plays one role, or several where boxes overlap. A rule lets one role read another;
a token reads another token as soon as any of its roles may read any of the other's.

A rules file (YAML or JSON) has one line per reader: its name, then the names that it reads.

    main: main, vision, region *, background
    vision: all
    hint i: vision, hint i, region *, background
    region i: main, vision, hint i, region *, background
    background: main, vision, region *, background

Names:   main | vision | hint N | region N | noise region N | ref region N
         background | noise background | ref background | noise | ref | image | text | all
         "region" and "background" are the noise and the reference tokens together; "vision" is the picture as the text
         encoder saw it (Qwen only).
N:       a number from 1, `*` (all), `i` (the reader's own number), `j` (every number but the reader's own).
Edits:   `-name` and `+name` take from, or add to, what the reader read before; without a sign the line starts anew.
Order:   later lines win. A reader without a line reads what `from` gives it. Every role always reads itself.
Phases:  a list instead of one mapping; each phase holds until its share of the steps is over (the last: 1.0, may be
         left out). `from: paper` starts with the built-in rules (as set by mutual, symmetric, ...), `from: local` with
         the locality rules; without it a reader reads only itself.

    - until: 0.5
      from: local
      hint i: -background
    - from: paper
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from replan.errors import ConfigError, PlanError

MAX_REGIONS = 19  # three roles per region and four more must fit the 62 usable bits of an int64


class RoleKind(Enum):
    """What a token is; the value is its name in a rules file."""

    MAIN = "main"
    VISION = "vision"
    HINT = "hint"
    NOISE_REGION = "noise region"
    NOISE_BACKGROUND = "noise background"
    REF_REGION = "ref region"
    REF_BACKGROUND = "ref background"


_REGIONS = (RoleKind.NOISE_REGION, RoleKind.REF_REGION)
_NUMBERED = (RoleKind.HINT, *_REGIONS)
_REFERENCE = (RoleKind.REF_REGION, RoleKind.REF_BACKGROUND)
_IMAGE = (RoleKind.NOISE_REGION, RoleKind.NOISE_BACKGROUND, RoleKind.REF_REGION, RoleKind.REF_BACKGROUND)

# A name in a rules file -> the kinds it stands for. Names of the second table take a number, `*`, `i` or `j`.
_PLAIN_NAMES: Mapping[str, tuple[RoleKind, ...]] = {
    "main": (RoleKind.MAIN,),
    "vision": (RoleKind.VISION,),
    "noise background": (RoleKind.NOISE_BACKGROUND,),
    "ref background": (RoleKind.REF_BACKGROUND,),
    "background": (RoleKind.NOISE_BACKGROUND, RoleKind.REF_BACKGROUND),
    "noise": (RoleKind.NOISE_REGION, RoleKind.NOISE_BACKGROUND),
    "ref": (RoleKind.REF_REGION, RoleKind.REF_BACKGROUND),
    "image": _IMAGE,
    "text": (RoleKind.MAIN, RoleKind.VISION, RoleKind.HINT),
    "all": tuple(RoleKind),
}
_NUMBERED_NAMES: Mapping[str, tuple[RoleKind, ...]] = {
    "hint": (RoleKind.HINT,),
    "noise region": (RoleKind.NOISE_REGION,),
    "ref region": (RoleKind.REF_REGION,),
    "region": _REGIONS,
}


@dataclass(frozen=True, slots=True)
class Role:
    """One part of the joint sequence. `index` counts regions from 1 for hints and regions, and is 0 otherwise."""

    kind: RoleKind
    index: int = 0

    def __post_init__(self) -> None:
        if (self.index > 0) != (self.kind in _NUMBERED):
            raise ValueError(f"role {self.kind.value} {self.index}: hints and regions count from 1, others are 0")

    @property
    def name(self) -> str:
        """As a rules file spells it: "hint 1", "noise background"."""
        return f"{self.kind.value} {self.index}" if self.index else self.kind.value


Rules = Mapping[Role, frozenset[Role]]  # reader -> what it reads


def roles(regions: int) -> tuple[Role, ...]:
    """Every role of a plan with that many regions: 3 * regions + 4, in a fixed order.

    Raises PlanError above MAX_REGIONS.
    """
    if not 0 <= regions <= MAX_REGIONS:
        raise PlanError(f"the plan has {regions} regions: at most {MAX_REGIONS} fit one mask; merge or drop some")
    return tuple(
        Role(kind, index) for kind in RoleKind for index in (range(1, regions + 1) if kind in _NUMBERED else (0,))
    )


Base = Literal["nothing", "paper", "local"]


@dataclass(frozen=True, slots=True)
class RulePhase:
    """Rules that hold until a share of the steps is over.

    `rows` are lines of a rules file ("hint i: -background"), applied in order to what `base` gives; they may use
    wildcards, so one phase fits plans with any number of regions. Raises ConfigError on an unknown name.
    """

    until: float
    rows: tuple[str, ...] = ()
    base: Base = "nothing"

    def __post_init__(self) -> None:
        if not 0.0 < _number("until", self.until) <= 1.0:
            raise ConfigError(f"until = {self.until}: is a share of the steps and must lie in (0, 1]")
        if self.base not in get_args(Base):
            raise ConfigError(f"from: {self.base}: unknown{_nearest(str(self.base), get_args(Base))}")
        for row in self.rows:
            _parse_row(row)


@dataclass(frozen=True, slots=True)
class MaskConfig:
    """Everything that decides who reads whom.

    expand             each side of a box moves out by this share of its width or height
    isolate            share of the steps under the locality rules: background noise does not read region noise
    mutual             regions read each other
    symmetric          a hint reads only its own region (and the image prompt), not the whole picture
    hide_main          the main prompt and the image prompt are read by nobody
    region_reads_main  regions read the main prompt beside their own hint
    pooled             which prompt feeds a pooled text vector, where a backbone has one
    rules              rules of the user's own; they replace the built-in schedule (`isolate`)
    """

    expand: float
    isolate: float
    mutual: bool = True
    symmetric: bool = False
    hide_main: bool = False
    region_reads_main: bool = True
    pooled: Literal["main", "hints", "none"] = "main"
    rules: tuple[RulePhase, ...] = ()

    def __post_init__(self) -> None:
        if _number("expand", self.expand) < 0.0:
            raise ConfigError(f"expand = {self.expand}: must be 0 or more (0.15 = 15 % on each side)")
        if not 0.0 <= _number("isolate", self.isolate) <= 1.0:
            raise ConfigError(f"isolate = {self.isolate}: is a share of the steps and must lie in [0, 1]")
        for name in ("mutual", "symmetric", "hide_main", "region_reads_main"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be true or false")
        if self.pooled not in ("main", "hints", "none"):
            raise ConfigError(f"pooled = {self.pooled!r}: must be main, hints or none")
        _check_schedule(self.rules)


def builtin_rules(regions: int, config: MaskConfig, *, isolated: bool) -> Rules:
    """The published rules with the switches of `config`; `isolated` cuts background noise off from region noise."""
    everything = roles(regions)
    return {query: frozenset(key for key in everything if _reads(query, key, config, isolated)) for query in everything}


def _reads(query: Role, key: Role, config: MaskConfig, isolated: bool) -> bool:
    """One cell of the built-in matrix."""
    same = query.index == key.index
    if query == key:
        return True
    if config.hide_main and key.kind in (RoleKind.MAIN, RoleKind.VISION):
        return False
    if RoleKind.VISION in (query.kind, key.kind):
        return True
    if query.kind is RoleKind.MAIN:
        return key.kind is not RoleKind.HINT
    if query.kind is RoleKind.HINT:
        return key.kind in _IMAGE and (not config.symmetric or (key.kind in _REGIONS and same))
    if key.kind is RoleKind.MAIN:
        return config.region_reads_main or query.kind not in _REGIONS
    if key.kind is RoleKind.HINT:
        return query.kind in _REGIONS and same
    if query.kind in _REGIONS and key.kind in _REGIONS:
        return config.mutual or same
    return not (isolated and query.kind is RoleKind.NOISE_BACKGROUND and key.kind is RoleKind.NOISE_REGION)


def phase_rules(phase: RulePhase, regions: int, config: MaskConfig) -> Rules:
    """The user's rules spelled out for a plan with that many regions.

    Raises ConfigError when a line names a region that the plan has not, or stops a role from reading itself.
    """
    if phase.base == "nothing":
        table = {role: frozenset({role}) for role in roles(regions)}
    else:
        table = dict(builtin_rules(regions, config, isolated=phase.base == "local"))
    for row in phase.rows:
        query, entries = _parse_row(row)
        for reader in _select(query, 0, regions, row):
            table[reader] = _edit(table[reader], reader, entries, regions, row)
    return table


def isolate_reference(rules: Rules) -> Rules:
    """The same rules, but reference tokens read only those reference tokens that they read before."""
    return {
        query: frozenset(key for key in keys if key.kind in _REFERENCE) if query.kind in _REFERENCE else keys
        for query, keys in rules.items()
    }


def schedule(regions: int, config: MaskConfig) -> tuple[tuple[float, Rules], ...]:
    """(until this share of the steps, rules) in ascending order; the last is 1.0."""
    if config.rules:
        return tuple((phase.until, phase_rules(phase, regions, config)) for phase in config.rules)
    parts: list[tuple[float, Rules]] = []
    if config.isolate > 0.0:
        parts.append((config.isolate, builtin_rules(regions, config, isolated=True)))
    if config.isolate < 1.0:
        parts.append((1.0, builtin_rules(regions, config, isolated=False)))
    return tuple(parts)


def spell(rules: Rules, until: float = 1.0) -> RulePhase:
    """Rules as a phase with one explicit line per role: what a rules file without wildcards would say."""
    return RulePhase(until, tuple(f"{q.name}: {', '.join(k.name for k in rules if k in rules[q])}" for q in rules))


def matrix(rules: Rules, *, vision: bool = True) -> tuple[tuple[str, ...], tuple[tuple[bool, ...], ...]]:
    """Role names, and the square table [reader][read]; `vision=False` leaves the image prompt out (Flux has none)."""
    shown = [role for role in rules if vision or role.kind is not RoleKind.VISION]
    return tuple(role.name for role in shown), tuple(tuple(key in rules[query] for key in shown) for query in shown)


def load_rules(path: str | Path, regions: int | None = None) -> tuple[RulePhase, ...]:
    """Read a rules file for `MaskConfig.rules`; with `regions` given, also check that its numbers fit such a plan.

    Raises ConfigError on a missing or unreadable file, an unknown name, or phases out of order.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"rules file {path}: cannot be read ({error})") from error
    if isinstance(content, dict) and "rules" in content:  # settings with the rules among them: replan.presets
        content = content["rules"]
    items = content if isinstance(content, list) else [content]
    if not items or not all(isinstance(item, dict) and item for item in items):
        raise ConfigError(f"rules file {path}: must hold lines such as `hint i: hint i, region i`, or a list of phases")
    try:
        phases = tuple(_phase(item, last=number == len(items)) for number, item in enumerate(items, 1))
        _check_schedule(phases)
        if regions is not None:
            for phase in phases:
                phase_rules(phase, regions, MaskConfig(expand=0.0, isolate=0.0))
    except ConfigError as error:
        raise ConfigError(f"rules file {path}: {error}") from error
    return phases


def _phase(item: Mapping[Any, Any], *, last: bool) -> RulePhase:
    """One mapping of a rules file."""
    rows = {str(name): reads for name, reads in item.items() if name not in ("until", "from")}
    if "until" not in item and not last:
        raise ConfigError("every phase but the last needs `until`, a share of the steps in (0, 1]")
    return RulePhase(
        until=item.get("until", 1.0),
        rows=tuple(f"{name}: {_entries(name, reads)}" for name, reads in rows.items()),
        base=item.get("from", "nothing"),
    )


def _entries(name: str, reads: Any) -> str:
    """A line's right side, given as text or as a list, as text."""
    parts = reads if isinstance(reads, list) else [] if reads is None else [reads]
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{name}: {reads!r}: must be names, separated by commas or as a list")
    return ", ".join(parts)


def _check_schedule(phases: Sequence[RulePhase]) -> None:
    ends = [phase.until for phase in phases]
    if any(late <= early for early, late in pairwise(ends)) or (ends and ends[-1] != 1.0):
        raise ConfigError(f"rule phases end at {ends}: shares must grow and the last must be 1.0")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r}: must be a finite number")
    return float(value)


Name = tuple[str, str]  # ("region", "i"), ("main", "")


def _parse_row(row: str) -> tuple[Name, tuple[tuple[str, Name], ...]]:
    """ "hint i: -background" -> (("hint", "i"), (("-", ("background", "")),))."""
    query, colon, right = row.partition(":")
    if not colon:
        raise ConfigError(f"rule `{row}`: must read `name: names it reads`")
    entries = tuple(_parse_entry(part, row) for part in right.split(",") if part.strip())
    if len({sign == "" for sign, _ in entries}) > 1:
        raise ConfigError(f"rule `{row}`: either all names carry + or -, or none")
    name = _parse_name(query, row)
    if name[1] == "j":
        raise ConfigError(f"rule `{row}`: `j` means another region than the reader's; on the left write `{name[0]} i`")
    return (name[0], "*" if name[1] == "i" else name[1]), entries  # on the left, i runs over all


def _parse_entry(text: str, row: str) -> tuple[str, Name]:
    text = text.strip()
    sign = text[0] if text[0] in "+-" else ""
    return sign, _parse_name(text[len(sign) :], row)


def _parse_name(text: str, row: str) -> Name:
    """Split a name from its number; raise ConfigError with the nearest known name."""
    words = text.lower().split()
    number = words.pop() if words and re.fullmatch(r"[0-9]{1,3}|[*ij]", words[-1]) else ""
    name = " ".join(words)
    if name in _NUMBERED_NAMES and number and number != "0":
        return name, number
    if name in _PLAIN_NAMES and not number:
        return name, ""
    if name in _NUMBERED_NAMES:
        raise ConfigError(f"rule `{row}`: `{text.strip()}` needs a number from 1, or *, i or j: `{name} *`")
    if name in _PLAIN_NAMES:
        raise ConfigError(f"rule `{row}`: `{name}` takes no number; write `{name}`")
    known = [*_PLAIN_NAMES, *_NUMBERED_NAMES] if not number else list(_NUMBERED_NAMES)
    raise ConfigError(f"rule `{row}`: `{text.strip()}` is unknown{_nearest(name, known, number)}")


def _nearest(name: str, known: Iterable[str], number: str = "") -> str:
    """ " (did you mean ...?)" with the closest known name, or the list of all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        return f" (known: {', '.join(known)})"
    tail = f" {number or '*'}" if close[0] in _NUMBERED_NAMES else ""
    return f" (did you mean {close[0]}{tail}?)"


def _select(name: Name, own: int, regions: int, row: str) -> list[Role]:
    """The roles that a name stands for, seen from a reader with number `own` (0 = it has none)."""
    text, number = name
    if not number:
        return [role for role in roles(regions) if role.kind in _PLAIN_NAMES[text]]
    if number.isdigit() and int(number) > regions:
        raise ConfigError(f"rule `{row}`: there is no {text} {number}, the plan has {regions} regions")
    indices = {"*": set(range(1, regions + 1)), "i": {own}, "j": set(range(1, regions + 1)) - {own}}
    chosen = indices[number] if number in indices else {int(number)}
    return [role for role in roles(regions) if role.kind in _NUMBERED_NAMES[text] and role.index in chosen]


def _edit(
    before: frozenset[Role], reader: Role, entries: Sequence[tuple[str, Name]], regions: int, row: str
) -> frozenset[Role]:
    """What `reader` reads after one line."""
    after = set(before) if entries and entries[0][0] else {reader}
    for sign, name in entries:
        if name[1] in ("i", "j") and not reader.index:
            raise ConfigError(f"rule `{row}`: {reader.name} has no number, so `{' '.join(name)}` is unclear; use *")
        chosen = _select(name, reader.index, regions, row)
        if sign == "-" and reader in chosen:
            instead = f"; write `-{name[0]} j`" if name[1] == "*" else ""
            raise ConfigError(f"rule `{row}`: {reader.name} must read itself, or it might read nothing{instead}")
        after = after - set(chosen) if sign == "-" else after | set(chosen)
    return frozenset(after)

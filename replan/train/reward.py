"""Rewards of planner training: pure functions of an answer's text and a judge's ratings.

    stage 1   R1 = 0.5 F + 0.3 K + 0.2 G        format, content, regions; at most 0.905
    stage 2   R  = P + 0.2 R1                   P = (t + e + c e) / 3 from the judge, 0 where the gate is closed
    detection                                   see replan.train.detection

All constants are the published ones. Two switches of our own stand beside them: `global_plans` and `leak_penalty`.
A judge that failed has no place here: without ratings there is no reward, see replan.train.score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

from replan.errors import ConfigError
from replan.plan import examples_in

Kind = Literal["format", "edit", "detection"]

FLAWLESS = 0.9  # regions score of a list with nothing wrong: 0.5 valid + 0.2 count + 0.2 hints
PLACEHOLDERS = ("...", "…", "text", "reasoning", "your reasoning", "prompt", "global prompt", "hint", "none")
_MOST_REGIONS = 5
_NEGATIVE = -20.0  # for an answer that repeats a placeholder: no other merit may outweigh it

_SPACES = re.compile(r"\s*([<>/])\s*")
_TAG_TEXT = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ("think", "gen_image", "region")}
_PLAN = re.compile(r"<gen_image>.*?</gen_image>(?:<region>.*?</region>)?", re.DOTALL)
_REASONED = re.compile(r"<think>.*?</think>" + _PLAN.pattern, re.DOTALL)
_HINT = re.compile(r'"hint"\s{0,4}:\s{0,4}"([^"]{1,500})"')


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Which reward, and its switches; the defaults are the published values.

    kind           format: stage 1; edit: stage 2; detection: boxes and points against known ones
    think          false: the variant without reasoning
    soft           stage 2 in its soft form: P = (T + E + max(E - 3, 0) / 5 * C) / 15
    threshold      sharp form: scores from here on count as 1
    format_weight  what R1 adds to stage 2
    gate           regions score below which a plan is not rendered at all
    longest        characters of reasoning and of the global prompt above which content is lost
    global_plans   ours: a plan without regions passes the gate, and is worth as much as one with regions when right:
                   in stage 2 by the judge, in stage 1 where the row's own answer has no regions either
    leak_penalty   ours: taken off when a region repeats a box or a hint of the prompt's example
    """

    kind: Kind = "format"
    think: bool = True
    soft: bool = False
    threshold: int = 4
    format_weight: float = 0.2
    gate: float = 0.7
    longest: int = 512
    global_plans: bool = False
    leak_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"reward.kind = {self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        if not 1 <= self.threshold <= 5:
            raise ConfigError(f"reward.threshold = {self.threshold}: scores run from 1 to 5")
        if self.leak_penalty < 0 or self.format_weight < 0:
            raise ConfigError("reward.leak_penalty and reward.format_weight: must not be negative")
        if self.longest < 1:
            raise ConfigError(f"reward.longest = {self.longest}: must be 1 or more")


@dataclass(frozen=True, slots=True)
class Examples:
    """What the prompt shows as an example and no answer may repeat: boxes, hints, reasoning."""

    boxes: frozenset[tuple[float, ...]] = frozenset()
    hints: frozenset[str] = frozenset()
    reasoning: frozenset[str] = frozenset()


@cache
def examples_of(template: str) -> Examples:
    """The examples in a prompt template (without the instruction, which may hold boxes of the user's own)."""
    return Examples(
        frozenset(examples_in(template)),
        frozenset(_plain(hint) for hint in _HINT.findall(template)),
        frozenset(_plain(text) for text in _TAG_TEXT["think"].findall(template)),
    )


@dataclass(frozen=True, slots=True)
class TextScore:
    """What an answer's text is worth by itself.

    format   F in {0, 1}
    content  K, at most 0.75
    regions  G, at most 0.9; 0 without a region list
    count    regions proposed; None: no list, or none that can be read
    leaks    regions that repeat the prompt's example
    """

    format: float
    content: float
    regions: float
    count: int | None = None
    leaks: int = 0

    @property
    def reward(self) -> float:
        """R1 of stage 1."""
        return 0.5 * self.format + 0.3 * self.content + 0.2 * self.regions

    @property
    def is_global(self) -> bool:
        """A well-formed plan without any region."""
        return self.format == 1.0 and self.count == 0


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward and the parts that it is made of, for the log."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def score_text(answer: str, examples: Examples, config: RewardConfig) -> TextScore:
    """Format, content and regions of an answer. White space around `<`, `>` and `/` does not count."""
    text = _SPACES.sub(r"\1", answer).strip()
    is_formed = (_REASONED if config.think else _PLAN).fullmatch(text) is not None and _single(text)
    listed = _section(text, "region")
    items = None if listed is None else _items(listed)
    regions, leaks = (0.0, 0) if listed is None else _score_regions(items, examples)
    count = 0 if listed is None and is_formed else None if items is None else len(items)
    return TextScore(float(is_formed), _score_content(text, listed, items, examples, config), regions, count, leaks)


def _single(text: str) -> bool:
    """No tag opens twice: a lazy match must not swallow a second plan."""
    return all(text.count(f"<{name}>") <= 1 and text.count(f"</{name}>") <= 1 for name in _TAG_TEXT)


def _score_content(
    text: str, listed: str | None, items: list[Any] | None, examples: Examples, config: RewardConfig
) -> float:
    """K. A missing tag earns nothing here (F punishes it); a placeholder or an empty global prompt costs 20."""
    step = 0.25 if config.think else 0.5
    score = 0.0 if listed is None else step if items is not None else -step
    reasoning, prompt = _section(text, "think"), _section(text, "gen_image")
    if config.think and reasoning is not None:
        score += 0.25 * min(len(reasoning) / 50, 1.0)
        score += _NEGATIVE * (_is_placeholder(reasoning) or _plain(reasoning) in examples.reasoning)
        score -= 0.25 * (len(reasoning) > config.longest)
    if prompt is not None:
        score += step * min(len(prompt) / (20 if config.think else 5), 1.0)
        score += _NEGATIVE * (not prompt or _is_placeholder(prompt))
        score -= step * (len(prompt) > config.longest)
    return score


def _score_regions(items: list[Any] | None, examples: Examples) -> tuple[float, int]:
    """G of a region list (None: not readable), and how many regions repeat the example."""
    if items is None:
        return -0.5, 0
    score, leaks, sound = 0.5, 0, 0
    score += 0.2 * (1 <= len(items) <= _MOST_REGIONS)
    for item in items:
        entry = item if isinstance(item, dict) else {}
        hint, box = entry.get("hint"), entry.get("bbox_2d")
        is_copied_hint = isinstance(hint, str) and _plain(hint) in examples.hints
        is_bad = not isinstance(hint, str) or not hint.strip() or _is_placeholder(hint) or is_copied_hint
        is_box = isinstance(box, list) and len(box) == 4 and all(_is_number(edge) for edge in box)
        is_copied_box = isinstance(box, list) and is_box and tuple(box) in examples.boxes
        score -= 1.0 * is_bad + 1.0 * (not is_box) + 1.0 * is_copied_box
        sound += not is_bad
        leaks += is_copied_box or is_copied_hint
    score += 0.2 * (0 < len(items) == sound)
    return min(score, 1.0), leaks


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def is_open(text: TextScore, config: RewardConfig) -> bool:
    """The gate: whether a plan is good enough to be rendered and judged."""
    if text.format != 1.0 or (config.leak_penalty > 0 and text.leaks):
        return False
    return text.regions >= config.gate or (config.global_plans and text.is_global)


def plan_reward(ratings: Mapping[str, int], config: RewardConfig) -> float:
    """P of the judge's target, effect and consistency, each 1 to 5; in [0, 1]. Eq. R(2) without its last term."""
    target, effect, consistency = (ratings[name] for name in ("target", "effect", "consistency"))
    if config.soft:
        return (target + effect + max(effect - 3, 0) / 5 * consistency) / 15
    t, e, c = (float(score >= config.threshold) for score in (target, effect, consistency))
    return (t + e + c * e) / 3


def format_reward(text: TextScore, config: RewardConfig, expected: str = "") -> Reward:
    """Stage 1; `expected` is the row's own answer, which need not be a plan."""
    if config.global_plans and text.is_global and score_text(expected, Examples(), config).is_global:
        text = replace(text, regions=FLAWLESS)
    leak = config.leak_penalty * bool(text.leaks)
    return Reward(text.reward - leak, _text_parts(text))


def edit_reward(text: TextScore, ratings: Mapping[str, int] | None, config: RewardConfig) -> Reward:
    """Stage 2; `ratings` is None where the gate is closed and nothing was rendered."""
    planned = 0.0 if ratings is None else plan_reward(ratings, config)
    if config.global_plans and text.is_global:  # being right earns what a flawless list of regions would
        text = replace(text, regions=max(text.regions, FLAWLESS * planned))
    value = planned + config.format_weight * text.reward - config.leak_penalty * bool(text.leaks)
    parts = _text_parts(text) | {"plan": planned, "open": float(ratings is not None)}
    if ratings is not None:
        parts["success"] = float(all(ratings[name] >= 4 for name in ("target", "effect", "consistency")))
    return Reward(value, parts)


def _text_parts(text: TextScore) -> dict[str, float]:
    return {
        "format": text.format, "content": text.content, "regions": text.regions,
        "leak": float(bool(text.leaks)), "global": float(text.is_global),
    }  # fmt: skip


# --- reading answers -------------------------------------------------------------------------------------------------


def _section(text: str, name: str) -> str | None:
    found = _TAG_TEXT[name].search(text)
    return None if found is None else found[1].strip()


def _items(listed: str) -> list[Any] | None:
    """The region list, strictly: repairs are for users, not for a policy that should learn the format."""
    try:
        value = json.loads(listed)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _plain(text: str) -> str:
    return _SPACES.sub(r"\1", text).strip().strip(".!").lower()


def _is_placeholder(text: str) -> bool:
    return text.strip().strip("[]{}()").strip().lower() in PLACEHOLDERS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Which rollouts of a batch verl trains on: pure functions of the keys and tags under which verl keeps them.

<prompt>                  {"is_prompt": True, "status": "finished" | "failure" | ..., "global_steps": step}
<prompt>_<number>_<part>  a rollout that has a reward
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from replan.train.patience import Outage

_ENDED = ("finished", "failure")  # failure: at least one rollout has no reward


def first_prompts(tags: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """The oldest `count` prompts whose rollouts have all ended, well or not."""
    ended = [key for key, tag in tags.items() if tag.get("is_prompt") and tag["status"] in _ENDED]
    return sorted(ended, key=lambda key: tags[key]["global_steps"])[:count]


def group_keys(tags: Mapping[str, Mapping[str, Any]], prompts: Sequence[str]) -> dict[str, list[str]]:
    """The rollouts of each prompt; a rollout's key is `<prompt>_<number>_<part>`."""
    groups: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    for key, tag in tags.items():
        prompt = key.partition("_")[0]
        if not tag.get("is_prompt") and prompt in groups:
            groups[prompt].append(key)
    return groups


def select(groups: Mapping[str, Sequence[str]], group: int, most_failed: float) -> tuple[list[str], dict[str, float]]:
    """The rollouts to train on, and what was lost of `group` for each prompt. Raises Outage when it was too much."""
    expected = group * len(groups)
    lost = expected - sum(map(len, groups.values()))
    alone = sum(len(keys) == 1 for keys in groups.values())
    kept = [key for keys in groups.values() if len(keys) > 1 for key in keys]
    allowed = int(most_failed * expected)
    if lost > allowed or not kept:
        raise Outage(
            f"{lost} of {expected} rollouts have no reward (services.most_failed allows {allowed}); "
            "see the warnings of the reward workers, mend the service and start the same command again"
        )
    return kept, {"rollouts/lost": float(lost), "rollouts/alone": float(alone), "rollouts/kept": float(len(kept))}


def mean_parts(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the rewards' parts, for the log."""
    values: dict[str, list[float]] = defaultdict(list)
    for told in parts:
        for name, value in told.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values[f"reward/{name}"].append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}

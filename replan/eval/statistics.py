"""Means with bootstrap intervals, and differences of paired runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, its 95 % percentile bootstrap interval, and over how many items."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Paired:
    """`other - base` over the items that both have: mean, interval, and how often the other is above, equal, below."""

    difference: Estimate
    wins: int
    ties: int
    losses: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """None without values. The resampling has its own fixed seed, so that a report can be repeated."""
    data = np.asarray(values, float)
    if not len(data):
        return None
    rng = np.random.default_rng(0)
    # a few hundred draws at a time: 2,000 x 1,000 indices would take 16 MB, 2,000 x 100,000 too much
    means = [data[rng.integers(0, len(data), (100, len(data)))].mean(1) for _ in range(DRAWS // 100)]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Estimate(float(data.mean()), float(low), float(high), len(data))


def paired(base: Sequence[float], other: Sequence[float]) -> Paired | None:
    """Values of the same items in the same order; None without any."""
    differences = [b - a for a, b in zip(base, other, strict=True)]
    found = estimate(differences)
    if found is None:
        return None
    wins, losses = sum(d > 1e-9 for d in differences), sum(d < -1e-9 for d in differences)
    return Paired(found, wins, len(differences) - wins - losses, losses)

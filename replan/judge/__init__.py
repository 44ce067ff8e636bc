"""Judges: four scores for an edit, on the published scales."""

from __future__ import annotations

from replan.judge.base import DIMENSIONS, Case, Dimension, Judge, JudgeConfig, JudgeDown, Rating, Unscored, load_judge

__all__ = ["DIMENSIONS", "Case", "Dimension", "Judge", "JudgeConfig", "JudgeDown", "Rating", "Unscored", "load_judge"]

"""A report as a picture: grouped bars with their intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from replan.errors import ConfigError
from replan.eval.markdown import TITLES
from replan.eval.report import COLUMNS, CONVENTIONS, Missing, Summary
from replan.images import write_atomic

_BARS = [column for column in COLUMNS if column != "success"]  # the others share the scale 1 .. 5


def draw(summaries: Sequence[Summary], kind: Missing, path: Path) -> None:
    """Write a picture (the suffix says which kind)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib: pip install 'replan[eval]'") from error
    form = path.suffix.lstrip(".").lower()
    if form not in ("png", "svg", "pdf"):
        raise ConfigError(f"{path}: a picture is a .png, .svg or .pdf")
    count = len(summaries)
    figure = Figure(figsize=(8.0 + 1.2 * max(0, count - 3), 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / count
    for place, summary in enumerate(summaries):
        found = [summary.table[kind][column] for column in _BARS]
        means = [one.mean if one else 0.0 for one in found]
        below = [one.mean - one.low if one else 0.0 for one in found]
        above = [one.high - one.mean if one else 0.0 for one in found]
        at = [number + (place - (count - 1) / 2) * width for number in range(len(_BARS))]
        bars = axes.bar(
            at, means, width * 0.92, yerr=[below, above], capsize=2, color=f"C{place % 10}",
            label=f"{summary.run.name} ({summary.run.scored} of {len(summary.run.rows)} scored)",
            error_kw={"lw": 1, "ecolor": "#333333"},
        )  # fmt: skip
        axes.bar_label(bars, labels=[f"{mean:.2f}" for mean in means], fontsize=7, padding=2)
    axes.set_xticks(range(len(_BARS)), [TITLES[column] for column in _BARS])
    axes.set_ylim(0, 5.6)
    axes.set_ylabel("mean score, 95 % interval")
    judge = summaries[0].run.judge["model"]
    complete = all(summary.run.scored == len(summary.run.rows) for summary in summaries)
    axes.set_title(f"Judge: {judge}; {'no score is missing' if complete else CONVENTIONS[kind]}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(3, count))
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=150)
    write_atomic(path, content.getvalue())

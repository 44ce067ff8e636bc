"""What speed costs: each preset's exact scores on the mini world, beside its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any

from replan.bench.defaults import WITHIN, fastest
from replan.bench.loops import PRESETS
from replan.eval.statistics import estimate
from replan.mini.instructions import Item
from replan.mini.judge import MiniVerdict, judge
from replan.mini.report import items, request
from replan.speed import load_speed

if TYPE_CHECKING:
    from replan.edit import Editor

ROUNDS = 5
COLUMNS = ("success", "effect", "consistency", "quality", "outside_psnr")
TOLD = 50  # items between two lines of progress


def measure(backbone: str, count: int, say: Callable[[str], None], split: str = "test") -> dict[str, Any]:
    """Scores of `count` held-out items with their exact plans, per preset, and the time of the denoising loop.

    Times are this process's CPU time over the same items, all presets and the stock editor in turn.
    """
    import torch

    from replan.bench.facts import facts
    from replan.edit import Editor

    todo = items(split, count)
    editor = Editor.load(backbone, None)
    verdicts: dict[str, list[MiniVerdict]] = {preset: [] for preset in PRESETS}
    for number, item in enumerate(todo):  # all presets of an item together: its words are encoded once
        if number % TOLD == 0:
            say(f"item {number + 1} of {count}")
        for preset in PRESETS:
            verdicts[preset].append(judge(item, _edit(editor, item, preset)))
    rows = {preset: _scores(found) | _lost(found, verdicts["exact"]) for preset, found in verdicts.items()}
    say("times")
    seconds = _times(editor, todo[: min(8, count)])
    for preset in PRESETS:
        rows[preset] |= {
            "seconds": median(seconds[preset]),
            "speedup": median(a / b for a, b in zip(seconds["stock"], seconds[preset], strict=True)),
            "speedup_over_exact": median(a / b for a, b in zip(seconds["exact"], seconds[preset], strict=True)),
        }
    return {
        "backbone": backbone,
        "split": split,
        "count": count,
        "facts": facts(torch.device("cpu")),
        "presets": rows,
        "default": fastest(rows),
    }


def _edit(editor: Editor, item: Item, preset: str) -> Any:
    own = editor.config
    editor.config = replace(own, speed=load_speed(preset))
    try:
        return editor(request(item, planned=True)).image
    finally:
        editor.config = own


def _scores(verdicts: Sequence[MiniVerdict]) -> dict[str, Any]:
    found = {name: estimate([min(float(getattr(verdict, name)), 60.0) for verdict in verdicts]) for name in COLUMNS}
    return {name: asdict(value) for name, value in found.items() if value is not None}


def _lost(verdicts: Sequence[MiniVerdict], exact: Sequence[MiniVerdict]) -> dict[str, Any]:
    """Points of success lost against `exact`, item by item on the same items."""
    pairs = zip(exact, verdicts, strict=True)
    lost = estimate([100 * (float(one.success) - float(other.success)) for one, other in pairs])
    return {} if lost is None else {"points_lost": asdict(lost)}


def _times(editor: Editor, todo: Sequence[Item]) -> dict[str, list[float]]:
    """Seconds of the denoising loop over all of `todo`, per round; the stock editor with the bare instruction."""
    from replan.denoise import sample

    backbone, own = editor.backbone, editor.config
    seconds: dict[str, list[float]] = {name: [] for name in ("stock", *PRESETS)}
    for number in range(ROUNDS):
        names = list(seconds)
        for name in names[number % 4 :] + names[: number % 4]:
            speed = load_speed("exact" if name == "stock" else name)
            total = 0.0
            for item in todo:
                plan = None if name == "stock" else item.plan
                cond = backbone.condition(request(item), plan, replace(own, speed=speed))
                noise = backbone.noise(cond)
                start = process_time()
                sample(backbone.velocity(cond), noise, cond.sigmas)
                total += process_time() - start
            seconds[name].append(total / len(todo))
    return seconds


def render(report: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    head = ("preset", "loop", "speed-up over stock", "over exact", *COLUMNS)
    lines = [
        f"{report['backbone']}: {report['count']} held-out items ({report['split']}), exact plans, exact judge; "
        f"{report['facts']['cpu']}, {report['facts']['date'][:10]}, CPU time",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for name, row in report["presets"].items():
        figures = [f"{row[c]['mean']:.2f} ({row[c]['low']:.2f} to {row[c]['high']:.2f})" for c in COLUMNS]
        times = [f"{1000 * row['seconds']:.0f} ms", f"{row['speedup']:.2f}", f"{row['speedup_over_exact']:.2f}"]
        lines.append("| " + " | ".join([name, *times, *figures]) + " |")
    told = [
        f"{name} {row['points_lost']['mean']:.1f} ({row['points_lost']['low']:.1f} to {row['points_lost']['high']:.1f})"
        for name, row in report["presets"].items()
        if name != "exact" and "points_lost" in row
    ]
    if told:
        lines += ["", f"Points of success lost against exact on the same items: {', '.join(told)}."]
    dear = [name for name, row in report["presets"].items() if row["success"]["mean"] < _floor(report)]
    lines += ["", f"The fastest preset within one point of exact: {report['default']}."]
    if dear:
        lines += [f"Costs more than a point, and is for those who ask for it: {', '.join(dear)}."]
    return "\n".join(lines)


def _floor(report: Mapping[str, Any]) -> float:
    """The least success of a preset that may be the default."""
    return report["presets"]["exact"]["success"]["mean"] - WITHIN - 1e-9


def pareto(report: Mapping[str, Any], path: Path) -> None:
    """Success over speed-up, one point per preset with its 95 % interval. Raises ConfigError without matplotlib."""
    from replan.errors import ConfigError

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture needs matplotlib: pip install 'replan[eval]'") from error
    figure = Figure(figsize=(5, 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, row in report["presets"].items():
        score = row["success"]
        error = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
        axes.errorbar(row["speedup"], score["mean"], yerr=error, fmt="o", capsize=3, color="#2563eb")
        axes.annotate(name, (row["speedup"], score["mean"]), xytext=(7, 5), textcoords="offset points")
    axes.axhline(_floor(report), color="#9ca3af", linewidth=0.8, linestyle="--")
    axes.set(xlabel="speed-up of the loop over the stock editor", ylabel="success, exact judge", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{report['backbone']}: {report['count']} items", fontsize=10)
    figure.savefig(path)

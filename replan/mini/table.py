"""The mini world's report for people: Markdown, and the table as a picture, made from the report's JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from replan.errors import ConfigError
from replan.eval.report import weighted
from replan.eval.statistics import Estimate, estimate
from replan.images import write_atomic
from replan.mini.report import COLUMNS, FORMAT, JUDGED
from replan.mini.ways import CEILING

Table = Mapping[str, Estimate | None]
TITLES = {
    "quality": "Quality", "target": "Target", "effect": "Effect", "consistency": "Consistency", "overall": "Overall",
    "weighted": "Weighted", "success": "Success", "outside_psnr": "PSNR outside", "seconds": "Seconds",
}  # fmt: skip
PLANNERS = {"planner": "planner", "hasty": "planner without reasoning"}
GROUPS = {"task": "Task", "referring": "Referring type"}
SHOWN_BY_GROUP = ("base", "paper", "direct", "end-to-end")
DECIMALS = {"outside_psnr": 1, "seconds": 2}
_SHADES = ("#f7c6b8", "#fdf3dc", "#b9dfb4")  # low, middle, high


# --- figures ---------------------------------------------------------------------------------------------------------


def values(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """One row's columns by item."""
    scores = {name: [float(digit) for digit in row[name]] for name in JUDGED}
    four = list(zip(*(scores[name] for name in JUDGED), strict=True))
    right = [q >= 4 and t == e == c == 5 for q, t, e, c in four]
    return {
        **scores,
        "overall": [sum(item) / 4 for item in four],
        "weighted": [weighted(*item) for item in four],
        "success": [float(one) for one in right],
        "outside_psnr": [float(value) for value in row["outside_psnr"]],
        "seconds": [float(value) for value in row["seconds"]],
    }


def estimates(row: Mapping[str, Any]) -> Table:
    """Mean and interval of each column."""
    return {name: estimate(found) for name, found in values(row).items()}


def plan_rates(bits: Mapping[str, Any]) -> Table:
    """Mean and interval of each of a planner's measures."""
    told = {name: text for name, text in bits.items() if name not in ("key", "seconds")}
    return {name: estimate([float(bit) for bit in text if bit != "-"]) for name, text in told.items()}


def to_text(report: Mapping[str, Any]) -> str:
    """The report as a JSON file: a line per row, and the means beside the items' figures so that people can read it."""
    lines = []
    for section, content in report.items():
        if section not in ("rows", "plans"):
            lines.append(f" {json.dumps(section)}: {json.dumps(content, ensure_ascii=False)}")
            continue
        inner = [f"  {json.dumps(name)}: {json.dumps(_with_means(row, section))}" for name, row in content.items()]
        lines.append(f" {json.dumps(section)}: {{\n" + ",\n".join(inner) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _with_means(row: Mapping[str, Any], section: str) -> dict[str, Any]:
    table = estimates(row) if section == "rows" else plan_rates({k: v for k, v in row.items() if k != "means"})
    short = {name: [round(v, 4) for v in (e.mean, e.low, e.high)] for name, e in table.items() if e}
    return {"means": short} | {key: value for key, value in row.items() if key != "means"}


def read(path: Path) -> dict[str, Any]:
    """A report's JSON. Raises ConfigError when it is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise ConfigError(f"{path}: format {report['format']}: this version reads {FORMAT}")
        for row in report["rows"].values():
            values(row)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is no report of `replan mini report` ({error})") from error
    return report


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [caption(report), _scores(report)]
    if report["plans"]:
        parts.append(_plans(report["plans"]))
    parts += [_by_group(report, group) for group in GROUPS]
    return "\n\n".join(part for part in parts if part)


def caption(report: Mapping[str, Any]) -> str:
    """What the figures are."""
    about, count = report["about"], report["items"]["count"]
    clock = "of one processor core" if about["clock"] == "processor" else "by the wall clock"
    return (
        f"{count} items of the split `{about['split']}`, scores of the exact judge; means ± half the 95 % bootstrap "
        f"interval. PSNR in dB outside the boxes against the source. Seconds per edit, {clock}, planning included."
    )


def _scores(report: Mapping[str, Any]) -> str:
    lines = [["", *(TITLES[name] for name in COLUMNS)]]
    for group, rows in _grouped(report):
        lines.append([f"*{group}*", *([""] * len(COLUMNS))])
        for row in rows:
            table = estimates(row)
            lines.append([row["title"], *(_cell(name, table[name]) for name in COLUMNS)])
    return _table(lines)


def _grouped(report: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    return [(group, list(rows)) for group, rows in groupby(report["rows"].values(), key=lambda row: row["group"])]


def _plans(plans: Mapping[str, Mapping[str, Any]]) -> str:
    tables = {name: plan_rates({k: v for k, v in bits.items() if k != "means"}) for name, bits in plans.items()}
    measures = list(next(iter(tables.values())))
    lines = [["", *measures]]
    for name, table in tables.items():
        lines.append([PLANNERS[name], *(_cell("success", table[measure]) for measure in measures)])
    return _table(lines)


def _by_group(report: Mapping[str, Any], group: str) -> str:
    """Success by category, for the rows that matter most."""
    shown = {name: report["rows"][name] for name in SHOWN_BY_GROUP if name in report["rows"]}
    if not shown:
        return ""
    lines = [[f"Success by {GROUPS[group].lower()}", "items", *(row["title"] for row in shown.values())]]
    right = {name: values(row)["success"] for name, row in shown.items()}
    for category, members in sorted(report["items"][group].items(), key=lambda pair: -len(pair[1])):
        cells = [_cell("success", estimate([right[name][number] for number in members])) for name in shown]
        lines.append([category, str(len(members)), *cells])
    return _table(lines)


def _cell(name: str, found: Estimate | None) -> str:
    if found is None:
        return "-"
    digits = DECIMALS.get(name, 2)
    if name == "seconds":
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ± {(found.high - found.low) / 2:.{digits}f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the picture -----------------------------------------------------------------------------------------------------


def picture(report: Mapping[str, Any], path: Path) -> None:
    """The table of scores as a picture (the suffix says which kind), each column shaded from its worst to its best.

    Raises ConfigError without matplotlib, or for another suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'replan[eval]'") from error
    form = path.suffix.lstrip(".").lower()
    if form not in ("png", "svg", "pdf"):
        raise ConfigError(f"{path}: a picture is a .png, .svg or .pdf")
    groups = [(group, [(row["title"], estimates(row)) for row in rows]) for group, rows in _grouped(report)]
    height = 2.2 + sum(len(rows) + 1.0 for _, rows in groups)
    width, first = 13.6, 4.5
    figure = Figure(figsize=(width, 0.34 * height), dpi=150)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    step = (width - first - 0.2) / len(COLUMNS)
    for place, name in enumerate(COLUMNS):
        axes.text(first + (place + 0.5) * step, 0.85, TITLES[name], ha="center", va="center", weight="bold", size=9.5)
    axes.plot([0.2, width - 0.2], [1.4, 1.4], color="#333333", lw=1)
    spans = _spans([table for group, rows in groups for _, table in rows if group != CEILING])
    at = 1.4
    for group, rows in groups:
        axes.text(0.25, at + 0.55, group, va="center", size=9, style="italic", color="#555555")
        at += 1.0
        for title, table in rows:
            axes.text(0.45, at + 0.5, title.replace("`", ""), va="center", size=9.5)
            for place, name in enumerate(COLUMNS):
                _draw_cell(axes, (first + place * step, at, step), name, table[name], spans[name])
            at += 1.0
    note = caption(report).replace("`", "")
    axes.text(0.25, height - 0.25, note, va="center", size=6.8, color="#555555")
    content = io.BytesIO()
    figure.savefig(content, format=form)
    write_atomic(path, content.getvalue())


def _spans(tables: Sequence[Table]) -> dict[str, tuple[float, float]]:
    """The lowest and highest mean of each column."""
    means = {name: [found.mean for table in tables if (found := table[name])] for name in COLUMNS}
    return {name: (min(found), max(found)) if found else (0.0, 0.0) for name, found in means.items()}


def _draw_cell(
    axes: Any, at: tuple[float, float, float], name: str, found: Estimate | None, span: tuple[float, float]
) -> None:
    """One mean with its interval; `at` is left, top and width."""
    left, top, width = at
    if found is None or (name == "seconds" and found.mean == 0):
        axes.text(left + width / 2, top + 0.5, "–", ha="center", va="center", size=9.5, color="#777777")
        return
    if name != "seconds":
        axes.add_patch(_patch(left, top, width, _shade(found.mean, span)))
    digits = DECIMALS.get(name, 2)
    best = name != "seconds" and found.mean == span[1]
    text, middle = f"{found.mean:.{digits}f}", top + 0.5
    if name == "seconds":
        axes.text(left + width / 2, middle, text, ha="center", va="center", size=9.5)
    else:
        weight = "bold" if best else "normal"
        axes.text(left + 0.47 * width, middle, text, ha="right", va="center", size=9.5, weight=weight)
        half = f"± {(found.high - found.low) / 2:.{digits}f}"
        axes.text(left + 0.53 * width, top + 0.52, half, ha="left", va="center", size=7, color="#555555")


def _patch(left: float, top: float, width: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left + 0.02, top + 0.04), width - 0.04, 0.92, facecolor=colour, edgecolor="none")


def _shade(mean: float, span: tuple[float, float]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    low, high = span
    share = 1.0 if high - low < 1e-9 else min(max((mean - low) / (high - low), 0.0), 1.0)
    return LinearSegmentedColormap.from_list("shade", _SHADES)(share)

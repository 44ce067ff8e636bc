"""The report as a table: for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("", "median", "± %", "ratio", "speed-up", "GFLOP", "GFLOP/s", "peak MB", "error")


def heading(report: Mapping[str, Any]) -> str:
    """On what and how it was measured, in one line."""
    about, asked = report["facts"], report["asked"]
    machine = about.get("gpu") or f"{about['cpu']}, {about['threads']} of {about['cores']} cores, load {about['load']}"
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers") if name in about)
    clock = "" if asked["clock"] == "wall" else ", CPU time"
    return (
        f"{about['date']}, {machine}, {about['dtype']}, {versions}{clock}; {asked['regions']} regions, "
        f"{asked['area']:.0%} of the picture; random weights"
    )


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table."""
    if row["problem"]:
        return [f"{row['name']}: {row['problem']}", *[""] * (len(COLUMNS) - 1)]
    ratio = row["ratio"]
    return [
        row["name"],
        _time(row["median"]),
        "" if row["spread"] is None else f"{100 * row['spread']:.0f}",
        "" if ratio is None else f"{ratio:.3f}",
        "" if ratio is None or ratio == 0 else f"{1 / ratio:.2f}",
        _number(row["flops"], 1e9),
        _number(row["rate"], 1e9),
        _number(row["peak_bytes"], 1e6),
        "" if row["error"] is None else f"{row['error']:.1e}",
    ]


def ran(row: Mapping[str, Any]) -> str:
    """Which kernels ran how often in one run, and what else is known of it."""
    parts = [f"{count} x {name}" for name, count in row["kernels"].items()]
    parts += [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in row["more"].items() if _told(value)]
    return "; ".join(parts)


def groups(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows under their headings, in order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(row["group"], []).append(row)
    return found


def _told(value: Any) -> bool:
    return value is not None and value != [] and value != {}


def tables(report: Mapping[str, Any]) -> list[tuple[Table, list[str]]]:
    """One table per group, for a terminal of 80 columns or more, and below it what ran in each row."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    made = []
    for title, rows in groups(report).items():
        table = Table(*COLUMNS, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.collapse_padding = True
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for row in rows:
            table.add_row(*map(escape, cells(row)))
        made.append((table, [f"{row['name']}: {ran(row)}" for row in rows if ran(row)]))
    return made


def markdown(report: Mapping[str, Any], command: str) -> str:
    """The report as a Markdown page."""
    lines = [f"`{command}`", "", heading(report)]
    for title, rows in groups(report).items():
        lines += [
            "",
            f"**{title}**",
            "",
            "| " + " | ".join([*COLUMNS, "what ran"]) + " |",
            "|---|" + "---:|" * 8 + "---|",
        ]
        lines += ["| " + " | ".join([*cells(row), ran(row)]) + " |" for row in rows]
    lines += ["", *NOTES]
    return "\n".join(lines) + "\n"


NOTES: Sequence[str] = (
    "ratio: median over rounds of the time against the same round's first row. ± %: half the range over the median.",
    "error: against the same rules with dense masks and every step in full; of a step its largest difference over the "
    "largest value, of a whole edit root mean squares. With random weights it tests exactness, not quality.",
    "peak: working memory above the weights, in one run.",
)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _number(value: float | None, unit: float) -> str:
    if value is None:
        return ""
    scaled = value / unit
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " + ".join(f"{count} {name}" for name, count in value.items())
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

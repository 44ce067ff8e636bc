"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replan.eval.report import COLUMNS, CONVENTIONS, FEW, GROUPS, Missing, Summary, coverage, published
from replan.eval.statistics import Estimate, Paired, estimate

TITLES = {
    "quality": "Quality", "target": "Target", "effect": "Effect", "consistency": "Consistency", "overall": "Overall",
    "weighted": "Weighted", "success": "Success", "outside_psnr": "PSNR outside (dB)", "outside_ssim": "SSIM outside",
    "outside_lpips": "LPIPS outside", "outside_shift": "colour shift outside", "inside_change": "change inside",
}  # fmt: skip
GROUP_TITLES = {"referring": "Referring type", "task": "Task type"}


def report(summaries: Sequence[Summary], conventions: Sequence[Missing], *, with_published: bool = False) -> str:
    """The whole report; the tables once per convention."""
    parts = ["# Benchmark report", _about(summaries), _coverage(summaries)]
    complete = all(summary.run.scored == len(summary.run.rows) for summary in summaries)
    for kind in conventions:
        named = "no score is missing, so drop and zero are the same" if complete else f"{kind}: {CONVENTIONS[kind]}"
        parts.append(f"## Scores ({named})")
        parts.append(_scores(summaries, kind))
        if with_published:
            parts += ["Published (arXiv 2512.16864, judge Gemini-2.5-Pro, missing items count as 0):", _published()]
        if len(summaries) > 1:
            parts.append(f"### Against {summaries[0].run.name}, over the items of both")
            parts.append(_against(summaries[1:], kind))
        for group in GROUPS:
            parts.append(f"### {GROUP_TITLES[group]}")
            parts.append(_groups(summaries, kind, group))
    parts.append(_pixels(summaries))
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(summaries: Sequence[Summary]) -> str:
    first = summaries[0].run
    judge = first.judge
    prompts = ", ".join(f"{name} {mark}" for name, mark in judge.get("prompts", {}).items())
    lines = [
        f"Data: {first.data.get('source')}, split {first.data.get('split')}. "
        f"Judge: {judge['model']}, temperature {judge.get('temperature')}"
        + (f", prompts {prompts}." if prompts else "."),
        "Cells: mean [95 % bootstrap interval]. Weighted = (T + E + (Q + C) E / 5) / 4. "
        "Success = target, effect and consistency 5, quality 4 or more.",
    ]
    return "\n".join(lines)


def _coverage(summaries: Sequence[Summary]) -> str:
    rows = []
    for summary in summaries:
        found = coverage(summary.run)
        share = f"{100 * found['scored'] / found['items']:.1f} %" if found["items"] else "-"
        pace = estimate(summary.run.seconds)
        rows.append(
            [summary.run.name, *(str(value) for value in found.values()), share, f"{pace.mean:.2f}" if pace else "-"]
        )
    return _table(["Run", "Items", "Generated", "Scored", "Bad rows", "Coverage", "Seconds per item"], rows)


def _scores(summaries: Sequence[Summary], kind: Missing) -> str:
    rows = [[summary.run.name, *(_cell(summary.table[kind][c]) for c in COLUMNS)] for summary in summaries]
    return _table(["Run", *(TITLES[c] for c in COLUMNS)], rows)


def _published() -> str:
    rows = [[name, *(f"{row[c]:.2f}" if c in row else "" for c in COLUMNS)] for name, row in published().items()]
    return _table(["Model", *(TITLES[c] for c in COLUMNS)], rows)


def _against(summaries: Sequence[Summary], kind: Missing) -> str:
    rows = [[summary.run.name, *(_paired(summary.against[kind][c]) for c in COLUMNS)] for summary in summaries]
    return _table(["Run (difference, wins/ties/losses)", *(TITLES[c] for c in COLUMNS)], rows)


def _groups(summaries: Sequence[Summary], kind: Missing, group: str) -> str:
    names = list(dict.fromkeys(name for summary in summaries for name in summary.groups[kind][group]))
    rows, few = [], []
    for name in names:
        for summary in summaries:
            table = summary.groups[kind][group].get(name, {})
            first = table.get("overall")
            if first is None or first.count < FEW:
                few.append(f"{name} ({first.count if first else 0})")
                continue
            short = [c for c in COLUMNS if c != "success"]
            rows.append([name, summary.run.name, str(first.count), *(_cell(table.get(c)) for c in short)])
    left_out = f"\n\nFewer than {FEW} items, in the JSON only: {', '.join(dict.fromkeys(few))}." if few else ""
    return _table(["Category", "Run", "Items", *(TITLES[c] for c in COLUMNS if c != "success")], rows) + left_out


def _pixels(summaries: Sequence[Summary]) -> str:
    measured = [summary for summary in summaries if summary.run.pixels]
    if not measured:
        return ""
    columns = list(measured[0].pixels)
    rows = [
        [summary.run.name, str(len(summary.run.pixels)), *(_cell(summary.pixels[c]) for c in columns)]
        for summary in measured
    ]
    notes = dict.fromkeys(note for summary in measured for note in summary.run.pixel_notes)
    text = "## Pixels, against the source\n\n" + _table(
        ["Run", "Items with boxes", *(TITLES[c] for c in columns)], rows
    )
    return text + "".join(f"\n\n{note}." for note in notes)


def _cell(found: Estimate | None) -> str:
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]" if found else "-"


def _paired(found: Paired | None) -> str:
    if found is None:
        return "-"
    gap = found.difference
    return f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}] {found.wins}/{found.ties}/{found.losses}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )

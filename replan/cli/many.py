"""`replan edit --batch`: reading the jobs, progress, and what the shell is told at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from replan.cli.options import Flags
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.batch import Outcome
    from replan.record import Setup
    from replan.types import Edit, EditRequest


def edit_many(path: Path, output: str | None, flags: Flags, seed: int, *, skip_bad: bool) -> None:
    """Do the jobs of a JSONL file. One JSON line per job on stdout. Exit 1 when a job failed, 2 for bad lines."""
    from replan import batch
    from replan.cli.console import say
    from replan.cli.outputs import writable

    if output is None:
        raise ConfigError("--batch needs a folder for its results: -o FOLDER")
    folder = Path(output)
    setup = flags.setup()
    jobs, problems = batch.read_jobs(path)
    for problem in problems:
        say(f"error: {problem}")
    if problems and not skip_bad:
        raise ConfigError(f"{path}: {len(problems)} bad lines, nothing was run; mend them or add --skip-bad")
    writable(folder)
    outcomes = batch.run(jobs, folder, setup, seed, _edit(setup), ("replan", *sys.argv[1:]))
    counts = {"done": 0, "skipped": 0, "failed": 0}
    try:
        for outcome in _shown(outcomes, len(jobs)):
            counts[outcome.status] += 1
            _tell(outcome)
    finally:
        left = len(jobs) - sum(counts.values())
        rest = f", {left} not reached (the same command resumes)" if left else ""
        say(
            f"{counts['done']} done, {counts['skipped']} were done before, {counts['failed']} failed{rest}; in {folder}"
        )
    if counts["failed"]:
        raise typer.Exit(1)


def _edit(setup: Setup) -> Any:
    from replan.cli.console import quiet_libraries

    editor = setup.open()

    def edit(request: EditRequest) -> Edit:
        quiet_libraries()  # here, because a batch that is done already loads nothing
        return editor.baseline(request) if setup.baseline else editor(request, strict=setup.strict)

    return edit


def _shown(outcomes: Any, total: int) -> Any:
    """The outcomes, with a bar on a terminal: rate over what was really done, and the time left."""
    from replan.cli.console import stderr

    console = stderr()
    if not console.is_terminal:
        yield from outcomes
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    with Progress(
        BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), TextColumn("left"), console=console
    ) as bar:
        task = bar.add_task("", total=total, rate="")
        spent, worked = 0.0, 0
        for outcome in outcomes:
            if outcome.status != "skipped":
                spent, worked = spent + outcome.seconds, worked + 1
            bar.update(task, advance=1, rate=f"{spent / worked:.1f} s each" if worked else "")
            yield outcome


def _tell(outcome: Outcome) -> None:
    import json

    from replan.cli.console import out, say

    line = {"id": outcome.id, "line": outcome.job.line, "status": outcome.status}
    line |= {"error": outcome.error} if outcome.status == "failed" else {"path": str(outcome.path)}
    out(json.dumps(line, ensure_ascii=False))
    if outcome.status == "failed":
        say(f"failed: line {outcome.job.line} ({outcome.id}): {outcome.error}")

"""What goes to stderr: log lines and progress. stdout carries data only."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from replan.edit import OnStep
    from replan.types import Edit, Plan

_STYLES = {logging.WARNING: "bold yellow", logging.ERROR: "bold red"}


class _Handler(logging.Handler):
    """Replan's own log records as plain lines on stderr, warnings marked."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        stderr().print(Text(prefix + record.getMessage(), style=_STYLES.get(record.levelno, "")), soft_wrap=True)
        if record.exc_info and record.exc_info[0] is not None:
            stderr().print(Text("".join(traceback.format_exception(*record.exc_info)).rstrip()), soft_wrap=True)


def stderr() -> Console:
    """A console on the present stderr."""
    return Console(stderr=True, highlight=False)


def start_log() -> None:
    """Show replan's log; called once per process, by main."""
    log = logging.getLogger("replan")
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        log.addHandler(_Handler())
        log.propagate = False
    log.setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and hints out of our log; downloads keep their bars."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # transformers turned these off as well


def say(text: str) -> None:
    """A line on stderr."""
    stderr().print(Text(text), soft_wrap=True)


def out(text: str) -> None:
    """A line of data on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def steps(title: str) -> Iterator[OnStep]:
    """A progress bar over denoising steps, on a terminal; a callback that does nothing elsewhere."""
    quiet_libraries()
    console = stderr()
    if not console.is_terminal:
        yield lambda step, total, preview: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(step: int, total: int, preview: Any) -> None:
            bar.update(task, completed=step, total=total, description="steps")

        yield report


def describe(plan: Plan) -> None:
    """The plan in a few lines on stderr."""
    say(f"plan: {plan.prompt or '(nothing for the whole picture)'}")
    for number, region in enumerate(plan.regions, 1):
        say(f"  {number}. {region.box.as_tuple()} {region.hint}")


def describe_edit(edit: Edit, *, plan: bool) -> None:
    """Times of a finished edit on stderr, before them its plan if asked for."""
    if plan and edit.plan is not None:
        describe(edit.plan)
    work = sum(seconds for stage, seconds in edit.timings.items() if stage != "load")
    planning = edit.timings.get("plan") if plan else None
    share = f"; planning {planning / work:.0%} of {work:.1f} s" if planning and work else ""
    say("time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in edit.timings.items()) + share)

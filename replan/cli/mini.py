"""`replan mini`: look at the mini world, and measure its models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from replan.cli import options

if TYPE_CHECKING:
    from replan.edit import Editor

mini = typer.Typer(
    help="The mini world: drawn scenes with exact plans and targets, and the small models trained on it.",
    no_args_is_help=True,
)
Split = Annotated[str, typer.Option(metavar="dev|test", help="Which held-out split.")]


@mini.command()
def show(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the sheet goes.")],
    count: Annotated[int, typer.Option("--n", min=1, max=200, help="How many items.")] = 24,
    split: Split = "dev",
    results: Annotated[bool, typer.Option("--results", help="Also edit each item, end to end.")] = False,
    backbone: options.Backbone = None,
    planner: options.Planner = None,
) -> None:
    """Draw a contact sheet: instruction, source with the exact boxes, exact target, and results if asked for.

    [bold]Example[/bold]
      [cyan]replan mini show --n 12 --results -o sheet.png[/cyan]
    """
    from replan.cli.console import out
    from replan.images import save_image
    from replan.mini.report import request
    from replan.mini.sheet import contact_sheet

    todo = _items(split, count)
    editor = _editor(backbone, planner) if results else None
    edited = [editor(request(item)).image for item in todo] if editor else []
    save_image(contact_sheet(todo, edited), output)
    out(str(output))


@mini.command()
def report(
    count: Annotated[int, typer.Option("--n", min=2, help="How many items.")] = 500,
    split: Split = "test",
    rows: Annotated[
        str,
        typer.Option(
            "--rows", metavar="A,B,...", help="Only these rows, or files of attention rules; `--rows list` names all."
        ),
    ] = "",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures as JSON; rows that are there already are kept."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also write the table as a picture (png, svg, pdf).")
    ] = None,
    read: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Measure nothing: the report of this JSON file.")
    ] = None,
    edit: Annotated[
        str, typer.Option("--edit", metavar="NAME", help="The editor's settings instead of its own: a name or a file.")
    ] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes side by side; on a CPU one per core, at most 4.")
    ] = None,
    backbone: options.Backbone = None,
    planner: options.Planner = None,
) -> None:
    """Measure planner and editor on held-out items with the exact judge: Markdown on stdout.

    Rows: the base editor, the same with the instruction rewritten from the plan, each preset of attention rules with
    the exact plan, boxes that are off, and the planner's own plans with and without reasoning.

    [bold]Examples[/bold]
      [cyan]replan mini report --json report.json --plot report.png[/cyan]     run it again to go on where it stopped
      [cyan]replan mini report --n 100 --rows base,paper,own[/cyan]            a quick look
      [cyan]replan mini report --from report.json[/cyan]                       the tables again
    """
    from replan.cli.console import out, say
    from replan.cli.outputs import writable
    from replan.images import write_atomic
    from replan.mini import table
    from replan.mini.ways import choose, ways

    if rows == "list":
        for way in ways().values():
            out(f"{way.name:20} {way.group}: {way.title}")
        return
    for path in (json_file, plot):
        if path is not None:
            writable(path.parent)
    if read is not None:
        found = table.read(read)
    else:
        from replan.cli.console import quiet_libraries
        from replan.mini.report import Job, Models, measure

        quiet_libraries()
        chosen = choose([name.strip() for name in rows.split(",") if name.strip()])
        models = Models(backbone or "mini", planner or "mini", edit)
        done = table.read(json_file) if json_file is not None and json_file.exists() else None
        job = Job(models, _known_split(split), count, chosen, workers or _cores(), done)
        found = measure(job, lambda so_far: _keep(so_far, json_file), say)
    if plot is not None:
        table.picture(found, plot)
    if read is not None and json_file is not None:
        write_atomic(json_file, table.to_text(found).encode())
    out(table.markdown(found))


def _keep(report: dict[str, Any], path: Path | None) -> None:
    from replan.images import write_atomic
    from replan.mini.table import to_text

    if path is not None:
        write_atomic(path, to_text(report).encode())


def _cores() -> int:
    """One process per core on a CPU; with an accelerator one."""
    import os

    import torch

    return 1 if torch.cuda.is_available() or torch.backends.mps.is_available() else min(os.cpu_count() or 1, 4)


def _known_split(split: str) -> str:
    from replan.errors import ConfigError
    from replan.mini.rows import COUNTS

    if split not in COUNTS:
        raise ConfigError(f"split = {split!r}: must be {' or '.join(COUNTS)}")
    return split


def _items(split: str, count: int) -> list:
    from replan.mini.report import items

    return items(_known_split(split), count)


def _editor(backbone: str | None, planner: str | None) -> Editor:
    return options.Flags(backbone=backbone, planner=planner).setup().open()

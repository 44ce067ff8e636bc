"""`replan mini`: look at the mini world, and measure its models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")
    ] = None,
    backbone: options.Backbone = None,
    planner: options.Planner = None,
) -> None:
    """Measure planner and editor on held-out items with the exact judge: Markdown on stdout.

    [bold]Example[/bold]
      [cyan]replan mini report --n 500 --json report.json[/cyan]     about ten minutes on two cores
    """
    import json
    from dataclasses import asdict, replace

    from replan.cli.console import out
    from replan.images import write_atomic
    from replan.mini.report import measure, render_markdown

    editor = _editor(backbone, planner)
    paper = replace(editor.config.mask, isolate=0.0, region_reads_main=True, pooled="main")
    tables = measure(editor, _items(split, count), paper)
    if json_file:
        plain = {name: {column: asdict(value) for column, value in table.items()} for name, table in tables.items()}
        write_atomic(json_file, json.dumps(plain, indent=2).encode() + b"\n")
    out(render_markdown(tables))


def _items(split: str, count: int) -> list:
    from replan.errors import ConfigError
    from replan.mini.report import SPLITS, items

    if split not in SPLITS:
        raise ConfigError(f"split = {split!r}: must be {' or '.join(SPLITS)}")
    return items(split, count)


def _editor(backbone: str | None, planner: str | None) -> Editor:
    return options.Flags(backbone=backbone, planner=planner).setup().open()

"""`replan bench`: are our edits faster than the stock editor's, and are they right?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(help="Measure speed, memory and exactness beside the stock editor.", invoke_without_command=True)
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write everything as JSON.")]
Markdown = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")]


@bench.callback()
def run(
    context: typer.Context,
    size: Annotated[
        str, typer.Option(metavar="mini|tiny|kontext|qwen-2511", help="Which transformers, with random weights.")
    ] = "tiny",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to run.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16", help="bfloat16 on a GPU.")] = "auto",
    regions: Annotated[int, typer.Option(metavar="N", help="How many regions.")] = 2,
    area: Annotated[float, typer.Option(metavar="X", help="Share of the picture in them, their halo included.")] = 0.2,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of a whole edit; else the model's own.")] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds; whole edits get a third of them.")] = 6,
    clock: Annotated[
        str, typer.Option(metavar="wall|cpu", help="cpu: this process's CPU time, for a CPU that is busy otherwise.")
    ] = "wall",
    parts: Annotated[str, typer.Option(metavar="steps,loops,plans", help="Some of them only.")] = "steps,loops,plans",
    json_file: JsonFile = None,
    markdown: Markdown = None,
) -> None:
    """Run our steps and edits and the stock editor's in turn, in one process, and print how they compare.

    [bold]Examples[/bold]
      [cyan]replan bench[/cyan]                                         shallow models, on this machine
      [cyan]replan bench --size kontext --device cuda[/cyan]            FLUX.1 Kontext's real shape: needs 40 GB
      [cyan]replan bench --size qwen-2511 --device cuda --json q.json[/cyan]
      [cyan]replan bench quality --plot pareto.png[/cyan]               what speed costs on the mini models

    Weights are random, so nothing is downloaded; times and exactness do not depend on them, pictures do.
    A row that ran another kernel than its name says has no figures.
    """
    if context.invoked_subcommand is not None:
        return
    import json

    from replan.bench.show import markdown as page
    from replan.bench.suite import Asked
    from replan.bench.suite import run as measure
    from replan.cli.console import quiet_libraries, say
    from replan.images import write_atomic

    asked = Asked(
        size,
        device,
        dtype,
        regions,
        area,
        steps,
        repeats,
        clock,
        tuple(parts.replace(" ", "").split(",")),
    )
    command = shlex.join(["replan", *sys.argv[1:]])

    def keep(report: dict[str, Any]) -> None:
        report["command"] = command
        if json_file:
            write_atomic(json_file, json.dumps(report, indent=1).encode() + b"\n")
        if markdown:
            write_atomic(markdown, page(report, command).encode())

    quiet_libraries()
    _show(measure(asked, say, keep))


def _show(report: dict[str, Any]) -> None:
    """The tables on stdout."""
    from rich.console import Console
    from rich.text import Text

    from replan.bench.show import NOTES, heading, tables

    console = Console()
    console.print(Text(heading(report)), soft_wrap=True)
    for table, notes in tables(report):
        console.print(table)
        for note in notes:
            console.print(Text(note, style="dim"))
        console.print()
    for note in NOTES:
        console.print(Text(note, style="dim"))


@bench.command()
def quality(
    count: Annotated[int, typer.Option("--n", min=2, help="How many held-out items.")] = 100,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw success over speed-up.")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    backbone: Annotated[str, typer.Option("--backbone", "-b", metavar="NAME", help="A mini editor.")] = "mini",
    default: Annotated[
        bool, typer.Option("--set-default", help="Write the default into the settings of the editors of its kind.")
    ] = False,
) -> None:
    """What each preset of speed costs: the mini world's exact scores beside the time of an edit.

    [bold]Examples[/bold]
      [cyan]replan bench quality --n 200 --plot pareto.png[/cyan]
      [cyan]replan bench quality --n 500 --set-default --json q.json[/cyan]    also decides what editors run with

    The default of an editor is the fastest preset whose success is within one point of exact. --set-default writes it
    to configs/edit/: that of the measured editor and those of the published editors of the same kind.
    """
    import json

    from replan.bench.defaults import LEAST, set_default
    from replan.bench.quality import measure, pareto, render
    from replan.cli.console import out, quiet_libraries, say
    from replan.errors import ConfigError
    from replan.images import write_atomic

    if default and count < LEAST:
        raise ConfigError(f"n = {count}: --set-default needs {LEAST} or more; one item is a point then")
    quiet_libraries()
    report = measure(backbone, count, say)
    if default:
        report["settings"] = set_default(report)
        say(f"speed: {report['default']} is now the default of {', '.join(report['settings'])}")
    if json_file:
        write_atomic(json_file, json.dumps(report, indent=1).encode() + b"\n")
    text = render(report)
    if markdown:
        write_atomic(markdown, text.encode() + b"\n")
    out(text)
    if plot:
        pareto(report, plot)

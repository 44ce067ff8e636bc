"""`replan doctor`: what is here, what would run, what to type to mend the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from replan.doctor import Check


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False) -> None:
    """Say what is here, what would run and what would not, and what to type to mend it.

    Looks at python, packages, device and memory, attention kernels, extras, settings and weights.
    Downloads nothing, loads no model. Exit 0 when at least the mini models run, else 1.
    """
    import json

    from replan import config
    from replan.cli.console import out
    from replan.doctor import examine, healthy

    checks = examine()
    if as_json:
        out(json.dumps([config.dump(check) for check in checks], indent=2))
    else:
        _print(checks)
    if not healthy(checks):
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    styles = {"ok": ("ok    ", "green"), "absent": ("--    ", "yellow"), "broken": ("BROKEN", "bold red")}
    width = max(len(check.name) for check in checks)
    console, group = Console(highlight=False), None
    for check in checks:
        if check.group != group:
            console.print(Text(("\n" if group else "") + check.group, style="bold"))
            group = check.group
        line = Text(f"  {check.name:<{width}}  ").append(*styles[check.state]).append(f"  {check.found}")
        console.print(line, soft_wrap=True)
        if check.fix:  # on a line of its own and never wrapped, to be copied
            console.print(Text(f"  {'':<{width}}          > {check.fix}", style="cyan"), soft_wrap=True)

"""`replan doctor`: what is here, what would run, what to type to mend the rest."""

from __future__ import annotations

from typing import Annotated

import typer


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


def _print(checks: list) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {
        "ok": Text("ok", style="green"),
        "absent": Text("--", style="yellow"),
        "broken": Text("BROKEN", style="bold red"),
    }
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    group = None
    for check in checks:
        if check.group != group:
            table.add_row(*([""] * 3) if group else [], end_section=False) if group else None
            table.add_row(Text(check.group, style="bold"), "", "")
            group = check.group
        found = Text(check.found)
        if check.fix:
            found.append(f"\n> {check.fix}", style="cyan")
        table.add_row(Text(f"  {check.name}"), marks[check.state], found)
    Console(highlight=False).print(table)

"""The command line: `replan VERB`. Only the verb that is asked for is imported, and its stage when it runs, so that
--help is immediate."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from replan.cli.failures import reported
from replan.cli.page import Page, Pages

# verb: its module here; the function or group in it bears the name of the verb, or of the module
VERBS = {
    "plan": "plan", "mask": "plan", "edit": "edit", "session": "session", "demo": "demo", "doctor": "doctor",
    "bench": "bench", "eval": "evaluate", "mini": "mini", "train": "train", "serve": "serve",
}  # fmt: skip

HELP = """Edit pictures by instruction: plan first, then edit each region by its own hint.

replan edit photo.png "make the left cup red" -o out.png

Results go to stdout (JSON, or the paths of what was written), log and progress to stderr.
Exit codes: 0 done, 1 our failure, 2 a mistake in the command or its files, 130 interrupted.
"""


class Verbs(Pages):
    """Turns the errors of every verb into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with reported(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


def build(verbs: Iterable[str] = tuple(VERBS)) -> typer.Typer:
    """The command line with these verbs."""
    made = typer.Typer(
        cls=Verbs, help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    made.callback()(_top)
    for verb in verbs:
        module: Any = importlib.import_module(f"replan.cli.{VERBS[verb]}")
        found = getattr(module, verb if hasattr(module, verb) else VERBS[verb])
        if isinstance(found, typer.Typer):
            for command in found.registered_commands:
                command.cls = Page
            made.add_typer(found, name=verb, cls=Pages)
        else:
            made.command(name=verb, cls=Page, help=found.__doc__)(found)
    return made


def _version(wanted: bool) -> None:
    if wanted:
        from replan import __version__
        from replan.cli.console import out

        out(__version__)
        raise typer.Exit


def _top(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    from replan.cli.console import start_log

    start_log()


def __getattr__(name: str) -> Any:
    """`app`: the command line with all verbs, made when it is asked for."""
    if name == "app":
        return build()
    raise AttributeError(name)


def main() -> None:
    """The console script."""
    first = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    build([first] if first in VERBS else VERBS)(prog_name="replan")

"""The command line: `replan VERB`. Each verb imports its stage when it runs, so that --help is immediate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from replan.cli import bench, demo, doctor, edit, evaluate, mini, plan, serve, session, train
from replan.cli.failures import reported
from replan.cli.page import Page, Pages

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


app = typer.Typer(
    cls=Verbs, help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from replan import __version__
        from replan.cli.console import out

        out(__version__)
        raise typer.Exit


@app.callback()
def top(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    from replan.cli.console import start_log

    start_log()


for verb in (plan.plan, plan.mask, edit.edit, session.session, demo.demo, doctor.doctor):
    app.command(cls=Page, help=verb.__doc__)(verb)
app.add_typer(bench.bench, name="bench")
app.add_typer(evaluate.evaluate, name="eval")
app.add_typer(mini.mini, name="mini")
app.add_typer(train.train, name="train")
app.add_typer(serve.serve, name="serve")


def main() -> None:
    """The console script."""
    app(prog_name="replan")

"""`replan plan` and `replan mask`: what would be edited, and who would read whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from replan.cli import options
from replan.cli.options import OUTPUT, Flags
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.edit import Editor
    from replan.types import EditRequest


def plan(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The picture to edit.")],
    instruction: Annotated[str, typer.Argument(metavar='"INSTRUCTION"', help="What to change.")],
    settings: options.Settings = None,
    candidates: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Sampled plans, one JSON line {seed, plan} each, instead of the one best plan."
        ),
    ] = 1,
    seed: options.Seed = None,
    planner: options.Planner = None,
    prompt_template: options.PromptTemplate = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Plan an edit: a JSON plan on stdout, with boxes in the picture's pixels.

    [bold]Examples[/bold]
      [cyan]replan plan photo.png "make the left cup red" > plan.json[/cyan]
      [cyan]replan plan photo.png "..." | replan edit photo.png --plan - -o out.png[/cyan]
      [cyan]replan plan photo.png "..." --candidates 4 > plans.jsonl[/cyan]
      [cyan]replan plan photo.png "..." --planner http://127.0.0.1:8000/v1[/cyan]  vLLM

    Change the JSON by hand and hand it to [cyan]replan edit --plan[/cyan]: it takes the same path as a planned edit.
    """
    given = locals()
    from replan import plan as grammar
    from replan.cli.console import describe, out, steps
    from replan.images import load_image
    from replan.types import EditRequest

    setup = Flags.of(given | {"settings": options.positionals(list(settings or ()), 0)[2]}).setup()
    options.check_instruction(instruction)
    request = EditRequest(load_image(Path(image)), instruction, seed or 0)
    editor = setup.open()
    if candidates > 1:
        _candidates(editor, request, candidates)
        return
    with steps("loading and planning"):
        found = editor.plan(request)
    describe(found)
    out(json.dumps(grammar.to_json(found), indent=2, ensure_ascii=False))


def mask(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The picture to edit.")],
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan to look at (- is stdin).")],
    settings: options.Settings = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", rich_help_panel=OUTPUT, help="File or folder, else ./<picture>_mask.png."
        ),
    ] = None,
    backbone: options.Backbone = None,
    expand: options.Expand = None,
    isolate: options.Isolate = None,
    rules: options.Rules = None,
    config: options.Config = None,
) -> None:
    """Show what a plan means to the editor: boxes, hints and tokens on the picture, and who reads whom.

    [bold]Examples[/bold]
      [cyan]replan mask photo.png --plan plan.json -o mask.png[/cyan]
      [cyan]replan mask photo.png --plan plan.json -b flux-kontext --expand 0.15[/cyan]
      [cyan]replan mask photo.png --plan plan.json --rules rules.yaml[/cyan]

    The matrix goes to stdout as a table too. No model is loaded.
    """
    given = locals()
    from replan.backbones import find, token_grid
    from replan.cli.console import out, say
    from replan.cli.edit import given_plan
    from replan.cli.outputs import targets
    from replan.draw import draw_matrix, draw_plan, matrix_table, stack
    from replan.errors import PlanError
    from replan.images import load_image, save_image
    from replan.record import PlanFileError
    from replan.rules import schedule
    from replan.types import Size

    _, _, rest = options.positionals(list(settings or ()), 0)
    setup = Flags.of(given | {"settings": rest}).setup()
    picture = load_image(Path(image))
    found = given_plan(plan, picture.size)
    (path,) = targets(output, f"{Path(image).stem}_mask.png", 1)
    grid = token_grid(setup.backbone, Size(*picture.size), setup.config)
    try:
        phases = schedule(len(found.regions), setup.config.mask)
    except PlanError as error:
        raise PlanFileError(str(error)) from error  # a plan that was given is the user's to mend
    vision = "Qwen" in find(setup.backbone)[0].pipeline  # only Qwen's text encoder sees the picture
    drawn = draw_plan(picture, found, grid, setup.config.mask.expand)
    save_image(stack([drawn, draw_matrix(phases, vision=vision, width=drawn.width)]), path)
    out(matrix_table(phases, vision=vision))
    say(f"{grid.columns}x{grid.rows} tokens; written: {path}")


def _candidates(editor: Editor, request: EditRequest, count: int) -> None:
    """Sampled plans as JSON lines. Exit 1 when not one of them can be used."""
    from replan import plan as grammar
    from replan.cli.console import out, steps
    from replan.planner.base import candidates
    from replan.types import Plan

    with steps("loading and planning"):
        if editor.planner is None:
            raise ConfigError("there is no planner to sample from")
        outcomes = candidates(editor.planner, request, count)
    for number, outcome in enumerate(outcomes):
        usable = isinstance(outcome, Plan)
        found = {"plan": grammar.to_json(outcome)} if usable else {"error": str(outcome)}
        out(json.dumps({"seed": request.seed + number} | found, ensure_ascii=False))
    if not any(isinstance(outcome, Plan) for outcome in outcomes):
        raise typer.Exit(1)

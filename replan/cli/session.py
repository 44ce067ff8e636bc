"""`replan session`: load once, edit again and again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from replan.cli import options
from replan.cli.options import OUTPUT, Flags
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.edit import Editor
    from replan.record import Setup

LAST = "^"


def session(
    settings: options.Settings = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", rich_help_panel=OUTPUT, help="Where the results go.")
    ] = Path("session"),
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    baseline: options.Baseline = False,
    keep_background: options.KeepBackground = None,
    config: options.Config = None,
    expand: options.Expand = None,
    isolate: options.Isolate = None,
    rules: options.Rules = None,
    backbone: options.Backbone = None,
    planner: options.Planner = None,
    prompt_template: options.PromptTemplate = None,
    lora: options.Lora = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    quantize: options.Quantize = None,
    compile: options.Compile = None,
    attention: options.Attention = None,
    speed: options.Speed = None,
    vae_tiling: options.VaeTiling = None,
    strict: options.Strict = False,
) -> None:
    """Load the models once, then ask for a picture and an instruction again and again.

    At the picture prompt: a path; [cyan]Enter[/cyan] for the same picture again; [cyan]^[/cyan] for the last result.
    At either prompt: [cyan]seed=7[/cyan] sets the seed of the rounds that follow. [cyan]Ctrl-D[/cyan] leaves.

    Each round writes FOLDER/<picture>_001.png and its sidecar, never over an older one.
    A mistake ends the round, not the session.
    """
    given = locals()
    from replan.cli.console import say
    from replan.cli.outputs import writable

    _, _, rest = options.positionals(list(settings or ()), 0)
    setup = Flags.of(given | {"settings": rest}).setup()
    writable(output)
    editor = setup.open()
    say("Ctrl-D leaves.")
    state = State(seed=seed or 0)
    while _round(state, editor, setup, output):
        continue
    say(f"{state.finished} results in {output}" if state.finished else "bye")


@dataclass(slots=True)
class State:
    """What the next round may refer to."""

    seed: int
    picture: Path | None = None
    result: Path | None = None
    finished: int = 0


def _round(state: State, editor: Editor, setup: Setup, folder: Path) -> bool:
    """One picture, one instruction, one result; False when the input has ended."""
    from replan.cli.console import say
    from replan.cli.failures import explain
    from replan.errors import ReplanError

    try:
        picture = _ask_picture(state)
        instruction = _ask("instruction> ", state)
    except EOFError:
        say("")
        return False
    try:
        _edit(state, editor, setup, picture, instruction, folder)
    except (ReplanError, OSError, RuntimeError) as error:
        told = explain(error)
        if told is None:
            raise
        say(f"error: {told[1]}")
    return True


def _edit(state: State, editor: Editor, setup: Setup, picture: Path, instruction: str, folder: Path) -> None:
    from replan.cli.edit import make, save
    from replan.cli.outputs import unused
    from replan.images import load_image
    from replan.types import EditRequest

    request = EditRequest(load_image(picture), instruction, state.seed)
    state.picture = picture
    target = unused(folder, picture.stem if picture != state.result else picture.stem.rpartition("_")[0])
    save(make(editor, request, setup), setup, [picture], [target])
    state.result = target
    state.finished += 1


def _ask_picture(state: State) -> Path:
    from replan.cli.console import say

    known = [f"Enter = {state.picture}"] if state.picture else []
    known += [f"{LAST} = {state.result}"] if state.result else []
    choices = f" ({', '.join(known)})" if known else ""
    while True:
        answer = _ask(f"picture{choices}> ", state, empty=state.picture is not None)
        if answer == "" and state.picture is not None:
            return state.picture
        if answer == LAST:
            if state.result is not None:
                return state.result
            say("error: there is no result yet")
            continue
        path = Path(answer.strip("'\"")).expanduser()
        if path.is_file():
            return path
        say(f"error: {path}: {'is a folder' if path.is_dir() else 'there is no such file'}")


def _ask(prompt: str, state: State, *, empty: bool = False) -> str:
    """A line from stdin, the prompt on stderr; `seed=N` is taken on the way. Raises EOFError."""
    from replan.cli.console import say, stderr

    while True:
        answer = stderr().input(prompt, markup=False).strip()
        name, equals, value = answer.partition("=")
        if equals and name.strip() == "seed":
            try:
                state.seed = _seed(value)
            except ConfigError as error:
                say(f"error: {error}")
            continue
        if answer or empty:
            return answer


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"seed = {text!r}: must be a whole number") from error

"""`replan edit`: one picture, several candidates, many pictures, or a recorded run again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan.cli import options
from replan.cli.options import Flags
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.edit import Editor, OnStep
    from replan.record import Candidate, File, Setup
    from replan.types import Edit, EditRequest, Plan


DRAWN = 512  # pixels of the longer side; the scenes that the mini models know are smaller by far


def edit(
    image: options.Image = None,
    instruction: options.Instruction = None,
    settings: options.Settings = None,
    output: options.Output = None,
    plan: options.PlanFile = None,
    also: options.Also = None,
    candidates: options.Candidates = 1,
    repeat: options.Repeat = None,
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
    batch: options.Batch = None,
    skip_bad: options.SkipBad = False,
) -> None:
    """Edit a picture by an instruction: plan the regions, then edit each by its own hint.

    [bold]Examples[/bold]
      [cyan]replan edit photo.png "make the left cup red" -o out.png[/cyan]
      [cyan]replan plan photo.png "make the left cup red" > plan.json[/cyan]  change it, then
      [cyan]replan edit photo.png --plan plan.json -o out.png[/cyan]
      [cyan]replan edit photo.png "..." --baseline -o stock.png[/cyan]        without regions
      [cyan]replan edit photo.png "..." --candidates 4 -o tries/[/cyan]
      [cyan]replan edit photo.png "..." -b flux-kontext --offload model[/cyan]
      [cyan]replan edit --repeat out.json -o again.png[/cyan]                 the same bytes
      [cyan]replan edit --batch jobs.jsonl -o results/[/cyan]                 resumes

    Next to out.png lies out.json: plan, reasoning, settings, seed, versions, times, command line.
    Of the backbone's YAML, --config FILE, key=value and options, the later ones win.
    """
    given = locals()
    _check_together(given)
    wanted = 0 if repeat or batch else 1 if plan else 2
    first, text, rest = options.positionals([image, instruction, *(settings or ())], wanted)
    flags = Flags.of(given | {"settings": rest})
    if batch is not None:
        from replan.cli.many import edit_many

        edit_many(batch, output, flags, seed or 0, skip_bad=skip_bad)
        return
    if repeat is not None:
        _repeat(repeat, output, flags, seed)
        return
    if first is None or (text is None and plan is None):
        raise ConfigError('edit needs a picture and an instruction: replan edit IMAGE "INSTRUCTION" (see --help)')
    _single(Path(first), text or "", plan, Request(tuple(also or ()), seed or 0, candidates, output), flags)


def _check_together(given: Mapping[str, Any]) -> None:
    """Refuse options that would silently have no effect beside each other."""
    apart = (("repeat", "batch"), ("repeat", "plan"), ("batch", "plan"), ("baseline", "plan"))
    apart += (("repeat", "candidates"), ("batch", "candidates"), ("repeat", "also"), ("batch", "also"))
    for one, other in apart:
        if given[one] and given[other] and given[other] != 1:
            raise ConfigError(f"--{one} and --{other} exclude each other")


@dataclass(frozen=True, slots=True)
class Request:
    """What `edit` was asked for, beside picture, words and setup."""

    also: tuple[Path, ...]
    seed: int
    count: int
    output: str | None


def _single(image: Path, instruction: str, plan: Path | None, asked: Request, flags: Flags) -> None:
    from replan.cli.outputs import targets
    from replan.images import load_image
    from replan.types import EditRequest

    setup = flags.setup()
    if plan is None:
        options.check_instruction(instruction)
    picture = load_image(image)
    found = None if plan is None else given_plan(plan, picture.size)
    extra = tuple(load_image(path) for path in asked.also)
    paths = targets(asked.output, f"{image.stem}_edited.png", asked.count)
    for path in paths:
        if path.resolve() == image.resolve():
            raise ConfigError(f"{path}: is the picture to edit; nothing could repeat the edit without it, name another")
    request = EditRequest(picture, instruction, asked.seed, found, extra)
    edits = make(setup.open(), request, setup, asked.count)
    save(edits, setup, [image, *asked.also], paths)


def given_plan(path: Path, size: tuple[int, int]) -> Plan:
    """The plan of a --plan option, for a picture of `size`; `-` reads stdin."""
    import json

    from replan.record import PlanFileError, read_plan
    from replan.types import Size

    if str(path) != "-":
        return read_plan(path, Size(*size))
    try:
        return read_plan(json.load(sys.stdin), Size(*size))
    except ValueError as error:
        raise error if isinstance(error, PlanFileError) else PlanFileError(f"stdin: not a plan: {error}") from error


def make(editor: Editor, request: EditRequest, setup: Setup, count: int = 1) -> list[Edit]:
    """The edits, with progress, log and warnings on stderr."""
    from replan.cli.console import describe, describe_edit, say, steps
    from replan.errors import PlanError
    from replan.record import PlanFileError

    if setup.backbone == "mini" and max(request.image.size) > DRAWN:
        say("note: the mini models know small drawn scenes only; for photographs use -b flux-kontext or another")
    if request.plan is not None:
        describe(request.plan)
    with steps("loading" if setup.baseline or request.plan else "loading and planning") as on_step:
        try:
            edits = _run(editor, request, setup, count, on_step)
        except PlanError as error:
            if request.plan is None:
                raise
            raise PlanFileError(str(error)) from error  # a plan that was given is the user's to mend
    describe_edit(edits[0], plan=request.plan is None)
    return edits


def _run(editor: Editor, request: EditRequest, setup: Setup, count: int, on_step: OnStep) -> list[Edit]:
    if setup.baseline:
        return [editor.baseline(replace(request, seed=request.seed + number), on_step) for number in range(count)]
    if count == 1:
        return [editor(request, on_step, strict=setup.strict)]
    return editor.candidates(request, count, on_step, strict=setup.strict)


def save(edits: list[Edit], setup: Setup, images: list[Path], paths: list[Path], only: Candidate | None = None) -> None:
    """Write pictures and sidecars; what is written stays when a later one fails. `only`: one of several was made."""
    from replan import record
    from replan.cli.console import out
    from replan.images import save_image

    also = tuple(record.File(str(path.resolve()), record.sha256(path)) for path in images[1:])
    for number, (edit, path) in enumerate(zip(edits, paths, strict=True)):
        candidate = only or (record.Candidate(number, len(edits)) if len(edits) > 1 else None)
        save_image(edit.image, path)
        found = record.record(
            edit, setup, images[0], path, also=also, candidate=candidate, command=("replan", *sys.argv[1:])
        )
        record.write(found, path.with_suffix(".json"))
        out(str(path))


def _repeat(sidecar: Path, output: str | None, flags: Flags, seed: int | None) -> None:
    from replan import record
    from replan.cli.console import say
    from replan.cli.outputs import targets
    from replan.images import load_image
    from replan.types import EditRequest, Size

    past = record.read(sidecar)
    images = [_unchanged(file) for file in (past.image, *past.also)]
    setup = flags.setup(past)
    (path,) = targets(output, f"{sidecar.stem}_repeat.png", 1)
    pictures = [load_image(image) for image in images]
    plan = None if past.plan is None else record.read_plan(past.plan, Size(*pictures[0].size))
    place = past.candidate or record.Candidate(0, 1)
    start = (past.seed if seed is None else seed) - place.index
    request = EditRequest(pictures[0], past.instruction, start, plan, tuple(pictures[1:]))
    edit = make(setup.open(), request, setup, place.count)[place.index]
    save([edit], setup, images, [path], past.candidate)
    if setup == past.setup() and seed in (None, past.seed):
        same = record.sha256(path) == past.result.sha256
        then = {name: version for name, version in past.versions.items() if record.versions().get(name) != version}
        say(
            "repeat: the same bytes"
            if same
            else f"repeat: other bytes; what was different then: {then or 'nothing known'}"
        )


def _unchanged(file: File) -> Path:
    from replan.record import sha256

    path = Path(file.path)
    if not path.is_file():
        raise ConfigError(f"{path}: the picture of the recorded run is gone")
    if sha256(path) != file.sha256:
        raise ConfigError(f"{path}: is not the picture of the recorded run any more (other bytes)")
    return path

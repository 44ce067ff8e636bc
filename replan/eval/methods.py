"""What is measured: RePlan on a backbone, the stock editor, the stock editor after a rewrite, InstructPix2Pix."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from replan import config, record
from replan.backbones.base import EditConfig
from replan.backbones.runtime import Runtime
from replan.errors import ConfigError
from replan.eval.data import Bench, DataConfig
from replan.eval.generate import FORMAT, Method, Todo
from replan.planner.base import PlannerConfig
from replan.presets import spelled
from replan.types import Edit, EditRequest

MethodName: TypeAlias = Literal["replan", "baseline", "rephrase", "instruct-pix2pix"]
EXACT = "answer"  # planner = answer: the plan that the row itself carries


@dataclass(frozen=True, slots=True)
class Pix2PixConfig:
    """InstructPix2Pix: the pipeline's own two guidance scales, and the area that it was trained for."""

    steps: int = 20
    guidance: float = 7.5
    image_guidance: float = 1.5
    max_area: int = 512 * 512

    def __post_init__(self) -> None:
        if self.steps < 1 or self.max_area < 64 * 64:
            raise ConfigError("pix2pix: steps must be 1 or more, max_area at least 4096")


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """One run of the benchmark.

    output    folder of the results
    method    replan; baseline: the stock editor; rephrase: the stock editor with a rewritten instruction; or
              instruct-pix2pix
    backbone  editor: a name, a folder or a hub id
    planner   of method replan; `answer` takes the plan in the row's answer
    rewriter  of method rephrase: http(s)://host/v1#model, openai:model, gemini:model, or a local model's hub id, folder
    seed      the seed of an item is this plus its id
    preset    a file of edit settings such as edit/paper_flux, in place of the backbone's own
    edit      settings over the backbone's own, for example edit.steps=20 or edit.rules=local
    workers   items under way at once; for editors and planners behind a network
    processes editors to run side by side, one per GPU, through accelerate's launcher
    service   address of an editor service (`replan serve editor`) that makes the edits, `workers` at once
    timeout   seconds for one try at the service, the wait in its queue included
    """

    output: str
    method: MethodName = "replan"
    backbone: str = "mini"
    planner: str = "mini"
    rewriter: str | None = None
    seed: int = 42
    preset: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    edit: Mapping[str, Any] = field(default_factory=dict)
    planning: PlannerConfig = field(default_factory=PlannerConfig)
    pix2pix: Pix2PixConfig = field(default_factory=Pix2PixConfig)
    runtime: Runtime = field(default_factory=Runtime)
    workers: int = 1
    processes: int = 1
    service: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("workers", "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if not 0 < self.timeout <= 3600:
            raise ConfigError(f"timeout = {self.timeout}: must be above 0 and at most 3600")
        if self.method not in get_args(MethodName):
            raise ConfigError(f"method = {self.method!r}: must be one of {', '.join(get_args(MethodName))}")
        if self.method == "rephrase" and not self.rewriter:
            raise ConfigError("method = rephrase: needs rewriter = a model that rewrites the instruction")
        if self.service is not None:
            self._check_service()

    def _check_service(self) -> None:
        """What belongs to the service must not be set here, where it would do nothing."""
        if self.method == "instruct-pix2pix":
            raise ConfigError("service: serves no instruct-pix2pix; leave it out")
        if self.processes > 1:
            raise ConfigError(f"processes = {self.processes}: with a service, workers says how many at once")
        if self.planning != PlannerConfig():
            raise ConfigError("planning: the service's planner has settings of its own; give them to `replan serve`")
        if self.runtime != Runtime() and self.method != "rephrase":
            raise ConfigError("runtime: the service's own counts; give it to `replan serve`")


def todo(settings: GenerateConfig) -> Todo:
    """The edit function of a run and everything that decides its pictures. Models load at the first item."""
    if settings.method == "instruct-pix2pix":
        from replan.backbones.instruct_pix2pix import InstructPix2Pix

        chosen = {"method": settings.method, "backbone": settings.backbone, "pix2pix": config.dump(settings.pix2pix)}
        pipe = InstructPix2Pix(settings.backbone, settings.pix2pix, settings.runtime)
        running = chosen | _running(settings.runtime)
        return Todo(_one_at_a_time(pipe), running, settings.seed, check=pipe.load)
    return _editing(settings)


def _editing(settings: GenerateConfig) -> Todo:
    from replan.backbones import find
    from replan.edit import Editor

    source = settings.preset or find(settings.backbone)[0].config
    edit = config.load(EditConfig, source, over=(spelled(settings.edit),))
    exact = settings.method == "replan" and settings.planner == EXACT
    planner = settings.planner if settings.method == "replan" and not exact else None
    chosen: dict[str, Any] = {"method": settings.method, "backbone": settings.backbone, "edit": config.dump(edit)}
    if settings.method == "replan":
        chosen["planner"] = settings.planner
    if settings.service is not None:
        from replan.eval.service import connect

        served = connect(settings, edit, planner)
        made = Todo(served, {**chosen, **served.about}, settings.seed, exact, served.check, served.stop)
        return _rephrasing(settings, made)
    editor = Editor.load(
        settings.backbone, planner, config=edit, runtime=settings.runtime, planner_config=settings.planning
    )
    if settings.method == "replan":
        chosen["planning"] = _deciding(settings.planning)
    method: Method = editor if settings.method == "replan" else editor.baseline

    def check() -> None:
        _ = editor.backbone, editor.planner  # they load, if they are not there yet

    running = chosen | _running(settings.runtime)
    return _rephrasing(settings, Todo(_one_at_a_time(method), running, settings.seed, exact, check))


def _rephrasing(settings: GenerateConfig, edit: Todo) -> Todo:
    """With a rewritten instruction, if the method is that."""
    if settings.method != "rephrase":
        return edit
    from replan.eval.rephrase import load_rewriter, prompt_hash

    rewrite = load_rewriter(str(settings.rewriter), settings.runtime)
    chosen = {**edit.settings, "rewriter": settings.rewriter, "rewriter_prompt": prompt_hash()}

    def check() -> None:
        edit.check()
        rewrite("make it red")

    return replace(edit, edit=_rephrased(rewrite, edit.edit), settings=chosen, check=check)


def describe(settings: GenerateConfig, chosen: Todo, bench: Bench) -> dict[str, Any]:
    """What run.json says."""
    data = config.dump(settings.data)
    if Path(settings.data.source).exists():
        data["source"] = str(Path(settings.data.source).resolve())
    return {
        "format": FORMAT,
        "settings": {"seed": settings.seed, "data": {k: v for k, v in data.items() if k != "limit"}, **chosen.settings},
        "data": data,
        "items": len(bench.items),
        "bad_rows": [{"index": row.index, "reason": row.reason} for row in bench.bad],
        "versions": record.versions(),
    }


def _running(runtime: Runtime) -> dict[str, Any]:
    """What of the runtime decides bytes: not where the model lies while it waits."""
    return {"dtype": runtime.dtype, "quantize": runtime.quantize, "lora": list(runtime.lora)}


def _deciding(planning: PlannerConfig) -> dict[str, Any]:
    plain = config.dump(planning)
    return {name: plain[name] for name in plain if name not in ("timeout", "retries", "concurrency", "batch_size")}


def _one_at_a_time(method: Method) -> Method:
    """A model in this process is used by one thread at a time."""
    lock = threading.Lock()

    def edit(request: EditRequest) -> Edit:
        with lock:
            return method(request)

    return edit


def _rephrased(rewrite: Any, edit: Method) -> Method:
    def run(request: EditRequest) -> Edit:
        words = rewrite(request.instruction)
        edited = edit(replace(request, instruction=words))
        return replace(edited, request=request, notes=(*edited.notes, f"instruction rewritten: {words}"))

    return run

"""Options that several verbs share. Every default is None: the values come from the backbone's own YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan import config
    from replan.config import Override
    from replan.planner import PlannerConfig
    from replan.record import Record, Setup

OUTPUT, EDITING, REGIONS, MODELS, RUNNING, MANY = "Output", "Editing", "Regions", "Models", "Running", "Many pictures"
RELEASED_PLANNER = "TainU/RePlan-Qwen2.5-VL-7B"
_PLANNER = "planner."
_SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)

Image = Annotated[str | None, typer.Argument(metavar="IMAGE", help="The picture to edit.", show_default=False)]
Instruction = Annotated[str | None, typer.Argument(metavar='"INSTRUCTION"', help="What to change.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings by name, such as mask.mutual=false", show_default=False),
]
Output = Annotated[
    str | None,  # not a Path, which would lose the / at a folder's end
    typer.Option(
        "--output", "-o", metavar="FILE", rich_help_panel=OUTPUT, show_default=False,
        help="File or folder, else ./<picture>_edited.png; candidates become out_0.png, out_1.png, ...",
    ),
]  # fmt: skip
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="FILE", rich_help_panel=EDITING,
        help="A plan file instead of the planner (- is stdin); the instruction may then be left out.",
    ),
]  # fmt: skip
Also = Annotated[
    list[Path] | None,
    typer.Option(metavar="IMAGE", rich_help_panel=EDITING, help="A further picture; for qwen-image-edit-plus."),
]
Candidates = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", rich_help_panel=EDITING, help="Edits by one plan with the seeds seed, seed+1, ..."
    ),
]
Repeat = Annotated[
    Path | None,
    typer.Option(metavar="SIDECAR", rich_help_panel=EDITING, help="Run a recorded edit again; options change it."),
]
Batch = Annotated[
    Path | None,
    typer.Option(
        metavar="JOBS.jsonl", rich_help_panel=MANY,
        help="Lines of {image, instruction, plan?, seed?, id?}; -o is a folder. Run it again to resume.",
    ),
]  # fmt: skip
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", rich_help_panel=MANY, help="Do the good lines of a batch that has bad ones.")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone", "-b", metavar="NAME", rich_help_panel=MODELS,
        help="Editor: mini (default), flux-kontext, qwen-image-edit, qwen-image-edit-plus, a folder or hub id.",
    ),
]  # fmt: skip
Planner = Annotated[
    str | None,
    typer.Option(
        "--planner", metavar="NAME", rich_help_panel=MODELS,
        help="Planner: mini, a hub id, a folder, the URL of an OpenAI-compatible server, openai:MODEL or gemini:MODEL. "
        f"Default: mini with a mini editor, else {RELEASED_PLANNER}.",
    ),
]  # fmt: skip
PromptTemplate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", rich_help_panel=MODELS, help="The planner's prompt; the instruction goes below it."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|ID", rich_help_panel=MODELS, help="LoRA for the editor; may be given several times."),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=EDITING, help="Same seed, same picture; 0 if not given.")
]
Steps = Annotated[int | None, typer.Option(metavar="N", rich_help_panel=EDITING, help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="X", rich_help_panel=EDITING, help="How strongly the prompt pulls (with Qwen: the true CFG scale)."
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        rich_help_panel=EDITING,
        help="What to stay away from; needs a backbone that runs with true CFG.",
    ),
]
Baseline = Annotated[
    bool, typer.Option("--baseline", rich_help_panel=EDITING, help="No plan, no regions: exactly the stock editor.")
]
KeepBackground = Annotated[
    bool | None,
    typer.Option(
        "--keep-background", rich_help_panel=EDITING,
        help="Paste the untouched source pixels back outside the boxes.",
    ),
]  # fmt: skip
Config = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", rich_help_panel=EDITING, help="YAML with settings that go over the backbone's own."),
]
Expand = Annotated[
    float | None,
    typer.Option(
        metavar="X", rich_help_panel=REGIONS, help="Widen each box on every side by this share of its width or height."
    ),
]
Isolate = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        rich_help_panel=REGIONS,
        help="Share of the steps (0 to 1) in which the background ignores the regions.",
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", rich_help_panel=REGIONS,
        help="Attention rules: a preset (paper, local, ...) or a file of your own, with step ranges (YAML or JSON).",
    ),
]  # fmt: skip
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", rich_help_panel=RUNNING, help="Exit 1 when planning fails, instead of using the instruction."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=RUNNING, help="Where to run: auto, cpu, cuda, cuda:1, mps."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=RUNNING,
        help="auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU, else float32.",
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=RUNNING,
        help="none, stages, model, group or sequential: keep what is not in use off the GPU, from planner or editor "
        "down to single layers; less memory, slower.",
    ),
]  # fmt: skip
VaeTiling = Annotated[
    bool | None,
    typer.Option("--vae-tiling", rich_help_panel=RUNNING, help="Decode large pictures in tiles: less memory."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", rich_help_panel=RUNNING,
        help="int8, fp8, nf4, bnb-int8 or a .gguf file: smaller weights of the editor; needs replan\\[gpu]. "
        "The planner's: planner.quantize=nf4",
    ),
]  # fmt: skip
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=RUNNING, help="auto, dense, flex or cascade: what carries out the region masks."
    ),
]
Speed = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", rich_help_panel=RUNNING,
        help="exact, cached or fast: between steps nothing, the reference picture, or all that lies outside the "
        "regions is reused.",
    ),
]  # fmt: skip
Compile = Annotated[
    bool | None, typer.Option("--compile", rich_help_panel=RUNNING, help="torch.compile: slow start, then faster.")
]


@dataclass(frozen=True, slots=True)
class Flags:
    """What was given on the command line for a setup; None or empty where nothing was."""

    settings: Sequence[str] = ()
    backbone: str | None = None
    planner: str | None = None
    prompt_template: Path | None = None
    lora: list[str] | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    baseline: bool = False
    keep_background: bool | None = None
    config: list[Path] | None = None
    expand: float | None = None
    isolate: float | None = None
    rules: str | None = None
    strict: bool = False
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    quantize: str | None = None
    compile: bool | None = None
    attention: str | None = None
    speed: str | None = None
    vae_tiling: bool | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Flags:
        """From a command's own arguments, by name; what a verb does not offer stays unset."""
        return cls(**{field.name: given[field.name] for field in fields(cls) if given.get(field.name) is not None})

    def setup(self, base: Record | None = None) -> Setup:
        """The layers in order: the backbone's YAML (or a recorded run), --config files, key=value, options.

        Keys under `planner.` are the planner's own settings.
        """
        from replan import config
        from replan.backbones import EditConfig, Runtime, find
        from replan.presets import spelled
        from replan.record import Setup

        backbone = self.backbone or (base.backbone if base else "mini")
        kept = base if base is not None and backbone == base.backbone else None
        files, planner_files = _split_files(self.config or ())
        pairs = [config.split(setting) for setting in self.settings]
        named, own = _rules(self.rules, [pair for pair in pairs if not pair[0].startswith(_PLANNER)])
        files = [*(spelled(file) for file in files), *named]
        source: config.Source = kept.config if kept else find(backbone)[0].config
        plain = config.load(EditConfig, source, own, files)
        editing = config.load(EditConfig, source, [*own, *self._editing(guided=plain.guided)], files)
        if self.negative_prompt and not editing.guided:
            raise ConfigError("--negative-prompt: has no effect without true CFG; add true_cfg=2.0 (doubles the time)")
        return Setup(
            backbone,
            _known(self.planner) if self.planner else kept.planner if kept else _planner_for(source),
            editing,
            config.load(Runtime, base.runtime if base else {}, self._running()),
            self._planning(base, planner_files, pairs),
            self.baseline or bool(base and base.baseline),
            self.strict or bool(base and base.strict),
        )

    def _planning(self, base: Record | None, files: list[Any], pairs: list[tuple[str, Any]]) -> PlannerConfig:
        from replan import config
        from replan.planner import PlannerConfig

        own: list[Override] = [(key.removeprefix(_PLANNER), value) for key, value in pairs if key.startswith(_PLANNER)]
        if self.prompt_template is not None:
            own.append(("template", str(self.prompt_template.resolve())))
        try:
            return config.load(PlannerConfig, base.planner_config if base else {}, own, files)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError(
                "\n".join(line if line.startswith(_PLANNER) else _PLANNER + line for line in lines)
            ) from error

    def _editing(self, *, guided: bool) -> list[Override]:
        from replan.speed import speed_values

        values = {
            "steps": self.steps,
            "true_cfg" if guided else "guidance": self.guidance,
            "negative_prompt": self.negative_prompt,
            "keep_background": self.keep_background,
            "mask.expand": self.expand,
            "mask.isolate": self.isolate,
            "speed": None if self.speed is None else speed_values(self.speed),
        }
        return [(key, value) for key, value in values.items() if value is not None]

    def _running(self) -> list[Override]:
        names = ("device", "dtype", "offload", "quantize", "compile", "attention", "vae_tiling", "lora")
        values = {name: getattr(self, name) for name in names}
        return [(key, value) for key, value in values.items() if value is not None]


def positionals(words: Sequence[str | None], wanted: int) -> tuple[str | None, str | None, list[str]]:
    """Sort `IMAGE INSTRUCTION key=value...` into its parts; the first `wanted` words (0 to 2) are no settings.

    Raises ConfigError for a setting that is not written key=value.
    """
    rest = [word for word in words if word is not None]
    image = rest.pop(0) if rest and wanted else None
    # with a plan (wanted = 1) the instruction may be left out
    is_instruction = rest and wanted and (wanted > 1 or not _SETTING.fullmatch(rest[0]))
    instruction = rest.pop(0) if is_instruction else None
    for word in rest:
        if not _SETTING.fullmatch(word):
            raise ConfigError(f"{word!r}: a setting is written key=value, for example steps=20; quote the instruction")
    return image, instruction, rest


def check_instruction(words: str) -> None:
    """Raise ConfigError when an instruction says nothing."""
    if not words.strip():
        raise ConfigError("the instruction is empty; say what to change")


def _known(planner: str) -> str:
    """The name of a planner. Raises ConfigError for what can only be a slip: a hub id has a /, a service a colon."""
    if planner == "mini" or "/" in planner or ":" in planner or Path(planner).is_dir():
        return planner
    from replan.config import nearest

    raise ConfigError(
        f"planner {planner!r}: unknown{nearest(planner, ['mini'])}; use mini, a folder, owner/name or a URL"
    )


def _planner_for(settings: config.Source) -> str:
    """The planner that goes with an editor, by the name of the editor's settings: small ones know one small world."""
    return "mini" if str(settings).startswith("edit/mini") else RELEASED_PLANNER


def _split_files(paths: Sequence[Path]) -> tuple[list[Any], list[Any]]:
    """Settings files, and what their `planner:` sections hold."""
    from replan import config

    files = [config.read(path) for path in paths]
    planner = [section for file in files if isinstance(section := file.pop("planner", None), dict)]
    return files, planner


def _rules(given: str | None, pairs: Sequence[tuple[str, Any]]) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The settings of the rules asked for by --rules or rules=NAME (the option wins), and the other pairs."""
    from replan.presets import spelled

    asked = [value for key, value in pairs if key == "rules"] if given is None else [given]
    return [spelled({"rules": asked[-1]})] if asked else [], [pair for pair in pairs if pair[0] != "rules"]

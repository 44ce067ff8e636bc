"""`run_replan`: the first release's command line, file names and folder layout, as a thin front of the same editor."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan.errors import ConfigError, PlanError, ReplanError

if TYPE_CHECKING:
    from replan.edit import Editor
    from replan.record import Setup
    from replan.types import Edit, EditRequest, Plan

BACKBONES = {"flux": "flux-kontext", "qwen": "qwen-image-edit"}
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Exit codes as `replan`'s."""
    from replan.cli.console import start_log
    from replan.cli.failures import reported

    args = parser().parse_args(argv)
    with reported():
        start_log()
        run(args)


def parser() -> argparse.ArgumentParser:
    """The original's flags. Numbers that depend on the pipeline come from configs/edit/, so none is repeated here."""
    made = argparse.ArgumentParser(
        prog="run_replan",
        description="Edit a picture by an instruction. Without --image or --instruction it asks, again and again.",
        epilog="The flags of the first release. `replan edit` has more: seeds, steps, own plans, many pictures.",
    )
    _add_inputs(made.add_argument_group("input and output"))
    _add_models(made.add_argument_group("models"))
    _add_regions(made.add_argument_group("regions"))
    return made


def _add_inputs(group: Any) -> None:
    group.add_argument("--image", help="the picture to edit")
    group.add_argument("--instruction", help="what to change")
    group.add_argument("--image_dir", default=".", metavar="DIR", help="where a relative --image lies (default: here)")
    group.add_argument("--output_dir", default="./output/inference", metavar="DIR", help="default: %(default)s")
    group.add_argument("--id", help="name of the result's folder (default: <picture>_<date>_<time>)")
    group.add_argument(
        "--only_save_image", action="store_true", help="write only <picture>_edited.png into --output_dir"
    )


def _add_models(group: Any) -> None:
    from replan.cli.options import RELEASED_PLANNER

    group.add_argument("--pipeline_type", choices=sorted(BACKBONES), default="flux", help="default: %(default)s")
    group.add_argument(
        "--diffusion_model_name", metavar="ID|DIR", help="editor instead of the pipeline's own; mini works"
    )
    group.add_argument("--vlm_ckpt_path", metavar="ID|DIR", help=f"planner (default: {RELEASED_PLANNER})")
    group.add_argument("--vlm_prompt_template_path", metavar="FILE", help="the planner's prompt")
    group.add_argument("--lora_path", metavar="FILE|ID", help="LoRA for the editor")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: cuda where there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="default: bf16 on a GPU, fp32 on a CPU")
    flex = group.add_mutually_exclusive_group()
    flex.add_argument("--enable_flex_attn", action="store_true", help="the default, where it can run")
    flex.add_argument("--disable_flex_attn", action="store_true", help="a dense attention mask")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--flex_attn_use_bitmask", action="store_true", help="the default")
    kind.add_argument(
        "--flex_attn_use_densemask", action="store_true", help="taken as the bit mask, which does the same"
    )


def _add_regions(group: Any) -> None:
    own = {kind: _mask_values(name) for kind, name in BACKBONES.items()}
    expand, switch = (", ".join(f"{kind} {own[kind][key]}" for kind in own) for key in ("expand", "isolate"))
    group.add_argument("--expand_value", type=float, metavar="X", help=f"widen each box by this (default: {expand})")
    group.add_argument("--expand_mode", choices=("ratio", "pixels"), default="ratio", help="default: %(default)s")
    group.add_argument(
        "--attention_switch_step", type=float, metavar="S",
        help=f"end of the locality rules: a share of the steps up to 1, else a step (default: {switch})",
    )  # fmt: skip
    mutual = group.add_mutually_exclusive_group()
    mutual.add_argument("--bboxes_attend_to_each_other", action="store_true", default=None, help="the default")
    mutual.add_argument("--no_bboxes_attend_to_each_other", action="store_true", help="regions do not read each other")
    group.add_argument("--symmetric_masking", action="store_true", help="a hint reads only its own region")
    group.add_argument("--delete_main_prompt", action="store_true", help="nobody reads the global prompt")
    group.add_argument("--replace_global_prompt", action="store_true", help="use the text below as global prompt")
    group.add_argument("--custom_global_prompt_text", metavar="TEXT", help="default: keep the rest as it is")


def run(args: argparse.Namespace) -> None:
    """One edit, or a round for each picture that is asked for; the models load once."""
    from replan.cli.outputs import writable

    setup = _setup(args)
    writable(Path(args.output_dir))
    editor = setup.open()
    if args.image and args.instruction:
        _edit(editor, setup, args, Path(args.image_dir, args.image), args.instruction)
        return
    while (asked := _ask(args)) is not None:
        _attempt(editor, setup, args, *asked)


def _setup(args: argparse.Namespace) -> Setup:
    from replan.backbones import find
    from replan.cli.options import Flags

    backbone = args.diffusion_model_name or BACKBONES[args.pipeline_type]
    kind, asked = find(backbone)[0].pipeline, find(BACKBONES[args.pipeline_type])[0].pipeline
    if kind != asked:
        raise ConfigError(
            f"--diffusion_model_name {backbone} is a {kind}; --pipeline_type {args.pipeline_type} is {asked}"
        )
    settings = [
        f"mask.{name}={'true' if value else 'false'}"
        for name, value in (
            ("mutual", not args.no_bboxes_attend_to_each_other),
            ("symmetric", args.symmetric_masking),
            ("hide_main", args.delete_main_prompt),
        )
    ]
    setup = Flags(
        settings,
        backbone,
        args.vlm_ckpt_path,
        _template(args.vlm_prompt_template_path),
        [args.lora_path] if args.lora_path else None,
        expand=0.0 if args.expand_mode == "pixels" else args.expand_value,
        device=args.device,
        dtype=DTYPES[args.dtype],
        attention="dense" if args.disable_flex_attn else None,
        speed="exact",  # as the original: nothing is reused between steps
    ).setup()
    if args.attention_switch_step is None:
        return setup
    share = _share(args.attention_switch_step, setup.config.steps)
    return replace(setup, config=replace(setup.config, mask=replace(setup.config.mask, isolate=share)))


def _share(step: float, steps: int) -> float:
    """The original's rule: up to 1 a share of the steps, above it a number of steps, both cut off at the ends."""
    return min(max(step if step <= 1 else int(step) / steps, 0.0), 1.0)


def _template(path: str | None) -> Path | None:
    # the original's default, `replan.txt`, named a file of its own; the planner's folder or the package has ours
    if path is None or (path == "replan.txt" and not Path(path).exists()):
        return None
    return Path(path)


def _ask(args: argparse.Namespace) -> tuple[Path, str] | None:
    """Picture and instruction from stdin, with what the flags gave as first choice; None when the input has ended."""
    from replan.cli.console import say, stderr

    try:
        image = instruction = ""
        while not image:
            image = (
                stderr().input(f"image{f' [{args.image}]' if args.image else ''}> ", markup=False) or args.image or ""
            )
        while not instruction:
            hint = f" [{args.instruction}]" if args.instruction else ""
            instruction = stderr().input(f"instruction{hint}> ", markup=False) or args.instruction or ""
    except EOFError:
        say("")
        return None
    return Path(args.image_dir, image.strip().strip("'\"")), instruction.strip()


def _attempt(editor: Editor, setup: Setup, args: argparse.Namespace, image: Path, instruction: str) -> None:
    """A round of the interactive loop: a mistake in it does not end the loop."""
    from replan.cli.console import say
    from replan.cli.failures import explain

    try:
        _edit(editor, setup, args, image, instruction)
    except (ReplanError, OSError, RuntimeError) as error:
        told = explain(error)
        if told is None:
            raise
        say(f"error: {told[1]}")


def _edit(editor: Editor, setup: Setup, args: argparse.Namespace, image: Path, instruction: str) -> None:
    from replan.cli.console import describe_edit, out, steps
    from replan.images import load_image, save_image
    from replan.types import EditRequest

    request = EditRequest(load_image(image), instruction)
    with steps("loading and planning") as on_step:
        edit = editor(_planned(editor, request, args), on_step)
    describe_edit(edit, plan=True)
    if args.only_save_image:
        path = Path(args.output_dir) / f"{image.stem}_edited.png"
        save_image(edit.image, path)
    else:
        path = _write_folder(edit, setup, args, image, _folder(args, image))
    out(str(path))


def _planned(editor: Editor, request: EditRequest, args: argparse.Namespace) -> EditRequest:
    """The request with the plan that the flags change, where they change one."""
    if not args.replace_global_prompt and args.expand_mode == "ratio":
        return request
    try:
        plan = editor.plan(request)
    except PlanError:
        return request  # the editor meets the same answer, falls back to the instruction and says so
    return replace(request, plan=adjust(plan, args))


def adjust(plan: Plan, args: argparse.Namespace) -> Plan:
    """A plan with another global prompt, or with boxes widened by pixels, as the flags say."""
    from replan.plan import KEEP
    from replan.types import Box

    if args.replace_global_prompt:
        plan = replace(plan, prompt=args.custom_global_prompt_text or KEEP)
    if args.expand_mode == "ratio":
        return plan
    by = int(args.expand_value or 0)
    boxes = [Box(r.box.left - by, r.box.top - by, r.box.right + by, r.box.bottom + by) for r in plan.regions]
    regions = tuple(replace(r, box=box.clip(plan.size)) for r, box in zip(plan.regions, boxes, strict=True))
    return replace(plan, regions=regions)


def _folder(args: argparse.Namespace, image: Path) -> Path:
    """A folder of its own for each result, also for two within one second or a second round with the same --id."""
    name = args.id or f"{image.stem}_{time.strftime('%Y%m%d_%H%M%S')}"
    interactive = not (args.image and args.instruction)
    folder, number = Path(args.output_dir) / name, 1
    while folder.exists() and (interactive or not args.id):
        number += 1
        folder = Path(args.output_dir) / f"{name}_{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_folder(edit: Edit, setup: Setup, args: argparse.Namespace, image: Path, folder: Path) -> Path:
    """The original's five files, and the sidecar that `replan edit --repeat` takes. Returns the result's path."""
    import sys

    from replan import config, record
    from replan.backbones import find
    from replan.draw import draw_plan, matrix_table
    from replan.images import save_image, write_atomic
    from replan.rules import schedule

    result = folder / "final_result.png"
    save_image(edit.request.image, folder / "original.png")
    save_image(edit.image, result)
    assert edit.plan is not None  # only a baseline has none, and there is no flag for it
    save_image(
        draw_plan(edit.image, _expanded(edit.plan, setup.config.mask.expand)), folder / "final_result_with_all_bbox.png"
    )
    vision = "Qwen" in find(setup.backbone)[0].pipeline
    table = matrix_table(schedule(len(edit.plan.regions), setup.config.mask), vision=vision)
    text = (
        f"Instruction:\n{edit.request.instruction}\n\nResponse:\n{_response(edit.plan)}\n\nWho reads whom:\n{table}\n"
    )
    write_atomic(folder / "instruction_and_response.txt", text.encode())
    sidecar = record.record(edit, setup, image, result, command=("run_replan", *sys.argv[1:]))
    record.write(sidecar, result.with_suffix(".json"))
    switches = vars(args) | {"instruction": edit.request.instruction, "response": _response(edit.plan)}
    record.write_json(
        switches | {"settings": config.dump(setup.config), "notes": list(edit.notes)}, folder / "config.json"
    )
    return result


def _expanded(plan: Plan, ratio: float) -> Plan:
    regions = tuple(replace(region, box=region.box.expand(ratio, plan.size)) for region in plan.regions)
    return replace(plan, regions=regions)


def _response(plan: Plan) -> str:
    """The planner's answer word for word, or the plan in its grammar when there was none."""
    from replan.plan import render

    return plan.raw or render(plan)


def _mask_values(backbone: str) -> dict[str, Any]:
    from replan.backbones import find
    from replan.config import read

    return read(find(backbone)[0].config)["mask"]

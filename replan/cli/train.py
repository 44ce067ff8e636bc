"""`replan train`: train the models that ship with the package, or better ones, on your own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from replan.cli import train_grpo

train = typer.Typer(
    help="Train planners by reinforcement, and the mini models. A run that was stopped goes on where it was.",
    no_args_is_help=True,
)
for verb in (train_grpo.data, train_grpo.grpo, train_grpo.weaken, train_grpo.export, train_grpo.prove):
    train.command(help=verb.__doc__)(verb)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where state and result go; an old run there goes on.")]
Family = Literal["flux", "qwen"]
BATCH = "Pictures per step."
LR = "Peak learning rate."
Start = Annotated[Path | None, typer.Option(metavar="FOLDER", help="A finished model to begin with.")]
Seed = Annotated[int, typer.Option(min=0, max=200, help="Of the weights at the start and of the scenes met.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps.")]
Evaluate = Annotated[
    int, typer.Option("--evaluate", min=0, metavar="N", help="Measure it on N held-out items (dev) afterwards.")
]
Bf16 = Annotated[bool, typer.Option("--bf16/--fp32", help="Forward passes in bfloat16: faster where the device can.")]


@train.command("mini-planner")
def mini_planner(
    folder: Folder,
    minutes: Annotated[float, typer.Option(min=0, help="Budget over all restarts.")] = 120,
    batch: Annotated[int, typer.Option(min=1, help=BATCH)] = 16,
    lr: Annotated[float, typer.Option(min=0, help=LR)] = 2e-3,
    start: Start = None,
    seed: Seed = 0,
    device: Device = "cpu",
    bf16: Bf16 = False,
    evaluate: Evaluate = 100,
) -> None:
    """Train the mini planner, a small Qwen3-VL; the result is FOLDER/planner.

    [bold]Example[/bold]
      [cyan]OMP_NUM_THREADS=1 replan train mini-planner runs/planner --minutes 120[/cyan]
      [cyan]replan plan picture.png "..." --planner runs/planner/planner[/cyan]
    """
    from replan.cli.console import out
    from replan.mini.train_planner import train_planner
    from replan.mini.training import TrainConfig

    config = TrainConfig(minutes, batch=batch, lr=lr, muon_lr=lr, save_every=250, seed=seed, device=device, bf16=bf16)
    train_planner(folder, config, start)
    _evaluate(evaluate, ("end-to-end",), planner=str(folder / "planner"))
    out(str(folder / "planner"))


@train.command("mini-editor")
def mini_editor(
    folder: Folder,
    family: Annotated[Family, typer.Option(help="Which editor's classes: Flux Kontext or Qwen-Image-Edit.")] = "flux",
    minutes: Annotated[float, typer.Option(min=0, help="Budget of the transformer over all restarts.")] = 88,
    vae_minutes: Annotated[float, typer.Option(min=0, help="Budget of the autoencoder.")] = 15,
    decoder_minutes: Annotated[
        float, typer.Option(min=0, help="More for its decoder alone; the editor need not learn anew.")
    ] = 0,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes in the pool of encoded pictures.")] = 16_000,
    batch: Annotated[int, typer.Option(min=1, help=BATCH)] = 32,
    lr: Annotated[float, typer.Option(min=0, help=LR)] = 1.5e-3,
    vae: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A finished autoencoder to begin with; its training goes on.")
    ] = None,
    start: Start = None,
    seed: Seed = 0,
    device: Device = "cpu",
    bf16: Bf16 = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the transformer.")] = False,
    evaluate: Evaluate = 100,
) -> None:
    """Train the mini editor, a small Flux Kontext or Qwen-Image-Edit, and its autoencoder; the result is FOLDER/editor.

    [bold]Examples[/bold]
      [cyan]OMP_NUM_THREADS=2 replan train mini-editor runs/editor[/cyan]
      [cyan]replan edit picture.png "..." --backbone runs/editor/editor[/cyan]
      [cyan]OMP_NUM_THREADS=2 replan train mini-editor runs/qwen --family qwen[/cyan]
      [cyan]replan edit picture.png "..." --backbone runs/qwen/editor[/cyan]
    """
    from replan.cli.console import out
    from replan.mini.training import TrainConfig

    if family == "qwen":
        from replan.mini.train_qwen_editor import train_editor
    else:
        from replan.mini.train_editor import train_editor

    config = TrainConfig(minutes, batch, lr, lr, save_every=500, seed=seed, device=device, bf16=bf16, compiled=compiled)
    train_editor(folder, config, vae_minutes, scenes, vae, start, decoder_minutes)
    _evaluate(evaluate, ("base", "own", "ceiling"), backbone=str(folder / "editor"))
    out(str(folder / "editor"))


def _evaluate(count: int, rows: tuple[str, ...], **models: str) -> None:
    """Say how good a finished model is: the report's tables of a few rows, on stderr."""
    if not count:
        return
    from replan.cli.console import quiet_libraries, say
    from replan.mini import table
    from replan.mini.report import Job, Models, measure
    from replan.mini.ways import choose

    quiet_libraries()
    say(table.markdown(measure(Job(Models(**models), "dev", count, choose(rows)), lambda _: None, say)))

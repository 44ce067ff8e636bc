"""`replan train data|grpo|weaken|export|prove`: reinforcement learning of the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings by name.", show_default=False),
]


def data(
    output: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="Where the rows go.")],
    settings: Settings = None,
) -> None:
    """Build training data: one parquet file, which every engine reads.

    From the mini world, or from rows of reason_edit_base's schema (image, prompt, answer, extra_info): a hub id, a
    folder, or a .parquet, .jsonl or .arrow file. Prints counts as JSON; rows that are left out are told one by one.

    [bold]Examples[/bold]
      [cyan]replan train data runs/train.parquet source=TainU/reason_edit_base split=train model=Qwen/Qwen2.5-VL-7B-Instruct[/cyan]
      [cyan]replan train data runs/train.parquet source=mini model=mini multiple=16[/cyan]
      [cyan]replan train data runs/dev.parquet source=mini split=dev model=mini multiple=16[/cyan]
    """  # noqa: E501
    import json

    from replan import config as loader
    from replan.cli.console import out, quiet_libraries, say
    from replan.train.build import BuildConfig, build

    if output.suffix != ".parquet":
        from replan.errors import ConfigError

        raise ConfigError(f"{output}: name a .parquet file")
    quiet_libraries()
    built = build(loader.load(BuildConfig, {}, settings or ()), output)
    for note in built.notes:
        say(f"left out: {note}")
    out(json.dumps({"path": str(output), **built.counts()}, ensure_ascii=False))


def grpo(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name such as grpo/stage1, or a YAML file.")],
    settings: Settings = None,
) -> None:
    """Train a planner with GRPO; the result is OUTPUT/planner. Run it again to go on after a stop.

    One process, or as many as accelerate launches; engine verl brings its own cluster.

    [bold]Examples[/bold]
      [cyan]replan train grpo grpo/mini_stage1 output=runs/mini-stage1[/cyan]
      [cyan]replan train grpo configs/grpo/stage2.yaml planner=runs/stage1/planner steps=40[/cyan]
      [cyan]accelerate launch --num_processes 2 -m replan train grpo grpo/stage1 engine=trl[/cyan]
    """
    from replan import config as loader
    from replan.cli.console import out
    from replan.train.grpo import GrpoConfig

    chosen = loader.load(GrpoConfig, config, settings or ())
    _quiet()
    if chosen.engine == "verl":
        from replan.train import engine_verl as engine
    else:
        from replan.train import engine_trl as engine  # type: ignore[no-redef]
    out(str(engine.train(chosen)))


def _quiet() -> None:
    """Also what trl says of transformers' newer names, and datasets of pictures that are decoded when looked at."""
    import logging
    import warnings

    from replan.cli.console import quiet_libraries

    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    logging.getLogger("datasets.fingerprint").setLevel(logging.ERROR)


def weaken(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the weakened planner goes.")],
    planner: Annotated[str, typer.Option(help="Which planner: mini, a folder or a hub id.")] = "mini",
    noise: Annotated[float, typer.Option(help="Strength, relative to the weights' own deviation.")] = 0.4,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Make a planner worse on purpose, reproducibly: a start for trying out the training.

    [bold]Example[/bold]
      [cyan]replan train weaken runs/weak --noise 0.4[/cyan]
    """
    from replan.cli.console import out, quiet_libraries
    from replan.train.weaken import weaken as run

    quiet_libraries()
    out(str(run(planner, folder, noise, seed)))


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint of either engine.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the model goes.")],
) -> None:
    """Write a trained planner as an ordinary model folder; adapters and shards are merged.

    [bold]Examples[/bold]
      [cyan]replan train export runs/stage2 planner[/cyan]
      [cyan]replan train export runs/stage2/checkpoints/global_step_40/actor planner[/cyan]
    """
    from replan.cli.console import out, quiet_libraries
    from replan.train.folder import export as run

    quiet_libraries()
    out(str(run(source, folder)))


def prove(
    stage: Annotated[str, typer.Argument(metavar="stage1|stage2", help="Which proof.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where data, runs and results go.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    jobs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Seeds trained at once, each with its share of the cores.")
    ] = 1,
    settings: Settings = None,
) -> None:
    """Show on the mini world that training works: FOLDER/STAGE.json and FOLDER/STAGE.png. Run it again to go on.

    stage1: from a weakened planner to answers in valid form. stage2: from one that is in form again to more tasks done
    right.

    [bold]Example[/bold]
      [cyan]replan train prove stage1 runs/proof --jobs 2 && replan train prove stage2 runs/proof --jobs 2[/cyan]
    """
    from replan.cli.console import out
    from replan.train.proof import prove as run

    _quiet()
    for path in run(stage, folder, seeds, settings or (), jobs, _quiet):
        out(str(path))

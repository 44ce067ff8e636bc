"""Proof on the mini world that both stages train: figures on held-out items, and the curves as a picture.

stage1   a weakened planner learns to answer in valid form again; measured: share of held-out answers in valid form
stage2   a planner that was weakened more and has its form again from a short stage 1 (the first proof's ends too near
         the unweakened planner to leave much to learn): plans are rendered and judged; measured: share of held-out
         tasks done right, that is, the exact judge gives target, effect and consistency 4 or more

Each seed is an ordinary run of configs/grpo/mini_<stage>.yaml, so it can be stopped and goes on; several run side by
side.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import multiprocessing
import os
import platform
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from replan import config as configs
from replan import record
from replan.errors import ConfigError, ReplanError
from replan.images import write_atomic
from replan.train import run
from replan.train.build import BuildConfig, build
from replan.train.engine_trl import last_checkpoint, train
from replan.train.grpo import GrpoConfig
from replan.train.weaken import weaken, weakened_by

log = logging.getLogger(__name__)

NOISE = {"stage1": 0.36, "stage2": 0.38}
WEAK_SEED = 0
FORM = ("steps=64", "val_every=64")  # the short stage 1 that brings stage 2's planner back into form
MEASURE = {"stage1": "valid", "stage2": "success"}
TITLE = {"valid": "answers in valid form", "success": "tasks done right"}
NEEDED = {"stage1": "every seed ends at 0.99 or more", "stage2": "every seed gains 0.10 or more"}
HELD_OUT = 200
PLACES = ("planner", "train", "val", "output", "seed")  # settings that differ from seed to seed, and folders


@dataclass(frozen=True, slots=True)
class Curve:
    """One seed: the measure over training steps (on rollouts, sampled) and on held-out items (greedy)."""

    seed: int
    training: Mapping[int, float]
    held_out: Mapping[int, float]

    @property
    def start(self) -> float:
        return self.held_out[min(self.held_out)]

    @property
    def end(self) -> float:
        return self.held_out[max(self.held_out)]


def prove(
    stage: str,
    folder: Path,
    seeds: int,
    overrides: Sequence[str],
    jobs: int = 1,
    begin: Callable[[], None] | None = None,
) -> tuple[Path, Path]:
    """Run what is missing, `jobs` seeds at once; write `<folder>/<stage>.json` and `.png`. `begin` is called first in
    every process that trains; a function of a module.

    Raises ConfigError for an unknown stage.
    """
    if stage not in MEASURE:
        raise ConfigError(f"stage {stage!r}: must be {' or '.join(MEASURE)}")
    if importlib.util.find_spec("matplotlib") is None:  # said before the work, not after it
        raise ConfigError("the picture needs matplotlib: pip install 'replan[train]'")
    start = _start(stage, folder)
    outputs = {seed: folder / f"{stage}-seed{seed}" for seed in range(1, seeds + 1)}
    chosen = [_config(stage, start, folder, output, seed, overrides) for seed, output in outputs.items()]
    missing = [config for config in chosen if not _is_done(Path(config.output), config)]
    _train(missing, min(jobs, len(missing)), begin)
    curves = [read_curve(output, MEASURE[stage], seed) for seed, output in outputs.items()]
    for curve in curves:
        log.info("seed %d: %s %.3f -> %.3f on held-out items", curve.seed, MEASURE[stage], curve.start, curve.end)
    return _write(stage, folder, curves, overrides)


def _train(chosen: Sequence[GrpoConfig], jobs: int, begin: Callable[[], None] | None) -> None:
    """Train each, `jobs` at once in processes of their own that share the cores."""
    if jobs < 2:
        for config in chosen:
            train(config)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs, context, initializer=_begin_beside, initargs=(begin,), max_tasks_per_child=1
        ) as pool:
            list(pool.map(_train_beside, chosen, [threads] * len(chosen)))
    except BrokenProcessPool as error:
        raise ReplanError("the process of a seed died; the same command goes on") from error


def _begin_beside(begin: Callable[[], None] | None) -> None:
    """Ctrl-C reaches all processes; only the first one says so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if begin is not None:
        begin()


def _train_beside(config: GrpoConfig, threads: int) -> None:
    """One of several trainings at once: in a fresh process, whose log says which seed it is."""
    import torch

    torch.set_num_threads(threads)
    told = logging.StreamHandler()
    told.setFormatter(logging.Formatter(f"seed {config.seed}: %(message)s"))
    logger = logging.getLogger("replan")
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    train(config)


def _is_done(output: Path, chosen: GrpoConfig) -> bool:
    """Whether the run is finished. Raises ConfigError for one with other settings."""
    if not (output / run.PLANNER / "config.json").exists():
        return False
    ran, now = json.loads((output / run.RUN).read_bytes())["config"], json.loads(json.dumps(configs.dump(chosen)))
    changed = [key for key, value in now.items() if key not in ("loggers", "samples", "keep") and ran.get(key) != value]
    if changed:
        raise ConfigError(f"{output}: finished with other settings of {', '.join(changed)}; use another folder")
    return True


def read_curve(output: Path, measure: str, seed: int) -> Curve:
    """The measure over a run's steps, from its last checkpoint's history."""
    last = last_checkpoint(output)
    if last is None:
        raise ConfigError(f"{output}: holds no checkpoint")
    history = json.loads((last / "trainer_state.json").read_bytes())["log_history"]
    name = f"plan/{measure}"
    return Curve(
        seed,
        {int(entry["step"]): float(entry[name]) for entry in history if entry.get(name) is not None},
        {int(entry["step"]): _share(entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry},
    )


def _share(mean: float) -> float:
    """A share of the held-out items, rid of the rounding of means in single precision."""
    return round(float(mean), 6)


def holds(stage: str, curves: Sequence[Curve]) -> bool:
    """Whether the figures are what NEEDED says."""
    if stage == "stage1":
        return all(curve.end >= 0.99 for curve in curves)
    return all(_share(curve.end - curve.start) >= 0.10 for curve in curves)  # 0.82 - 0.72 is a little less than 0.1


def _data(folder: Path) -> tuple[Path, Path]:
    files = folder / "train.parquet", folder / "held_out.parquet"
    for path, split, count in ((files[0], "train", 2000), (files[1], "test", HELD_OUT)):
        if not path.exists():
            build(BuildConfig(split=split, count=count, model="mini", multiple=16), path)
    return files


def _start(stage: str, folder: Path) -> Path:
    """The planner that a stage begins with: stage 1 with a weakened one, stage 2 with one that is in form again."""
    weak = _weak(stage, folder)
    if not (weak / "config.json").exists():
        weaken("mini", weak, NOISE[stage], WEAK_SEED)
    wanted = {"planner": "mini", "noise": NOISE[stage], "seed": WEAK_SEED}
    if dict(weakened_by(weak)) != wanted:
        raise ConfigError(f"{weak}: weakened by {dict(weakened_by(weak))}, now by {wanted}; use another folder")
    if stage == "stage1":
        return weak
    output = folder / f"{stage}-start"
    chosen = _config("stage1", weak, folder, output, 1, FORM)
    if not _is_done(output, chosen):
        train(chosen)
    return output / run.PLANNER


def _weak(stage: str, folder: Path) -> Path:
    return folder / ("weak" if stage == "stage1" else f"weak-{stage}")


def _config(stage: str, planner: Path, folder: Path, output: Path, seed: int, overrides: Sequence[str]) -> GrpoConfig:
    train_file, held_out = _data(folder)
    given = [("planner", str(planner)), ("train", str(train_file)), ("val", str(held_out)), ("output", str(output))]
    return configs.load(GrpoConfig, f"grpo/mini_{stage}", [*given, ("seed", seed), *overrides])


def _write(stage: str, folder: Path, curves: Sequence[Curve], overrides: Sequence[str]) -> tuple[Path, Path]:
    ran = json.loads((folder / f"{stage}-seed{curves[0].seed}" / run.RUN).read_bytes())
    settings = {name: value for name, value in ran["config"].items() if name not in PLACES}
    command = f"replan train prove {stage} FOLDER --seeds {len(curves)}"
    mean = {name: statistics.fmean(getattr(curve, name) for curve in curves) for name in ("start", "end")}
    told = {
        "stage": stage,
        "measure": TITLE[MEASURE[stage]],
        "needed": NEEDED[stage],
        "holds": holds(stage, curves),
        "start": mean["start"],
        "end": mean["end"],
        "held_out_items": min(HELD_OUT, settings["val_items"]),
        "weakened_by": weakened_by(_weak(stage, folder)),
        "then": None if stage == "stage1" else " ".join(["stage 1, seed 1,", *FORM]),
        "seeds": [
            {"seed": c.seed, "start": c.start, "end": c.end, "held_out": c.held_out, "training": c.training}
            for c in curves
        ],
        "command": " ".join([command, *overrides]),
        "date": ran["starts"][-1]["date"][:10],
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "config": settings,
        "versions": ran["starts"][-1]["versions"],
    }
    paths = folder / f"{stage}.json", folder / f"{stage}.png"
    record.write_json(told, paths[0])
    write_atomic(paths[1], draw(stage, curves))
    return paths


def draw(stage: str, curves: Sequence[Curve]) -> bytes:
    """The curves as PNG bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        colour = f"C{number}"
        steps, values = list(curve.training), _smooth(list(curve.training.values()))
        axes.plot(steps, values, color=colour, lw=1, alpha=0.45)
        checks = sorted(curve.held_out)
        shown = [curve.held_out[step] for step in checks]
        axes.plot(
            checks, shown, "o-", color=colour, lw=2, ms=5, label=f"seed {curve.seed}: {shown[0]:.3f} to {shown[-1]:.3f}"
        )
    measure = TITLE[MEASURE[stage]]
    axes.set_xlabel("step")
    axes.set_ylabel(f"share of {measure}")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"Stage {stage[-1]} on the mini world: {measure}\nthick: {HELD_OUT} held-out items, greedy; "
                   "thin: training rollouts, mean of 5 steps", fontsize=9)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _smooth(values: Sequence[float], span: int = 5) -> list[float]:
    """Running mean over the last `span` values."""
    return [sum(values[max(0, at - span + 1) : at + 1]) / (at + 1 - max(0, at - span + 1)) for at in range(len(values))]

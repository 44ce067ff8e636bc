"""`replan eval`: generate a benchmark's edits, score them, report, browse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.eval.data import Bench
    from replan.eval.generate import Made
    from replan.eval.methods import GenerateConfig
    from replan.eval.score import Scoring

T = TypeVar("T")

evaluate = typer.Typer(
    help="The benchmark: edits of every item, scores by a judge, a report with intervals, a page to look at.",
    no_args_is_help=True,
)
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings by name.", show_default=False),
]
Judge = Annotated[
    str,
    typer.Option(
        "--judge", metavar="NAME",
        help="mini (exact), gemini:MODEL, vertex:MODEL, openai:MODEL, or the address of a server, http://host/v1#MODEL.",
    ),
]  # fmt: skip
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]


@evaluate.command()
def generate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name such as eval/mini_replan, or a YAML file.")],
    settings: Settings = None,
) -> None:
    """Edit every item of a benchmark. Run it again to resume; failed items are tried again.

    [bold]Examples[/bold]
      [cyan]replan eval generate eval/mini_replan[/cyan]
      [cyan]replan eval generate configs/eval/replan_flux.yaml processes=8 output=runs/flux[/cyan]   one editor per GPU
      [cyan]replan eval generate eval/replan_flux service=http://host:8001 workers=16[/cyan]   by `replan serve editor`
      [cyan]accelerate launch --num_machines 2 ... -m replan eval generate eval/replan_flux[/cyan]   on several machines
      [cyan]replan eval generate eval/replan_flux data.source=my.jsonl edit.steps=20[/cyan]
    """
    from replan import config as loader
    from replan.eval import shard
    from replan.eval.methods import GenerateConfig

    chosen = loader.load(GenerateConfig, config, settings or ())
    if chosen.processes > 1:
        shard.launch(chosen.processes, chosen.runtime, ["eval", "generate", config, *(settings or ()), "processes=1"])
        return
    failed = _generate(chosen)
    shard.leave()
    if failed:
        raise typer.Exit(1)


def _generate(chosen: GenerateConfig) -> int:
    """Make this process's share; returns how many items failed."""
    from dataclasses import replace

    from replan.cli.console import out, quiet_libraries, say
    from replan.cli.outputs import writable
    from replan.eval import generate as engine
    from replan.eval import methods, shard
    from replan.eval.data import load_bench

    here, runtime = shard.this_shard(chosen.runtime)
    bench = load_bench(chosen.data)
    folder = Path(chosen.output)
    writable(folder)
    if not chosen.service:
        quiet_libraries()
    todo = methods.todo(replace(chosen, runtime=runtime))
    run = methods.describe(chosen, todo, bench)
    engine.compare(folder, run)  # in every process, before any of them touches an item of another run
    if here.is_main:
        _tell_bench(bench)
        engine.sweep(folder)
        engine.start(folder, run)
    mine = bench.items[here.index :: here.count]
    counts = {"done": 0, "skipped": 0, "failed": 0}
    name = f"process {here.index}: " if here.count > 1 else ""
    try:
        for made in _shown(engine.generate(mine, folder, todo, chosen.workers), len(mine), _was_work):
            counts[made.status] += 1
            if made.status == "failed":
                say(f"{name}failed: item {made.id}: {made.error}")
    finally:
        left = len(mine) - sum(counts.values())
        rest = f", {left} not reached (the same command resumes)" if left else ""
        done, skipped, failed = counts["done"], counts["skipped"], counts["failed"]
        say(f"{name}{done} done, {skipped} were done before, {failed} failed{rest}; in {folder}")
    if here.is_main:
        out(str(folder))
    return counts["failed"]


@evaluate.command()
def score(
    folder: Folder,
    judge: Judge,
    settings: Settings = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where paid answers are kept; ~/.cache/replan/judge by default."),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost, and stop.")] = False,
    pixels: Annotated[bool, typer.Option(help="Also measure pixels outside and inside the boxes.")] = True,
    plans: Annotated[
        str | None,
        typer.Option(metavar="DIR|answer", help="Boxes for the pixel measures: another run's plans, or the rows' own."),
    ] = None,
) -> None:
    """Score a run. Run it again to resume: nothing is paid twice, and a changed picture is judged anew.

    Settings of the judge: temperature, concurrency, tries, retries, timeout, structured, price_in, price_out, ...

    [bold]Examples[/bold]
      [cyan]replan eval score runs/mini-replan --judge mini[/cyan]
      [cyan]replan eval score runs/flux --judge gemini:gemini-2.5-pro price_in=1.25 price_out=10[/cyan]
      [cyan]replan eval score runs/flux --judge http://localhost:8000/v1#Qwen2.5-VL-72B-Instruct concurrency=24[/cyan]
    """
    from replan import config as loader
    from replan.cli.console import out, say
    from replan.eval.data import DataConfig, load_bench
    from replan.eval.generate import read_run
    from replan.eval.score import Cost, Kept, Scoring
    from replan.judge import JudgeConfig, load_judge

    run = read_run(folder)
    bench = load_bench(loader.load(DataConfig, run["data"]))
    _tell_bench(bench)
    chosen = loader.load(JudgeConfig, {}, settings or ())
    scoring = Scoring.of(folder, bench, load_judge(judge, chosen), Kept(cache or _cache()))
    expected = scoring.estimate(chosen.price_in, chosen.price_out)
    missing = f", {len(scoring.missing)} items have no picture" if scoring.missing else ""
    say(f"{scoring.known} scores known, {len(scoring.open)} to ask{missing}")
    if expected.tokens_in:
        say(f"estimated: about {expected}")
    if estimate:
        return
    spent = Cost(price_in=chosen.price_in, price_out=chosen.price_out)
    workers = 1 if judge == "mini" else chosen.concurrency
    try:
        _ask_all(scoring, workers, spent)
    finally:
        path = scoring.save(run, spent)
        if spent.tokens_in:
            say(f"spent: {spent}")
    if pixels:
        _measure(folder, bench, plans)
    out(str(path))


@evaluate.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Scored runs; the first is the base.")],
    judge: Annotated[str | None, typer.Option("--judge", metavar="NAME", help="Whose scores, if several.")] = None,
    missing: Annotated[
        str, typer.Option(metavar="drop|zero|both", help="What a missing score counts as; zero is as published.")
    ] = "both",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write all as JSON.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Also draw grouped bars (.png, .svg, .pdf).")
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="Print the published table beside it.")] = False,
) -> None:
    """Markdown on stdout: columns with intervals, coverage, categories, pixel measures, runs against the first.

    [bold]Example[/bold]
      [cyan]replan eval report runs/mini-base runs/mini-replan --json report.json --picture report.png[/cyan]
    """
    from replan import record
    from replan.cli.console import out
    from replan.eval import markdown
    from replan.eval import picture as drawing
    from replan.eval import report as engine

    kinds: dict[str, tuple[engine.Missing, ...]] = {"drop": ("drop",), "zero": ("zero",), "both": ("drop", "zero")}
    if missing not in kinds:
        raise ConfigError(f"--missing {missing}: must be {', '.join(kinds)}")
    summaries = engine.summarize([engine.read_run(folder, judge) for folder in folders])
    complete = all(summary.run.scored == len(summary.run.rows) for summary in summaries)
    # with nothing missing both conventions are the same table
    chosen = kinds[missing][: 1 if complete else None]
    out(markdown.report(summaries, chosen, with_published=published).rstrip("\n"))
    if json_file is not None:
        record.write_json(engine.to_json(summaries), json_file)
    if picture is not None:
        drawing.draw(summaries, chosen[0], picture)


@evaluate.command()
def browse(
    folder: Folder,
    other: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A second run, shown beside the first.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("browse.html"),
    judge: Annotated[str | None, typer.Option("--judge", metavar="NAME", help="Whose scores, if several.")] = None,
    side: Annotated[int, typer.Option(min=64, help="Longest side of the pictures in the page, in pixels.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items.")] = None,
) -> None:
    """Write one self-contained page: source, boxes, plan, reasoning, result, scores and the judge's reasons.

    [bold]Example[/bold]
      [cyan]replan eval browse runs/mini-base runs/mini-replan -o compare.html[/cyan]
    """
    from replan import config as loader
    from replan.cli.console import out
    from replan.eval import browse as page
    from replan.eval.data import DataConfig, load_bench
    from replan.eval.generate import read_run

    data = loader.load(DataConfig, read_run(folder)["data"])
    folders = [folder] if other is None else [folder, other]
    page.write(load_bench(data).items[:limit], folders, output, judge, side)
    out(str(output))


def _ask_all(scoring: Scoring, workers: int, spent: Any) -> None:
    from replan.cli.console import say

    unscored = 0
    for answered in _shown(scoring.run(workers, spent), len(scoring.open), lambda answered: True):
        why = answered.entry.get("unscored")
        if why:
            unscored += 1
            say(f"unscored: item {answered.ask.case.id}, {answered.ask.dimension.name}: {why}")
    if unscored:
        say(f"{unscored} scores are missing; the same command asks for them again")


def _measure(folder: Path, bench: Bench, plans: str | None) -> None:
    from collections import Counter

    from replan.cli.console import say
    from replan.eval import pixels

    source = pixels.answer_plans if plans == "answer" else pixels.own_plans(Path(plans) if plans else folder)
    measures = pixels.measure_run(folder, bench.items, source)
    reasons = Counter(why for why in _shown(measures, len(bench.items), lambda why: True) if why is not None)
    for why, count in reasons.items():
        say(f"pixels: {count} items not measured: {why}")
    for note in pixels.read_notes(folder):
        say(f"pixels: {note}")


def _tell_bench(bench: Bench) -> None:
    from replan.cli.console import say

    for note in bench.notes:
        say(f"data: {note}")
    if bench.bad:
        say(f"data: {len(bench.bad)} rows cannot be used, {len(bench.items)} can")


def _cache() -> Path:
    import os

    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "replan" / "judge"


def _was_work(made: Made) -> bool:
    return made.status != "skipped"


def _shown(results: Iterable[T], total: int, worked: Any) -> Iterator[T]:
    """The results, with a bar on a terminal, and now and then a line elsewhere: rate over real work, and time left."""
    from replan.cli.console import say, stderr
    from replan.eval.progress import Pace

    pace = Pace(total)
    console = stderr()
    if not console.is_terminal:
        for result in results:
            line = pace.tick(worked(result))
            yield result
            if line:
                say(line)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    text = TextColumn("{task.fields[rest]}")
    with Progress(BarColumn(), MofNCompleteColumn(), text, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rest="")
        for result in results:
            pace.tick(worked(result))
            bar.update(task, advance=1, rest=pace.rest())
            yield result

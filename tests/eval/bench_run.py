"""A run of the benchmark with an editor without weights, to be killed: python bench_run.py FOLDER COUNT PAUSE.

Prints a line when it starts to work and one when it is done. Loads no torch.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image

from replan.eval.data import Bench, DataConfig, load_bench
from replan.eval.generate import Todo, generate, start, sweep
from replan.types import Box, Edit, EditRequest, Plan, Region, Size

SETTINGS = {"method": "fake"}


def edit(request: EditRequest) -> Edit:
    """A picture of noise that depends on the seed and the instruction."""
    rng = random.Random(f"{request.seed} {request.instruction}")
    size = Size(*request.image.size)
    plan = Plan("made up", "keep the rest", (Region(Box(8, 8, 40, 40), request.instruction),), size)
    return Edit(request, plan, Image.frombytes("RGB", size, rng.randbytes(3 * size.width * size.height)), ("a note",))


def run(folder: Path, bench: Bench, pause: float = 0.0, workers: int = 1) -> list[str]:
    """What became of the items."""

    def slow(request: EditRequest) -> Edit:
        time.sleep(pause)
        return edit(request)

    sweep(folder)
    start(folder, {"format": 1, "settings": SETTINGS, "data": {"source": "mini", "split": "test"}, "bad_rows": []})
    return [made.status for made in generate(bench.items, folder, Todo(slow, SETTINGS, 42), workers)]


def many(count: int) -> Bench:
    """More items than there are scenes; drawing each would take longer than the test."""
    few = load_bench(DataConfig(limit=10)).items
    return Bench(tuple(replace(few[number % 10], id=number) for number in range(count)), ())


if __name__ == "__main__":
    found = many(int(sys.argv[2]))
    print("ready", "torch" in sys.modules, flush=True)
    run(Path(sys.argv[1]), found, float(sys.argv[3]))
    print("done", flush=True)

"""SIGKILL at any moment costs the item in hand and nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import bench_run

COUNT, KILLS, PAUSE = 250, 20, 0.02
SCRIPT = Path(bench_run.__file__)
ENV = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent.parent)}


def files(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for the times taken."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "seconds.json"
    }


def finished(folder: Path) -> int:
    return len(list(folder.glob("*/edit.json")))


def test_twenty_kills_and_an_undisturbed_run_give_the_same_bytes(tmp_path: Path) -> None:
    rng = random.Random(7)
    killed = tmp_path / "killed"
    bench = bench_run.many(COUNT)
    reached = []
    for _ in range(KILLS):
        call = [sys.executable, str(SCRIPT), str(killed), str(COUNT), str(PAUSE)]
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=ENV) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready False\n"  # no torch
            time.sleep(rng.uniform(0.0, 0.25))
            assert process.poll() is None, "finished before it could be killed"
            process.kill()
            process.wait()
        reached.append(finished(killed))
    assert reached == sorted(reached), "a finished item got lost"
    assert 0 < reached[-1] < COUNT, reached
    statuses = bench_run.run(killed, bench)
    assert statuses.count("skipped") == reached[-1]
    quiet = tmp_path / "quiet"
    bench_run.run(quiet, bench)
    assert files(killed) == files(quiet)
    assert not list(killed.rglob("*.part"))

"""Load test of the editor service: many clients, few replicas, some of them killed.

    OMP_NUM_THREADS=1 python scripts/load_test.py                              200 clients, 2 replicas, 2 kills
    OMP_NUM_THREADS=1 python scripts/load_test.py --requests 400 --clients 50  a shorter one
    OMP_NUM_THREADS=1 python scripts/load_test.py --replicas 0 --kills 0       one editor, no Ray

Every client asks for edits of the mini world with plans of their own, one after the other, through the same client that
trainers use. Checked: every request got exactly one answer, and that answer is the very picture that its seed gives
in this process; what was turned away came back with a clear status; memory of the service does not grow.
Exit 1 when one of these does not hold. Figures go to stdout as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from replan.errors import ServiceError
from replan.mini.report import items
from replan.mini.scenes import draw
from replan.serve.client import ClientConfig, EditClient
from replan.types import Edit, EditRequest

PICTURES = 4
MOST_KB = 20  # that a request may leave behind: less than one picture of 96 x 96, so that one kept by mistake shows
SEEDS = 3  # few different requests, so that the expected pictures can be made in this process


@dataclass
class Tally:
    """What came of the requests."""

    seconds: list[float] = field(default_factory=list)
    answers: Counter[int] = field(default_factory=Counter)  # request -> how many answers
    wrong: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)  # of every single HTTP try
    memory: list[tuple[int, float]] = field(default_factory=list)  # (answers so far, MB)
    killed: list[int] = field(default_factory=list)


def main() -> None:
    figures = run(sys.argv[1:])
    print(json.dumps(figures, indent=2))
    sys.exit(0 if all(figures["checks"].values()) else 1)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """The figures of a load test by its command line."""
    asked = _arguments(arguments)
    with _service(asked) as (url, root):
        tally, wall = asyncio.run(_load(url, root, asked))
    return _figures(tally, wall, asked)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--replicas", type=int, default=2, help="0: one editor without Ray")
    parser.add_argument("--kills", type=int, default=2, help="how often a replica gets SIGKILL")
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--port", type=int, default=8571)
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _service(asked: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The service as a user starts it; its address and process id."""
    command = [sys.executable, "-m", "replan", "serve", "editor", f"steps={asked.steps}", "--planner", "none"]
    command += ["--port", str(asked.port), "--queue", str(asked.queue), "--batch", str(asked.batch)]
    command += ["--replicas", str(asked.replicas)] if asked.replicas else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        while url and not url.startswith("http"):
            url = process.stdout.readline().strip()
        try:
            if not url:
                raise SystemExit("the service did not start")
            with EditClient(url) as client:
                client.wait_ready(300)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def _load(url: str, root: int, asked: argparse.Namespace) -> tuple[Tally, float]:
    requests = _requests()
    expected = await asyncio.to_thread(_expected, requests, asked.steps)
    tally, todo = Tally(), iter(range(asked.requests))
    config = ClientConfig(
        timeout=120, retries=1000, backoff=0.2, longest_wait=5, patience=900, connections=asked.clients
    )
    with EditClient(url, config) as client:
        _count_tries(client, tally)
        start = time.monotonic()
        watch = asyncio.create_task(_watch(tally, root, asked))
        await asyncio.gather(*(_client(client, todo, requests, expected, tally) for _ in range(asked.clients)))
        wall = time.monotonic() - start
        watch.cancel()
        await client.aclose()
    tally.memory.append((sum(tally.answers.values()), memory(root)))
    return tally, wall


async def _client(
    client: EditClient, todo: Iterator[int], requests: list[EditRequest], expected: list[bytes], tally: Tally
) -> None:
    """One visitor: asks, waits, compares, asks again."""
    for number in todo:
        which = number % len(requests)
        start = time.monotonic()
        try:
            edit = await client.acall(requests[which])
        except ServiceError as error:
            tally.refused.append(str(error))
            continue
        tally.seconds.append(time.monotonic() - start)
        tally.answers[number] += 1
        if not _is(edit, expected[which]):
            tally.wrong.append(number)


def _is(edit: Edit, expected: bytes) -> bool:
    """The very bytes; beside others in a batch, two grey levels of rounding."""
    got = edit.image.tobytes()
    if edit.notes and len(got) == len(expected):
        return max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 2
    return got == expected


def _requests() -> list[EditRequest]:
    world = items("dev", PICTURES)
    return [EditRequest(draw(item.scene), item.instruction, seed, item.plan) for item in world for seed in range(SEEDS)]


def _expected(requests: list[EditRequest], steps: int) -> list[bytes]:
    from dataclasses import replace

    from replan import Editor
    from replan.backbones import default_config

    editor = Editor.load("mini", None, config=replace(default_config("mini"), steps=steps))
    return [editor(request).image.tobytes() for request in requests]


class Counted(httpx.AsyncBaseTransport):
    """Notes how every single try ends, also those that the client retries: by a status, or without one."""

    def __init__(self, inner: httpx.AsyncBaseTransport, tally: Tally) -> None:
        self.inner, self.tally = inner, tally

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await self.inner.handle_async_request(request)
            await response.aread()  # a connection may also drop in the middle of an answer
        except httpx.HTTPError as error:
            self.tally.statuses[type(error).__name__] += 1
            raise
        self.tally.statuses[str(response.status_code)] += 1
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


def _count_tries(client: EditClient, tally: Tally) -> None:
    line = client.line
    settings = line.settings()
    inner = httpx.AsyncHTTPTransport(limits=settings.get("limits", httpx.Limits()))
    line.use(httpx.AsyncClient(**settings, transport=Counted(inner, tally)))


async def _watch(tally: Tally, root: int, asked: argparse.Namespace) -> None:
    """Kill replicas in the first half; note the memory now and then."""
    dice = random.Random(0)
    marks = [asked.requests * (k + 1) // (2 * asked.kills + 1) for k in range(asked.kills)]  # in the first half
    while True:
        await asyncio.sleep(0.5)
        done = sum(tally.answers.values())
        pids = replicas(root)
        if marks and done >= marks[0] and len(pids) >= asked.replicas:
            marks.pop(0)
            victim = dice.choice(pids)
            os.kill(victim, signal.SIGKILL)
            tally.killed.append(victim)
        if len(pids) >= max(1, asked.replicas) and (not tally.memory or done >= tally.memory[-1][0] + 100):
            tally.memory.append((done, memory(root)))


def processes(root: int) -> list[int]:
    """A process and all that came of it; Ray's replicas are no children of ours, but of its daemon, which is."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def replicas(root: int) -> list[int]:
    """Processes that hold a model: replicas, or the service itself."""
    names = {}
    for pid in processes(root):
        with contextlib.suppress(OSError):
            names[pid] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    found = [pid for pid, name in names.items() if "ServeReplica:replan:editor" in name]
    return found or [root]


def memory(root: int) -> float:
    """Megabytes of the service's replicas and front, in all."""
    total = 0.0
    for pid in {*replicas(root), root, *(p for p in processes(root) if _named(p, "ServeReplica:replan:front"))}:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    return round(total, 1)


def _named(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return name in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return False


def _growth(tally: Tally) -> float:
    """Kilobytes that a request leaves behind, by the line through the second half, in which no replica is killed."""
    half = sum(tally.answers.values()) // 2
    later = [(done, mb) for done, mb in tally.memory if done >= half]
    if len({done for done, _ in later}) < 2:
        return 0.0
    slope = statistics.linear_regression(*zip(*later, strict=True)).slope
    return round(slope * 1024, 1)


def _figures(tally: Tally, wall: float, asked: argparse.Namespace) -> dict[str, Any]:
    answers = sum(tally.answers.values())
    ordered, growth = sorted(tally.seconds) or [0.0], _growth(tally)
    return {
        "clients": asked.clients, "requests": asked.requests, "replicas": asked.replicas, "queue": asked.queue,
        "batch": asked.batch, "steps": asked.steps, "killed": len(tally.killed), "wall_seconds": round(wall, 1),
        "answered": answers, "refused_in_the_end": len(tally.refused),
        "answered_twice": sum(count > 1 for count in tally.answers.values()),
        "wrong_pictures": len(tally.wrong),
        "tries_by_status": dict(sorted(tally.statuses.items())),
        "edits_per_second": round(answers / wall, 2),
        "p50_seconds": round(statistics.median(ordered), 2),
        "p99_seconds": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "memory_mb": tally.memory[:: max(1, len(tally.memory) // 10)] + tally.memory[-1:],
        "kb_per_request": growth,
        "checks": {
            "every request answered exactly once or refused": answers + len(tally.refused) == asked.requests
            and all(count == 1 for count in tally.answers.values())
            and tally.statuses["200"] == answers,  # what was answered came once, as a try of its own
            "every picture is the one its seed gives": not tally.wrong,
            "every status is clear": set(tally.statuses) <= {"200", "429", "503"},
            "memory is flat": growth < MOST_KB,
            "all kills happened": len(tally.killed) == asked.kills,
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()

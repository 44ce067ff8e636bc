"""Slow: stage 2 on real services that fail. Run with: pytest tests/train/test_chaos.py -m slow"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from rollouts import mini_rows

from replan import config as configs
from replan.train.engine_trl import train
from replan.train.grpo import GrpoConfig
from replan.train.run import read

pytestmark = pytest.mark.slow
STEPS = 6
DOWN = 30.0  # seconds without a judge


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """`replan serve ...` in a process of its own, which can be killed and started again."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.call = [sys.executable, "-m", "replan", "serve", *arguments, "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it is ready."""
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.call, stdout=quiet, stderr=quiet, start_new_session=True)
        until = time.monotonic() + 300
        while not self.is_ready():
            assert self.process.poll() is None, f"{' '.join(self.call)}: ended with {self.process.returncode}"
            assert time.monotonic() < until, f"{' '.join(self.call)}: is not ready"
            time.sleep(0.2)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """SIGKILL, to the process and all its children."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Weather:
    """Stands before the judge: passes calls on, slowly, or refuses them while it is down."""

    def __init__(self, judge: str) -> None:
        self.judge, self.is_down, self.delay, self.refused, self.passed = judge, False, 0.0, 0, 0
        weather = self

        class Door(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass("GET", b"")

            def do_POST(self) -> None:
                self._pass("POST", self.rfile.read(int(self.headers["content-length"])))

            def _pass(self, method: str, body: bytes) -> None:
                if weather.is_down:
                    weather.refused += 1
                    self.close_connection = True
                    return
                time.sleep(weather.delay)
                reply = httpx.request(
                    method, weather.judge + self.path, content=body, headers={"content-type": "application/json"},
                    timeout=60,
                )  # fmt: skip
                weather.passed += 1
                self.send_response(reply.status_code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(reply.content)))
                self.end_headers()
                self.wfile.write(reply.content)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


def settings(folder: Path, output: str, editor: str, judge: str) -> GrpoConfig:
    rows = mini_rows(folder, 12)
    given: list[Any] = [
        ("planner", "mini"), ("train", str(rows.path)), ("val", None), ("output", str(folder / output)),
        ("services.editor", editor), ("services.judge", judge), f"steps={STEPS}", "rollout.prompts=2",
        "rollout.group=4", "optim.micro=8", "optim.lr=1e-5", "loggers=[]", "save_every=100", "services.timeout=2",
        "services.backoff=1", "services.longest=4", "services.patience=600", "services.workers=4",
        "services.most_failed=0.0",
    ]  # fmt: skip
    return configs.load(GrpoConfig, "grpo/mini_stage2", given)


def replicas(root: int) -> list[int]:
    """The editor's replicas below a service's process, by the title that Ray gives them."""
    found, family = [], [root]
    for pid in family:
        family += children(pid)
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "ServeReplica:replan:editor" in title:
            found.append(pid)
    return found


def children(pid: int) -> list[int]:
    """Of all of its threads."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def wait_for_work(url: str) -> None:
    """Until a request is under way in the editor."""
    until = time.monotonic() + 120
    while not re.search(r"^replan_inside [1-9]", httpx.get(url + "/metrics").text, re.MULTILINE):
        assert time.monotonic() < until, "nobody asked the editor for anything"
        time.sleep(0.005)


@pytest.mark.parametrize("ways", [(), ("--replicas", "2")], ids=["process", "replicas"])
def test_judge_down_editor_killed_judge_slow(tmp_path: Path, ways: tuple[str, ...]) -> None:
    """As many steps as without any of it, and the very same rewards: none came from an outage."""
    with (
        Service("judge", "--judge", "mini") as judge,
        Service("editor", "--backbone", "mini", "--planner", "none", *ways) as editor,
    ):
        weather = Weather(judge.url)
        told: list[str] = []

        def kill() -> None:
            assert editor.process is not None
            found = replicas(editor.process.pid)  # looked up before, so that the request still runs at the kill
            wait_for_work(editor.url)
            if ways:  # Ray starts another one
                os.kill(found[0], signal.SIGKILL)
            else:
                editor.kill()
                editor.start()

        plot = threading.Thread(target=disturb, args=(weather, tmp_path / "chaos" / "rollouts.jsonl", kill, told))
        plot.start()
        train(settings(tmp_path, "chaos", editor.url, weather.url))
        plot.join()
        assert told == ["judge down", "judge back, slow", "editor killed"]
        assert weather.refused > 0
        train(settings(tmp_path, "quiet", editor.url, judge.url))
    chaos, quiet = (read(tmp_path / name / "rollouts.jsonl") for name in ("chaos", "quiet"))
    assert len(chaos) == STEPS
    assert None not in [reward for step in chaos for reward in step["rewards"]]
    assert [step["items"] for step in chaos] == [step["items"] for step in quiet]
    assert [step["rewards"] for step in chaos] == [step["rewards"] for step in quiet]


def disturb(weather: Weather, log: Path, kill: Callable[[], None], told: list[str]) -> None:
    """The judge leaves after step 1 for half a minute and comes back slow; later an editor is killed at its work."""
    wait_for(log, 1)
    weather.is_down = True
    told.append("judge down")
    time.sleep(DOWN)
    weather.is_down, weather.delay = False, 0.3
    told.append("judge back, slow")
    wait_for(log, 3)
    kill()
    told.append("editor killed")


def wait_for(log: Path, steps: int) -> None:
    until = time.monotonic() + 600
    while len(read(log)) < steps and time.monotonic() < until:
        time.sleep(0.05)

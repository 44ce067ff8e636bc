"""`replan serve` as a user runs it."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from servants import setup, until
from typer.testing import CliRunner

from replan.cli import app, serve
from replan.cli.options import Flags
from replan.errors import ServiceError
from replan.serve import wire
from replan.serve.limits import Limits

SCRIPTS = Path(__file__).parents[2] / "scripts"


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own; the address that it printed."""
    command = [sys.executable, "-m", "replan", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def test_a_judge_from_start_to_ctrl_c():
    with started("judge", "--port", "0") as (url, process):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        until(lambda: httpx.get(url + "/ready").status_code == 200, 200)
        about = wire.About.model_validate(httpx.get(url + "/v1/about").json())
        assert (about.service, about.model["name"], about.limits["queue"]) == ("judge", "mini", 64)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_the_editor_is_set_up_by_the_options_of_an_edit():
    shared = {field.name for field in fields(Flags)} - {"strict"}  # every request says so itself
    assert shared <= set(inspect.signature(serve.editor).parameters)


def test_help_names_the_two_services():
    runner = CliRunner()
    told = runner.invoke(app, ["serve", "--help"])
    assert told.exit_code == 0
    assert {"editor", "judge"} <= set(told.output.split())
    for verb in ("editor", "judge"):
        assert "127.0.0.1" in runner.invoke(app, ["serve", verb, "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["editor", "stepps=3"], "did you mean steps"),
        (["editor", "--backbone", "minni"], "did you mean mini"),
        (["judge", "--judge", "nobody"], "nobody"),
        (["judge", "concurency=3"], "did you mean concurrency"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], told: str):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert told in result.output


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "judge", "--port", port])
    assert result.exit_code == 2
    assert f"127.0.0.1:{port}: cannot listen there" in result.output


def test_the_script_is_one_command(tmp_path: Path):
    """With a `replan` that only shows what it was asked, and no GPU."""
    fake = tmp_path / "replan"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BACKBONE": "mini", "REPLICAS": "2"}
    answer = subprocess.run(
        [SCRIPTS / "serve_editor.sh", "steps=2"], env=environment, capture_output=True, text=True, check=True
    )
    wanted = "serve editor --backbone mini --planner none --replicas 2 --host 127.0.0.1 --port 8001 steps=2"
    assert answer.stdout.strip() == wanted


def test_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install replan[serve]")

    def fails(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fails)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command's own way with SIGTERM is not for the tests
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    answer = CliRunner().invoke(app, ["serve", "editor", "--replicas", "2"])
    assert answer.exit_code == 1
    assert "Ray did not start at RAY_ADDRESS = 10.0.0.1:6379: The current node" in " ".join(answer.output.split())


def test_replicas_that_do_not_come_up_say_why(monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install replan[serve]")
    from ray import serve

    from replan.serve import cluster

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a page of Ray's own")

    for place, name in ((ray, "init"), (ray, "shutdown"), (serve, "start"), (serve, "shutdown")):
        monkeypatch.setattr(place, name, lambda **_: None)
    monkeypatch.setattr(serve, "run", fails)
    told = "Traceback ...\n  in _begin\nreplan.errors.ServiceError: loading failed: no weights\n"
    monkeypatch.setattr(cluster, "_deployment", lambda: SimpleNamespace(message=told))
    with (
        pytest.raises(ServiceError, match=r"did not start: .*ServiceError: loading failed: no weights$"),
        cluster.running(setup(), Limits(), cluster.Cluster(1)),
    ):
        pass

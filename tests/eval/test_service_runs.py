"""Runs whose edits an editor service makes: the same pictures as in process, however many are under way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planner_server import Answer, serve
from test_eval_cli import replan

from replan import config
from replan.backbones import EditConfig, Runtime
from replan.errors import ConfigError, ServiceError
from replan.eval import methods
from replan.eval.data import load_bench
from replan.eval.generate import generate
from replan.planner import PlannerConfig
from replan.record import Setup
from replan.serve.client import EditClient
from replan.serve.limits import Limits
from replan.serve.run import editor_app, running

COUNT = 6


def setup(flux_folder: Path, planner: str | None = None) -> Setup:
    """Other settings than the runs have, which must not matter."""
    edit = config.load(EditConfig, "edit/mini", ["steps=3"])
    return Setup(str(flux_folder), planner, edit, Runtime(device="cpu"), PlannerConfig())


@pytest.fixture(scope="module")
def url(flux_folder: Path) -> Iterator[str]:
    with running(editor_app(setup(flux_folder), Limits(queue=2))) as address:  # so that some are told to come back
        EditClient(address).wait_ready(300)  # transformers cannot load in two threads of a process at once
        yield address


def words(folder: Path, flux_folder: Path, **changes: Any) -> dict[str, Any]:
    found = {"output": str(folder), "backbone": str(flux_folder), "planner": "answer", "preset": "edit/mini"}
    return found | {"edit": {"steps": 1}, "data": {"limit": COUNT}} | changes


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/final_result.png")}


@pytest.mark.parametrize("method", ["replan", "baseline"])
def test_the_same_pictures_as_in_process(method: str, url: str, flux_folder: Path, tmp_path: Path) -> None:
    for name, more in (("here", {"runtime": {"device": "cpu"}}), ("there", {"service": url, "workers": 5})):
        values = words(tmp_path / name, flux_folder, method=method) | more
        chosen = config.load(methods.GenerateConfig, values)
        todo = methods.todo(chosen)
        made = list(generate(load_bench(chosen.data).items, tmp_path / name, todo, chosen.workers))
        assert [one.error for one in made] == [None] * COUNT
    assert url not in json.dumps(todo.settings)  # a service that moved is the same one
    assert len(pictures(tmp_path / "here")) == COUNT
    assert pictures(tmp_path / "here") == pictures(tmp_path / "there")


def test_command_resumes(url: str, flux_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = ["generate", "eval/mini_exact", f"output={run}", f"backbone={flux_folder}", "preset=edit/mini"]
    call += ["edit.steps=1", f"data.limit={COUNT}", f"service={url}", "workers=4"]
    code, out, told = replan(*call)
    assert (code, out.strip()) == (0, str(run)), told
    (run / "2" / "edit.json").unlink()
    before = pictures(run)
    assert f"1 done, {COUNT - 1} were done before, 0 failed" in replan(*call)[2]
    assert pictures(run) == before


def test_other_models_or_settings_that_do_nothing_are_refused(url: str, flux_folder: Path, tmp_path: Path) -> None:
    for changes, told in (
        ({"backbone": "flux-kontext"}, "its backbone is .*, the run's is flux-kontext"),
        ({"planner": "mini"}, "its planner is none, the run's is mini"),
        ({"method": "instruct-pix2pix"}, "serves no instruct-pix2pix"),
        ({"processes": 2}, "workers says how many"),
        ({"planning": {"temperature": 0.5}}, "give them to `replan serve`"),
        ({"runtime": {"dtype": "bfloat16"}}, "the service's own counts"),
        ({"timeout": 0}, "timeout = 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            methods.todo(config.load(methods.GenerateConfig, words(tmp_path, flux_folder, service=url, **changes)))


def test_what_is_no_editor_or_batches_is_refused(flux_folder: Path, tmp_path: Path) -> None:
    with serve() as server:
        chosen = config.load(methods.GenerateConfig, words(tmp_path, flux_folder, service=server.url))
        about = {"replan": "1", "service": "editor", "model": {"backbone": flux_folder.name}, "limits": {"batch": 4}}
        for body, error, told in (
            ({"status": "ok"}, ServiceError, "no editor service of this version"),
            (about | {"service": "judge"}, ConfigError, "is a judge"),
            (about, ConfigError, "4 edits in one forward"),
        ):
            server.script = [Answer(body)]
            with pytest.raises(error, match=told):
                methods.todo(chosen)


def test_a_service_that_is_gone_ends_the_run(flux_folder: Path, tmp_path: Path) -> None:
    with running(editor_app(setup(flux_folder)), grace=0) as address:
        EditClient(address).wait_ready(120)
        chosen = config.load(
            methods.GenerateConfig, words(tmp_path, flux_folder, service=address, timeout=0.5, workers=2)
        )
        todo = methods.todo(chosen)
    with pytest.raises(ServiceError, match="/ready"):
        list(generate(load_bench(chosen.data).items, tmp_path, todo, 2))
    assert 1 <= len(list(tmp_path.glob("*/failed.json"))) < COUNT
    with pytest.raises(ServiceError, match="/v1/about"):
        methods.todo(chosen)

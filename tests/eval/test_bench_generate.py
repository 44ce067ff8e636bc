"""Generation: seeds by item, resume, failed items, order and workers, other settings in the same folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_run
import pytest
from test_bench_kill import files

from replan import config
from replan.errors import BackboneError, ConfigError, PlannerError
from replan.eval import methods
from replan.eval.data import Bench, DataConfig, load_bench
from replan.eval.generate import Todo, generate, read_done, start
from replan.types import Edit, EditRequest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def bench() -> Bench:
    return load_bench(DataConfig(limit=12))


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    bench_run.run(folder, bench)
    return files(folder)


def test_order_shards_and_workers_change_no_byte(bench: Bench, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    parts = [bench.items[1::3], bench.items[0::3][::-1], bench.items[2::3]]
    for part in parts:
        bench_run.run(tmp_path, Bench(tuple(part), ()), workers=1)
    assert files(tmp_path) == undisturbed
    other = tmp_path.with_name("workers")
    bench_run.run(other, bench, pause=0.005, workers=5)
    assert files(other) == undisturbed


def test_seed_is_base_plus_id(bench: Bench, tmp_path: Path) -> None:
    bench_run.run(tmp_path, bench)
    assert [read_done(tmp_path, item.id)["seed"] for item in bench.items] == [42 + item.id for item in bench.items]  # type: ignore[index]


def test_failures_are_recorded_and_tried_again(bench: Bench, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    broken = {bench.items[3].instruction}

    def edit(request: EditRequest) -> Edit:
        if request.instruction in broken:
            raise PlannerError("the planner's server does not answer")
        return bench_run.edit(request)

    todo = Todo(edit, bench_run.SETTINGS, 42)
    for tries in (1, 2):
        made = {one.id: one for one in generate(bench.items, tmp_path, todo)}
        assert made[3].status == "failed"
        failure = json.loads((tmp_path / "3" / "failed.json").read_text())
        assert (failure["error"], failure["tries"]) == ("the planner's server does not answer", tries)
        assert "Traceback" in failure["traceback"]
        assert read_done(tmp_path, 3) is None
    broken.clear()
    assert [one.status for one in generate(bench.items, tmp_path, todo)].count("done") == 1
    assert not (tmp_path / "3" / "failed.json").exists()
    made_files = files(tmp_path)
    assert made_files == {name: content for name, content in undisturbed.items() if name != "run.json"}


def test_what_no_item_can_be_made_without_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    def edit(request: EditRequest) -> Edit:
        raise BackboneError("weights cannot be loaded")

    def check() -> None:
        edit(EditRequest(bench.items[0].image(), "", 0))

    with pytest.raises(BackboneError, match="cannot be loaded"):
        list(generate(bench.items, tmp_path, Todo(edit, {}, 0, check=check)))
    assert [path.parent.name for path in tmp_path.glob("*/failed.json")] == ["0"]


def test_full_disk_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    def edit(request: EditRequest) -> Edit:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        list(generate(bench.items, tmp_path, Todo(edit, {}, 0)))


def test_a_damaged_result_is_made_again(bench: Bench, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    bench_run.run(tmp_path, bench)
    (tmp_path / "1" / "edit.json").write_text('{"half')
    (tmp_path / "2" / "final_result.png").unlink()
    assert bench_run.run(tmp_path, bench).count("done") == 2
    assert files(tmp_path) == undisturbed


def test_changed_item_is_made_again_and_other_settings_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench_run.run(tmp_path, bench)
    items = (replace(bench.items[0], instruction="something else"), *bench.items[1:])
    assert bench_run.run(tmp_path, Bench(items, ())) == ["done", *["skipped"] * 11]
    run = json.loads((tmp_path / "run.json").read_text())
    with pytest.raises(ConfigError, match=r"other settings \(edit.steps: None there, 20 now\)"):
        start(tmp_path, run | {"settings": {**run["settings"], "edit.steps": 20}})


def test_ctrl_c_keeps_what_is_done(bench: Bench, tmp_path: Path) -> None:
    seen = []

    def edit(request: EditRequest) -> Edit:
        seen.append(request.seed)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return bench_run.edit(request)

    with pytest.raises(KeyboardInterrupt):
        list(generate(bench.items, tmp_path, Todo(edit, bench_run.SETTINGS, 42)))
    assert sorted(int(path.parent.name) for path in tmp_path.glob("*/edit.json")) == [0, 1, 2]
    assert not list(tmp_path.glob("*/failed.json"))


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("gen_*.sh")), ids=lambda path: path.name)
def test_scripts_call_one_command(script: Path, tmp_path: Path) -> None:
    fake = tmp_path / "replan"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)

    def call(*words: str) -> list[str]:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run([script, *words], env=path, capture_output=True, text=True, check=True).stdout.split()

    verb, noun, name = call()
    assert (verb, noun) == ("eval", "generate")
    assert config.config_path(name).is_file()
    own = "configs/eval/mini_base.yaml"
    assert call(own, "seed=1") == ["eval", "generate", own, "seed=1"]
    assert call("seed=1") == ["eval", "generate", name, "seed=1"]


def test_methods_say_what_is_wrong() -> None:
    for words, told in (
        ({"method": "rephrase"}, "needs rewriter"),
        ({"workers": 0}, "workers = 0"),
        ({"methd": "replan"}, "did you mean method"),
    ):
        with pytest.raises(ConfigError, match=told):
            config.load(methods.GenerateConfig, {"output": "x", **words})


def test_generate_loads_no_torch_before_the_first_edit() -> None:
    code = "import sys, replan.eval.generate, replan.eval.data, replan.eval.score; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

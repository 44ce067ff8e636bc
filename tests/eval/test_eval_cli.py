"""`replan eval` from end to end, with a tiny editor and local judges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planner_server import serve
from test_bench_kill import ENV, files
from test_vlm_judge import score as answer
from typer.testing import CliRunner

from replan.cli import app
from replan.eval import shard
from replan.mini import rows


def replan(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    found = CliRunner().invoke(app, ["eval", *map(str, words)])
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good rows and a bad one."""
    path = rows.export(tmp_path_factory.mktemp("data"), "test", 3)
    path.write_text(path.read_text() + '{"image": "images/00000.png", "prompt": ""}\n')
    return path


def settings(flux_folder: Path, data: Path) -> list[str]:
    words = ["edit.steps=1", "runtime.device=cpu", "planner=answer", "preset=edit/mini"]
    return [f"backbone={flux_folder}", f"data.source={data}", *words]


def test_generate_score_report(flux_folder: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = ("generate", "eval/mini_exact", f"output={run}", *settings(flux_folder, data))
    code, out, told = replan(*call)
    assert (code, out.strip()) == (0, str(run)), told
    assert "data: row 3: extra_info: missing" in told
    assert "1 rows cannot be used, 3 can" in told
    assert "3 done, 0 were done before, 0 failed" in told
    assert "0 done, 3 were done before, 0 failed" in replan(*call)[2]
    code, _, told = replan(*call, "edit.steps=2")
    assert code != 0
    assert replan("score", run, "--judge", "mini")[0] == 0
    found = json.loads((run / "scores" / "mini.json").read_text())
    assert [len(item["ratings"]) for item in found["items"]] == [4, 4, 4]
    assert (run / "pixels.json").is_file()
    code, out, _ = replan("report", run)
    assert code == 0
    assert "| run | 3 | 3 | 3 | 1 | 100.0 % |" in out


def test_score_by_a_service(data: Path, flux_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert replan("generate", "eval/mini_exact", f"output={run}", *settings(flux_folder, data))[0] == 0
    with serve() as server:
        server.choose = lambda body: answer("openai", 5)
        words = ["--judge", f"{server.url}/v1#judge-1", "price_in=2", "price_out=10", "--cache", tmp_path / "cache"]
        code, _, told = replan("score", run, *words, "--estimate")
        assert code == 0
        assert "0 scores known, 12 to ask" in told
        assert "estimated: about 12 calls" in told
        assert server.asked == []
        code, _, told = replan("score", run, *words, "--no-pixels")
        assert code == 0
        # 12 x (1,000 in at 2, 50 out at 10 dollars a million)
        assert "spent: 12 calls, 12,000 tokens in, 600 out, 0.03 US dollars" in told
        assert "12 scores known, 0 to ask" in replan("score", run, *words, "--no-pixels")[2]
        assert len(server.asked) == 12
    assert replan("report", run)[1].count("5.00 [5.00, 5.00]") >= 6


def test_a_failed_item_makes_exit_1_and_is_tried_again(flux_folder: Path, tmp_path: Path) -> None:
    path = rows.export(tmp_path, "test", 2)
    picture = tmp_path / "images" / "00001.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])  # its header is sound
    call = ("generate", "eval/mini_exact", f"output={tmp_path / 'run'}", *settings(flux_folder, path))
    code, _, told = replan(*call)
    assert code == 1
    assert "failed: item 1: item 1: its picture is damaged" in told
    assert "1 done, 0 were done before, 1 failed" in told
    picture.write_bytes(whole)
    code, _, told = replan(*call)
    assert code == 0
    assert "1 done, 1 were done before, 0 failed" in told


def test_no_process_touches_a_run_with_other_settings(
    data: Path, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "eval/mini_exact", f"output={tmp_path}", *settings(flux_folder, data))
    assert replan(*call)[0] == 0
    before = files(tmp_path)
    monkeypatch.setattr(shard, "this_shard", lambda runtime: (shard.Shard(1, 2), runtime))
    code, _, told = replan(*call, "edit.steps=2")
    assert code != 0, told
    assert files(tmp_path) == before


@pytest.mark.slow
def test_an_item_that_fails_in_one_process_leaves_the_others_to_finish(flux_folder: Path, tmp_path: Path) -> None:
    path = rows.export(tmp_path, "test", 4)
    picture = tmp_path / "images" / "00000.png"
    picture.write_bytes(picture.read_bytes()[:500])  # process 0 fails at it at once, and has finished item 2 before
    words = ["eval", "generate", "eval/mini_exact", f"output={tmp_path / 'run'}", *settings(flux_folder, path)]
    call = [sys.executable, "-m", "replan", *words, "edit.steps=100", "processes=2"]
    for _ in range(2):
        for name in ("1", "3"):
            (tmp_path / "run" / name / "edit.json").unlink(missing_ok=True)
        found = subprocess.run(call, env=ENV | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert (found.returncode, "with exit code 1; the same command resumes" in found.stderr) == (1, True)
        assert sorted(path.parent.name for path in (tmp_path / "run").glob("*/edit.json")) == ["1", "2", "3"]


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(data: Path, flux_folder: Path, tmp_path: Path) -> None:
    made = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        words = ["eval", "generate", "eval/mini_exact", f"output={folder}", *settings(flux_folder, data)]
        call = [sys.executable, "-m", "replan", *words, f"processes={count}"]
        subprocess.run(call, env=ENV | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, cwd=os.getcwd())
        made.append({name: content for name, content in files(folder).items() if name != "run.json"})
    assert made[0] == made[1]

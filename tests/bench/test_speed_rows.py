"""The benchmark itself: it runs what it says, sides take turns, arithmetic is counted right, failures stay visible."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from replan.bench import plans
from replan.bench.flops import computed_pairs, step_flops
from replan.bench.loops import loop_rows
from replan.bench.measure import Plan, Row, Side, alternate
from replan.bench.model import Bench, Scene, boxes, build
from replan.bench.plans import plan_rows
from replan.bench.show import cells, markdown, tables
from replan.bench.sizes import TINY, shapes
from replan.bench.steps import STOCK, step_rows
from replan.bench.suite import Asked, run
from replan.cli import app
from replan.errors import ConfigError
from replan.types import Grid

ASSETS = Path(__file__).parents[2] / "assets"
CPU = torch.device("cpu")
HOW = Plan(CPU, 1, "wall", lambda line: None)
SCENE = Scene(2, 0.2)
SMALL = [replace(shape, tokens=12, main=16, padded=24, hint=8, steps=4) for shape in TINY]


@pytest.fixture(scope="module", params=SMALL, ids=lambda shape: shape.family)
def small(request: pytest.FixtureRequest) -> Bench:
    return build(request.param, CPU, torch.float32)


def by_name(rows: list[Row]) -> dict[str, Row]:
    assert [row.problem for row in rows] == [None] * len(rows)
    return {row.name: row for row in rows}


# arithmetic


def test_the_formula_counts_what_torch_counts(small: Bench) -> None:
    cond = small.conditioning(Scene(0, 0.0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small.stepper(cond).step(small.noise(), cond.sigmas[0], "full")
    counted, length = counter.get_total_flops(), cond.layout.length
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    blocks = small.shape.layers * 4.0 * length**2 * small.shape.width
    assert attention in (0, blocks)  # torch may not know the CPU's own kernel
    formula = step_flops(small.shape, length, length**2)
    assert formula == pytest.approx(counted + blocks - attention, rel=0.05)  # embedders and modulation are left out


def test_published_shapes_have_the_published_arithmetic() -> None:
    (kontext,), (qwen,) = shapes("kontext"), shapes("qwen-2511")
    assert step_flops(kontext, 8704, 8704**2) == pytest.approx(165.4e12, rel=0.001)
    assert step_flops(qwen, 8442, 8442**2) == pytest.approx(167.3e12, rel=0.001)


def test_boxes_and_their_halo_cover_the_area() -> None:
    for regions in (1, 2, 4):
        for area in (0.1, 0.2, 0.5):
            found = boxes(Scene(regions, area), Grid(64, 64), halo=1)
            covered = sum((box.width // 16 + 2) * (box.height // 16 + 2) for box in found)
            assert covered / 64**2 == pytest.approx(area, rel=0.08)
            for one, other in pairwise(found):
                assert one.right <= other.left


# steps, loops, plans


def test_every_step_is_right_and_ran_what_it_says(small: Bench) -> None:
    rows = by_name(step_rows(small, SCENE, HOW))
    assert len(rows) == 7
    assert next(iter(rows)) == STOCK
    for name, row in rows.items():
        assert row.ratio is not None
        assert row.rate is not None
        assert row.error is not None, name
        assert row.error <= (0.0 if "oracle" in name else 1e-5)
        assert (row.peak_bytes or 0) > 1e5, name
    layers = small.shape.layers
    assert list(rows[STOCK].kernels.values()) == [layers]
    assert "mask" not in str(rows[STOCK].kernels) + str(rows["masked step, cascade"].kernels)
    assert "mask" in str(rows["masked step, dense (the oracle)"].kernels)
    cached, region = rows["cached step (reference reused)"], rows["region step (background reused)"]
    assert (rows[STOCK].flops or 0) > (cached.flops or 0) > (region.flops or 0)
    if small.shape.family == "qwen":  # its reference tokens know neither noise nor noise level
        assert cached.more["error_after_one_step"] == 0.0


def test_a_step_by_another_executor_gets_no_figures(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from replan.backbones import stepper

    real = stepper.prepare
    monkeypatch.setattr(stepper, "prepare", lambda mask, executor, *rest: real(mask, "dense", *rest))
    found = {row.name: row for row in step_rows(small, SCENE, HOW)}
    assert found["masked step, dense (the oracle)"].problem is None
    for executor in ("flex", "cascade"):
        row = found[f"masked step, {executor}"]
        assert (row.problem, row.seconds) == ("not measured: ['dense'] ran", ())


def test_whole_edits(small: Bench) -> None:
    rows = by_name(loop_rows(small, SCENE, HOW))
    assert list(rows) == [
        "unmasked stock loop",
        *(f"masked loop, preset {name}" for name in ("exact", "cached", "fast")),
    ]
    stock, exact, cached, fast = rows.values()
    assert stock.error is not None
    assert stock.error <= 1e-5
    assert exact.error is not None
    assert exact.error <= 1e-5
    assert exact.more["steps"] == {"full": 4}
    assert (stock.flops or 0) > (cached.flops or 0)
    assert fast.more["steps"]["region"] > 0
    if small.shape.family == "qwen":
        assert cached.error is not None
        assert cached.error <= 1e-5


def test_other_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PLANS", 4)
    monkeypatch.setattr(plans.plans, "__defaults__", (4,))
    bench = build(replace(SMALL[0], tokens=20), CPU, torch.float32)  # long enough for the cascade
    switch, stock, full, region = plan_rows(bench, SCENE, 1.0, HOW)
    assert "CascadeMask" in switch.name
    assert 0 < switch.more["bytes"] <= 64 * 1024
    assert len(switch.seconds) == 4
    assert (switch.error, switch.peak_bytes is not None) == (0.0, True)
    for compiled in (stock, full, region):
        assert compiled.problem is None
        assert compiled.more["graphs"] > 0
        assert compiled.more["recompilations"] == 0
        assert compiled.error is not None
        assert compiled.error <= 1e-5
    assert (full.flops or 0) > (region.flops or 0) > 0


# the harness


def side(name: str, log: list[str], **more: Any) -> Side:
    return Side(name, lambda: lambda: log.append(name) or torch.zeros(1), **more)


def test_sides_take_turns_and_are_compared_within_a_round() -> None:
    log: list[str] = []
    sides = [side("a", log), side("b", log), side("c", log)]
    rows = alternate("g", sides, replace(HOW, repeats=3))
    assert log[:3] == ["a", "b", "c"]
    assert log[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    row = Row("g", "x", (1.0, 3.0, 2.0), (0.5, 1.0, 4.0), flops=10.0)
    assert (row.median, row.ratio, row.spread, row.rate) == (2.0, 1.0, 0.5, 5.0)
    assert rows[0].ratios == (1.0, 1.0, 1.0)


def test_a_failure_is_told_and_the_others_go_on() -> None:
    log: list[str] = []

    def broken() -> Any:
        raise RuntimeError("out of memory\nand more")

    rows = alternate("g", [side("a", log), Side("b", broken), side("c", log, check=lambda seen: "another kernel")], HOW)
    assert [row.problem for row in rows] == [
        None, "failed: RuntimeError: out of memory", "not measured: another kernel",
    ]  # fmt: skip
    assert [len(row.seconds) for row in rows] == [1, 0, 0]


def test_a_side_that_went_another_way_when_timed_gets_no_figures() -> None:
    runs: list[int] = []
    wanders = Side(
        "b", lambda: lambda: runs.append(0) or torch.zeros(1), check=lambda seen: "lost" if runs[1:] else None
    )
    rows = alternate("g", [side("a", []), wanders], HOW)
    assert [row.problem for row in rows] == [None, "not measured: lost"]


def test_dense_computes_all_pairs_and_the_cascade_only_visible_ones(small: Bench) -> None:
    from replan.attention import prepare
    from replan.mask import sort_tokens

    cond = small.conditioning(SCENE)
    mask = cond.masks[0][1]
    assert mask is not None
    length = cond.layout.length
    assert computed_pairs(prepare(mask, "dense", CPU), length, length) == length**2
    ordered = mask.take(sort_tokens(cond.layout, mask, 0).joint_S)
    assert computed_pairs(prepare(ordered, "cascade", CPU), length, length) == int(ordered.dense().sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "huge"}, "must be one of mini, tiny"), ({"area": 0.0}, "must lie in"), ({"regions": 0}, "1 or more"),
        ({"clock": "sun"}, "wall or cpu"), ({"parts": ("steps", "naps")}, "must be some of"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(Asked(**({"size": "tiny"} | changes)), lambda line: None)


def test_the_command(tmp_path: Path) -> None:
    words = ["bench", "--size", "mini", "--parts", "steps", "--repeats", "1", "--device", "cpu"]
    files = ["--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md")]
    result = CliRunner().invoke(app, [*words, *files], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "unmasked stock step" in result.stdout
    report = json.loads((tmp_path / "b.json").read_text())
    assert {"torch", "cpu", "cores", "date"} <= set(report["facts"])
    assert [row["problem"] for row in report["rows"]] == [None] * 7
    page = (tmp_path / "b.md").read_text()
    assert page == markdown(report, report["command"])
    assert page.count("\n| ") == 8
    assert CliRunner().invoke(app, ["bench", "--size", "huge"]).exit_code == 2


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.family)
def test_steps_and_edits_are_right_on_a_gpu(shape: Any) -> None:
    device = torch.device("cuda")
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        bench = build(shape, device, dtype)
        how = replace(HOW, device=device)
        for row in step_rows(bench, SCENE, how):
            assert row.problem is None, row
            assert row.error is None or row.error <= limit, row
        rows = by_name(loop_rows(bench, SCENE, how))
        assert (rows["masked loop, preset exact"].error or 0.0) <= 10 * limit
    for row in plan_rows(bench, SCENE, None, how):
        assert row.problem is None, row
        assert row.more.get("recompilations", 0) == 0, row
        assert row.error is not None
        assert row.error <= limit, row


def test_the_tables_can_be_read_on_eighty_columns() -> None:
    report = json.loads((ASSETS / "bench" / "tiny.json").read_bytes())
    console = Console(width=80, file=io.StringIO(), record=True)
    for table, _ in tables(report):
        console.print(table)
    shown = console.export_text()
    for row in report["rows"]:
        name, *figures = cells(row)
        assert any(all(figure in line for figure in figures) for line in shown.splitlines()), row["name"]
        assert name.split()[0] in shown

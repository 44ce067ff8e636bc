"""The maskless cascade against the dense matrix: many plans and rules, results, gradients, cost."""

from __future__ import annotations

import random

import pytest
import torch

import replan.attention as attention_module
from replan.attention import attend, executor_of, prepare
from replan.cascade import CascadeMask, plan_tiles
from replan.mask import RegionMask, TokenLayout, phases, sort_tokens
from replan.rules import MaskConfig, RulePhase
from replan.types import Box, Grid, Size

SIZE = Size(160, 120)
PLAIN = MaskConfig(expand=0.0, isolate=0.0)
RULES = (
    RulePhase(0.4, ("hint i: hint i, region i", "region i: main, hint i, region i"), base="local"),
    RulePhase(0.7, ("region 1: -region j, -hint j", "main: +hint *"), base="paper"),
    RulePhase(1.0, ("all: all",)),
)


def boxes(count: int, rng: random.Random) -> list[Box]:
    """Any boxes: overlaps, boxes in boxes, a box that covers all, one that is a single pixel."""
    found = []
    for _ in range(count):
        left, top = rng.randrange(SIZE.width - 1), rng.randrange(SIZE.height - 1)
        found.append(Box(left, top, rng.randrange(left + 1, SIZE.width + 1), rng.randrange(top + 1, SIZE.height + 1)))
    return found


def sorted_masks(seed: int) -> list[tuple[RegionMask, int, int]]:
    """(mask over sorted tokens, text and noise tokens, text and active tokens) of each phase of a random plan."""
    rng = random.Random(seed)
    count = rng.choice((1, 2, 2, 3, 4, 7))
    layout = TokenLayout(
        vision=rng.choice((0, 5)), main=rng.choice((0, 6)), hints=tuple(rng.randrange(1, 9) for _ in range(count)),
        noise=Grid(8, 6), refs=(Grid(8, 6),) if seed % 4 else (Grid(8, 6), Grid(3, 5)),
        hint_pads=() if seed % 2 else (1,) * count,
    )  # fmt: skip
    rules = RULES if count > 1 and seed % 3 == 0 else ()
    config = MaskConfig(
        expand=rng.choice((0.0, 0.2)), isolate=rng.choice((0.0, 0.5, 1.0)), mutual=rng.random() < 0.5,
        symmetric=rng.random() < 0.3, hide_main=rng.random() < 0.2, rules=rules,
    )  # fmt: skip
    planned = phases(layout, boxes(count, rng), SIZE, config, isolated_reference=rng.random() < 0.4)
    order = sort_tokens(layout, planned[0][1], halo=rng.randrange(3))
    cached, region = layout.noise_slice.stop, layout.text_length + order.active
    return [(mask.take(order.joint_S), cached, region) for _, mask in planned]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("seed", range(40))
def test_equals_dense_on_random_plans(seed: int) -> None:
    for mask, *fewer in sorted_masks(seed):
        query, key, value = (normal(2, mask.length, 2, 16, seed=seed + number) for number in range(3))
        for rows in (mask.length, *fewer):
            seen = mask.member_S[:rows] != 0  # padding has no result of its own
            dense = attend(query[:, :rows], key, value, mask, "dense")
            assert executor_of(prepare(mask, "cascade", "cpu", rows)) == "cascade"
            assert relative(attend(query[:, :rows], key, value, mask, "cascade")[:, seen], dense[:, seen]) <= 1e-5
            assert torch.isfinite(attend(query[:, :rows], key, value, mask, "cascade")).all()


@pytest.mark.parametrize("seed", range(12))
def test_gradients_equal_dense(seed: int) -> None:
    mask, cached, _ = sorted_masks(seed)[0]
    seen = mask.member_S[:cached] != 0
    grads = []
    for executor in ("dense", "cascade"):
        parts = [normal(1, mask.length, 2, 16, seed=number).requires_grad_() for number in range(3)]
        out = attend(parts[0][:, :cached], parts[1], parts[2], mask, executor)[:, seen]
        out.square().sum().backward()
        grads.append([part.grad for part in parts])
    for dense, cascade in zip(*grads, strict=True):
        assert relative(cascade, dense) <= 1e-5


def test_without_a_backward_kernel_gradients_come_from_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, *_ = sorted_masks(1)[0]
    monkeypatch.setattr(attention_module, "differentiable", lambda device: False)
    monkeypatch.setattr(attention_module, "cascade", lambda *parts: pytest.fail("a result without its gradient"))
    query = normal(1, mask.length, 2, 16, seed=0).requires_grad_()
    out = attend(query, query, query, prepare(mask, "cascade", "cpu"))
    seen = mask.member_S != 0
    assert torch.equal(out[:, seen], attend(query, query, query, mask, "dense")[:, seen])
    (gradient,) = torch.autograd.grad(out.square().sum(), query)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("seed", range(20))
def test_rectangles_cover_each_visible_pair_once(seed: int) -> None:
    for mask, *_ in sorted_masks(seed):
        plan = plan_tiles(mask, mask.length, limit=10_000)
        assert isinstance(plan, CascadeMask)
        covered = torch.zeros(mask.length, mask.length, dtype=torch.long)
        touched = torch.zeros(mask.length, dtype=torch.bool)
        for tile in plan.tiles:
            covered[slice(*tile.rows), slice(*tile.keys)] += 1
            assert [(tile.pieces[0][0], tile.pieces[-1][1])] == [tile.rows]
            for start, stop, merge in tile.pieces:
                assert touched[start:stop].all() if merge else not touched[start:stop].any()
            touched[slice(*tile.rows)] = True
        seen = mask.member_S != 0
        assert torch.equal(covered[seen], mask.dense().long()[seen])
        assert torch.equal(plan.dense("cpu")[seen], mask.dense()[seen])
        assert plan.dense("cpu").any(dim=1).all()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_plan_of_the_paper_is_a_few_calls(count: int) -> None:
    layout = TokenLayout(0, 512, (64,) * count, Grid(64, 64), (Grid(64, 64),), hint_pads=(3,) * count)
    side = 64 // count * 16
    apart = [Box(number * side, 64, (number + 1) * side - 16, 512) for number in range(count)]
    (_, mask), *_ = phases(layout, apart, Size(1024, 1024), PLAIN)
    plan = plan_tiles(mask.take(sort_tokens(layout, mask).joint_S), mask.length)
    assert plan is not None
    assert len(plan.tiles) == 3 * count + 2
    done = sum(tile.rows[1] - tile.rows[0] for tile in plan.tiles) / mask.length
    assert done <= 1.6, "most rows are done in one call"


def test_intricate_masks_are_left_to_the_other_executors() -> None:
    mask = sorted_masks(4)[0][0]
    mixed = mask.take(torch.randperm(mask.length, generator=torch.Generator().manual_seed(0)))
    assert plan_tiles(mixed, mixed.length, limit=20) is None
    query = normal(1, mask.length, 1, 8, seed=0)
    seen = mixed.member_S != 0
    slow, fast = (attend(query, query, query, mixed, executor)[:, seen] for executor in ("dense", "cascade"))
    assert relative(fast, slow) <= 1e-5  # asked for by name it still does it


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_dense_on_cuda(dtype: torch.dtype) -> None:
    for mask, cached, _ in sorted_masks(3):
        query, key, value = (normal(2, mask.length, 2, 64, seed=number).cuda().to(dtype) for number in range(3))
        seen = mask.member_S[:cached] != 0
        dense = attend(query[:, :cached], key, value, mask, "dense")[:, seen]
        got = attend(query[:, :cached], key, value, mask, "cascade")[:, seen]
        assert relative(got.float(), dense.float()) <= (1e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_one_graph_serves_every_plan_and_agrees() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=False)
    found = set()
    for seed in range(20):
        rng = random.Random(seed)
        layout = TokenLayout(0, 6, (4,) * 2, Grid(8, 6), (Grid(8, 6),))
        planned = phases(layout, boxes(2, rng), SIZE, PLAIN)
        mask = planned[0][1].take(sort_tokens(layout, planned[0][1]).joint_S)
        query, key, value = (normal(1, mask.length, 2, 8, seed=seed + number) for number in range(3))
        plan = prepare(mask, "cascade", "cpu")
        assert isinstance(plan, CascadeMask)
        found.add(len(plan.tiles))
        assert relative(compiled(query, key, value, plan), attend(query, key, value, mask, "dense")) <= 1e-5
    assert len(found) > 1
    assert counter.frame_count == 1

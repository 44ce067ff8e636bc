"""What another plan costs: time and bytes of its metadata, and compiled code that has to be made again."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replan.attention import Prepared, prepare
from replan.backbones.base import Conditioning
from replan.bench.measure import Plan, Row
from replan.bench.model import Bench, Scene
from replan.mask import TokenLayout, phases, sort_tokens
from replan.rules import MaskConfig
from replan.types import Box, Grid, Size

PLANS = 50


def plan_rows(bench: Bench, scene: Scene, step_seconds: float | None, how: Plan) -> list[Row]:
    """Switching among 50 plans with the same number of regions and tokens: the rest of an edit stays as it is."""
    group = f"{bench.shape.name}: another plan"
    how.say(f"{group}: {PLANS} plans")
    base, rules = bench.conditioning(scene), _rules(bench)
    seconds, sizes, kinds = [], [], set()
    for boxes in plans(bench.shape.tokens, scene.regions):
        prepared: list[Prepared] = []
        seconds.append(how.seconds(lambda boxes=boxes, into=prepared: into.extend(switch(bench, base, boxes, rules))))
        sizes.append(max(prepared_bytes(each) for each in prepared))
        kinds |= {type(each).__name__ for each in prepared}
    ratio = statistics.median(seconds) / step_seconds if step_seconds else None
    row = Row(
        group,
        f"plan switch and metadata ({', '.join(sorted(kinds))})",
        tuple(seconds),
        () if ratio is None else (ratio,),
        more={"bytes": max(sizes), "plans": PLANS},
    )
    return [row, _recompiled(bench, base, group, scene)]


def plans(tokens: int, regions: int, count: int = PLANS) -> Iterator[list[Box]]:
    """Random boxes, `regions` in each plan; the same ones every time."""
    draw = random.Random(0)
    for _ in range(count):
        found = []
        for _ in range(regions):
            width, height = (draw.randint(tokens // 8, tokens // 2) for _ in "xy")
            left, top = draw.randint(0, tokens - width), draw.randint(0, tokens - height)
            found.append(Box(left * 16, top * 16, (left + width) * 16, (top + height) * 16))
        yield found


def switch(bench: Bench, base: Conditioning, boxes: list[Box], rules: MaskConfig) -> list[Prepared]:
    """All that a plan's boxes decide before the first step: masks of all phases, sorted and made ready."""
    masks, order = _masks(base.layout, boxes, rules)
    return [prepare(mask.take(order.joint_S), "auto", bench.device) for mask in masks]


def _rules(bench: Bench) -> MaskConfig:
    from replan.backbones.base import EditConfig
    from replan.config import load

    return replace(load(EditConfig, bench.shape.settings).mask, expand=0.0)


def _masks(layout: TokenLayout, boxes: list[Box], rules: MaskConfig) -> Any:
    grid: Grid = layout.noise
    found = phases(layout, boxes, Size(grid.columns * 16, grid.rows * 16), rules)
    masks = [mask for _, mask in found]
    return masks, sort_tokens(layout, masks[0], 0)


def prepared_bytes(value: Any) -> int:
    """Bytes of everything in a prepared mask: tensors wherever they are, and eight for each Python number."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, bool | int | float):
        return 8
    if isinstance(value, tuple | list):
        return sum(prepared_bytes(each) for each in value)
    if is_dataclass(value):
        return sum(prepared_bytes(getattr(value, field.name)) for field in fields(value))
    if hasattr(value, "as_tuple"):  # a BlockMask
        return sum(prepared_bytes(each) for each in value.as_tuple() if isinstance(each, Tensor))
    return 0


def _recompiled(bench: Bench, base: Conditioning, group: str, scene: Scene) -> Row:
    """Masked steps of 50 plans with compiled blocks: graphs made after the first two plans."""
    from torch._dynamo.utils import counters

    # what is compiled again is decided before any code is made, so a CPU needs no compiler for this
    backend = "inductor" if bench.device.type == "cuda" else "eager"
    name = f"compiled blocks ({backend}), {PLANS} plans"
    torch._dynamo.reset()
    bench.transformer.compile_repeated_blocks(backend=backend)
    graphs, rules = [], _rules(bench)
    try:
        with torch.no_grad():
            for boxes in plans(bench.shape.tokens, scene.regions):
                masks, _ = _masks(base.layout, boxes, rules)
                cond = replace(base, masks=tuple((0.0, mask) for mask in masks[:1]))
                bench.stepper(cond).step(bench.noise(), base.sigmas[0], "full")
                graphs.append(counters["stats"]["unique_graphs"])
    except RuntimeError as failure:
        return Row(group, name, problem=f"failed: {str(failure).strip().splitlines()[0][:200]}")
    finally:
        torch._dynamo.reset()
    return Row(group, name, more={"recompilations": graphs[-1] - graphs[1], "graphs": graphs[1], "backend": backend})

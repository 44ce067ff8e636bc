"""What another plan costs: time and bytes of its metadata, and compiled code that has to be made again."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replan.attention import FlexMask, Prepared, prepare
from replan.backbones.base import Conditioning
from replan.backbones.runtime import GRAPHS
from replan.bench.flops import kind_flops, step_flops
from replan.bench.measure import Plan, Row, relative
from replan.bench.model import Bench, Scene
from replan.bench.watch import observe
from replan.cascade import CascadeMask
from replan.mask import RegionMask, TokenLayout, phases, sort_tokens
from replan.rules import MaskConfig
from replan.speed import Kind, load_speed
from replan.types import Box, Grid, Size

PLANS = 50


def plan_rows(bench: Bench, scene: Scene, step_seconds: float | None, how: Plan) -> list[Row]:
    """Switching among 50 plans with the same number of regions and tokens: the rest of an edit stays as it is."""
    group = f"{bench.shape.name}: another plan"
    how.say(f"{group}: {PLANS} plans")
    base, rules = bench.conditioning(scene), _rules(bench)
    row = _switched(bench, base, list(plans(bench.shape.tokens, scene.regions)), rules, how)
    ratio = statistics.median(row.seconds) / step_seconds if step_seconds else None
    compiled = [_compiled(bench, scene, preset, step_seconds, how) for preset in (None, "exact", "fast")]
    return [replace(each, group=group) for each in (replace(row, ratios=() if ratio is None else (ratio,)), *compiled)]


def _switched(bench: Bench, base: Conditioning, boxes: list[list[Box]], rules: MaskConfig, how: Plan) -> Row:
    """All plans in turn. The error, of three, is the share of pairs whose visibility is not the dense mask's."""
    seconds, sizes, kinds, wrong = [], [], set(), 0.0
    for number, each in enumerate(boxes):
        prepared: list[Prepared] = []
        seconds.append(how.seconds(lambda each=each, into=prepared: into.extend(switch(bench, base, each, rules))))
        masks, order = _masks(base.layout, each, rules)
        sizes.append(order.joint_S.nbytes + sum(map(prepared_bytes, prepared)))
        kinds |= {type(one).__name__ for one in prepared}
        if number < 3:
            ordered = [mask.take(order.joint_S) for mask in masks]
            wrong = max(wrong, *(_differs(one, mask) for one, mask in zip(prepared, ordered, strict=True)))

    def once() -> Tensor:
        switch(bench, base, boxes[0], rules)
        return torch.zeros(())

    seen = observe(once, bench.device)
    name = f"plan switch and metadata ({', '.join(sorted(kinds))})"
    more = {"bytes": max(sizes), "plans": len(boxes)}
    return Row("", name, tuple(seconds), flops=0.0, peak_bytes=seen.peak, error=wrong, more=more)


def _differs(prepared: Prepared, mask: RegionMask) -> float:
    """Share of (query, key) pairs that a prepared mask shows or hides against the dense one; padding does not count."""
    if isinstance(prepared, FlexMask):
        return 0.0  # its lists are compared, block by block, where its steps are
    seen = prepared.dense("cpu") if isinstance(prepared, CascadeMask) else prepared[0, 0].cpu()
    read = mask.member_S != 0
    wrong = (seen != mask.dense()) & read & read[:, None]
    return float(wrong.sum()) / wrong.numel()


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


def _masks(layout: TokenLayout, boxes: list[Box], rules: MaskConfig, *, isolated: bool = False) -> Any:
    grid: Grid = layout.noise
    size = Size(grid.columns * 16, grid.rows * 16)
    masks = [mask for _, mask in phases(layout, boxes, size, rules, isolated_reference=isolated)]
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


def _compiled(bench: Bench, scene: Scene, preset: str | None, step_seconds: float | None, how: Plan) -> Row:
    """Steps with blocks compiled as --compile does it; `preset` None is the stock editor."""
    # what is compiled again is decided before any code is made, so a CPU needs no compiler for this
    backend = "inductor" if bench.device.type == "cuda" else "eager"
    steps = {"exact": f"a full step of {PLANS} plans", "fast": f"a full and a region step of {PLANS} plans"}
    name = f"compiled blocks ({backend}), {'unmasked stock step' if preset is None else steps[preset]}"
    row = Row("", name, more={"backend": backend})
    torch._dynamo.reset()
    bench.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=GRAPHS):
            if preset is None:
                return _compiled_stock(bench, row, step_seconds, how)
            return _compiled_steps(bench, scene, preset, row, step_seconds, how)
    except RuntimeError as failure:
        return Row("", name, problem=f"failed: {str(failure).strip().splitlines()[0][:200]}")
    finally:
        for block in bench.transformer.modules():
            block._compiled_call_impl = None
        torch._dynamo.reset()


def _compiled_stock(bench: Bench, row: Row, step_seconds: float | None, how: Plan) -> Row:
    """`row` with the stock step. Its error is that against the same step as it is without compilation."""
    cond, noise, before = bench.conditioning(Scene(0, 0.0)), bench.noise(), _graphs()
    stepper, length = bench.stepper(cond), cond.layout.length
    out = stepper.step(noise, cond.sigmas[0], "full")
    graphs = _graphs() - before
    if graphs == 0:
        return replace(row, problem="not measured: nothing was compiled")
    seconds = tuple(
        how.seconds(lambda: stepper.step(noise, cond.sigmas[0], "full")) for _ in range(max(how.repeats, 3))
    )
    with torch.compiler.set_stance("force_eager"):
        error = relative(out, bench.stepper(cond).step(noise, cond.sigmas[0], "full"))
    return replace(
        row,
        seconds=seconds,
        ratios=tuple(took / step_seconds for took in seconds) if step_seconds else (),
        flops=step_flops(bench.shape, length, length * length),
        error=error,
        more={"recompilations": _graphs() - before - graphs, "graphs": graphs, **row.more},
    )


def _graphs() -> int:
    """How many graphs were made so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _compiled_steps(bench: Bench, scene: Scene, preset: str, row: Row, step_seconds: float | None, how: Plan) -> Row:
    """`row` with what 50 plans took, and the graphs made after those of the first plans.

    Its time is that of the last kind of step, its error that of the last plan. With `fast` the number of queried tokens
    differs from plan to plan: the second plan makes the general graphs.
    """
    base, rules = bench.conditioning(scene, load_speed(preset)), _rules(bench)
    kinds: tuple[Kind, ...] = ("full",) if preset == "exact" else ("full", "region")
    noise, sigma, graphs, seconds = bench.noise(), base.sigmas[0], [], []
    before, cond, stepper, took = _graphs(), base, bench.stepper(base), 0.0
    out: list[Tensor] = []
    for boxes in plans(bench.shape.tokens, scene.regions):
        masks, _ = _masks(base.layout, boxes, rules, isolated=bool(base.speed.isolate_reference))
        cond = replace(base, masks=((0.0, masks[0]),))
        stepper, out = bench.stepper(cond), []
        for kind in kinds:
            took = how.seconds(lambda stepper=stepper, kind=kind, out=out: out.append(stepper.step(noise, sigma, kind)))
        seconds.append(took)
        graphs.append(_graphs() - before)
    first = len(kinds) - 1
    if graphs[first] == 0:
        return replace(row, problem="not measured: nothing was compiled")
    with torch.compiler.set_stance("force_eager"):
        error = relative(out[-1], bench.stepper(cond, "dense").step(noise, sigma, "full"))
    calm = tuple(seconds[first + 1 :])
    more = {"recompilations": graphs[-1] - graphs[first], "graphs": graphs[first], **row.more}
    return replace(
        row,
        seconds=calm,
        ratios=tuple(took / step_seconds for took in calm) if step_seconds else (),
        flops=kind_flops(bench, stepper, cond, kinds[-1]),
        error=error,
        more=more | {"executors": sorted(stepper.executors)},
    )

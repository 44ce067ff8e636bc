"""Single steps: stock, masked by every executor, as the original does it, cached, and on the regions only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from replan.backbones.base import Conditioning
from replan.backbones.stepper import Query, Stepper
from replan.bench.flops import kind_flops, step_flops
from replan.bench.measure import Plan, Row, Side, alternate, relative
from replan.bench.model import Bench, Scene
from replan.bench.watch import Seen
from replan.processors import Step, region_attention
from replan.speed import EXACT, Kind, SpeedConfig, load_speed

STOCK = "unmasked stock step"
EXECUTORS = ("dense", "flex", "cascade")


def step_rows(bench: Bench, scene: Scene, how: Plan) -> list[Row]:
    """One forward of one prompt each, all with the same noise; the stock step comes first and is the measure."""
    sides = [_stock(bench), *(_masked(bench, scene, name) for name in EXECUTORS), _original(bench, scene)]
    sides.append(_reusing(bench, scene, load_speed("cached"), "cached"))
    sides.append(_reusing(bench, scene, load_speed("fast"), "region"))
    return alternate(f"{bench.shape.name}: one step", sides, how)


@dataclass(slots=True)
class Made:
    """What a side has prepared, kept for the questions that come after the run."""

    stepper: Stepper | None = None
    cond: Conditioning | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def _stock(bench: Bench) -> Side:
    made = Made()

    def prepare() -> Callable[[], Tensor]:
        cond = bench.conditioning(Scene(0, 0.0))
        made.stepper, made.cond = bench.stepper(cond), cond
        return _runner(made.stepper, bench.noise(), cond.sigmas[0], "full")

    def flops() -> float:
        assert made.cond is not None
        length = made.cond.layout.length
        return step_flops(bench.shape, length, length * length)

    def check(seen: Seen) -> str | None:
        assert made.stepper is not None
        masked = [name for name in seen.kernels if "mask" in name]
        return (
            f"ran with a mask: {masked + sorted(made.stepper.executors)}" if masked or made.stepper.executors else None
        )

    def error(output: Tensor) -> float:
        """Against a dense mask that hides nothing."""
        cond, length = bench.conditioning(Scene(0, 0.0)), bench.shape.main + 2 * bench.shape.tokens**2
        return relative(output, _dense_run(bench, cond, torch.ones(1, 1, length, length, dtype=torch.bool))())

    return Side(STOCK, prepare, flops, check, error, lambda: {"tokens": made.cond.layout.length if made.cond else 0})


def _masked(bench: Bench, scene: Scene, executor: str) -> Side:
    made = Made()

    def prepare() -> Callable[[], Tensor]:
        made.cond = bench.conditioning(scene)
        made.stepper = bench.stepper(made.cond, executor)
        return _runner(made.stepper, bench.noise(), made.cond.sigmas[0], "full")

    def error(output: Tensor) -> float:
        return relative(output, oracle(bench, scene, EXACT, "full"))

    compiled = executor != "flex" or bench.device.type == "cuda"
    return Side(
        f"masked step, {executor}" + (" (the oracle)" if executor == "dense" else ""),
        prepare,
        lambda: _flops(bench, made, "full"),
        lambda seen: _ran(made, executor, seen, bench.device),
        error,
        lambda: {} if compiled else {"not compiled": "no kernel of its own on this device"},
        operators=compiled,
    )


def _original(bench: Bench, scene: Scene) -> Side:
    """Hints padded like a prompt, and a bool mask for every head of its own, through SDPA."""
    made, shape = Made(), bench.shape
    heads = shape.config["num_attention_heads"]

    def prepare() -> Callable[[], Tensor]:
        cond = bench.conditioning(scene, hint=shape.padded)
        made.cond = cond
        mask = cond.mask(float(cond.sigmas[0]))
        assert mask is not None
        dense = mask.to(bench.device).dense()[None, None].expand(1, heads, -1, -1).contiguous()
        made.notes["mask_bytes"] = dense.numel()
        return _dense_run(bench, cond, dense)

    def flops() -> float:
        assert made.cond is not None
        length = made.cond.layout.length
        return step_flops(shape, length, length * length)

    def error(output: Tensor) -> float:
        return relative(output, oracle(bench, scene, EXACT, "full", hint=shape.padded))

    def check(seen: Seen) -> str | None:
        watched = bench.device.type != "cuda" and not any("mask" in name for name in seen.kernels)
        return f"no kernel got a mask: {dict(seen.kernels)}" if watched else None

    name = f"the original's form: hints of {shape.padded}, mask [1, {heads}, N, N]"
    return Side(name, prepare, flops, check, error, lambda: made.notes)


def _dense_run(bench: Bench, cond: Conditioning, dense: Tensor) -> Callable[[], Tensor]:
    """The first step over tokens in the model's own order, with a bool mask [1, 1 or H, N, N]."""
    noise, dense = bench.noise(), dense.to(bench.device)
    hidden = torch.cat([noise, cond.tensors["reference"]], dim=1)
    text_T, image_Q = (torch.arange(count, device=bench.device) for count in (cond.layout.text_length, hidden.shape[1]))

    def run() -> Tensor:
        with region_attention(bench.transformer), bench.transformer.cache_context("cond"):
            query = Query(hidden, cond.tensors["text"], noise.shape[1], text_T, image_Q, Step(dense))
            return bench.backbone._forward(query, cond.sigmas[0], cond)[:, : noise.shape[1]]

    return run


def _reusing(bench: Bench, scene: Scene, speed: SpeedConfig, kind: Kind) -> Side:
    """A step that takes keys and values from the full step before it."""
    made = Made()

    def prepare() -> Callable[[], Tensor]:
        cond = bench.conditioning(scene, speed)
        made.stepper, made.cond = bench.stepper(cond), cond
        noise, sigma = bench.noise(), cond.sigmas[1]
        exact = oracle(bench, scene, speed, "full")
        made.stepper.step(noise, cond.sigmas[0], "full")
        stale = made.stepper.step(noise, sigma, kind)
        made.notes["error_after_one_step"] = relative(stale, exact)
        made.notes["active_share"] = round((made.stepper.active or 0) / noise.shape[1], 3)
        made.stepper.step(noise, sigma, "full")  # now the same noise level: only the bookkeeping is tested
        return _runner(made.stepper, noise, sigma, kind)

    def error(output: Tensor) -> float:
        return relative(output, oracle(bench, scene, speed, "full"))

    def check(seen: Seen) -> str | None:
        assert made.stepper is not None
        ran = made.stepper.taken[-1]
        if ran != kind:
            return f"a {ran} step ran"
        return _unmasked(seen) if made.stepper.executors == {"cascade"} else None

    name = "cached step (reference reused)" if kind == "cached" else "region step (background reused)"
    return Side(name, prepare, lambda: _flops(bench, made, kind), check, error, lambda: {**made.notes, **_ways(made)})


def oracle(bench: Bench, scene: Scene, speed: SpeedConfig, kind: Kind, hint: int | None = None) -> Tensor:
    """The same step by the dense executor; with reuse allowed, at the second noise level and everything computed."""
    cond = bench.conditioning(scene, speed, hint=hint)
    level = cond.sigmas[0 if speed.cache == "none" else 1]
    return bench.stepper(cond, "dense").step(bench.noise(), level, kind)


def _runner(stepper: Stepper, noise: Tensor, sigma: Tensor, kind: Kind) -> Callable[[], Tensor]:
    return lambda: stepper.step(noise, sigma, kind)


def _ways(made: Made) -> dict[str, Any]:
    return {"executors": sorted(made.stepper.executors)} if made.stepper is not None else {}


def _ran(made: Made, executor: str, seen: Seen, device: torch.device) -> str | None:
    """What ran instead of `executor`, or None."""
    assert made.stepper is not None
    if made.stepper.executors != {executor}:
        return f"{sorted(made.stepper.executors)} ran"
    if executor == "flex" and device.type == "cuda" and "flex_attention" not in seen.kernels:
        return f"no compiled FlexAttention kernel ran: {list(seen.kernels)}"
    return _unmasked(seen) if executor == "cascade" else None


def _unmasked(seen: Seen) -> str | None:
    """What ran that the cascade must not run."""
    wrong = [name for name in seen.kernels if "mask" in name or "math" in name]
    return f"a masked or unfused kernel ran: {wrong}" if wrong else None


def _flops(bench: Bench, made: Made, kind: Kind) -> float:
    assert made.stepper is not None
    assert made.cond is not None
    return kind_flops(bench, made.stepper, made.cond, kind)

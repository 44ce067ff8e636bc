"""Whole edits: the stock loop without regions beside ours in each preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replan.backbones.base import Conditioning
from replan.backbones.stepper import Stepper
from replan.bench.flops import computed_pairs, step_flops
from replan.bench.measure import Plan, Row, Say, Side, alternate
from replan.bench.model import Bench, Scene
from replan.bench.watch import Seen
from replan.denoise import sample
from replan.mask import RegionMask
from replan.speed import EXACT, load_speed

PRESETS = ("exact", "cached", "fast")


def loop_rows(bench: Bench, scene: Scene, how: Plan) -> list[Row]:
    """`shape.steps` steps, with classifier-free guidance where the model is used with it."""
    shape = bench.shape
    guided = " x guidance" if shape.guided else ""
    group = f"{shape.name}: whole edit, {shape.steps} steps{guided}"
    loops = [Loop(bench, scene, preset) for preset in (None, *PRESETS)]
    return alternate(group, [loop.side(how.say) for loop in loops], how)


@dataclass(slots=True)
class Loop:
    """One whole edit; `preset` None is the stock editor."""

    bench: Bench
    scene: Scene
    preset: str | None
    cond: Conditioning | None = None
    stepper: Stepper | None = None

    def side(self, say: Say) -> Side:
        name = "unmasked stock loop" if self.preset is None else f"masked loop, preset {self.preset}"

        def error(output: Tensor) -> float:
            say(f"{name}: the oracle")
            return distance(output, self.oracle())

        return Side(name, self.prepare, self.flops, self.check, error, self.more)

    def oracle(self) -> Tensor:
        """The same rules with dense masks and every step in full: what is left is what reuse changes.

        The stock loop is held against a dense mask that hides nothing.
        """
        cond = self.cond
        assert cond is not None
        if self.preset is None:
            ones_S = torch.ones(cond.layout.length, dtype=torch.int64)
            cond = replace(cond, masks=((0.0, RegionMask(ones_S, ones_S)),))
        stepper = self.bench.stepper(cond, "dense")
        return sample(lambda x, sigma: stepper.step(x, sigma, "full"), self.bench.noise(), cond.sigmas)

    def prepare(self) -> Callable[[], Tensor]:
        bench = self.bench
        scene = Scene(0, 0.0) if self.preset is None else self.scene
        speed = EXACT if self.preset is None else load_speed(self.preset)
        self.cond = bench.conditioning(scene, speed, guided=bench.shape.guided)
        noise = bench.noise()

        def run() -> Tensor:
            assert self.cond is not None
            self.stepper = bench.stepper(self.cond)  # one per run: caches, sorted tokens and masks are made anew
            return sample(self.stepper, noise, self.cond.sigmas)

        return run

    def check(self, seen: Seen) -> str | None:
        assert self.stepper is not None
        if tuple(self.stepper.taken) != self.stepper.kinds:
            return f"steps {self.stepper.taken} were taken instead of {list(self.stepper.kinds)}"
        if self.preset is None and self.stepper.executors:
            return f"{sorted(self.stepper.executors)} ran in the stock loop"
        return None

    def flops(self) -> float:
        stepper, cond = self.stepper, self.cond
        assert stepper is not None
        assert cond is not None
        branches = [stepper._positive] if stepper._negative is None else [stepper._positive, stepper._negative]
        negative = [cond] if cond.negative is None else [cond, cond.negative]
        lent = stepper._shares_reference
        total = 0.0
        for number, (branch, own) in enumerate(zip(branches, negative, strict=True)):
            length, text, noise = own.layout.length, own.layout.text_length, self.bench.shape.tokens**2
            for kind in stepper.taken:
                kind = "cached" if number and lent and kind == "full" else kind
                queries = {"full": length, "cached": text + noise, "region": text + (stepper.active or 0)}[kind]
                prepared = next((found for (_, mine), found in branch.prepared.items() if mine == kind), None)
                total += step_flops(self.bench.shape, queries, computed_pairs(prepared, queries, length))
        return total

    def more(self) -> dict[str, Any]:
        stepper = self.stepper
        if stepper is None:
            return {}
        kinds: Sequence[str] = stepper.taken
        steps = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        share = (stepper.active or 0) / self.bench.shape.tokens**2
        return {"steps": steps, "executors": sorted(stepper.executors), "active_share": round(share, 3)}


def distance(output: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference over that of the oracle."""
    return float(torch.linalg.vector_norm(output.float() - oracle.float()) / torch.linalg.vector_norm(oracle.float()))

"""A planner and a backbone without weights: quick, deterministic, and their results show what they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from replan.backbones.base import Conditioning, EditConfig, generators
from replan.errors import PlanError, PlannerError
from replan.mask import TokenLayout
from replan.planner import Outcome
from replan.types import Box, EditRequest, Grid, Plan, Region, Size


class FakePlanner:
    """Plans the left half of any picture. "nonsense" as instruction is a bad answer, "outage" a failure."""

    def __init__(self) -> None:
        self.requests: list[EditRequest] = []

    def __call__(self, request: EditRequest) -> Plan:
        self.requests.append(request)
        if "nonsense" in request.instruction:
            raise PlanError("no tags in the answer")
        if "outage" in request.instruction:
            raise PlannerError("the planner's server does not answer")
        size = Size(*request.image.size)
        region = Region(Box(0, 0, max(1, size.width // 2), size.height), request.instruction)
        return Plan("the left half is meant", "keep the rest", (region,), size, ("made up",), "<think>raw</think>")

    def plan_many(self, requests: Sequence[EditRequest], *, sampled: bool = False) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                plan = self(request)
            except (PlanError, PlannerError) as error:
                outcomes.append(error)
                continue
            hint = f"{plan.regions[0].hint} {request.seed}" if sampled else plan.regions[0].hint
            outcomes.append(with_hint(plan, hint))
        return outcomes


class FakeBackbone:
    """Fills the boxes (the whole picture without any) with a colour that depends on seed, steps, prompt and hints.

    `before(request)` is called first of all, so that a test can raise at a chosen item.
    """

    def __init__(self, before: Callable[[EditRequest], Any] | None = None) -> None:
        self.before = before or (lambda request: None)
        self.requests: list[EditRequest] = []
        self.plans: list[Plan | None] = []

    def condition(self, request: EditRequest, plan: Plan | None, config: EditConfig) -> Conditioning:
        self.before(request)
        self.requests.append(request)
        self.plans.append(plan)
        self.now = (request, plan, config)
        regions = plan.regions if plan else ()
        layout = TokenLayout(0, 4, (2,) * len(regions), Grid(4, 4), (Grid(4, 4),))
        return Conditioning(
            tensors={},
            sigmas=torch.linspace(1, 0, config.steps + 1),
            layout=layout,
            source=Size(*request.image.size),
            seeds=(request.seed,),
        )

    def noise(self, cond: Conditioning) -> Tensor:
        return torch.cat([torch.randn(1, 16, 4, generator=generator) for generator in generators(cond.seeds)])

    def velocity(self, cond: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, sigma: 0.5 * x

    def decode(self, latent: Tensor, cond: Conditioning) -> Image.Image:
        request, plan, _ = self.now
        words = "|".join([plan.prompt, *(region.hint for region in plan.regions)]) if plan else request.instruction
        red, green = (int(value) for value in (latent.flatten()[:2].sigmoid() * 255))
        image = request.image.copy()
        boxes = [region.box for region in plan.regions] if plan and plan.regions else [Box(0, 0, *image.size)]
        for box in boxes:
            corners = (box.left, box.top, box.right - 1, box.bottom - 1)
            ImageDraw.Draw(image).rectangle(corners, fill=(red, green, sum(words.encode()) % 256))
        return image


def picture(width: int = 32, height: int = 24) -> Image.Image:
    """A small picture in which every pixel is different from its neighbours."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 7 % 256, y * 11 % 256, (x + y) * 5 % 256) for y in range(height) for x in range(width)])
    return image


def plan_for(image: Image.Image, hint: str = "a red cup") -> Plan:
    """A plan with one region for a picture."""
    size = Size(*image.size)
    return Plan("", "keep the rest", (Region(Box(2, 2, size.width - 2, size.height - 2), hint),), size)


def with_hint(plan: Plan, hint: str) -> Plan:
    """The same plan with another hint in its first region."""
    return replace(plan, regions=(replace(plan.regions[0], hint=hint), *plan.regions[1:]))

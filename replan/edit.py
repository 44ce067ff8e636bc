"""The editor: plan, condition, sample, decode; nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from replan.backbones import Backbone, Conditioning, EditConfig, Runtime, default_config, load_backbone
from replan.backbones.runtime import move
from replan.background import paste_background
from replan.errors import ConfigError, PlanError, ReplanError
from replan.plan import AnswerError
from replan.types import Edit, EditRequest, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from replan.planner import Planner, PlannerConfig

__all__ = ["Editor", "OnStep", "Runtime"]

T = TypeVar("T")
Preview = Callable[[], "Image"]
OnStep = Callable[[int, int, Preview], bool | None]
log = logging.getLogger(__name__)
BESIDE = "made in one batch with others: a few pixels may differ by rounding from the same request alone"


class Editor:
    """Turns requests into edits. Planner and backbone load when first used; a request with a plan needs no planner."""

    def __init__(self, planner: Planner | None, backbone: Backbone, config: EditConfig) -> None:
        self.config = config
        self._planner: _Lazy[Planner | None] = _Lazy(lambda: planner)
        self._backbone: _Lazy[Backbone] = _Lazy(lambda: backbone)
        self._runtime = Runtime()

    @classmethod
    def load(
        cls,
        backbone: str = "mini",
        planner: str | None = "mini",
        *,
        config: EditConfig | None = None,
        runtime: Runtime | None = None,
        planner_config: PlannerConfig | None = None,
    ) -> Editor:
        """By name, folder or hub id; `planner=None` plans nothing. Nothing is loaded before it is used.

        Raises ConfigError for an unknown backbone; the first use raises BackboneError or PlannerError.
        """
        where = runtime or Runtime()
        editor = cls.__new__(cls)
        editor.config = config or default_config(backbone)
        editor._planner = _Lazy(lambda: None if planner is None else _load_planner(planner, planner_config, where))
        editor._backbone = _Lazy(lambda: load_backbone(backbone, where))
        editor._runtime = where
        return editor

    @property
    def planner(self) -> Planner | None:
        return self._planner.get()

    @property
    def backbone(self) -> Backbone:
        return self._backbone.get()

    def plan(self, request: EditRequest) -> Plan:
        """The request's own plan, or the planner's, in the picture's pixels.

        Raises PlanError when the planner's answer cannot be used, PlannerError when the planner itself failed.
        """
        size = Size(*request.image.size)
        if request.plan is not None:
            return request.plan.to(size)
        if self.planner is None:
            raise ConfigError("this editor has no planner: give the request a plan, or load it with planner='mini'")
        return self.planner(request).to(size)

    def __call__(self, request: EditRequest, on_step: OnStep | None = None, *, strict: bool = False) -> Edit:
        """Plan and edit. A plan that cannot be used falls back to the bare instruction, and a note says so.

        `on_step(step, total, preview)` is called after each step; `preview()` decodes the present state; when it
        returns False, Cancelled is raised. With `strict`, PlanError is raised instead of falling back.
        """
        return self._run(request, 1, on_step, strict=strict)[0]

    def baseline(self, request: EditRequest, on_step: OnStep | None = None) -> Edit:
        """The stock editor with the bare instruction: no plan, no regions."""
        return self._run(request, 1, on_step, bare=True)[0]

    def candidates(
        self, request: EditRequest, count: int, on_step: OnStep | None = None, *, strict: bool = False
    ) -> list[Edit]:
        """`count` edits by one plan with the seeds request.seed, +1, ...; made in one batched forward per step."""
        return self._run(request, count, on_step, strict=strict)

    def together(
        self,
        requests: Sequence[EditRequest],
        on_step: OnStep | None = None,
        *,
        strict: bool = False,
        bare: bool = False,
    ) -> list[Edit | ReplanError]:
        """One edit of each request; those that fit (`backbones.stack`) share a batched forward per step.

        An error stands in the place of its own edit and leaves the others alone; when `on_step` stops a forward,
        Cancelled is raised. Beside others a few pixels may come out different by rounding, and a note says so; a
        request alone gives the very bytes of a call.
        """
        from replan.backbones.stack import stack

        found: list[Edit | ReplanError] = []
        groups: list[list[tuple[int, _Prepared]]] = []
        for number, request in enumerate(requests):
            try:
                prepared = self._prepare(request, strict=strict, bare=bare)
            except ReplanError as error:
                found.append(error)
                continue
            found.append(ReplanError("not edited"))  # replaced below
            for group in groups:
                if stack([*(other.cond for _, other in group), prepared.cond]) is not None:
                    group.append((number, prepared))
                    break
            else:
                groups.append([(number, prepared)])
        for group in groups:
            cond = stack([prepared.cond for _, prepared in group])
            assert cond is not None
            clock = group[0][1].clock
            latents = self._sample(cond, on_step, clock)
            for (number, prepared), latent in zip(group, latents, strict=True):
                prepared.clock.seconds["sample"] = clock.seconds["sample"]
                edit = self._finish(prepared, latent, prepared.request.seed)
                found[number] = edit if len(group) == 1 else replace(edit, notes=(*edit.notes, BESIDE))
        return found

    def _run(
        self, request: EditRequest, count: int, on_step: OnStep | None, *, strict: bool = False, bare: bool = False
    ) -> list[Edit]:
        if count < 1:
            raise ConfigError(f"candidates = {count}: must be 1 or more")
        prepared = self._prepare(request, strict=strict, bare=bare)
        seeds = tuple(request.seed + number for number in range(count))
        latents = self._sample(replace(prepared.cond, seeds=seeds), on_step, prepared.clock)
        edits = [self._finish(prepared, latent, seed) for seed, latent in zip(seeds, latents, strict=True)]
        return [replace(edit, timings=dict(prepared.clock.seconds)) for edit in edits]

    def _prepare(self, request: EditRequest, *, strict: bool, bare: bool) -> _Prepared:
        """Plan and condition."""
        clock = _Clock()
        plan, notes = None, ()
        if not bare:
            if request.plan is None:
                with clock("load"):
                    self._bring(self._planner, leaves=self._backbone)
            with clock("plan"):
                plan, notes = self._planned(request, strict)
        with clock("load"):
            self._bring(self._backbone, leaves=self._planner)
        with clock("condition"):
            cond = self.backbone.condition(request, plan, self.config)
        return _Prepared(request, plan, (*notes, *cond.notes), cond, clock)

    def _sample(self, cond: Conditioning, on_step: OnStep | None, clock: _Clock) -> Tensor:
        """Clean latents [len(cond.seeds), P, C]."""
        from replan.denoise import sample

        with clock("load"):
            self._bring(self._backbone, leaves=self._planner)
        backbone = self.backbone
        with clock("sample"):
            report = None if on_step is None else _previewed(on_step, lambda x: backbone.decode(x[:1], cond))
            return sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas, report)

    def _finish(self, prepared: _Prepared, latent: Tensor, seed: int) -> Edit:
        """Decode one latent [P, C]."""
        request, plan, clock = prepared.request, prepared.plan, prepared.clock
        with clock("decode"):
            image = self.backbone.decode(latent[None], prepared.cond)
            if self.config.keep_background and plan is not None and plan.regions:
                size = Size(*request.image.size)
                boxes = [region.box.expand(self.config.mask.expand, size) for region in plan.regions]
                image = paste_background(request.image, image, boxes)
        return Edit(replace(request, seed=seed), plan, image, prepared.notes, dict(clock.seconds))

    def _bring(self, comes: _Lazy[Any], leaves: _Lazy[Any]) -> None:
        """Load a model. With offload the other one leaves the device before, and comes back by the same call."""
        offload = self._runtime.offload
        # with the other kinds of offload hooks move the backbone's parts, and nobody else may
        movable = {"none": (), "stages": (self._planner, self._backbone)}.get(offload, (self._planner,))
        if leaves.made and leaves in movable:
            move(leaves.get(), "cpu")
        if comes.made and comes in movable:
            move(comes.get(), self._runtime.torch_device())
        comes.get()

    def _planned(self, request: EditRequest, strict: bool) -> tuple[Plan, tuple[str, ...]]:
        """The plan and the notes about it; on PlanError the instruction becomes the whole plan."""
        try:
            plan = self.plan(request)
        except PlanError as error:
            if strict or request.plan is not None:
                raise
            note = f"planning failed, the whole picture is edited by the bare instruction: {error}"
            log.warning(note)
            raw = error.raw if isinstance(error, AnswerError) else ""
            return Plan("", request.instruction, (), Size(*request.image.size), (note,), raw), (note,)
        for note in plan.notes:
            log.info("plan: %s", note)
        return plan, plan.notes


def _load_planner(spec: str, config: PlannerConfig | None, runtime: Runtime) -> Planner:
    from replan.planner import PlannerConfig, load_planner

    config = config or PlannerConfig()
    if config.cache == "auto" and runtime.compile:
        config = replace(config, cache="static")
    return load_planner(spec, config, runtime.torch_device(), runtime.torch_dtype())


def _previewed(on_step: OnStep, decode: Callable[[Any], Image]) -> Callable[[int, int, Any], bool | None]:
    """The sampler's callback: a latent becomes a picture only when the caller asks for it."""
    return lambda step, total, estimate: on_step(step, total, lambda: decode(estimate))


class _Lazy(Generic[T]):
    """A value made once, when first asked for, by one thread."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock, self.made = make, threading.Lock(), False

    def get(self) -> T:
        with self._lock:
            if not self.made:
                self._value, self.made = self._make(), True
            return self._value


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request on its way, before the first step."""

    request: EditRequest
    plan: Plan | None
    notes: tuple[str, ...]
    cond: Conditioning
    clock: _Clock


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
